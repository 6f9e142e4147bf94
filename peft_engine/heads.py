"""The output head of a language model, joined with its loss: logits are formed only when read.

    model(input_ids=..., labels=...).loss    linear_cross_entropy over the labelled rows
    model(input_ids=..., labels=...).logits  stands for hidden W^T, computed by the first operation on it

On an attached model (the instance alone is changed) a hook notes that labels were given; the head, whose
class is then FusedHeadLinear, answers with LazyLogits in place of logits. The model's loss function is set
to one that recognises them; where its forward calls nn.CrossEntropyLoss instead (T5, BART), torch's
cross_entropy of LazyLogits is ours. Whatever else is done with them yields the real logits, with gradients.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

from peft_engine import dense
from peft_engine.conv1d import plain
from peft_engine.dispatch import BackendError
from peft_engine.lazy_logits import LazyLogits, lazy_cross_entropy
from peft_engine.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY, LinearCrossEntropyCall
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import DTYPES
from peft_engine.report import LayerReport

OP = "linear_cross_entropy"


_FEW_ROWS = 4


class FusedHeadLinear(nn.Linear):
    """An output head that leaves its product to the loss when its model was called with labels.

    Without labels its product is dense.linear's, or, of few rows that ask for no gradient, lora_linear's.
    """

    labels_given: bool
    labels_position: int  # of `labels` among the arguments of the model's forward

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        lazy, self.labels_given = self.labels_given, False
        if torch.compiler.is_compiling():
            return dense.linear(input, self.weight, self.bias)
        if lazy and not input.is_meta:
            return LazyLogits.of(input, self.weight, self.bias)
        few = input.numel() <= _FEW_ROWS * self.in_features
        if few and self.weight.dtype in DTYPES and not torch.is_grad_enabled():
            # The logits of the next tokens: torch's own product takes longer for so few rows.
            return lora_linear(input, self.weight.detach(), None, None, 1.0, bias=self.bias)
        return dense.linear(input, self.weight, self.bias)


def note_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attached model: tells its head whether a loss will be asked for."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is FusedHeadLinear:
        position = head.labels_position
        labels = args[position] if len(args) > position else kwargs.get("labels")
        head.labels_given = labels is not None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss, same arguments and value; lazy logits are not formed for it."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    loss = None
    if isinstance(logits, LazyLogits) and logits.shape[-1] == vocab_size:
        given = shift_labels
        if given is None:
            assert labels is not None
            given = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = lazy_cross_entropy(logits, given, ignore_index, reduction)
    if loss is None:
        return ForCausalLMLoss(
            logits,
            labels,
            vocab_size,
            num_items_in_batch,
            ignore_index,
            shift_labels,
            **kwargs,  # type: ignore[arg-type]
        )
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


# --- in and out ---------------------------------------------------------------------------------------------


def attach_head(model: nn.Module) -> LayerReport:
    """Joins the output head of `model` with its loss, in place, where it can; says what runs and why."""
    base = _transformers_model(model)
    report = describe_head(base)
    if not report.fused or type(base.get_output_embeddings()) is FusedHeadLinear:  # type: ignore[operator]
        return report
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    head.__class__ = FusedHeadLinear
    head.labels_given = False
    head.labels_position = list(inspect.signature(type(base).forward).parameters).index("labels") - 1
    if _calls_loss_function(type(base).forward):
        base.loss_function = causal_lm_loss  # type: ignore[assignment]
    base.register_forward_pre_hook(note_labels, with_kwargs=True)
    return report


def detach_head(model: nn.Module) -> None:
    """Undoes attach_head; a model that was not attached stays as it is."""
    base: Any = _transformers_model(model)
    if base.__dict__.get("_loss_function") is causal_lm_loss:
        del base._loss_function
    for key, hook in list(base._forward_pre_hooks.items()):
        if hook is note_labels:
            del base._forward_pre_hooks[key]
            base._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in base.modules():
        if type(module) is FusedHeadLinear:
            head: Any = module
            head.__class__ = nn.Linear
            del head.labels_given, head.labels_position


def describe_head(model: nn.Module) -> LayerReport:
    """What attach_head does, or did, with the head of `model`; nothing is changed."""
    base: Any = _transformers_model(model)
    get = getattr(base, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        return LayerReport("", OP, "none", False, "the model has no output head that transformers knows of")
    name = next((path for path, module in base.named_modules() if module is head), "")
    stands_for = nn.Linear if type(head) is FusedHeadLinear else plain(type(head))
    kind = f"{stands_for.__module__.split('.')[0]}.{stands_for.__name__}"
    reason = _refuse(base, head, name)
    if reason is None and head.weight.dtype not in DTYPES:
        reason = f"no kernel takes {head.weight.dtype}"
    if reason is not None:
        return LayerReport(name, OP, "transformers", False, reason, kind)
    try:
        choice = LINEAR_CROSS_ENTROPY.choose(
            LinearCrossEntropyCall(head.weight.device.type, head.weight.dtype)
        )
    except BackendError as error:
        return LayerReport(name, OP, "none", False, str(error), kind)
    fused = choice.backend != "reference"
    reason = "; ".join(f"{b}: {why}" for b, why in choice.refused.items() if "not built" not in why)
    if not fused:
        return LayerReport(
            name, OP, "transformers", False, reason or "plain torch; this backend is pinned", kind
        )
    return LayerReport(name, OP, choice.backend, True, reason, kind)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _transformers_model(model: nn.Module) -> Any:
    base: Any = unwrap(model)
    if type(base).__name__ == "PeftMixedModel":
        return base.base_model.model
    return base.get_base_model() if hasattr(base, "get_base_model") else base


# --- which models -------------------------------------------------------------------------------------------

# Config fields with which a model caps its logits between the head and the loss.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
# A buffer that models add to their logits, one value for each entry of the vocabulary: LazyLogits take it in.
_BIAS = "self.final_logits_bias"
_VIEWS = ("view", "reshape")


def _refuse(model: Any, head: nn.Module, name: str) -> str | None:
    """Why the loss of this model cannot be computed from the head's input and weight."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not isinstance(model, PreTrainedModel):
        return "not a transformers model"
    if plain(type(head)) not in (nn.Linear, FusedHeadLinear):
        return f"the head is a {type(head).__name__}, not a plain linear layer"
    if "forward" in head.__dict__:
        return "the head's forward was replaced on the instance (a hook of accelerate?)"
    forward = type(model).forward
    if _calls_loss_function(forward) and model.loss_function not in (ForCausalLMLoss, causal_lm_loss):
        loss = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        return f"the model's loss is {loss}, not the causal language model's"
    config = model.config.get_text_config()
    capped = any(getattr(config, field, None) is not None for field in _SOFTCAPS)
    return _refuse_forward(forward, name, capped)


def _refuse_forward(forward: Any, head: str, capped: bool) -> str | None:
    """Why this forward does not hand what the head returns to a loss known here; read from its source."""
    tree = _source(forward)
    if tree is None:
        return "the source of the model's forward cannot be read"
    losses = _losses(tree)
    if len(losses) != 1 or "labels" not in inspect.signature(forward).parameters:
        return "the model's forward computes its loss with neither self.loss_function nor CrossEntropyLoss()"
    given = next((k.value for k in losses[0].keywords if k.arg in ("logits", "input")), None)
    given = losses[0].args[0] if given is None and losses[0].args else given
    if isinstance(given, ast.Call) and isinstance(given.func, ast.Attribute) and given.func.attr in _VIEWS:
        given = given.func.value  # of whole rows, or the loss would not be of classes
    if not isinstance(given, ast.Name):
        return "the loss is not of what the head itself returns"
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) or node.lineno > losses[0].lineno:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if not any(isinstance(t, ast.Name) and t.id == given.id for t in targets):
            continue
        value = _without_bias(node.value) if isinstance(node, ast.Assign) else None
        biased = value is not None and value is not node.value
        again = biased and isinstance(value, ast.Name) and value.id == given.id
        caps = _softcaps(tree, node) and (not capped or _is_step_of_softcap(node.value, given.id))
        if again or caps or (value is not None and _from_head(value, head)):
            continue
        return f"the loss is not of what the head itself returns: {ast.unparse(node)}"
    return None


@functools.cache
def _source(forward: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None


def _losses(tree: ast.AST) -> list[ast.Call]:
    """The calls of self.loss_function, or, without one, of modules made by CrossEntropyLoss() in place."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = [call for call in calls if _path(call.func) == "self.loss_function"]
    made = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and ast.unparse(node.value) in ("CrossEntropyLoss()", "CrossEntropyLoss(ignore_index=-100)")
    }
    return found or [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in made]


def _calls_loss_function(forward: Any) -> bool:
    tree = _source(forward)
    return tree is not None and any(_path(call.func) == "self.loss_function" for call in _losses(tree))


def _without_bias(value: ast.expr) -> ast.expr:
    """x of x + self.final_logits_bias, moved to a device or not; another expression as it is."""
    added = value.right if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) else None
    if isinstance(added, ast.Call) and isinstance(added.func, ast.Attribute) and added.func.attr == "to":
        added = added.func.value
    return value.left if added is not None and _path(added) == _BIAS else value  # type: ignore[attr-defined]


def _from_head(value: ast.expr, head: str) -> bool:
    """self.<head>(...), with .float() or .contiguous() after it or not."""
    while isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        if _path(value.func) == f"self.{head}":
            return True
        if value.func.attr not in ("float", "contiguous"):
            return False
        value = value.func.value
    return False


def _softcaps(tree: ast.AST, node: ast.AST) -> bool:
    """node stands under an `if` on a softcap."""
    return any(
        isinstance(test, ast.If)
        and any(field in ast.unparse(test.test) for field in _SOFTCAPS)
        and any(inner is node for statement in test.body for inner in ast.walk(statement))
        for test in ast.walk(tree)
    )


def _is_step_of_softcap(value: ast.expr | None, logits: str) -> bool:
    """cap * tanh(logits / cap) or a part of it, which LazyLogits follow."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Div, ast.Mult)):
        return _is_step_of_softcap(value.left, logits)
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("tanh") and len(value.args) == 1:
        return _is_step_of_softcap(value.args[0], logits)
    return isinstance(value, ast.Name) and value.id == logits


def _path(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Attribute) else ""

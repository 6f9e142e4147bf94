"""Puts fused layers into a model, takes them out, and says what runs in each layer and why.

A fused layer is a subclass of the layer it stands for, put in by setting the instance's class: tensors,
names, hooks and references stay, and nothing but the class says that a layer is fused. Optimising twice is
optimising once, and copies and pickles of an optimised model are optimised.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from peft_engine import dense, dropout, native, projections
from peft_engine.conv1d import as_made, by_rows, is_conv1d, is_linear
from peft_engine.dispatch import BackendError, noted
from peft_engine.heads import attach_head, describe_head, detach_head
from peft_engine.methods import copies, derived, fused_attention, lora_layers, virtual_attention, walks
from peft_engine.methods.attention_sites import uses_interface
from peft_engine.methods.bottleneck_layers import Bottlenecks
from peft_engine.methods.sharded import class_of
from peft_engine.nn import NF4Linear
from peft_engine.ops.bottleneck import ALIASES, BOTTLENECK, BottleneckCall
from peft_engine.ops.lora_linear import LORA_LINEAR, LoraLinearCall
from peft_engine.ops.nf4 import NF4Tensor
from peft_engine.report import LayerReport, Report

ModelType = TypeVar("ModelType", bound=torch.nn.Module)

# The modules whose classes are fused stand-ins; those of peft_engine.nn and methods are layers of ours.
STAND_INS = ("peft_engine.layers", "peft_engine.bnb_layers", "peft_engine.peft_layers", "peft_engine.dropout")

NOT_YET = "its own code runs; peft_engine.optimize(model) fuses it"
DENSE_ALONE = "a dense weight without an adapter: torch's product is as fast"
BY_ONEDNN = "a dense float32 weight without an adapter: multiplied by oneDNN, the faster one in torch here"
SLOW = "a dense weight without an adapter, and torch has no fast product of {} here; float32 is faster"
SHARDED = "fully_shard has made it a class of its own; call peft_engine.optimize first"
REPLACED = "its forward was replaced on the instance (a hook of accelerate?), so a class would have no effect"


def optimize(model: torch.nn.Module) -> Report:
    """Puts fused layers in the place of the layers of `model` that have one, and the fused loss on its head.

    model: a transformers model, plain, in bitsandbytes' 4 bit or with adapters of ours; a PeftModel.
    Returns what then runs in each layer. A second call changes nothing.
    Raises ValueError, with nothing changed, when bitsandbytes has repacked weights at an evaluation.
    """
    _refuse_repacked(model)
    walks.forget(model)
    detach_head(model)  # an adapter may have come around the head since it was joined with its loss
    # bitsandbytes' layers first: whether PEFT's layer around one can be fused depends on it.
    for adapters in (False, True):
        for module in model.modules():
            if _is_peft_layer(module) is adapters and _unreplaced(module):
                fused, _, _ = _fused_class(module)
                if fused is not None and type(module) is class_of(module) is not fused:
                    _set_class(module, fused)
                    _lay_out(module, by_rows)
    if "transformers" in sys.modules:
        fused_attention.put(model, [m for m in model.modules() if _is_stand_in(m) and uses_interface(m)])
    attach_head(model)
    return explain(model)


def unoptimize(model: ModelType) -> ModelType:
    """The model with its layers as they were before `optimize`; adapters stay.

    Raises ValueError, with nothing changed, for a fused layer whose forward was replaced since.
    """
    stand_ins = {name: module for name, module in model.named_modules() if _is_stand_in(module)}
    replaced = [name for name, module in stand_ins.items() if not _unreplaced(module)]
    if replaced:
        raise ValueError(
            f"unoptimize: the forward of {replaced[0]} was replaced after optimize and calls the fused one; "
            "undo that first (accelerate.hooks.remove_hook_from_module(model, recurse=True))"
        )
    wrapped = [name for name, module in stand_ins.items() if type(module) is not class_of(module)]
    if wrapped:
        raise ValueError(f"unoptimize: {wrapped[0]} is of a class that fully_shard has made of the fused one")
    for module in stand_ins.values():
        for kept in ("_nf4", derived.KEPT):
            module.__dict__.pop(kept, None)
        _set_class(module, _stood_for(module))
        _lay_out(module, as_made)
    fused_attention.take(model)
    detach_head(model)
    return model


def explain(model: torch.nn.Module) -> Report:
    """What runs in each layer of `model` as it is set now, and why not something faster; changes nothing."""
    return Report(tuple(_layers(model)), _cpu())


# --- which class --------------------------------------------------------------------------------------------


def _fused_class(module: torch.nn.Module) -> tuple[type | None, str, str]:
    """The class for the module, its op, and why there is none; ("", "") for what no op stands for."""
    if _is_peft_layer(module):
        from peft_engine import peft_layers

        return peft_layers.fused_class(module)
    if _is_bnb_linear(module):
        from peft_engine import bnb_layers

        return bnb_layers.fused_class(module)
    if isinstance(module, torch.nn.Dropout):
        return dropout.fused_class(module)
    if "transformers" in sys.modules:
        from peft_engine import layers  # imports transformers

        return layers.fused_class(module)
    return None, "", ""


def _is_peft_layer(module: torch.nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a model with PEFT's layers has imported PEFT
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _is_bnb_linear(module: torch.nn.Module) -> bool:
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(module, modules.Linear4bit)


def _unreplaced(module: torch.nn.Module) -> bool:
    """Whether a call runs the class's forward; accelerate, taking a hook off, leaves that one bound."""
    own = module.__dict__.get("forward")
    return own is None or getattr(own, "__func__", None) is type(module).forward


def _set_class(module: torch.nn.Module, kind: type) -> None:
    module.__dict__.pop("forward", None)
    module.__class__ = kind


def _lay_out(module: torch.nn.Module, how: Callable[[torch.nn.Module], None]) -> None:
    """Of PEFT's layer around a Conv1D: the weight, for the kernels or back."""
    base = module._modules.get("base_layer")
    if base is not None and is_conv1d(type(base)):
        how(base)


def _is_stand_in(module: torch.nn.Module) -> bool:
    return class_of(module).__module__ in STAND_INS


def _stood_for(module: torch.nn.Module) -> type:
    """The class as the model had it."""
    if not _is_stand_in(module):
        return class_of(module)
    return next(c for c in class_of(module).__mro__ if not c.__module__.startswith("peft_engine."))


def _refuse_repacked(model: torch.nn.Module) -> None:
    names = [name for name, module in model.named_modules() if _is_bnb_linear(module)]
    if not names:
        return
    from peft_engine import bnb_layers

    bad = [name for name in names if bnb_layers.is_repacked(model.get_submodule(name))]
    if bad:
        which = f"{bad[0]} ({len(bad)} of {len(names)} layers)"
        raise ValueError(f"optimize: {bnb_layers.REPACKED.format(name=which)}")


# --- what runs ----------------------------------------------------------------------------------------------


def _layers(model: torch.nn.Module) -> Iterator[LayerReport]:
    inside = None  # the adapter layer whose parts follow: its line speaks for them
    head = _head(model)
    # The embedding comes first and has the dtype of the activations, which adapters in float32 have not.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    by_name = fused_attention.refused(model)
    for name, module in model.named_modules():
        if head is not None and module is head:
            line = _head_line(name, model, head)
            yield line
            if line.fused or _is_plain_linear(head):
                continue
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Bottlenecks):
            yield _bottleneck_line(name, module, dtype)
        if copies.is_ours(name):  # an adapter's own part: a line speaks for all of it
            continue
        if _is_peft_layer(module):
            inside = f"{name}." if name else ""
            yield _peft_line(name, module, dtype)
        elif _is_bnb_linear(module):
            yield _bnb_line(name, module)
        elif isinstance(module, NF4Linear) or lora_layers.is_adapted(module):
            yield _our_line(name, module) or _dense_line(model, name, module)
        elif is_linear(module):
            yield _dense_line(model, name, module)
        else:
            own = _model_line(model, name, module, dtype, by_name)
            found = _virtual_tokens_line(name, module, dtype, own) or own
            if found is not None:
                yield found


def _head(model: Any) -> torch.nn.Module | None:
    """The output head, for which the loss is an op of its own."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _head_line(name: str, model: torch.nn.Module, head: torch.nn.Module) -> LayerReport:
    line = dataclasses.replace(describe_head(model), name=name)
    if _is_stand_in(head):  # a fused adapter around the head: name the class that the model had
        kind = _kind(head)
        reason = line.reason.replace(type(head).__name__, kind)
        line = dataclasses.replace(line, kind=kind, reason=reason)
    if line.fused and type(head) is torch.nn.Linear:  # it could be, and is not
        line = dataclasses.replace(line, backend="transformers", fused=False, reason=NOT_YET)
    return line


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """A dense linear layer without an adapter, the fused head among them."""
    return type(module) is torch.nn.Linear or type(module).__module__ == "peft_engine.heads"


def _line(name: str, module: torch.nn.Module, op: str, backend: str, fused: bool, reason: str) -> LayerReport:
    return LayerReport(name, op, backend, fused, reason, _kind(module))


def _kind(module: torch.nn.Module) -> str:
    """The class as the model had it, with its package."""
    kind = _stood_for(module)
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _ran(name: str, module: torch.nn.Module, op: str, backend: str, reason: str) -> LayerReport:
    """A line for a layer that calls an op, with the backend that dispatch chooses."""
    fused = backend != "reference"
    reason = reason or ("" if fused else "plain torch; this backend is pinned")
    return _line(name, module, op, backend, fused, reason)


def _either(name: str, module: torch.nn.Module, op: str, backend: str, reason: str) -> LayerReport:
    """A line for a layer that calls an op, or, where the backend is "", whose own code runs."""
    return _ran(name, module, op, backend, reason) if backend else _own(name, module, op, reason)


def _own(name: str, module: torch.nn.Module, op: str, reason: str) -> LayerReport:
    """A line for a layer whose own code runs."""
    return _line(name, module, op, _stood_for(module).__module__.split(".")[0], False, reason)


def _not_fused(name: str, module: torch.nn.Module) -> LayerReport:
    """A line for a layer that is no stand-in, although its kind may have one."""
    fused, op, reason = _fused_class(module)
    if not _unreplaced(module):
        reason = REPLACED
    elif fused is not None:
        reason = NOT_YET if type(module) is class_of(module) else SHARDED
    return _own(name, module, op, reason)


def _product_line(
    name: str,
    module: torch.nn.Module,
    weight: torch.Tensor | NF4Tensor,
    dtype: torch.dtype,
    adapter: torch.Tensor | None,
    op: str = "lora_linear",
) -> LayerReport:
    """A line for a layer that calls ops.lora_linear, or an op around it, with an input of `dtype`."""
    call = LoraLinearCall(
        device=weight.device.type,
        dtype=dtype,
        base="nf4" if isinstance(weight, NF4Tensor) else weight.dtype,
        adapter=None if adapter is None else dtype if adapter.dtype == dtype else torch.float32,
        in_features=weight.shape[1],
        rank=0 if adapter is None else adapter.shape[0],
    )
    try:
        choice = LORA_LINEAR.choose(call)
    except BackendError as error:
        return _line(name, module, op, "none", False, str(error))
    reason = "; ".join(filter(None, (choice.reason, noted("lora_linear"))))
    return _ran(name, module, op, choice.backend, reason)


def _dense_line(model: torch.nn.Module, name: str, module: torch.nn.Module) -> LayerReport:
    """A line for a dense linear layer without an adapter."""
    kind = class_of(module)
    if kind is not torch.nn.Linear and not is_conv1d(kind) and not lora_layers.is_adapted(module):
        return _own(name, module, "linear", f"no kernel for {type(module).__name__}")
    whose, weight = "torch", module.weight
    if _is_stand_in(model.get_submodule(name.rpartition(".")[0])):  # a fused layer calls it
        whose = projections.library(module)
    if whose == "peft-engine":
        return _line(name, module, "linear", "cpu", True, "")
    if weight.device.type == "cpu" and dense.is_slow(weight.dtype):
        return _line(name, module, "linear", "torch", False, SLOW.format(weight.dtype))
    return _line(name, module, "linear", "torch", False, BY_ONEDNN if whose == "oneDNN" else DENSE_ALONE)


def _our_line(name: str, module: Any) -> LayerReport | None:
    """A line for a layer of ours; None for a dense one without an active adapter."""
    nf4 = isinstance(module, NF4Linear)
    weight = module.nf4 if nf4 else module.base_weight
    dtype = (module.compute_dtype or module.weight_dtype) if nf4 else weight.dtype
    adapters = module._modules.get("lora_A", {})
    active = getattr(module, "active_adapter", None)
    names = active if isinstance(active, tuple) else (active,)
    used = next((n for n in names if n in adapters), None)
    if used is None and not nf4:
        return None
    adapter = None if used is None else adapters[used]
    op = "dora_linear" if used is not None and module.lora[used].dora else "lora_linear"
    return _product_line(name, module, weight, dtype, adapter, op)


def _bottleneck_line(name: str, module: Bottlenecks, dtype: torch.dtype) -> LayerReport:
    """A line for the adapters behind a sublayer, with the backend of the one that runs (or of the first)."""
    names = module.active if isinstance(module.active, tuple) else (module.active,)
    adapters: Any = module.adapters
    adapter = next((adapters[n] for n in names if n in adapters), None) or next(iter(adapters.values()))
    config, weight = adapter.config, adapter.down_weight
    norm = config.ln_before or (config.original_ln_before and module.norm[0] is not None)
    call = BottleneckCall(
        device=weight.device.type,
        dtype=dtype,
        weight=weight.dtype,
        activation=ALIASES.get(config.non_linearity, config.non_linearity),
        features=weight.shape[1],
        width=weight.shape[0],
        norm=norm,
    )
    try:
        choice = BOTTLENECK.choose(call)
    except BackendError as error:
        return _line(name, module, "bottleneck", "none", False, str(error))
    guessed = "of no family known here: placed by its name" if module.site.generic else ""
    return _ran(name, module, "bottleneck", choice.backend, "; ".join(filter(None, (guessed, choice.reason))))


def _bnb_line(name: str, module: Any) -> LayerReport:
    if not _is_stand_in(module):
        return _not_fused(name, module)
    return _product_line(name, module, module.nf4, module.compute_dtype or module.nf4.dtype, None)


def _peft_line(name: str, module: Any, given: torch.dtype) -> LayerReport:
    from peft_engine import peft_layers

    if not _is_stand_in(module):
        return _not_fused(name, module)
    base = module.get_base_layer()
    names = peft_layers.active_names(module)
    why = peft_layers.own_reason(module, names)
    alone = peft_layers.base_alone(module)
    if why is not None and (not alone or type(base) is torch.nn.Linear or is_conv1d(type(base))):
        return _own(name, module, "lora_linear", why)
    weight = peft_layers.base_weight(base)
    if isinstance(weight, NF4Tensor) and not alone:
        why = peft_layers.narrowed(given, base.compute_dtype)
        if why is not None:
            return _own(name, module, "lora_linear", why)
    dtype = (base.compute_dtype or weight.dtype) if isinstance(weight, NF4Tensor) else weight.dtype
    adapter = None if alone else module.lora_A[names[0]].weight
    op = "lora_linear" if alone or names[0] not in module.lora_variant else "dora_linear"
    return _product_line(name, module, weight, dtype, adapter, op)


def _virtual_tokens_line(
    name: str, module: torch.nn.Module, dtype: torch.dtype, own: LayerReport | None
) -> LayerReport | None:
    """The line of an attention layer behind virtual tokens, in place of `own`; None where there are none."""
    device = next(module.parameters(), torch.empty(0)).device.type
    found = virtual_attention.describe(module, device, dtype)
    if found is None:
        return None
    backend, reason = found
    if own is not None and own.reason == NOT_YET:  # what is around the attention
        reason = "; ".join(filter(None, (reason, f"the rest: {NOT_YET}")))
    return _either(name, module, "prefix_attention", backend, reason)


def _model_line(
    model: torch.nn.Module, name: str, module: torch.nn.Module, dtype: torch.dtype, by_name: set[int]
) -> LayerReport | None:
    device = next(model.parameters(), torch.empty(0)).device.type
    if isinstance(module, dropout.FusedDropout):
        return _either(name, module, "dropout", *dropout.running(device, dtype))
    fused, op, _ = _fused_class(module)
    if op == "gelu" and _fused_class(model.get_submodule(name.rpartition(".")[0]))[1] == "swiglu":
        return None  # its line speaks for the activation too
    if _is_stand_in(module):
        from peft_engine import layers

        return _either(name, module, *layers.running(module, dtype))
    found = fused_attention.describe(module, device, dtype, by_name) if fused is None else None
    if found is not None:
        backend, why = found
        return _either(name, module, "attention", backend, why or ("" if backend else NOT_YET))
    # What holds another layer of its op leaves the computing to that: T5LayerSelfAttention to T5Attention.
    if not op or any(inner is not module and _fused_class(inner)[1] == op for inner in module.modules()):
        return None
    return _not_fused(name, module)


def _cpu() -> str:
    why = native.load_error()
    return why if why is not None else native.isa()

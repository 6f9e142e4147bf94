"""NF4 quantisation of a model in place, and of a checkpoint as it is read (QLoRA, arXiv 2305.14314).

Every plain nn.Linear, and Conv1D of transformers, becomes an NF4Linear, one layer at a time. The output head
stays dense unless named otherwise, and so does a weight that is tied to another, as the head often is to the
embedding. The model's config says in bitsandbytes' words what was done: what `save_pretrained` writes loads
with transformers alone.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from peft_engine.conv1d import is_conv1d, is_linear, plain
from peft_engine.heads import FusedHeadLinear
from peft_engine.methods import copies, experts, sharded
from peft_engine.methods.read_directly import in_fast_path, never_called
from peft_engine.methods.target_parameters import in_convolution
from peft_engine.nn import NF4Linear, become_nf4
from peft_engine.ops.nf4 import BLOCKSIZES, DTYPES, NF4Tensor, nf4_quantize

ModelType = TypeVar("ModelType", bound=torch.nn.Module)


def quantize_(
    model: ModelType,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: Iterable[str] | None = None,
) -> ModelType:
    """Turns each plain nn.Linear, and Conv1D of transformers, of `model` into an NF4Linear, in place.

    The weights of a mixture's experts are put in NF4 too. Returns the model.

    The dense weight of a layer is freed before the next is quantised. Layers already in NF4 stay as they are.
    skip_modules: names of modules that stay dense, whole ("model.layers.0") or as the end of a name
    ("down_proj"); it takes the place of the default, the output head (a classifier: its last layer). A tied
    weight stays dense always, and so do what transformers keeps in float32 (T5's wo), what another module
    reads without calling the layer (Mamba's dt_proj), and what an adapter trains in a copy
    (modules_to_save). Other adapters than LoRA may be there already.
    Raises ValueError before anything is changed: for layers with LoRA, for a model with another quantisation,
    for linear layers of a kind it cannot quantise, for a weight with NaN or inf, for a name that matches
    nothing.
    """
    _check_blocksize("quantize_", blocksize)
    sharded.refuse(model, "quantize_")
    chosen, dense = select_linears(model, skip_modules, "quantize_", blocksize)
    _refuse_quantised(model)
    if not chosen:
        raise ValueError("quantize_: the model has no nn.Linear left to quantise")
    for name in chosen:
        check_weight(model.get_parameter(parameter(model, name)), name, "quantize_")
    dtype = model.get_parameter(parameter(model, chosen[0])).dtype
    for name in chosen:
        weight = model.get_parameter(parameter(model, name))
        hold(model, name, quantized(model, name, weight, blocksize, double_quant))
        del weight
    write_config(model, dense, dtype, double_quant)
    keep_packed(model)
    return model


def load_quantized(
    path: str | Path,
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: Iterable[str] | None = None,
    **from_pretrained_arguments: Any,
) -> Any:
    """A transformers model whose linears are NF4, its checkpoint read shard by shard; in eval mode.

    path: a folder with config.json and safetensors files, or a name on the hub. Each linear's weight is read,
    cast to `dtype` (None: the checkpoint's own), quantised and placed before the next is read: the peak of
    memory is the quantised model and its largest layer. A checkpoint whose weights are NF4 already, ours or
    bitsandbytes', loads as it is; block size, double quantisation and skip_modules are then the file's.
    skip_modules as in `quantize_`. The other arguments are those of transformers' `from_pretrained`; the
    model's class is the one its config names. GGUF is refused.
    Raises OSError when there is no such model or it has no safetensors, ValueError for what cannot be
    quantised, for a weight that is missing, or holds NaN or inf.
    """
    _check_blocksize("load_quantized", blocksize)
    from peft_engine.loading import load  # transformers' loader takes a second to import

    return load(str(path), blocksize, double_quant, skip_modules, from_pretrained_arguments)


def select_linears(
    model: torch.nn.Module, skip_modules: Iterable[str] | None, caller: str, blocksize: int
) -> tuple[list[str], list[str]]:
    """The names of the linears and of experts' weights to quantise, and of those that stay dense.

    ValueError for what cannot be.
    """
    if isinstance(skip_modules, str):
        raise TypeError(f"{caller}: skip_modules must be a list of names, got the string {skip_modules!r}")
    skip = _output_head(model) if skip_modules is None else list(skip_modules)
    names = [*(name for name, _ in model.named_modules()), *experts.weights(model)]
    for pattern in skip:
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(
                f"{caller}: skip_modules names {pattern!r}, which no module has{_near(pattern, names)}"
            )
    routers = experts.routers(model)
    unused = {name: f"(its weight {why})" for name, why in in_fast_path(model).items()}
    dense_always = _tied_weights(model) | {f"{name}.weight" for name in never_called(model)}
    # T5's wo: its block casts what goes in to the weight's dtype, which for packed bytes is none.
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    chosen: list[str] = []
    dense: list[str] = []
    refused: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or "lora_A" in module._modules:
            raise ValueError(
                f"{caller}: {name} has an adapter already; quantise first and attach then "
                "(detach, or merge_and_unload of PEFT, takes adapters off)"
            )
        if copies.is_ours(name) or name in routers:
            continue
        skipped = any(_matches(name, pattern) for pattern in skip)
        if experts.is_experts(module) and not _unfused(module, blocksize):
            for leaf in experts.LEAVES:
                path = f"{name}.{leaf}".removeprefix(".")
                if leaf in module._parameters:
                    apart = skipped or any(_matches(path, pattern) for pattern in skip)
                    (dense if apart else chosen).append(path)
            continue
        why = None if in_convolution(model, name) else _refusal(module, blocksize)
        if why is None and is_dense(module):
            why = unused.get(name)
        if why is None and is_dense(module):
            skipped = skipped or name.rpartition(".")[2] in kept
            skipped = skipped or f"{name}.weight".removeprefix(".") in dense_always
            (dense if skipped else chosen).append(name)
        elif why is not None and skipped:
            dense.append(name)
        elif why is not None:
            refused.append(f"{name or type(module).__name__} {why}")
        elif isinstance(module, torch.nn.Linear) and not isinstance(module, NF4Linear):
            dense.append(name)
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ValueError(
            f"{caller}: cannot quantise {'; '.join(refused[:3])}{more}; "
            "leave them dense by naming them in skip_modules, with the output head if it shall stay dense"
        )
    return chosen, dense


def parameter(model: torch.nn.Module, name: str) -> str:
    """The path of the weight of one of those that select_linears names."""
    return name if experts.owner(model, name) is not None else f"{name}.weight".removeprefix(".")


def quantized(
    model: torch.nn.Module, name: str, weight: torch.Tensor, blocksize: int, double_quant: bool
) -> NF4Tensor:
    """The weight of one of those that select_linears names in NF4, by rows of in_features."""
    if experts.owner(model, name) is None and is_conv1d(type(model.get_submodule(name))):
        weight = weight.detach().t()
    return nf4_quantize(weight, blocksize=blocksize, double_quant=double_quant)


def hold(model: torch.nn.Module, name: str, q: NF4Tensor) -> None:
    """Puts `q` in the place of the weight of one of those that select_linears names."""
    found = experts.owner(model, name)
    if found is None:
        become_nf4(model.get_submodule(name), q)
    else:
        experts.become_nf4(experts.hold(*found), q)


def is_dense(module: torch.nn.Module) -> bool:
    """Whether a module is of a class that is quantised."""
    return plain(type(module)) is torch.nn.Linear or is_conv1d(type(module))


def check_weight(weight: torch.Tensor, name: str, caller: str) -> None:
    """TypeError or ValueError, with the layer's name, for a weight that has no NF4 form."""
    if weight.dtype not in DTYPES:
        raise TypeError(f"{caller}: {name}.weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.device.type == "meta":
        raise ValueError(
            f"{caller}: {name}.weight is on the meta device; load the weights first, or use load_quantized"
        )
    if weight.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(weight.detach())):
        raise ValueError(
            f"{caller}: {name}.weight holds NaN or inf; is the checkpoint whole, and its dtype wide enough?"
        )


def write_config(model: torch.nn.Module, dense: list[str], dtype: torch.dtype, double_quant: bool) -> None:
    """Describes the quantisation in `model.config`, in the form of transformers' BitsAndBytesConfig."""
    config = getattr(model, "config", None)
    if config is None:
        return
    config.quantization_config = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": sorted(dense),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def keep_packed(model: Any) -> None:
    """Has `save_pretrained` write experts in NF4 as they are, which it would cut one from another."""
    if not any(isinstance(module, experts.NF4ExpertWeights) for module in model.modules()):
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightConverter

    steps = getattr(model, "_weight_conversions", None)
    if steps is None:  # a model that was not loaded: what saving would take
        found = get_model_conversion_mapping(model, add_legacy=False)
        steps = [step for step in found if not isinstance(step, PrefixChange)]
    model._weight_conversions = [
        step
        for step in steps
        if not (
            isinstance(step, WeightConverter)
            and any("experts" in to and to.endswith(experts.LEAVES) for to in step.target_patterns)
        )
    ]


def _refuse_quantised(model: torch.nn.Module) -> None:
    """ValueError for a model whose config says that its weights are quantised in another way than NF4."""
    given = getattr(getattr(model, "config", None), "quantization_config", None)
    if given is None:
        return
    fields = given if isinstance(given, dict) else given.to_dict()
    if not (fields.get("load_in_4bit") and fields.get("bnb_4bit_quant_type") == "nf4"):
        raise ValueError(
            f"quantize_: the model is quantised already, by its config in {fields.get('quant_method')!r}, "
            "which is not NF4; start from the dense checkpoint"
        )


def _check_blocksize(caller: str, blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{caller}: blocksize must be one of {BLOCKSIZES}, got {blocksize}")


def _matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, a module above it, or the end of either."""
    return f".{pattern}." in f".{name}."


def _near(pattern: str, names: list[str]) -> str:
    import difflib

    ends = sorted({name.rsplit(".", 1)[-1] for name in names} - {""})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], ends, 3)
    return f"; near it: {', '.join(near)}" if near else ""


def _output_head(model: torch.nn.Module) -> list[str]:
    """The name of a language model's head, or of a transformers model's last layer, where classifiers are."""
    get = getattr(model, "get_output_embeddings", None)
    if get is None:
        return []
    head = get()
    if head is None:
        own = [name for name, _ in model.named_parameters() if not copies.is_ours(name)]
        return [own[-1].rpartition(".")[0]]
    return [name for name, module in model.named_modules() if module is head]


def _tied_weights(model: torch.nn.Module) -> set[str]:
    """Names of parameters that are one with another: by transformers' list, or by being one object.

    One that an adapter has a copy of is among them: the base's, or the copy, is held beside the module too.
    """
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    shared = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if owners[id(parameter)] > 1
    }
    return shared | set(keys) | set(keys.values())


def _unfused(module: torch.nn.Module, blocksize: int) -> str:
    """Why a layer's experts cannot be put in NF4."""
    for leaf in experts.LEAVES:
        if leaf in module._parameters:
            shape = experts.shape_of(module, leaf)
            why = experts.fused_class(module)[2] or experts.not_sliced(shape, blocksize, nested=False)
            if why:
                return f"has experts ({leaf}, {shape}) of a kind without a product in NF4: {why}"
    return ""


def _refusal(module: torch.nn.Module, blocksize: int) -> str | None:
    """Why a module that computes a linear map cannot become an NF4Linear; None if it can or is none."""
    kind = type(module)
    if kind is FusedHeadLinear:
        return "is joined with the loss by optimize; call unoptimize(model) first, and optimize after"
    for theirs in kind.__mro__:  # a fused layer stands for one of bitsandbytes
        if theirs.__module__.startswith("bitsandbytes."):
            return f"is bitsandbytes' {theirs.__name__}, quantised already (optimize takes it as it is)"
    if is_linear(module) and "forward" in module.__dict__:
        return "has its forward replaced (by accelerate's dispatch?); load the model on one device"
    if is_linear(module) and "weight" not in module._parameters:
        return "has a weight that is no parameter (pruned, or under weight_norm?)"
    known = (torch.nn.Linear, NF4Linear, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
    if isinstance(module, torch.nn.Linear) and plain(kind) not in known:
        return f"is a {kind.__name__}, a subclass of nn.Linear"
    if experts.is_experts(module):
        return _unfused(module, blocksize)
    for name, weight in module.named_parameters(recurse=False):
        if isinstance(module, experts.ExpertWeights):
            continue
        if weight.dim() == 3 and min(weight.shape) > 1 and weight.is_floating_point():
            return f"holds expert weights in one 3-D parameter, {name} {tuple(weight.shape)}"
    return None

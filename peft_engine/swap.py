"""Puts fused layers into a model, takes them out, and says what runs in each layer and why.

A fused layer is a subclass of the layer it stands for, put in by setting the instance's class: tensors,
names, hooks and references stay, and nothing but the class says that a layer is fused. Optimising twice is
optimising once, and copies and pickles of an optimised model are optimised.
"""

import importlib.util
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from peft_engine import native
from peft_engine.dispatch import BackendError
from peft_engine.methods.lora import LoraLinear
from peft_engine.nn import NF4Linear
from peft_engine.ops.lora_linear import LORA_LINEAR, LoraLinearCall
from peft_engine.ops.nf4 import NF4Tensor
from peft_engine.report import LayerReport, Report

ModelType = TypeVar("ModelType", bound=torch.nn.Module)

# The modules whose classes are fused stand-ins; those of peft_engine.nn and methods are layers of ours.
STAND_INS = ("peft_engine.layers", "peft_engine.bnb_layers", "peft_engine.peft_layers")

NOT_YET = "its own code runs; peft_engine.optimize(model) fuses it"
REPLACED = "its forward was replaced on the instance (a hook of accelerate?), so a class would have no effect"


def optimize(model: torch.nn.Module) -> Report:
    """Puts fused layers in the place of the layers of `model` that have one, and the fused loss on its head.

    model: a transformers model, plain, in bitsandbytes' 4 bit or with adapters of ours; a PeftModel.
    Returns what then runs in each layer. A second call changes nothing.
    Raises ValueError, with nothing changed, when bitsandbytes has repacked weights at an evaluation.
    """
    _refuse_repacked(model)
    # bitsandbytes' layers first: whether PEFT's layer around one can be fused depends on it.
    for adapters in (False, True):
        for module in model.modules():
            if _is_peft_layer(module) is adapters and _unreplaced(module):
                fused, _, _ = _fused_class(module)
                if fused is not None and type(module) is not fused:
                    module.__class__ = fused
    if _HEADS:
        from peft_engine import heads

        heads.attach_head(_transformers_model(model))
    return explain(model)


def unoptimize(model: ModelType) -> ModelType:
    """The model with its layers as they were before `optimize`; adapters stay."""
    for module in model.modules():
        if _is_stand_in(module):
            module.__dict__.pop("_nf4", None)
            module.__class__ = _stood_for(module)
    if _HEADS:
        from peft_engine import heads

        heads.detach_head(_transformers_model(model))
    return model


def explain(model: torch.nn.Module) -> Report:
    """What runs in each layer of `model` as it is set now, and why not something faster; changes nothing."""
    return Report(tuple(_layers(model)), _cpu())


# --- which class --------------------------------------------------------------------------------------------

_LAYERS = importlib.util.find_spec("peft_engine.layers") is not None
_HEADS = importlib.util.find_spec("peft_engine.heads") is not None


def _fused_class(module: torch.nn.Module) -> tuple[type | None, str, str]:
    """The class for the module, its op, and why there is none; ("", "") for what no op stands for."""
    if _is_peft_layer(module):
        from peft_engine import peft_layers

        return peft_layers.fused_class(module)
    if _is_bnb_linear(module):
        from peft_engine import bnb_layers

        return bnb_layers.fused_class(module)
    if _LAYERS:
        from peft_engine import layers

        return layers.fused_class(module)
    return None, "", ""


def _is_peft_layer(module: torch.nn.Module) -> bool:
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a model with PEFT's layers has imported PEFT
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _is_bnb_linear(module: torch.nn.Module) -> bool:
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(module, modules.Linear4bit)


def _unreplaced(module: torch.nn.Module) -> bool:
    return "forward" not in module.__dict__


def _is_stand_in(module: torch.nn.Module) -> bool:
    return type(module).__module__ in STAND_INS


def _stood_for(module: torch.nn.Module) -> type:
    """The class as the model had it."""
    if not _is_stand_in(module):
        return type(module)
    return next(c for c in type(module).__mro__ if not c.__module__.startswith("peft_engine."))


def _transformers_model(model: Any) -> torch.nn.Module:
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


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
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if _is_peft_layer(module):
            inside = f"{name}." if name else ""
            yield _peft_line(name, module)
        elif _is_bnb_linear(module):
            yield _bnb_line(name, module)
        elif isinstance(module, (NF4Linear, LoraLinear)):
            yield _our_line(name, module)
        else:
            yield from _model_line(name, module)


def _line(name: str, module: torch.nn.Module, op: str, backend: str, fused: bool, reason: str) -> LayerReport:
    kind = _stood_for(module)
    return LayerReport(name, op, backend, fused, reason, f"{kind.__module__.split('.')[0]}.{kind.__name__}")


def _own(name: str, module: torch.nn.Module, op: str, reason: str) -> LayerReport:
    """A line for a layer whose own code runs."""
    return _line(name, module, op, _stood_for(module).__module__.split(".")[0], False, reason)


def _not_fused(name: str, module: torch.nn.Module) -> LayerReport:
    """A line for a layer that is no stand-in, although its kind may have one."""
    fused, op, reason = _fused_class(module)
    if not _unreplaced(module):
        reason = REPLACED
    elif fused is not None:
        reason = NOT_YET
    return _own(name, module, op, reason)


def _product_line(
    name: str,
    module: torch.nn.Module,
    weight: torch.Tensor | NF4Tensor,
    dtype: torch.dtype,
    adapter: torch.Tensor | None,
) -> LayerReport:
    """A line for a layer that calls ops.lora_linear with an input of `dtype`."""
    call = LoraLinearCall(
        device=weight.device.type,
        dtype=dtype,
        base="nf4" if isinstance(weight, NF4Tensor) else weight.dtype,
        adapter=None if adapter is None else dtype if adapter.dtype == dtype else torch.float32,
        in_features=weight.shape[1],
    )
    try:
        choice = LORA_LINEAR.choose(call)
    except BackendError as error:
        return _line(name, module, "lora_linear", "none", False, str(error))
    fused = choice.backend != "reference"
    reason = choice.reason or ("" if fused else "plain torch; this backend is pinned")
    if fused:  # backends for other devices say nothing about this one
        reason = "; ".join(f"{b}: {why}" for b, why in choice.refused.items() if "not built" not in why)
    return _line(name, module, "lora_linear", choice.backend, fused, reason)


def _our_line(name: str, module: Any) -> LayerReport:
    nf4 = isinstance(module, NF4Linear)
    weight = module.nf4 if nf4 else module.weight
    dtype = (module.compute_dtype or module.weight_dtype) if nf4 else weight.dtype
    adapters = module._modules.get("lora_A", {})
    active = getattr(module, "active_adapter", None)
    names = active if isinstance(active, tuple) else (active,)
    adapter = next((adapters[n] for n in names if n in adapters), None)
    return _product_line(name, module, weight, dtype, adapter)


def _bnb_line(name: str, module: Any) -> LayerReport:
    if not _is_stand_in(module):
        return _not_fused(name, module)
    return _product_line(name, module, module.nf4, module.compute_dtype or module.nf4.dtype, None)


def _peft_line(name: str, module: Any) -> LayerReport:
    from peft_engine import peft_layers

    if not _is_stand_in(module):
        return _not_fused(name, module)
    base = module.get_base_layer()
    names = peft_layers.active_names(module)
    why = peft_layers.own_reason(module, names)
    alone = peft_layers.base_alone(module)
    if why is not None and (not alone or type(base) is torch.nn.Linear):
        return _own(name, module, "lora_linear", why)
    weight = peft_layers.base_weight(base)
    dtype = (base.compute_dtype or weight.dtype) if isinstance(weight, NF4Tensor) else weight.dtype
    adapter = None if alone else module.lora_A[names[0]].weight
    return _product_line(name, module, weight, dtype, adapter)


def _model_line(name: str, module: torch.nn.Module) -> Iterator[LayerReport]:
    if isinstance(module, torch.nn.Linear):
        yield _own(name, module, "linear", "a dense weight without an adapter: torch's product is as fast")
        return
    _, op, _ = _fused_class(module)
    if op:
        yield _not_fused(name, module)


def _cpu() -> str:
    why = native.load_error()
    return why if why is not None else native.isa()

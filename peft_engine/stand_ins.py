"""Which class stands in for a layer: the fused one, and the one that the model has."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from peft_engine import dense_layers, dropout
from peft_engine.conv1d import is_conv1d, is_linear, plain
from peft_engine.methods import experts
from peft_engine.methods.sharded import class_of

# The modules whose classes are fused stand-ins; those of peft_engine.nn and methods are layers of ours.
_WHERE = (
    "layers", "dense_layers", "dense_conv1d", "methods.experts", "bnb_layers", "peft_layers", "peft_experts",
    "dropout",
)  # fmt: skip
STAND_INS = tuple(f"peft_engine.{where}" for where in _WHERE)


def fused_class(module: torch.nn.Module) -> tuple[type | None, str, str]:
    """The class for the module, its op, and why there is none; ("", "") for what no op stands for."""
    if is_peft_experts(module):
        from peft_engine import peft_experts

        return peft_experts.fused_class(module)
    if is_peft_layer(module):
        from peft_engine import peft_layers

        return peft_layers.fused_class(module)
    if is_bnb_linear(module):
        from peft_engine import bnb_layers

        return bnb_layers.fused_class(module)
    if isinstance(module, torch.nn.Dropout):
        return dropout.fused_class(module)
    if is_linear(module):
        return dense_layers.fused_class(module), "", ""
    if experts.is_experts(module):
        return experts.fused_class(module)
    if "transformers" in sys.modules:
        from peft_engine import layers  # imports transformers

        return layers.fused_class(module)
    return None, "", ""


def is_peft_layer(module: torch.nn.Module) -> bool:
    """Whether a module is one that PEFT put around a layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # a model with PEFT's layers has imported PEFT
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def is_peft_experts(module: torch.nn.Module) -> bool:
    """Whether a module is one that PEFT put around a layer for one of its parameters (target_parameters)."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper = getattr(layer, "ParamWrapper", None)  # PEFT 0.17 and later
    return wrapper is not None and isinstance(module, wrapper)


def is_bnb_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer of bitsandbytes in 4 bit."""
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(module, modules.Linear4bit)


def unreplaced(module: torch.nn.Module) -> bool:
    """Whether a call runs the class's forward; accelerate, taking a hook off, leaves that one bound."""
    own = module.__dict__.get("forward")
    return own is None or getattr(own, "__func__", None) is type(module).forward


def as_it_was(module: torch.nn.Module) -> type:
    """The module's class; of experts of which something is held the one that they have without."""
    return module.__dict__.get(experts.AS_IT_WAS) or class_of(module)


def set_class(module: torch.nn.Module, kind: type) -> None:
    """Makes a module, without what was put in its forward's place, one of a class."""
    module.__dict__.pop("forward", None)
    if experts.AS_IT_WAS in module.__dict__:
        module.__dict__[experts.AS_IT_WAS] = kind
    else:
        module.__class__ = kind


def lay_out(module: Any, how: Callable[[torch.nn.Module], None]) -> None:
    """Of PEFT's layer around a Conv1D: the weight, for the kernels or back."""
    base = module._modules.get("base_layer")
    if base is not None and is_conv1d(type(base)):
        how(base)


def is_stand_in(module: torch.nn.Module) -> bool:
    """Whether a module is of a fused class that `optimize` put in the place of the model's."""
    kind = as_it_was(module)  # what only holds experts' weights is a class of peft_engine.experts too
    return kind.__module__ in STAND_INS and not issubclass(kind, experts.ExpertWeights)


def stood_for(module: torch.nn.Module) -> type:
    """The class as the model had it."""
    if not is_stand_in(module):
        return as_it_was(module)
    kind = as_it_was(module)
    if plain(kind) is not kind:
        return plain(kind)
    return next(c for c in kind.__mro__ if not c.__module__.startswith("peft_engine."))


def refuse_repacked(model: torch.nn.Module) -> None:
    """ValueError for a model in which bitsandbytes has repacked weights."""
    names = [name for name, module in model.named_modules() if is_bnb_linear(module)]
    if not names:
        return
    from peft_engine import bnb_layers

    bad = [name for name in names if bnb_layers.is_repacked(model.get_submodule(name))]
    if bad:
        which = f"{bad[0]} ({len(bad)} of {len(names)} layers)"
        raise ValueError(f"optimize: {bnb_layers.REPACKED.format(name=which)}")

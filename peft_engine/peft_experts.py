"""Fused stand-in for PEFT's LoRA on experts' weights (target_parameters); imports PEFT, so only where it is
used.

PEFT wraps the experts once for each adapted weight and adds s B A to all of it, in new memory, before the
model's own code runs. Here the outermost wrapper reads the adapters of all and runs ops.experts.
"""

from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import nn

from peft_engine.methods import experts
from peft_engine.methods.lora_experts import from_file
from peft_engine.ops.experts import Lora

ROUTED = ("top_k_index", "top_k_weights")  # what transformers calls what a router gives


class _FusedExperts(nn.Module):
    """The forward of experts and all wrappers around them through ops.experts."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        routed = [*args, *(kwargs[name] for name in ROUTED[len(args) :] if name in kwargs)]
        if len(routed) != 2 or len(args) + len(kwargs) != 2 or own_reason(self) is not None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        index, shares = routed
        return experts.compute(innermost(self), x, index, shares, loras(self))


class ParamWrapper(_FusedExperts, lora.ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of a parameter, around experts; PEFT looks for the class by this name."""


def fused_class(layer: Any) -> tuple[type | None, str, str]:
    """The fused class, the op, and why there is none."""
    base = innermost(layer)
    if not experts.is_experts(base):
        return None, "router", "PEFT's own code, over W + s B A; of a router, whose values are few"
    why = experts.fused_class(base)[2]
    return (None if why else ParamWrapper), "experts", why


def innermost(layer: Any) -> Any:
    """What all wrappers of this chain are around."""
    while isinstance(layer, lora.ParamWrapper):
        layer = layer._modules["base_layer"]
    return layer


def own_reason(layer: Any) -> str | None:
    """Why the wrappers, as they are set now, run PEFT's forward; None when they run the fused one."""
    base = innermost(layer)
    if layer.disable_adapters or layer.merged:
        return "the adapters are disabled or merged: the experts run alone"
    if not experts.is_experts(base):
        return "the weights of the experts are parametrized"
    if any(p.requires_grad for p in base._parameters.values() if p is not None):
        return "the weights of the experts are trained too; the kernels take them frozen"
    for part in (base, *_inside(layer)):
        if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
            return f"the {type(part).__name__} inside has hooks, which the fused product would pass by"
    wrappers = (layer, *_inside(layer))
    if not any(name in part.lora_A for part in wrappers for name in part.active_adapters):
        return "none of its adapters is active: the experts run alone"
    return None


def _inside(layer: Any) -> list[Any]:
    """The wrappers inside of this one."""
    found = []
    while isinstance(layer := layer._modules["base_layer"], lora.ParamWrapper):
        found.append(layer)
    return found


def loras(layer: Any) -> list[Lora | None]:
    """The active adapters of gate_up_proj and of down_proj, several of one weight as one."""
    wrappers = {part.parameter_name: part for part in (layer, *_inside(layer))}
    return [_lora(wrappers[leaf]) if leaf in wrappers else None for leaf in experts.LEAVES]


def _lora(wrapper: Any) -> Lora | None:
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    held = [
        from_file(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts)
        for name in names
    ]
    if not names:
        return None
    scales = [float(wrapper.scaling[name]) for name in names]
    if len(names) == 1:
        return Lora(*held[0], scales[0])
    a = torch.cat([a.float() for a, _ in held], 1)
    return Lora(a, torch.cat([s * b.float() for s, (_, b) in zip(scales, held, strict=True)], 2), 1.0)

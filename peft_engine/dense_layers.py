"""Dense linear layers outside the other fused ones, by the product that is the fastest (dense.py).

Without an adapter, or with one that is off. float32 weights that are trained have torch's own product.
"""

import importlib
from typing import Any

import torch
from torch import nn

from peft_engine import dense
from peft_engine.conv1d import is_conv1d, plain
from peft_engine.methods.lora import BASES, LAYERS, LoraLinear
from peft_engine.methods.sharded import class_of


class FusedLinear(nn.Linear):
    """torch's Linear."""

    stands_for = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return dense.linear(input, self.weight, self.bias)


class FusedLoraLinear(LoraLinear):
    """A Linear with adapters, for rows that run none of them."""

    stands_for = LoraLinear
    linear = staticmethod(dense.linear)


LAYERS[FusedLinear], BASES[FusedLoraLinear] = FusedLoraLinear, FusedLinear
FUSED: dict[type, type] = {nn.Linear: FusedLinear, LoraLinear: FusedLoraLinear}


def fused_class(module: nn.Module) -> type | None:
    """The class for a dense linear layer on a CPU, its own where it has it; None for every other module."""
    kind = plain(class_of(module))
    if kind not in FUSED and any(is_conv1d(base) for base in kind.__mro__):
        importlib.import_module("peft_engine.dense_conv1d")  # imports transformers; adds to FUSED
    weight = module._parameters.get("weight") if kind in FUSED else None
    return FUSED[kind] if weight is not None and weight.device.type == "cpu" else None


def library(module: Any) -> str:
    """Whose product runs in a dense linear layer once it is fused, as dense.library says."""
    fused = fused_class(module)
    learns = any(p.requires_grad for p in (module.weight, module.bias) if p is not None)
    whose = "torch" if fused is None else dense.library(getattr(module, "base_weight", module.weight))
    return "torch" if learns and whose == "oneDNN" else whose

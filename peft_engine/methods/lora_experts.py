"""LoRA on the experts of a mixture (ops/experts.py): of each weight one A (E, R, in) and one B (E, out, R).

PEFT's files (its target_parameters) have A as (E R, in) and B as (out, R E), the experts the fastest. A
router, whose code reads a weight (E, in) of its own, reads W + s B A in its place, which has few values.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft_engine.made_classes import stands_for, subclass
from peft_engine.methods.experts import LEAVES, ExpertWeights, NF4ExpertWeights
from peft_engine.methods.lora import BASES, LAYERS, WithLora
from peft_engine.ops.experts import Lora


class LoraExpertWeights(WithLora, ExpertWeights):
    """Experts' weights with adapters."""

    def adapter(self) -> Lora | None:
        """The adapter that is active."""
        name = self.active_adapter
        if not isinstance(name, str) or name not in self.lora:
            return None
        return Lora(self.lora_A[name], self.lora_B[name], self.lora[name].scaling)


class LoraNF4ExpertWeights(LoraExpertWeights, NF4ExpertWeights):  # type: ignore[misc]
    """Experts' weights in NF4 with adapters (QLoRA)."""


class _Router(WithLora):
    """A router with adapters on its weight."""

    @property
    def base_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self._parameters["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> torch.Tensor:
        """What the router's own code reads."""
        base, name = self.base_weight, self.active_adapter
        if not isinstance(name, str) or name not in self.lora:
            return base
        a, b = self.lora_A[name], self.lora_B[name]
        return torch.addmm(base.float(), b.float(), a.float(), alpha=self.lora[name].scaling).to(base.dtype)


@functools.cache
def router_class(kind: Any) -> type[nn.Module]:
    """The class of a router with adapters by that without."""
    adapted: type[nn.Module] = subclass(_Router, kind, __name__)
    LAYERS[kind], BASES[adapted] = adapted, kind
    return adapted


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router with adapters."""
    return isinstance(module, _Router)


def __getattr__(name: str) -> Any:
    return router_class(stands_for(name, __name__))  # a pickle's


for _base, _adapted in ((ExpertWeights, LoraExpertWeights), (NF4ExpertWeights, LoraNF4ExpertWeights)):
    LAYERS[_base], BASES[_adapted] = _adapted, _base


def from_file(a: torch.Tensor, b: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT's files have them, as the layer has them."""
    r = a.shape[0] // count
    return a.view(count, r, -1), b.view(-1, r, count).permute(2, 0, 1).contiguous()


def to_file(leaf: str, t: torch.Tensor) -> torch.Tensor:
    """A or B as the layer has it, as PEFT's files have it."""
    if leaf == "lora_A":
        return t.flatten(0, 1)
    return t.permute(1, 2, 0).flatten(1)


def nested(paths: Iterable[str]) -> dict[str, str]:
    """For each adapted weight of experts its path in PEFT's file: that of the experts for the last of them,
    with a base_layer more for each that is wrapped inside of it.
    """
    found: dict[str, str] = {}
    outside: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: -LEAVES.index(path.rpartition(".")[2])):
        parent = path.rpartition(".")[0]
        found[path] = outside[parent] = f"{outside[parent]}.base_layer" if parent in outside else parent
    return found

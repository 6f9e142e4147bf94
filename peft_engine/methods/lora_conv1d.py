"""LoRA on transformers' Conv1D (GPT-2). Imports transformers, which has made the layer."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peft_engine.methods.lora import BASES, LAYERS, WithLora, run


class LoraConv1D(WithLora, Conv1D):
    """A Conv1D with adapters, its weight laid out as conv1d.by_rows says.

    Rows without an adapter run the product of the layer before attach, with its bits up to the order in which
    a transposed operand is added up.
    """

    linear: Callable[..., torch.Tensor] = staticmethod(F.linear)

    @property
    def base_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self._parameters["weight"]  # type: ignore[assignment]
        return run(self, x, weight.t(), self.linear)


LAYERS[Conv1D], BASES[LoraConv1D] = LoraConv1D, Conv1D

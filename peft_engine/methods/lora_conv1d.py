"""LoRA on transformers' Conv1D (GPT-2). Imports transformers, which has made the layer."""

import torch
from transformers.pytorch_utils import Conv1D

from peft_engine.methods.lora import BASES, LAYERS, WithLora, run


class LoraConv1D(WithLora, Conv1D):
    """A Conv1D with adapters, its weight laid out as conv1d.by_rows says.

    Rows without an adapter run torch's product, with the bits of before attach up to the order in which a
    transposed operand is added up.
    """

    @property
    def base_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = self._parameters["weight"]  # type: ignore[assignment]
        return run(self, x, weight.t())


LAYERS[Conv1D], BASES[LoraConv1D] = LoraConv1D, Conv1D

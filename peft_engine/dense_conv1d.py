"""dense_layers.py for transformers' Conv1D (GPT-2). Imports transformers, which has made the layer."""

import torch
from transformers.pytorch_utils import Conv1D

from peft_engine import dense
from peft_engine.dense_layers import FUSED
from peft_engine.methods.lora import BASES, LAYERS
from peft_engine.methods.lora_conv1d import LoraConv1D


class FusedConv1D(Conv1D):
    """transformers' Conv1D."""

    stands_for = Conv1D

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dense.linear(x, self.weight.t(), self.bias)


class FusedLoraConv1D(LoraConv1D):
    """A Conv1D with adapters, for rows that run none of them."""

    stands_for = LoraConv1D
    linear = staticmethod(dense.linear)


LAYERS[FusedConv1D], BASES[FusedLoraConv1D] = FusedLoraConv1D, FusedConv1D
FUSED |= {Conv1D: FusedConv1D, LoraConv1D: FusedLoraConv1D}

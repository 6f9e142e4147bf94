"""The fused stand-in for nn.Dropout: what `optimize` makes of the dropout layers of a model."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_engine.methods.sharded import class_of
from peft_engine.ops.dropout import DROPOUT, DropoutCall, draw_seed, dropout
from peft_engine.ops.nf4 import DTYPES


class FusedDropout(nn.Dropout):
    """nn.Dropout that draws on every thread and keeps no mask: on a CPU torch draws one element at a time.

    Under torch.compile, on a GPU, in place and for other dtypes torch's runs.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        plain = input.device.type == "cpu" and input.dtype in DTYPES and not self.inplace and self.p < 1.0
        if not plain or torch.compiler.is_compiling():
            return F.dropout(input, self.p, True, self.inplace)
        seed = draw_seed(self.p, input.device)
        assert seed is not None
        return dropout(input, self.p, seed)


def fused_class(module: Any) -> tuple[type | None, str, str]:
    """The fused class for a dropout layer and its op; none for another module, and what never drops a thing
    or drops it in place.
    """
    ours = class_of(module) in (nn.Dropout, FusedDropout) and module.p > 0.0 and not module.inplace
    return (FusedDropout, "dropout", "") if ours else (None, "", "")


def running(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that runs a FusedDropout in training ("": torch's own code), and why no faster one."""
    if device != "cpu":
        return "", "on a GPU torch's own kernel runs"
    choice = DROPOUT.choose(DropoutCall(device, dtype))
    return choice.backend, choice.reason

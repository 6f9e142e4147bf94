"""The arguments that the bottleneck's kernels share, as the raw ops give them."""

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """An adapter, its norm (None where there is none) and settings."""

    down_weight: torch.Tensor
    down_bias: torch.Tensor | None
    up_weight: torch.Tensor
    up_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    activation: str
    scaling: float
    eps: float = 0.0

    @property
    def width(self) -> int:
        return self.down_weight.shape[0]

    def parameters(self, instead: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """down_weight to norm_bias, `instead` for each that is not there: no kernel reads it."""
        return tuple(instead if t is None else t for t in self[:6])

"""A call's tensors as the kernels take them: pointers, sizes, strides, constants, in the kernels' order."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Call:
    """The inputs of a forward or a backward, every last dimension dense; a bias spreads by strides of 0.

    What is made of all of them is made once for the three kernels of a backward.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prefix_k: torch.Tensor
    prefix_v: torch.Tensor
    first: torch.Tensor | None
    last: torch.Tensor | None
    bias: torch.Tensor | None
    causal: bool
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    softcap: float = 0.0

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows(self) -> int:
        """Packed rows of one key head."""
        return self.q.shape[2] * self.group

    @property
    def heads(self) -> int:
        """Key heads of all rows of the batch."""
        return self.k.shape[1] * self.q.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, prefix_k, prefix_v."""
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v

    @cached_property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, prefix_k, prefix_v, first, last, bias; q in the place of what is not given."""
        masks = (self.q if t is None else t for t in (self.first, self.last, self.bias))
        return *self.tensors, *masks

    @cached_property
    def dropout(self) -> tuple[Any, ...]:
        """seed, threshold, 1 / (1 - p); without dropout None, which leaves no argument."""
        if not self.dropout_p:
            return None, None, None
        return self.seed, round(self.dropout_p * 2**32), 1.0 / (1.0 - self.dropout_p)

    @property
    def cap(self) -> float | None:
        """The softcap; without one None, which leaves no argument."""
        return self.softcap or None

    @property
    def sizes(self) -> tuple[int, ...]:
        """queries, keys, prefix, kv_heads."""
        return self.q.shape[2], self.k.shape[2], self.prefix_k.shape[2], self.k.shape[1]

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of q, k, v, prefix_k, prefix_v and bias, all but the last dimension's."""
        bias = (0, 0, 0)
        if self.bias is not None:
            bias = self.bias.expand(*self.q.shape[:3], self.k.shape[2]).stride()[:3]
        prefix = (self.stride_of_prefix(t) for t in (self.prefix_k, self.prefix_v))
        parts = *(t.stride()[:3] for t in (self.q, self.k, self.v)), *prefix, bias
        return tuple(stride for part in parts for stride in part)

    def stride_of_prefix(self, t: torch.Tensor) -> tuple[int, ...]:
        """A prefix that the batch shares is read from its one copy."""
        return (0 if t.shape[0] == 1 else t.stride(0)), *t.stride()[1:3]

    @cached_property
    def constants(self) -> dict[str, Any]:
        head_dim = self.q.shape[3]
        return {
            "GROUP": self.group, "CAUSAL": self.causal and self.first is None,
            "INTERVALS": self.first is not None, "BIAS": self.bias is not None,
            "DROPOUT": self.dropout_p > 0.0, "CAPPED": self.softcap > 0.0,
            "EXACT": self.q.dtype == torch.float32, "HEAD_DIM": head_dim,
            "D": max(16, triton.next_power_of_2(head_dim)),
        }  # fmt: skip

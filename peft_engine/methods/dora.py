"""A layer's product under a DoRA adapter (Liu et al. 2024, arXiv 2402.09353); its maths: ops/dora_linear.

Kept in the layer (derived.py): ||W||^2 of each row, and in evaluation the norm of W + s B A too, since one
row of a decoded token takes less time than the norm. In training the norm is formed in each forward.
"""

from typing import Any

import torch
from torch.nn import functional as F

from peft_engine.methods import derived
from peft_engine.ops.dora_linear import dora_linear, dora_norm, row_squares
from peft_engine.ops.nf4 import NF4Tensor


def product(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    name: str,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """The layer's output under adapter `name`; dropout is drawn by torch, which checkpointing draws again."""
    dropped = F.dropout(x, dropout_p) if dropout_p > 0.0 else None
    n = norm(layer, weight, name, lora_a, lora_b, scaling)
    return dora_linear(x, weight, lora_a, lora_b, magnitude, scaling, bias=bias, dropped=dropped, norm=n)


def norm(
    layer: Any,
    weight: torch.Tensor | NF4Tensor,
    name: str,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """||W + s B A|| of each row, float32 (out_features,)."""

    def fresh() -> torch.Tensor:
        return dora_norm(weight, lora_a, lora_b, scaling, squares=squares(layer, weight))

    if torch.compiler.is_compiling() or derived.learns(layer, lora_a, lora_b):
        return fresh()
    return derived.kept(layer, ("norm", name), (_memory(weight), lora_a, lora_b), fresh, scaling)


def squares(layer: Any, weight: torch.Tensor | NF4Tensor) -> torch.Tensor:
    """||W||^2 of each row, float32 (out_features,)."""
    if torch.compiler.is_compiling():  # what attach or a load left; no address or version can be asked for
        before = derived.found(layer, derived.BASE)
        return row_squares(weight) if before is None or before.device != weight.device else before
    return derived.kept(layer, derived.BASE, (_memory(weight),), lambda: row_squares(weight))


def _memory(weight: torch.Tensor | NF4Tensor) -> torch.Tensor:
    """The tensor that stays: of a Conv1D's weight each forward takes a new view, the transpose."""
    if isinstance(weight, NF4Tensor):
        return weight.packed
    viewed = weight._base
    return weight if viewed is None or viewed.shape != weight.shape[::-1] else viewed

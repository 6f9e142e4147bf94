"""A layer's product under a DoRA adapter (Liu et al. 2024, arXiv 2402.09353); its maths: ops/dora_linear.

Kept in the layer: ||W||^2 of each row, and in evaluation the norm of W + s B A too, since one row of a
decoded token takes less time than the norm. Each is kept by the memory and the version of what it is made
of, which torch counts for every write but one through `.data`; in training the norm is formed in each
forward, and train() forgets it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.ops.dora_linear import dora_linear, dora_norm, row_squares
from peft_engine.ops.nf4 import NF4Tensor

KEPT = "_peft_engine_dora"  # in a layer's __dict__
SQUARES = None  # where an adapter's norm is under its name


class _Kept(dict):
    """What for, to what it was made of and the value; a copy of the layer starts without."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


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

    if layer.training or torch.compiler.is_compiling():
        return fresh()
    return _kept(layer, name, (_memory(weight), lora_a, lora_b), scaling, fresh)


def squares(layer: Any, weight: torch.Tensor | NF4Tensor) -> torch.Tensor:
    """||W||^2 of each row, float32 (out_features,)."""
    if torch.compiler.is_compiling():  # what attach left; no address or version can be asked for
        found = getattr(layer, KEPT, {}).get(SQUARES)
        if found is not None and found[1].device == weight.device:
            return found[1]
        return row_squares(weight)
    return _kept(layer, SQUARES, (_memory(weight),), 1.0, lambda: row_squares(weight))


def forget(layer: Any, *, base: bool) -> None:
    """Drops what is kept of the adapters; base: and of the layer's own weight."""
    kept = layer.__dict__.get(KEPT, {})
    for name in [name for name in kept if base or name is not SQUARES]:
        del kept[name]


def _memory(weight: torch.Tensor | NF4Tensor) -> torch.Tensor:
    return weight.packed if isinstance(weight, NF4Tensor) else weight


def _kept(
    layer: Any,
    name: str | None,
    made_of: tuple[torch.Tensor, ...],
    scaling: float,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:
    try:
        state = (scaling, *((t.data_ptr(), t._version) for t in made_of))
    except RuntimeError:  # an inference tensor, whose versions torch does not count
        return make()
    kept = layer.__dict__.setdefault(KEPT, _Kept())
    found = kept.get(name)
    if found is None or found[0] != state:
        with dispatch.outside_inference():
            found = kept[name] = state, make()
    return found[1]

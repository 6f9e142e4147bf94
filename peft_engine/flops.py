"""What torch.utils.flop_counter counts of the raw ops: the multiplications and additions of their products.

As torch counts its own: two for each step of a matrix multiplication, attention in full where it is causal,
nothing for what goes element by element, for decoding NF4, or for what an op computes once more. On a GPU,
where tensors go past the dispatcher, nothing is counted.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

Shape = Sequence[int]


def lora_linear_forward(x: Shape, *rest: Any, **_: Any) -> int:
    n, a = rest[5], rest[6]
    rows, k, r = math.prod(x[:-1]), x[-1], 0 if a is None else a[0]
    return 2 * rows * (n * k + r * (n + k))


def lora_linear_backward(dy: Shape, x: Shape, *rest: Any, **_: Any) -> int:
    a, _b, h, *_settings, need_dx, need_da = rest[5:]
    rows, k, n, r = math.prod(x[:-1]), x[-1], dy[-1], 0 if a is None else a[0]
    adapter = r * n * (need_dx or need_da) + r * k * (need_dx + need_da) + r * n * (h is not None)
    return 2 * rows * (n * k * need_dx + (adapter if r else 0))


def lora_groups_forward(x: Shape, *rest: Any, **_: Any) -> int:
    n, (_, r, _) = rest[5], rest[6]
    return 2 * math.prod(x[:-1]) * (n * x[-1] + r * (n + x[-1]))


def lora_groups_backward(dy: Shape, x: Shape, *rest: Any, **_: Any) -> int:
    (_, r, _), need_dx = rest[5], rest[-1]
    n, k = dy[-1], x[-1]
    return 2 * math.prod(x[:-1]) * (n * k * need_dx + r * (n + k * need_dx + k + n))


def prefix_attention_forward(q: Shape, k: Shape, v: Shape, prefix_k: Shape, *rest: Any, **_: Any) -> int:
    return 4 * math.prod(q) * (k[2] + prefix_k[2])


def prefix_attention_backward(
    dout: Shape, q: Shape, k: Shape, v: Shape, prefix_k: Shape, *rest: Any, **_: Any
) -> int:
    return 8 * math.prod(q) * (k[2] + prefix_k[2])


def linear_cross_entropy(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    need_dx, need_dw, _need_db = rest[-3:]
    return 2 * math.prod(x) * weight[0] * (1 + need_dx + need_dw)


def bottleneck_forward(x: Shape, residual: Shape | None, down: Shape, *rest: Any, **_: Any) -> int:
    return 4 * math.prod(x) * down[0]


def bottleneck_backward(
    dy: Shape, x: Shape, middle: Shape, stats: Shape, down: Shape, *rest: Any, **_: Any
) -> int:
    dx, ddown, _, dup, *_biases = rest[-1]
    return 2 * math.prod(dy) * down[0] * (1 + bool(dx) + bool(ddown) + bool(dup))


def experts_forward(x: Shape, index: Shape, weights: Shape, *rest: Any, **_: Any) -> int:
    base, adapters = _products_of_experts(x[-1], rest)
    return 2 * math.prod(index) * (base + adapters)


def experts_backward(dy: Shape, x: Shape, weights: Shape, *rest: Any, **_: Any) -> int:
    base, adapters = _products_of_experts(x[-1], rest)
    return 2 * rest[19][0] * (base + 2 * adapters)


def _products_of_experts(k: int, weights: Sequence[Any]) -> tuple[int, int]:
    """The multiplications of one token's expert: of its weights, and of their adapters."""
    a_up, a_down, width = weights[5], weights[13], weights[17]
    up, down = (0 if a is None else a[1] for a in (a_up, a_down))
    return 3 * width * k, up * (k + 2 * width) + down * (width + k)


def dense_by_onednn(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return 2 * math.prod(x) * weight[0]


@functools.cache
def register() -> None:
    """Makes torch's counter know the raw ops, once."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    from peft_engine import ops  # noqa: F401  which defines them
    from peft_engine.ops import experts, lora_groups  # noqa: F401

    formulas: dict[Any, Any] = {getattr(torch.ops.peft_engine, f.__name__): f for f in _FORMULAS}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see dense.py
        formulas[torch.ops.mkldnn._linear_pointwise] = dense_by_onednn
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


_FORMULAS = (
    lora_linear_forward, lora_linear_backward, lora_groups_forward, lora_groups_backward,
    prefix_attention_forward, prefix_attention_backward, linear_cross_entropy, bottleneck_forward,
    bottleneck_backward, experts_forward, experts_backward,
)  # fmt: skip

"""What bench/tune.py tunes of bottleneck and prefix_attention: candidate tiles, and calls that launch them.

A call is a part of the op's forward or backward, with the other kernels in it at the table's tiles.
"""

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu_timing import Call

Tile = tuple[int, ...]


class Tuned(NamedTuple):
    """The rows (of prefix_attention: queries) at which a kernel is timed, and what its tile is made of."""

    rows: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]


# By op and kernel; the order of a tile's numbers is that of the op's tiles.py.
KERNELS = {
    "bottleneck.fused": Tuned((8192,), ((32, 64, 128), (32, 64), (32, 64), (4, 8), (2, 3))),
    "bottleneck.fused_backward": Tuned((8192,), ((32, 64, 128), (32, 64), (32, 64), (4, 8), (2, 3))),
    "bottleneck.contract": Tuned((64, 512, 2048), ((16, 32, 64), (64,), (64, 128), (4, 8), (2, 3, 4))),
    "bottleneck.up": Tuned((64, 512, 2048), ((16, 32, 64), (64,), (64, 128), (4, 8), (1, 2))),
    "bottleneck.dx": Tuned((64, 512, 2048), ((16, 32, 64), (64,), (64, 128), (4, 8), (1, 2))),
    "bottleneck.outer": Tuned((512, 8192), ((32, 64), (64,), (64, 128), (4, 8), (2, 3))),
    "prefix_attention.attend": Tuned((16, 2048), ((16, 64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "prefix_attention.dq": Tuned((2048,), ((64, 128), (32, 64), (4, 8), (2, 3))),
    "prefix_attention.dkv": Tuned((2048,), ((64, 128), (32, 64), (4, 8), (2, 3))),
    "prefix_attention.prefix": Tuned((2048,), ((32, 64), (32, 64), (4, 8), (2, 3))),
}
# features and width; heads of queries and of keys, and head_dim: the last is what the table goes by
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "bottleneck": ((4096, 64), (2048, 64)),
    "prefix_attention": ((32, 8, 128), (16, 16, 128)),
}
TOKENS, PREFIX = 16384, 32  # of a batch of prefix_attention


def shapes_of(name: str) -> tuple[tuple[int, ...], ...]:
    return SHAPES[name.partition(".")[0]]


def rows_of(name: str) -> tuple[int, ...]:
    return KERNELS[name].rows


def case_of(name: str, shape: tuple[int, ...], rows: int) -> str:
    return f"{name}, {'x'.join(map(str, shape))}, {rows} rows"


def candidates(name: str, rows: int | None = None) -> list[Tile]:
    """The tiles to try, at any number of rows."""
    return list(itertools.product(*KERNELS[name].choices))


def table_tile(name: str, shape: tuple[int, ...], rows: int, device: torch.device) -> Tile:
    """The tile that the op's table has for a call."""
    from peft_engine.kernels.tiles import tile_of

    op, _, kernel = name.partition(".")
    table = importlib.import_module(f"peft_engine.kernels.{op}.tiles").TABLE
    size = rows
    if op == "prefix_attention":  # packed rows; of dkv the keys of all heads
        size *= shape[1] if kernel == "dkv" else shape[0] // shape[1]
    return tile_of(op, table, kernel, size, shape[-1], torch.bfloat16, device)


def call_of(name: str, shape: tuple[int, ...], rows: int, device: torch.device) -> tuple[Call, int]:
    """The launch of a kernel, in bf16, and how often it is launched: once."""
    op, _, kernel = name.partition(".")
    calls = bottleneck_calls if op == "bottleneck" else prefix_calls
    return calls(shape, rows, device)[kernel], 1


def bottleneck_calls(shape: tuple[int, ...], rows: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    from peft_engine.kernels.bottleneck import fused, outer, split
    from peft_engine.kernels.bottleneck.call import Call as Adapter

    features, width = shape
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=device)
    weights = bf16(width, features) / features**0.5, bf16(features, width) / width**0.5
    adapter = Adapter(weights[0], bf16(width), weights[1], bf16(features), None, None, "relu", 1.0)
    x, dy, y, dx = (bf16(rows, features) for _ in range(4))
    middle, dm = bf16(rows, width), bf16(rows, width)
    stats = torch.empty(0, 2, device=device)
    back = {"residual_is_x": True}
    split_forward = partial(split.forward, adapter, x, x, y, middle, stats)
    return {
        "fused": partial(fused.forward, adapter, x, x, y, middle, stats),
        "fused_backward": partial(fused.backward, adapter, dy, x, middle, stats, dm, dx, **back),
        "contract": split_forward,
        "up": split_forward,
        "dx": partial(split.backward, adapter, dy, x, middle, stats, dm, dx, **back),
        "outer": partial(outer.of_down, adapter, dm, x, stats),
    }


def prefix_calls(shape: tuple[int, ...], rows: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    from peft_engine.kernels.prefix_attention import dkv, dq
    from peft_engine.kernels.prefix_attention.call import Call as Attention
    from peft_engine.kernels.prefix_attention.forward import forward

    heads, kv_heads, head_dim = shape
    batch, scale = max(1, TOKENS // max(rows, 2048)), head_dim**-0.5
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=device)
    q, dout, grad_q = (bf16(batch, heads, rows, head_dim) for _ in range(3))
    keys = rows if rows > 16 else 2048  # few queries come after many keys
    k, v, grad_k, grad_v = (bf16(batch, kv_heads, keys, head_dim) for _ in range(4))
    prefix = [bf16(1, kv_heads, PREFIX, head_dim) for _ in range(4)]
    call = Attention(q, k, v, *prefix[:2], None, None, None, True)
    out, lse = forward(*call.tensors, None, None, None, True, scale)
    delta = torch.zeros_like(lse)
    return {
        "attend": partial(forward, *call.tensors, None, None, None, True, scale),
        "dq": partial(dq.gradient_of_queries, call, dout, out, lse, delta, grad_q, scale),
        "dkv": partial(dkv.gradient_of_real, call, dout, lse, delta, grad_k, grad_v, scale),
        "prefix": partial(dkv.gradient_of_prefix, call, dout, lse, delta, *prefix[2:], scale),
    }

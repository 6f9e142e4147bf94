"""The launches of lora_linear, compiled ahead of time: every tile of the tables, for its architectures."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft_engine.kernels.lora_linear import fill, single, tiles
from peft_engine.kernels.lora_linear.adapter import split
from peft_engine.kernels.lora_linear.down import down
from peft_engine.kernels.lora_linear.outer import outer
from peft_engine.kernels.lora_linear.up import up_

from peft_engine.kernels.tiles import pretended
from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, TENSOR_CORE, Variant, launched

N, K = 4096, 4096
WIDE = "LDG.E.128|LDGSTS.E.BYPASS.128|LDGSTS.E.128"
NF4, DENSE = "nf4", "dense"
MAIN = ("and the copy of x", "behind x", "the workspace", "the backward's workspace")  # of _others


def variants() -> Iterator[Variant]:
    for arch in ARCHS:
        with pretended(arch):
            for kernel in tiles.TABLE:
                for place, (rows, rank, *_) in enumerate(tiles.entries(kernel, arch)):
                    # float16 compiles to bfloat16's code but for its products with float32: one entry shows
                    # it, on a few architectures
                    first = tuple(NAMES) if arch in FEW_ARCHS else (torch.float32, torch.bfloat16)
                    dtypes = first if place == 0 else (torch.bfloat16,)
                    yield from _entry(kernel, dtypes, min(rows, 8192), rank, arch)
            yield from _others(arch)


def _entry(kernel: str, dtypes, rows: int, rank: int, arch: int) -> Iterator[Variant]:
    """The launches of one entry of a table: its common case."""
    for dtype in dtypes:
        x, dy = _meta(rows, K, dtype), _meta(rows, N, dtype)
        a, b = _meta(rank, K), _meta(N, rank)
        h = _meta(rows, rank)
        name = f"{NAMES[dtype]}, {rows} rows, rank {rank}"
        calls: dict[str, Callable[[], Any]] = {
            "down": lambda x=x, a=a: down(x, a, 1.0),
            "up": lambda dy=dy, h=h, b=b: up_(dy, h, b, 1.0),
            "outer": lambda x=x, h=h, dy=dy: outer(h, x, h, dy, torch.float32),
            "single": lambda x=x, a=a, b=b: single.forward(x, _base(NF4), N, a, b, 1.0, None, 0.0, None),
            "single_backward": lambda dy=dy, a=a, b=b: single.backward(
                dy, _base(NF4), K, a, b, 1.0, 0.0, None
            ),
        }
        yield from _named(calls[kernel], name, arch)


def _others(arch: int) -> Iterator[Variant]:
    """What else is launched, in bfloat16 at rank 16: dropout, a dense weight, sorted rows, an adapter in
    half.
    """
    half = torch.bfloat16
    rows, rank = 2048, 16
    x, dy, seed = _meta(rows, K, half), _meta(rows, N, half), _meta(1, dtype=torch.int64)
    a, b, h = _meta(rank, K), _meta(N, rank), _meta(rows, rank)
    order, bounds = _meta(rows, dtype=torch.int64), _meta(5, dtype=torch.int32)
    many_a, many_b = _meta(4, rank, K), _meta(4, N, rank)
    buffer = _meta(rows, K + 64, half)[:, : K + 48]
    calls: dict[str, Callable[[], Any]] = {
        "and the copy of x": lambda: down(x, a, 1.0, buffer=buffer, copy=True, terms=3),
        "behind x": lambda: down(buffer[:, :K], a, 1.0, buffer=buffer, terms=3),
        "dropout": lambda: (
            down(x, a, 1.0, dropout_p=0.1, seed=seed),
            up_(dy, h, b, 1.0, dropout_p=0.1, seed=seed),
            outer(h, x, h, dy, torch.float32, dropout_p=0.1, seed=seed),
            single.forward(x, _base(NF4), N, a, b, 1.0, None, 0.1, seed),
            single.backward(dy, _base(NF4), K, a, b, 1.0, 0.1, seed),
        ),
        "dense weight": lambda: (
            single.forward(x, _base(DENSE), N, a, b, 1.0, None, 0.0, None),
            single.backward(dy, _base(DENSE), K, a, b, 1.0, 0.0, None),
        ),
        "no adapter": lambda: (
            single.forward(x, _base(NF4), N, None, None, 1.0, None, 0.0, None),
            single.backward(dy, _base(NF4), K, None, None, 1.0, 0.0, None),
        ),
        "adapter in bf16": lambda: (
            down(x, a.to(half), 1.0),
            single.forward(x, _base(NF4), N, a.to(half), b.to(half), 1.0, None, 0.0, None),
        ),
        "sorted rows": lambda: (
            down(x, many_a, 1.0, order=order, bounds=bounds),
            up_(dy, h, many_b, 1.0, order=order, bounds=bounds),
            outer(h, x, h, dy, torch.float32, order=order, bounds=bounds),
        ),
        "the terms of 32 adapters": lambda: split(_meta(32, 32, K), half),
        "the workspace": lambda: fill.forward(_base(NF4), N, a, b, 2.0, x, 48),
        "the backward's workspace": lambda: fill.backward(_base(NF4), N, a, b, 2.0, x, 48),
        "the workspace, 576 columns, rank 128": lambda: fill.backward(
            _base(NF4, 576), N, _meta(128, 576), _meta(N, 128), 2.0, x, 384
        ),
        "the workspace, dense weight": lambda: fill.forward(_base(DENSE), N, a, b, 2.0, x, 48),
    }
    for name, call in calls.items():
        if name in MAIN or arch in FEW_ARCHS:
            yield from _named(call, f"bf16, {name}", arch)


def _named(call: Callable[[], Any], name: str, arch: int) -> Iterator[Variant]:
    for variant in launched(call):
        kernel = variant.kernel.__name__
        dot = kernel in ("down_kernel", "up_kernel", "outer_kernel", "forward_kernel", "backward_kernel")
        yield dataclasses.replace(
            variant,
            name=name,
            archs=(arch,),
            wants=(WIDE, TENSOR_CORE) if dot else (),
            weights=_weights(variant),
        )


def _weights(variant: Variant) -> int | None:
    """The weights decoded in one turn of the single kernel's loop."""
    constants = variant.constexprs
    return constants["BLOCK_N"] * constants["BLOCK_K"] if constants.get("NF4") else None


def _base(kind: str, columns: int = K) -> tuple[Any, ...]:
    if kind == DENSE:
        return _meta(N, columns, torch.bfloat16), None, None, None, 0
    blocks = N * columns // 64
    return (
        _meta(N * columns // 2, 1, dtype=torch.uint8),
        _meta(blocks, dtype=torch.uint8),
        _meta(blocks // 256),
        _meta(1),
        64,
    )


def _meta(*shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    *sizes, last = shape
    if isinstance(last, torch.dtype):
        return torch.empty(sizes, dtype=last, device="meta")
    return torch.empty(shape, dtype=dtype, device="meta")

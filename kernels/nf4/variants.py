"""The launches of nf4, to be compiled ahead of time: dtypes, block sizes, tiles, 2^31 weights."""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.nf4.dequantize import dequantize
from peft_engine.kernels.nf4.quantize import VALUES, quantize

from peft_engine.kernels.variants import FEW_ARCHS, NAMES, Variant, launched
from peft_engine.ops.nf4 import DTYPES

SIDE = 4096


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        yield from _dequantize(dtype, True)
        yield from _quantize(dtype)
    for variant in _beside():
        yield dataclasses.replace(variant, archs=FEW_ARCHS)


def _beside() -> Iterator[Variant]:
    """What is launched beside a weight that is quantised twice in blocks of 64."""
    yield from _dequantize(torch.bfloat16, False)
    yield from _dequantize(torch.bfloat16, True, "block 4096", blocksize=4096)
    yield from _quantize(torch.bfloat16, "block 4096", blocksize=4096)
    huge = (1, 1 << 31)
    yield from _dequantize(torch.bfloat16, True, "2^31", shape=huge)
    yield from _quantize(torch.bfloat16, "2^31", shape=huge)
    yield from _dequantize(torch.bfloat16, True, "rows apart", stride=SIDE + 64)
    for columns in (4096, 2048, 1024):
        yield from _dequantize(torch.bfloat16, True, f"{columns} weights", shape=(1, columns))
    yield from _dequantize(torch.bfloat16, True, "short block", shape=(1, SIDE * SIDE + 17), wide=False)


def _name(dtype: torch.dtype, nested: bool, rest: str) -> str:
    return ", ".join(filter(None, (NAMES[dtype], "nested" * nested, rest)))


def _dequantize(
    dtype: torch.dtype, nested: bool, rest: str = "", *, blocksize: int = 64,
    shape: tuple[int, int] = (SIDE, SIDE), stride: int | None = None, wide: bool = True,
) -> Iterator[Variant]:  # fmt: skip
    rows, columns = shape
    packed = torch.empty(-(-rows * columns // 2), 1, dtype=torch.uint8, device="meta")
    absmax = packed.new_empty(-(-rows * columns // blocksize), dtype=torch.uint8 if nested else torch.float32)
    second = packed.new_empty(-(-absmax.numel() // 256), dtype=torch.float32) if nested else None
    offset = packed.new_empty(1, dtype=torch.float32) if nested else None
    out = packed.new_empty(rows, stride or columns, dtype=dtype)[:, :columns]
    for variant in launched(lambda: dequantize(packed, absmax, second, offset, blocksize, out)):
        yield dataclasses.replace(
            variant,
            name=_name(dtype, nested, rest),
            wants=("LDG.E.64|LDG.E.128", "STG.E.128") if wide else (),
            weights=2 * variant.constexprs["BYTES"],
        )


def _quantize(
    dtype: torch.dtype, rest: str = "", *, blocksize: int = 64, shape: tuple[int, int] = (SIDE, SIDE)
) -> Iterator[Variant]:
    flat = torch.empty(shape[0] * shape[1], dtype=dtype, device="meta")
    for variant in launched(lambda: quantize(flat, blocksize)):
        yield dataclasses.replace(
            variant, name=_name(dtype, False, rest), wants=("LDG.E.128",), weights=VALUES
        )

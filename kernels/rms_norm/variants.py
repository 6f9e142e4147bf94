"""The launches of rms_norm, compiled ahead of time: dtypes, rows of a head, of a model, and longer than a
tile.
"""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.rms_norm.backward import backward
from peft_engine.kernels.rms_norm.forward import forward

from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, Variant, launched

WIDE = ("LDG.E.64|LDG.E.128", "STG.E.64|STG.E.128")
ROWS = 8192


def variants() -> Iterator[Variant]:
    half, single = torch.bfloat16, torch.float32
    for dtype, weight in ((half, half), (torch.float16, torch.float16), (single, single), (half, single)):
        yield from _named(4096, dtype, weight)
    for columns in (128, 2048, 8192, 16384):
        yield from _named(columns, half, half)
    yield from _named(16384, single, single)
    yield from _named(1031, half, half, wide=False)


def _named(columns: int, dtype: torch.dtype, weight: torch.dtype, *, wide: bool = True) -> Iterator[Variant]:
    x = torch.empty(ROWS, columns, dtype=dtype, device="meta")
    w, rstd = x.new_empty(columns, dtype=weight), x.new_empty(ROWS, dtype=torch.float32)
    name = f"{NAMES[dtype]}{', fp32 weight' if weight != dtype else ''}, {columns} columns"
    archs = ARCHS if (columns, dtype, weight) == (4096, torch.bfloat16, torch.bfloat16) else FEW_ARCHS
    for variant in launched(lambda: forward(x, w, 1e-6, 0.0)):
        yield dataclasses.replace(variant, name=name, archs=archs, wants=WIDE if wide else ())
    for variant in launched(lambda: backward(x, x, w, rstd, 0.0, True, True)):
        rows = wide and variant.kernel.__name__ == "dx_kernel"
        yield dataclasses.replace(variant, name=name, archs=archs, wants=WIDE if rows else ())

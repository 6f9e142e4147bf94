"""The launches of dora_linear, compiled ahead of time: dtypes, with and without bias and dm, a tail."""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.dora_linear.backward import backward
from peft_engine.kernels.dora_linear.forward import forward

from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, Variant, launched
from peft_engine.ops.nf4 import DTYPES

WIDE = ("LDG.E.64|LDG.E.128", "STG.E.64|STG.E.128")


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        yield from _named(dtype, 2048, 4096)
    yield from _named(torch.bfloat16, 7, 1031, wide=False)


def _named(dtype: torch.dtype, rows: int, columns: int, *, wide: bool = True) -> Iterator[Variant]:
    y = torch.empty(rows, columns, dtype=dtype, device="meta")
    m = torch.empty(columns, device="meta")
    main = dtype == torch.bfloat16 and wide
    archs = ARCHS if main else FEW_ARCHS
    calls = {"": lambda: forward(y, m, m, m), ", dm": lambda: backward(y, y, m, m, True)}
    if main:
        calls |= {", no bias": lambda: forward(y, m, m, None), ", no dm": lambda: backward(y, y, m, m, False)}
    for rest, call in calls.items():
        for variant in launched(call):
            rowwise = wide and variant.kernel.__name__ != "sum_kernel"
            name = f"{NAMES[dtype]}, {columns} columns{rest}"
            yield dataclasses.replace(variant, name=name, archs=archs, wants=WIDE if rowwise else ())

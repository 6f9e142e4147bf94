"""The launches of swiglu, compiled ahead of time: dtypes, without gaps and halves of wider rows."""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.swiglu.backward import backward
from peft_engine.kernels.swiglu.forward import forward

from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, Variant, launched
from peft_engine.ops.nf4 import DTYPES

WIDE = ("LDG.E.64|LDG.E.128", "STG.E.64|STG.E.128")


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        yield from _named(dtype, 8192, 14336, gap=0)
    yield from _named(torch.bfloat16, 8192, 14336, gap=14336)
    yield from _named(torch.bfloat16, 1 << 19, 1 << 13, gap=0, rest=", 2^32")
    yield from _named(torch.bfloat16, 7, 1031, gap=5, wide=False)
    for activation in ("gelu_tanh", "gelu"):
        yield from _named(torch.bfloat16, 8192, 14336, gap=0, activation=activation)


def _named(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    *,
    gap: int,
    rest: str = "",
    wide: bool = True,
    activation: str = "silu",
) -> Iterator[Variant]:
    gate = torch.empty(rows, columns + gap, dtype=dtype, device="meta")[:, :columns]
    name = f"{NAMES[dtype]}, {columns} columns{', rows apart' if gap else ''}{rest}"
    name += "" if activation == "silu" else f", {activation}"
    archs = ARCHS if dtype == torch.bfloat16 and columns == 14336 else FEW_ARCHS
    for call in (lambda: forward(gate, gate, activation), lambda: backward(gate, gate, gate, activation)):
        for variant in launched(call):
            yield dataclasses.replace(variant, name=name, archs=archs, wants=WIDE if wide else ())

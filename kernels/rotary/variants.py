"""The launches of rotary, compiled ahead of time: dtypes, many and few heads, a part of a head, both ways."""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.rotary.rotate import rotate

from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, Variant, launched
from peft_engine.ops.nf4 import DTYPES

WIDE = ("LDG.E.64|LDG.E.128", "STG.E.64|STG.E.128")


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        yield from _named(dtype, 32, 8, 128, 128)
    yield from _named(torch.bfloat16, 9, 3, 64, 64)
    yield from _named(torch.bfloat16, 32, 32, 96, 48)
    yield from _named(torch.bfloat16, 64, 8, 256, 256)


def _named(dtype: torch.dtype, heads_q: int, heads_k: int, head_dim: int, rotated: int) -> Iterator[Variant]:
    batch, tokens = 4, 2048
    q, k = (torch.empty(batch, tokens, h, head_dim, dtype=dtype, device="meta") for h in (heads_q, heads_k))
    angles = q.new_empty(1, tokens, rotated)
    archs = ARCHS if dtype == torch.bfloat16 and (heads_q, head_dim) == (32, 128) else FEW_ARCHS
    for back in (False, True):
        for variant in launched(lambda: rotate(q, k, angles, angles, back)):  # noqa: B023
            part = f", {rotated} turned" if rotated != head_dim else ""
            name = f"{NAMES[dtype]}, {heads_q} and {heads_k} heads of {head_dim}{part}{', back' * back}"
            yield dataclasses.replace(variant, name=name, archs=archs, wants=WIDE)

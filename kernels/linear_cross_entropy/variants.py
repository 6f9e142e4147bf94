"""The launches of linear_cross_entropy, compiled ahead of time: dtypes, with and without the gradient."""

import dataclasses
from collections.abc import Iterator

import torch
from peft_engine.kernels.linear_cross_entropy.columns import cross_entropy_columns
from peft_engine.kernels.linear_cross_entropy.rows import cross_entropy_rows

from peft_engine.activations import empty_with_spare
from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, Variant, launched
from peft_engine.ops.nf4 import DTYPES

VOCABULARY = 128_256
WIDE = ("LDG.E.64|LDG.E.128",)


def variants() -> Iterator[Variant]:
    for dtype in DTYPES:
        yield from _named(dtype, VOCABULARY)
    yield from _named(torch.bfloat16, 32_001)


def _named(dtype: torch.dtype, vocabulary: int) -> Iterator[Variant]:
    logits = empty_with_spare(256, vocabulary, -vocabulary % 8, dtype, "meta")
    labels = logits.new_empty(256, dtype=torch.int64)
    scale, stats = (logits.new_empty(256, *shape, dtype=torch.float32) for shape in ((), (2,)))
    calls = {
        "losses": lambda: cross_entropy_rows(logits, labels, scale, scale, stats, False),
        "losses and gradient": lambda: cross_entropy_rows(logits, labels, scale, scale, stats, True),
        "columns": lambda: cross_entropy_columns(logits, labels, scale, stats, 512),
    }
    odd = vocabulary % 8 > 0
    archs = ARCHS if dtype == torch.bfloat16 and not odd else FEW_ARCHS
    for what, call in calls.items():
        wants = WIDE if what == "losses" else (*WIDE, "STG.E.64|STG.E.128")
        if what == "columns" and odd:
            wants = ()  # a range of the vocabulary is a tensor of its own, with rows by fours (Chunks.step)
        for variant in launched(call):
            name = f"{NAMES[dtype]}, vocabulary {vocabulary}, {what}"
            yield dataclasses.replace(variant, name=name, archs=archs, wants=wants)

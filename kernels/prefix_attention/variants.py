"""The launches of prefix_attention, compiled ahead of time: every tile of the tables, every mask.

In bfloat16 for every architecture; in the other types, and with the other masks, for two of them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft_engine.kernels.prefix_attention import tiles
from peft_engine.kernels.prefix_attention.backward import backward
from peft_engine.kernels.prefix_attention.call import Call
from peft_engine.kernels.prefix_attention.dkv import gradient_of_prefix, gradient_of_real
from peft_engine.kernels.prefix_attention.dq import gradient_of_queries
from peft_engine.kernels.prefix_attention.forward import forward

from peft_engine.kernels.tiles import MANY, pretended
from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, TENSOR_CORE, Variant, launched
from peft_engine.ops.attention import by_token

WIDE = "LDG.E.128|LDGSTS.E.BYPASS.128|LDGSTS.E.128"


def variants() -> Iterator[Variant]:
    for arch in ARCHS:
        with pretended(arch):
            for kernel in tiles.TABLE:
                for rows, head_dim, *_ in tiles.entries(kernel, arch):
                    # float16 compiles to bfloat16's code but for the products' types: one entry shows it
                    for dtype in tuple(NAMES) if (rows, head_dim) == (MANY, 64) else tuple(NAMES)[:2]:
                        if arch not in FEW_ARCHS and dtype != torch.bfloat16:
                            continue
                        call = launch_of(kernel, rows, head_dim, dtype)
                        name = f"{NAMES[dtype]}, head_dim {head_dim}"
                        unit = "keys" if "dkv" in kernel else "rows"
                        _, comma, extra = kernel.partition(", ")
                        name += comma + extra + f", {rows} {unit}" * (rows < MANY)
                        yield from _named(call, name, arch, dtype)
            if arch in FEW_ARCHS:
                yield from _others(arch)


def launch_of(kernel: str, rows: int, head_dim: int, dtype: torch.dtype) -> Callable[[], Any]:
    """A launch for one entry: a prompt of 1000 tokens, or the token after it; 4 query heads a key head.

    Causal, or with intervals, which take more registers, beside a bias or dropout.
    """
    kernel, _, extra = kernel.partition(", ")
    tokens, keys = min(1000, rows // 4), 1000
    if kernel == "dkv" and rows == MANY:  # its tile goes by the keys of all heads
        keys = 5000
    q, k = _meta(2, 32, tokens, head_dim, dtype), _meta(2, 8, keys, head_dim, dtype)
    added = _meta(1, 32, tokens, keys, dtype) if extra == "bias" else None
    dropout = (0.1, _meta(1, torch.int64)) if extra == "dropout" else ()
    ends = (_meta(2, tokens, torch.int32),) * 2 if extra else (None, None)
    masks = *ends, added, not extra
    # the prefix as a trainer holds it: float32, shared by the batch
    call = Call(q, k, k, *(_meta(1, 8, 20, head_dim, torch.float32),) * 2, *masks, *dropout)
    row, dq, dk = torch.empty(q.shape[:3], device="meta"), by_token(q), by_token(k)
    return {
        "attend": lambda: forward(*call.tensors, *masks, 0.125, *dropout),
        "dq": lambda: gradient_of_queries(call, q, dq, row, row, dq, 0.125),
        "dkv": lambda: gradient_of_real(call, q, row, row, dk, dk, 0.125),
        "prefix": lambda: gradient_of_prefix(call, q, row, row, *call.tensors[3:], 0.125),
    }[kernel]


def _others(arch: int) -> Iterator[Variant]:
    """Intervals, no mask, both masks, also with dropout and capped scores; a head_dim between powers of two,
    no group, a prefix for each row. Of all sets of options on three architectures none spilled.
    """
    half, single = torch.bfloat16, torch.float32
    for name, dtype, head_dim, heads, masked, biased, p, softcap in (
        ("intervals", half, 64, 32, True, False, 0.0, 0.0),
        ("no mask", half, 80, 8, False, False, 0.0, 0.0),
        ("intervals and bias", half, 96, 16, True, True, 0.0, 0.0),
        ("intervals, bias and dropout", half, 64, 8, True, True, 0.1, 0.0),
        ("intervals", single, 128, 32, True, False, 0.0, 0.0),
        ("intervals and bias", single, 256, 8, True, True, 0.0, 0.0),
        ("capped", half, 128, 16, False, False, 0.0, 50.0),
        ("intervals, capped", half, 256, 16, True, False, 0.0, 50.0),
        ("intervals, bias and dropout, capped", half, 64, 16, True, True, 0.1, 50.0),
        ("intervals, bias and dropout, capped", single, 128, 16, True, True, 0.1, 50.0),
        ("intervals, capped", single, 256, 16, True, False, 0.0, 50.0),
    ):
        q, k = _meta(2, heads, 1000, head_dim, dtype), _meta(2, 8, 1000, head_dim, dtype)
        prefix = (_meta(2, 8, 20, head_dim, dtype),) * 2
        ends = (torch.empty(2, 1000, dtype=torch.int32, device="meta"),) * 2 if masked else (None, None)
        masks = *ends, _meta(1, heads, 1000, 1000, dtype) if biased else None, False, 0.125
        masks = *masks, p, _meta(1, torch.int64) if p else None, softcap
        row = torch.empty(q.shape[:3], device="meta")
        yield from _named(
            lambda q=q, k=k, prefix=prefix, row=row, masks=masks: (
                forward(q, k, k, *prefix, *masks),
                backward(q, q, k, k, *prefix, by_token(q), row, *masks),
            ),
            f"{NAMES[dtype]}, {name}, head_dim {head_dim}", arch, dtype,
        )  # fmt: skip


def _named(call: Callable[[], Any], name: str, arch: int, dtype: torch.dtype) -> Iterator[Variant]:
    for variant in launched(call):
        dot = variant.kernel.__name__ not in ("merge_kernel", "sum_kernel")
        # float32's products drop no digit, which a tensor core would
        wants = (WIDE, TENSOR_CORE) if dtype != torch.float32 else (WIDE,)
        yield dataclasses.replace(variant, name=name, archs=(arch,), wants=wants if dot else ())


def _meta(*shape) -> torch.Tensor:
    *sizes, dtype = shape
    return torch.empty(sizes, dtype=dtype, device="meta")

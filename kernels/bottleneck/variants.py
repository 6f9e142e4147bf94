"""The launches of bottleneck, compiled ahead of time: every tile of the tables, for its architectures.

In bfloat16 for every architecture; in the other types, and with more activations, for two of them.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft_engine.kernels.bottleneck import fused, outer, split, tiles
from peft_engine.kernels.bottleneck.call import Call

from peft_engine.kernels.tiles import pretended
from peft_engine.kernels.variants import ARCHS, FEW_ARCHS, NAMES, TENSOR_CORE, Variant, launched

H = 4096
LOADS = "LDG.E.64|LDG.E.128|LDGSTS.E.BYPASS.128|LDGSTS.E.128|UTMALDG"
BY_ROWS = ("statistics_kernel", "finish_kernel", "means_kernel", "reduce_kernel")  # without a product
WIDE = 1024  # for the entries without a largest width
# The least and the most that a call asks of a kernel: which tile holds the most is what matters.
PLAIN: dict[str, Any] = {"norm": False, "biases": False, "activation": "relu"}
FULL: dict[str, Any] = {"norm": True, "biases": True, "activation": "gelu"}
# What stands for the kernels of the tables, and for how many rows: 512 rows share the columns.
CALLS: dict[str, tuple[tuple[str, int], ...]] = {
    "fused": (("fused forward", 8192),),
    "fused_backward": (("fused backward", 8192),),
    "contract": (("forward", 8192), ("backward", 8192), ("forward", 512), ("backward", 512)),
    "outer": (("down", 8192), ("up", 8192)),
}


def variants() -> Iterator[Variant]:
    half, whole = torch.bfloat16, torch.float32
    for arch in ARCHS:
        with pretended(arch):
            for kernel in CALLS:
                for place, (_, width, *_) in enumerate(tiles.entries(kernel, arch)):
                    width = min(width, WIDE)
                    yield from _named(kernel, arch, half, half, width, FULL)
                    if place == 0 and arch in FEW_ARCHS:
                        yield from _named(kernel, arch, half, whole, width, FULL)
                        yield from _named(kernel, arch, whole, whole, width, PLAIN)
            if arch not in FEW_ARCHS:
                continue
            # float16 compiles to bfloat16's code but for its products with float32
            yield from _named("contract", arch, torch.float16, whole, WIDE, PLAIN)
            for activation in ("silu", "tanh"):
                for kernel in ("fused", "fused_backward"):
                    yield from _named(kernel, arch, half, half, 64, {**FULL, "activation": activation})


def _named(kernel: str, arch: int, dtype, weight, width: int, given: dict[str, Any]) -> Iterator[Variant]:
    weights = NAMES[dtype] if weight == dtype else f"{NAMES[dtype]}, fp32 weights"
    norm = "norm and biases" if given["norm"] else "no norm"
    for what, rows in CALLS[kernel]:
        name = f"{weights}, {rows} rows, width {width}, {what}, {norm}, {given['activation']}"
        for variant in launched(_calls(dtype, weight, rows, width, **given)[what]):
            dot = variant.kernel.__name__ not in BY_ROWS
            yield dataclasses.replace(
                variant, name=name, archs=(arch,), wants=(LOADS, TENSOR_CORE) if dot else ()
            )


def _calls(dtype, weight, rows: int, width: int, *, norm: bool, biases: bool, activation: str):
    """What launches the kernels."""

    def meta(*shape: int, dtype=weight) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    call = Call(
        meta(width, H), meta(width) if biases else None, meta(H, width), meta(H) if biases else None,
        meta(H) if norm else None, meta(H) if norm else None, activation, 1.0, 1e-5,
    )  # fmt: skip
    x, y = meta(rows, H, dtype=dtype), meta(rows, H, dtype=dtype)
    middle, dm, stats = meta(rows, width), meta(rows, width), meta(rows, 2, dtype=torch.float32)
    calls: dict[str, Callable[[], Any]] = {
        "fused forward": lambda: fused.forward(call, x, x, y, middle, stats),
        "fused backward": lambda: fused.backward(call, y, x, middle, stats, dm, x, residual_is_x=True),
        "forward": lambda: split.forward(call, x, x, y, middle, stats),
        "backward": lambda: split.backward(call, y, x, middle, stats, dm, x, residual_is_x=True),
        "down": lambda: outer.of_down(call, dm, x, stats),
        "up": lambda: outer.of_up(call, middle, y, stats),
    }
    return calls

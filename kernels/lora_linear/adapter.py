"""The adapter's own tensors as terms of the activations' dtype.

A float32 value beside half-precision activations is three terms of the half type, v = v1 + v2 / s + v3 / s^2,
which hold its 24 bits (s = 2^11 for float16, whose range is too short for what is left of small values; 1 for
bfloat16).
"""

import math

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles

from peft_engine.kernels.launch import cdiv, launch

BLOCK = 64
MOST_RANK = 64  # rows of a tile: the adapters of a mixed batch are split as one, and 256 rows spilled


@triton.jit
def term(value, DTYPE: tl.constexpr):
    """Float32 values as a term that others follow: float16's largest number where they are larger.

    As infinity they would leave an infinity of the other sign to the next term, and the sum would be NaN. So
    what is too large for all terms is infinite in the last alone.
    """
    if DTYPE.is_fp16():
        value = tl.where(value > 65504.0, 65504.0, tl.where(value < -65504.0, -65504.0, value))  # NaN stays
    return value.to(DTYPE)


@triton.jit
def terms_of_value(value, DTYPE: tl.constexpr, STEP: tl.constexpr):
    """v1, v2 unscaled, v2 scaled and v3 scaled twice, of float32 values."""
    first = term(value, DTYPE)
    rest = value - first.to(tl.float32)
    second = term(rest * STEP, DTYPE)
    third = ((rest * STEP - second.to(tl.float32)) * STEP).to(DTYPE)
    return first, rest.to(DTYPE), second, third


@triton.jit
def write_terms(a, terms, columns, rank, scaling, row, stride_c, r, c, STEP: tl.constexpr):
    """terms (3, rank, columns) of scaling * a, in its rows r, which begin at a + row, and columns c."""
    inside = (r < rank)[:, None] & (c < columns)[None, :]
    value = tl.load(a + row[:, None] + c[None, :] * stride_c, inside, other=0).to(tl.float32)
    first, _, second, third = terms_of_value(value * scaling, terms.dtype.element_ty, STEP)
    size = tl.cast(columns, tl.int64) * rank
    at = terms + r[:, None] * tl.cast(columns, tl.int64) + c[None, :]
    tl.store(at, first, inside)
    tl.store(at + size, second, inside)
    tl.store(at + 2 * size, third, inside)


@triton.jit
def terms_kernel(
    a, terms, columns, rank, each, stride_g, stride_r, stride_c,
    RANK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """terms of a, RANK rows and a block of columns a program; a has `each` rows in a group."""
    r = (tl.program_id(1) * RANK + tl.arange(0, RANK)).to(tl.int64)  # of many adapters together: above 2^31
    c = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    write_terms(
        a, terms, columns, rank, 1.0, r // each * stride_g + r % each * stride_r, stride_c, r, c, STEP
    )


def step_of(dtype: torch.dtype) -> int:
    """The factor between the scaled terms of a dtype."""
    return 2048 if dtype == torch.float16 else 1


def split(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The terms (3, R, C) in `dtype` of a float32 matrix (R, C), or of G of R / G rows, of any strides."""
    each, columns = a.shape[-2:]
    rank, strides = math.prod(a.shape[:-1]), a.stride() if a.dim() == 3 else (0, *a.stride())
    terms = torch.empty(3, rank, columns, dtype=dtype, device=a.device)
    block_r = min(tiles.padded_rank(rank), MOST_RANK)
    launch(
        terms_kernel, (cdiv(columns, BLOCK), cdiv(rank, block_r)),
        (a, terms, columns, rank, each, *strides),
        {"RANK": block_r, "STEP": step_of(dtype), "BLOCK": BLOCK},
        num_warps=4,
    )  # fmt: skip
    return terms

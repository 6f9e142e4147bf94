"""The adapter's own tensors as terms of the activations' dtype.

A float32 value beside half-precision activations is three terms of the half type, v = v1 + v2 / s + v3 / s^2,
which hold its 24 bits (s = 2^11 for float16, whose range is too short for what is left of small values; 1 for
bfloat16).
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles

from peft_engine.kernels.launch import cdiv, launch

BLOCK = 64


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
def write_terms(
    a, terms, columns, rank, scaling, stride_r, stride_c, c, RANK: tl.constexpr, STEP: tl.constexpr
):
    """terms (3, rank, columns) of scaling * a, in its columns c."""
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (c < columns)[None, :]
    value = tl.load(a + r[:, None] * stride_r + c[None, :] * stride_c, inside, other=0).to(tl.float32)
    first, _, second, third = terms_of_value(value * scaling, terms.dtype.element_ty, STEP)
    size = tl.cast(columns, tl.int64) * rank
    at = terms + r[:, None] * tl.cast(columns, tl.int64) + c[None, :]
    tl.store(at, first, inside)
    tl.store(at + size, second, inside)
    tl.store(at + 2 * size, third, inside)


@triton.jit
def terms_kernel(
    a, terms, columns, rank, stride_r, stride_c,
    RANK: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """terms of a, a block of columns a program."""
    c = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    write_terms(a, terms, columns, rank, 1.0, stride_r, stride_c, c, RANK, STEP)


def step_of(dtype: torch.dtype) -> int:
    """The factor between the scaled terms of a dtype."""
    return 2048 if dtype == torch.float16 else 1


def split(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The terms (3, R, C) in `dtype` of a float32 matrix (R, C) of any strides."""
    rank, columns = a.shape
    terms = torch.empty(3, rank, columns, dtype=dtype, device=a.device)
    launch(
        terms_kernel, (cdiv(columns, BLOCK),), (a, terms, columns, rank, *a.stride()),
        {"RANK": tiles.padded_rank(rank), "STEP": step_of(dtype), "BLOCK": BLOCK},
        num_warps=4,
    )  # fmt: skip
    return terms

"""The adapter's own tensors, laid out for the products: split into terms, and written beside the weight.

A float32 value beside half-precision activations is three terms of the half type, v = v1 + v2 / s + v3 / s^2,
which hold its 24 bits (s = 2^11 for float16, whose range is too short for what is left of small values; 1 for
bfloat16). Floor: bytes, a hundredth of the weight's; what counts is that all of it is one launch.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles

from peft_engine.activations import term_width, terms_of
from peft_engine.kernels.launch import cdiv, launch

BLOCK = 64


@triton.jit
def terms_of_value(value, DTYPE: tl.constexpr, STEP: tl.constexpr):
    """v1, v2 unscaled, v2 scaled and v3 scaled twice, of float32 values."""
    first = value.to(DTYPE)
    rest = value - first.to(tl.float32)
    second = (rest * STEP).to(DTYPE)
    third = ((rest * STEP - second.to(tl.float32)) * STEP).to(DTYPE)
    return first, rest.to(DTYPE), second, third


@triton.jit
def columns_of_b(
    b, space, terms, out_features, columns, rank, scaling, stride_bn, stride_br, stride, n,
    WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr, STEP: tl.constexpr, SPACE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """scaling * b of the rows n: columns behind the workspace's weight, and transposed as terms (3, R, N)."""
    r = tl.arange(0, RANK)
    inside = (n < out_features)[:, None] & (r < rank)[None, :]
    value = tl.load(b + n[:, None] * stride_bn + r[None, :] * stride_br, inside, other=0).to(tl.float32)
    first, unscaled, second, third = terms_of_value(value * scaling, space.dtype.element_ty, STEP)
    if SPACE:
        stored = (n < out_features)[:, None] & (r < WIDTH)[None, :]
        behind = space + n[:, None] * stride + columns + r[None, :]
        tl.store(behind, first, stored)
        if TERMS == 3:
            tl.store(behind + WIDTH, first, stored)
            tl.store(behind + 2 * WIDTH, unscaled, stored)
    if SPLIT:
        size = out_features.to(tl.int64) * rank
        at = terms + r[:, None] * out_features.to(tl.int64) + n[None, :]
        tl.store(at, tl.trans(first), tl.trans(inside))
        tl.store(at + size, tl.trans(second), tl.trans(inside))
        tl.store(at + 2 * size, tl.trans(third), tl.trans(inside))


@triton.jit
def rows_of_a(
    a, space, terms, out_features, columns, rank, stride_ar, stride_ak, stride, k,
    WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr, STEP: tl.constexpr, SPACE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The columns k of a: as rows below the workspace's weight, and as terms (3, R, K)."""
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (k < columns)[None, :]
    value = tl.load(a + r[:, None] * stride_ar + k[None, :] * stride_ak, inside, other=0).to(tl.float32)
    first, unscaled, second, third = terms_of_value(value, space.dtype.element_ty, STEP)
    if SPACE:
        stored = (r < WIDTH)[:, None] & (k < columns)[None, :]
        below = space + (out_features + r[:, None]) * stride.to(tl.int64) + k[None, :]
        tl.store(below, first, stored)
        if TERMS == 3:
            tl.store(below + WIDTH * stride.to(tl.int64), first, stored)
            tl.store(below + 2 * WIDTH * stride.to(tl.int64), unscaled, stored)
    if SPLIT:
        size = columns.to(tl.int64) * rank
        at = terms + r[:, None] * columns.to(tl.int64) + k[None, :]
        tl.store(at, first, inside)
        tl.store(at + size, second, inside)
        tl.store(at + 2 * size, third, inside)


@triton.jit
def adapter_kernel(
    a, b, space, terms_a, terms_b, out_features, columns, rank, scaling, stride_ar, stride_ak, stride_bn,
    stride_br, stride, programs_b,
    WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr, STEP: tl.constexpr, SPACE: tl.constexpr,
    SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the first programs write of scaling * b, and the rest of a; zeros lie between the workspace's
    terms.
    """
    i = tl.arange(0, BLOCK).to(tl.int64)
    if tl.program_id(0) < programs_b:
        columns_of_b(
            b, space, terms_b, out_features, columns, rank, scaling, stride_bn, stride_br, stride,
            tl.program_id(0) * BLOCK + i, WIDTH, RANK, TERMS, STEP, SPACE, SPLIT_B,
        )  # fmt: skip
    else:
        rows_of_a(
            a, space, terms_a, out_features, columns, rank, stride_ar, stride_ak, stride,
            (tl.program_id(0) - programs_b) * BLOCK + i, WIDTH, RANK, TERMS, STEP, SPACE, SPLIT_A,
        )  # fmt: skip


def step_of(dtype: torch.dtype) -> int:
    """The factor between the scaled terms of a dtype."""
    return 2048 if dtype == torch.float16 else 1


def split(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The terms (3, R, C) in `dtype` of a float32 matrix (R, C) of any strides."""
    terms = torch.empty(3, *a.shape, dtype=dtype, device=a.device)
    _launch(a, a, terms, terms, terms, 0, 1.0, space=False, split_a=True, split_b=False)
    return terms


def write(space, a, b, scaling: float, out_features: int, *, split_a: bool, split_b: bool):
    """The adapter's part of a workspace, and the terms of A, or of scaling * B^T, in the same launch.

    The terms asked for are None where an adapter of the workspace's own dtype has none.
    """
    wanted = terms_of(a.dtype, space.dtype) == 3
    terms_a = terms_b = None
    if wanted and split_a:
        terms_a = torch.empty(3, *a.shape, dtype=space.dtype, device=a.device)
    if wanted and split_b:
        terms_b = torch.empty(3, b.shape[1], b.shape[0], dtype=space.dtype, device=b.device)
    _launch(
        a, b, space, space if terms_a is None else terms_a, space if terms_b is None else terms_b,
        out_features, scaling, space=True, split_a=terms_a is not None, split_b=terms_b is not None,
    )  # fmt: skip
    return terms_a, terms_b


def _launch(a, b, space_out, terms_a, terms_b, out_features, scaling, *, space, split_a, split_b) -> None:
    rank, columns = a.shape
    programs_b = cdiv(out_features, BLOCK)
    launch(
        adapter_kernel, (programs_b + cdiv(columns, BLOCK),),
        (
            a, b, space_out, terms_a, terms_b, out_features, columns, rank, scaling, *a.stride(), *b.stride(),
            space_out.stride(0), programs_b,
        ),
        {
            "WIDTH": term_width(rank), "RANK": tiles.padded_rank(rank),
            "TERMS": terms_of(a.dtype, space_out.dtype), "STEP": step_of(space_out.dtype), "SPACE": space,
            "SPLIT_A": split_a, "SPLIT_B": split_b, "BLOCK": BLOCK,
        },
        num_warps=4,
    )  # fmt: skip

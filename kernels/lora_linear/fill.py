"""The workspace of lora_linear in one launch: the weight dequantised, and the adapter beside or below it.

Forward:  [W | s B], rows of W with s B in its terms behind them, and the terms of A, which `down` multiplies.
Backward: [W ; A], A in its terms below W, and the terms of s B^T.
Floor: bytes, the weight's; the adapter's hundredth hides behind them, as its programs come first.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles
from peft_engine.kernels.lora_linear.adapter import step_of, terms_of_value, write_terms
from peft_engine.kernels.nf4.dequantize import bytes_of_program, dequantize, dequantize_part
from peft_engine.kernels.nf4.tables import absmax_code, code

from peft_engine.activations import row_stride, term_width, terms_of
from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def write_beside(
    b, space, out_features, columns, rank, scaling, stride_bn, stride_br, stride, n,
    WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """scaling * b in the rows n, [w1 | w1 | w2] behind the weight's columns; zeros lie between the terms."""
    r = tl.arange(0, RANK)
    inside = (n < out_features)[:, None] & (r < rank)[None, :]
    value = tl.load(b + n[:, None] * stride_bn + r[None, :] * stride_br, inside, other=0).to(tl.float32)
    first, rest, _, _ = terms_of_value(value * scaling, space.dtype.element_ty, 1)
    stored = (n < out_features)[:, None] & (r < WIDTH)[None, :]
    at = space + n[:, None] * stride + columns + r[None, :]
    tl.store(at, first, stored)
    if TERMS == 3:
        tl.store(at + WIDTH, first, stored)
        tl.store(at + 2 * WIDTH, rest, stored)


@triton.jit
def write_below(
    a, space, out_features, columns, rank, stride_ar, stride_ak, stride, k,
    WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """The columns k of a, [a1 ; a1 ; a2] below the weight's rows."""
    r = tl.arange(0, RANK)
    inside = (r < rank)[:, None] & (k < columns)[None, :]
    value = tl.load(a + r[:, None] * stride_ar + k[None, :] * stride_ak, inside, other=0).to(tl.float32)
    first, rest, _, _ = terms_of_value(value, space.dtype.element_ty, 1)
    stored = (r < WIDTH)[:, None] & (k < columns)[None, :]
    at = space + (out_features + r[:, None]) * tl.cast(stride, tl.int64) + k[None, :]
    tl.store(at, first, stored)
    if TERMS == 3:
        tl.store(at + WIDTH * tl.cast(stride, tl.int64), first, stored)
        tl.store(at + 2 * WIDTH * tl.cast(stride, tl.int64), rest, stored)


@triton.jit
def fill_kernel(
    packed, absmax, nested_absmax, offset, code, absmax_code, a, b, space, terms, arrivals, counters,
    out_features, columns, chunks, rank, scaling, stride_ar, stride_ak, stride_bn, stride_br, stride,
    programs_b, programs,
    FORWARD: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, TERMS: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """The first programs_b programs take b, those up to `programs` a, the rest the weight (BYTES 0: none).

    The first ones also set the counters to 0 that the next launches find (parts.py, arrives_last).
    """
    program = tl.program_id(0)
    i = tl.arange(0, BLOCK).to(tl.int64)
    if program < programs:
        for start in range(program * BLOCK, counters, programs * BLOCK):
            tl.store(arrivals + start + i, 0, start + i < counters)
    if program < programs_b:
        n = program * BLOCK + i
        if FORWARD:
            write_beside(
                b, space, out_features, columns, rank, scaling, stride_bn, stride_br, stride, n, WIDTH, RANK,
                TERMS,
            )  # fmt: skip
        else:
            r = tl.arange(0, RANK)
            write_terms(b, terms, out_features, rank, scaling, r * stride_br, stride_bn, r, n, STEP)
    elif program < programs:
        k = (program - programs_b) * BLOCK + i
        if FORWARD:
            r = tl.arange(0, RANK)
            write_terms(a, terms, columns, rank, 1.0, r * stride_ar, stride_ak, r, k, STEP)
        else:
            write_below(
                a, space, out_features, columns, rank, stride_ar, stride_ak, stride, k, WIDTH, RANK, TERMS
            )  # fmt: skip
    else:
        if BYTES > 0:
            dequantize_part(
                program - programs, packed, absmax, nested_absmax, offset, code, absmax_code, space, columns,
                chunks, stride, BLOCKSIZE, NESTED, BYTES, True,
            )  # fmt: skip


def forward(base, out_features: int, a, b, scaling: float, like: torch.Tensor, width: int) -> tuple:
    """[W | s B] (N, K + width) of `like`'s dtype, its rows aligned, the terms (3, R, K) of A, and counters at
    0 for the product down to the rank of `like`'s rows.

    The terms are None where the adapter is of that dtype itself.
    """
    columns = a.shape[1]
    space = like.new_empty(out_features, row_stride(columns, width))
    terms, arrivals = _fill(space, base, out_features, a, b, scaling, like.shape[0], forward=True)
    return space[:, : columns + width], terms, arrivals


def backward(base, out_features: int, a, b, scaling: float, like: torch.Tensor, width: int) -> tuple:
    """[W ; A] (N + width, K) of `like`'s dtype, its rows aligned, the terms (3, R, N) of s B^T, and counters
    at 0 for the skinny products of `like`'s rows.

    The terms are None where the adapter is of that dtype itself.
    """
    columns = a.shape[1]
    space = like.new_empty(out_features + width, row_stride(columns, 0))
    terms, arrivals = _fill(space, base, out_features, a, b, scaling, like.shape[0], forward=False)
    return space[:, :columns], terms, arrivals


def weight(base, out_features: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """The weight alone, (N, K): the dense one itself, or NF4 dequantised."""
    if base[1] is None:
        return base[0]
    whole = like.new_empty(out_features, row_stride(columns, 0))[:, :columns]
    dequantize(*base, whole)
    return whole


def _fill(space, base, out_features: int, a, b, scaling: float, rows: int, *, forward: bool) -> tuple:
    packed, absmax, nested_absmax, offset, blocksize = base
    rank, columns = a.shape
    terms = None
    if terms_of(a.dtype, space.dtype) == 3:
        terms = space.new_empty(3, rank, columns if forward else out_features)
    size = 0
    if absmax is None:
        space[:out_features, :columns].copy_(packed)
    elif columns % blocksize or packed.data_ptr() % 4:  # blocks that go on in the next row
        dequantize(*base, space[:out_features, :columns])
    else:
        size = bytes_of_program(columns)
    warps = max(1, size // 1024) if size else 4
    padded = tiles.padded_rank(rank)
    block = max(8, 512 * warps // padded)
    # an adapter without terms has only the side that goes into the workspace
    programs_b = cdiv(out_features, block) if forward or terms is not None else 0
    programs = programs_b + (cdiv(columns, block) if not forward or terms is not None else 0)
    chunks = cdiv(columns, 2 * size) if size else 0
    nested = size > 0 and nested_absmax is not None
    counters = tiles.most_tiles(rows, columns, out_features)
    arrivals = torch.empty(counters, dtype=torch.int32, device=space.device)
    # No fused multiply-add: the scale is rounded twice, see scale_of.
    launch(
        fill_kernel, (programs + out_features * chunks,),
        (
            packed, absmax if size else packed, nested_absmax if nested else packed,
            offset if nested else packed, code(space.device) if size else packed,
            absmax_code(space.device) if size else packed, a, b, space, space if terms is None else terms,
            arrivals, counters, out_features, columns, chunks, rank, scaling, *a.stride(), *b.stride(),
            space.stride(0), programs_b, programs,
        ),
        {
            "FORWARD": forward, "WIDTH": term_width(rank), "RANK": padded,
            "TERMS": terms_of(a.dtype, space.dtype), "STEP": step_of(space.dtype), "BLOCK": block,
            "BLOCKSIZE": blocksize, "NESTED": nested, "BYTES": size,
        },
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return terms, arrivals

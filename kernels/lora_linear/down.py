"""h = s drop(x) A^T, in float32: the product down to the rank, of the forward and (as s dy B) of the
backward.

Floor: bytes, x read once. The contraction is split so that a few thousand rows fill the GPU; of a tile's
programs the one that arrives last adds their shares in order. A float32 A beside half-precision x comes in
terms of x's dtype (adapter.py), so that the loop is loads and products alone. For the workspace path h is
also written behind x in its terms (workspace.py), and x is copied in the same pass where it has no room
behind it.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import adapter, tiles
from peft_engine.kernels.lora_linear.parts import (
    arrives_last,
    kept,
    rows_of_tile,
    sum_of_shares,
    wide_dot,
)

from peft_engine.activations import term_width
from peft_engine.kernels.launch import cdiv, launch


@triton.jit(do_not_specialize=["threshold"])
def down_kernel(
    x, a, partial, arrivals, h, buffer, seed, order, bounds, rows, columns, groups, rank, share, scaling,
    threshold, stride_xm, stride_at, stride_ag, stride_ar, stride_ak, stride_bm,
    RANK: tl.constexpr, TERMS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, BEHIND: tl.constexpr,
    COPY: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[m, r] = scaling * sum over the columns k of drop(x)[m, k] a[r, k]; of sorted rows if GROUPED.

    With three TERMS, a is the sum of a[0], a[1] / STEP and a[2] / STEP^2. BEHIND: so many terms of h are
    written behind the buffer's columns, each WIDTH wide.
    """
    split = tl.program_id(1)
    if GROUPED:
        group, place, row, inside = rows_of_tile(order, bounds, tl.program_id(0), groups, BLOCK_M)
        if group < 0:
            return
        a += group.to(tl.int64) * stride_ag
    else:
        place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < rows
        row = place.to(tl.int64)
    r = tl.arange(0, RANK)
    acc = tl.zeros((BLOCK_M, RANK), tl.float32)
    second = tl.zeros((BLOCK_M, RANK), tl.float32)
    third = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(split * share, tl.minimum(columns, split * share + share), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = k < columns
        tile = tl.load(x + row[:, None] * stride_xm + k[None, :], inside[:, None] & there[None, :], other=0)
        if COPY:
            tl.store(
                buffer + row[:, None] * stride_bm + k[None, :], tile, inside[:, None] & there[None, :]
            )  # fmt: skip
        if DROPOUT:
            tile = tl.where(kept(seed, row, k, threshold), tile, 0.0)
        at = a + k[:, None].to(tl.int64) * stride_ak + r[None, :] * stride_ar
        both = there[:, None] & (r < rank)[None, :]
        acc = wide_dot(tile, tl.load(at, both, other=0), acc)
        if TERMS == 3:
            second = tl.dot(tile, tl.load(at + stride_at, both, other=0), second)
            # twice: 2 * stride_at of many adapters together may be above 2^31
            third = tl.dot(tile, tl.load(at + stride_at + stride_at, both, other=0), third)
    if TERMS == 3:
        acc += (second + third / STEP) / STEP
    stored = inside[:, None] & (r < rank)[None, :]
    at = place.to(tl.int64)[:, None] * rank + r[None, :]
    size = tl.cast(rows, tl.int64) * rank
    tl.store(partial + split * size + at, acc, stored)
    if arrives_last(arrivals + tl.program_id(0)):
        sum = sum_of_shares(partial, size, at, stored, BLOCK_M, RANK) * scaling
        tl.store(h + at, sum, stored)
        if BEHIND > 0:
            behind = buffer + row[:, None] * stride_bm + columns + r[None, :]
            stored = inside[:, None] & (r < WIDTH)[None, :]
            if BEHIND == 3:
                first = adapter.term(sum, buffer.dtype.element_ty)
                rest = (sum - first.to(tl.float32)).to(buffer.dtype.element_ty)
                tl.store(behind + WIDTH, rest, stored)
                tl.store(behind + 2 * WIDTH, first, stored)
            else:
                first = sum.to(buffer.dtype.element_ty)
            tl.store(behind, first, stored)


def down(
    x: torch.Tensor,
    a: torch.Tensor,
    scaling: float,
    *,
    buffer: torch.Tensor | None = None,
    copy: bool = False,
    terms: int = 0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    split: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """h (M, R) float32 of x (M, K), whose columns are together, and a (R, K) of any strides.

    buffer: (M, K + terms' columns), gets h's terms behind its first K columns, and x in those when `copy`
    says so. With dropout, what is kept of x is divided by 1 - p. With order and bounds, a is (G, R, K), and h
    is of the rows with an adapter, in sorted order. split: the terms of a, where they are there already;
    arrivals: a counter at 0 for each tile, which it is again afterwards.
    """
    rank, columns = a.shape[-2:]
    grouped = order is not None
    rows, groups = (order.shape[0], a.shape[0]) if grouped else (x.shape[0], 1)
    h = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    if not rows:
        return h
    block_m, block_k, warps, stages = tiles.tile("down", rows, rank, x.dtype, x.device)
    programs = cdiv(rows, block_m) + (groups if grouped else 0)
    share = block_k * cdiv(cdiv(columns, tiles.shares(columns, programs, block_k)), block_k)
    shares = cdiv(columns, share)
    partial = torch.empty(shares, rows, rank, dtype=torch.float32, device=x.device)
    buffer = x if buffer is None else buffer
    if arrivals is None:
        arrivals = torch.zeros(programs, dtype=torch.int32, device=x.device)
    if a.dtype != x.dtype:
        if split is None:
            split = adapter.split(a, x.dtype)
        a = split.view(3, *a.shape)
    launch(
        down_kernel, (programs, shares),
        (
            x, a, partial, arrivals, h, buffer, x if seed is None else seed,
            order if grouped else x, bounds if grouped else x,
            rows, columns, groups, rank, share, scaling / (1.0 - dropout_p), round(dropout_p * 2**32),
            x.stride(0), a.stride(0) if split is not None else 0,
            *(a.stride()[-3:] if grouped else (0, *a.stride()[-2:])), buffer.stride(0),
        ),
        {
            "RANK": tiles.padded_rank(rank), "TERMS": 1 if split is None else 3,
            "STEP": adapter.step_of(x.dtype), "WIDTH": term_width(rank), "BEHIND": terms,
            "COPY": copy, "DROPOUT": dropout_p > 0.0, "GROUPED": grouped,
            "BLOCK_M": block_m, "BLOCK_K": block_k,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return h

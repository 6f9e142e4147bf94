"""dA = g^T drop(z) and dB = (g^T z)^T, skinny products over the rows, split over them, in a fixed order.

Floor: bytes, z read once. Each program sums its share of the rows for BLOCK_C columns of z into a float32
partial; a second kernel adds the partials in order, so the result is the same in every run.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles
from peft_engine.kernels.lora_linear.parts import kept, wide_dot

from peft_engine.kernels.launch import cdiv, launch


@triton.jit(do_not_specialize=["threshold"])
def outer_kernel(
    g, z, partial, seed, order, bounds, rows, columns, rank, share, groups, threshold, stride_zm,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[s, group, r, c] = sum over the rows m of share s of g[m, r] drop(z)[m, c]."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    group = tl.program_id(2)
    if GROUPED:
        first = tl.load(bounds + group)
        last = tl.load(bounds + group + 1)
        each = tl.cdiv(tl.cdiv(last - first, tl.num_programs(1)), BLOCK_M) * BLOCK_M
        first += split * each
        last = tl.minimum(last, first + each)
    else:
        first = split * share
        last = tl.minimum(rows, first + share)
    r = tl.arange(0, RANK)
    there = c < columns
    acc = tl.zeros((RANK, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < last
        if GROUPED:
            row = tl.load(order + place, inside, other=0)
        else:
            row = place.to(tl.int64)
        left = tl.load(
            g + place.to(tl.int64)[None, :] * rank + r[:, None],
            (r < rank)[:, None] & inside[None, :],
            other=0.0,
        )
        tile = tl.load(z + row[:, None] * stride_zm + c[None, :], inside[:, None] & there[None, :], other=0)
        if DROPOUT:
            tile = tl.where(kept(seed, row, c, threshold), tile, 0.0)
        acc = wide_dot(left, tile, acc)
    at = partial + (split * groups + group).to(tl.int64) * rank * columns
    tl.store(
        at + r[:, None].to(tl.int64) * columns + c[None, :], acc, (r < rank)[:, None] & there[None, :]
    )  # fmt: skip


@triton.jit
def reduce_kernel(
    partial, out, groups, columns, rank, splits, scaling,
    TRANSPOSED: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[g, r, c] = scaling * sum_s partial[s, g, r, c], in order; TRANSPOSED writes out[g, c, r]."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK)
    group = tl.program_id(1).to(tl.int64)
    stored = (r < rank)[:, None] & (c < columns)[None, :]
    size = tl.cast(rank, tl.int64) * columns
    at = r[:, None].to(tl.int64) * columns + c[None, :]
    sum = tl.zeros((RANK, BLOCK), tl.float32)
    for s in range(splits):
        sum += tl.load(partial + (tl.cast(s, tl.int64) * groups + group) * size + at, stored, other=0.0)
    sum = (sum * scaling).to(out.dtype.element_ty)
    if TRANSPOSED:
        to = out + group * size + c[:, None].to(tl.int64) * rank + r[None, :]
        tl.store(to, tl.trans(sum), tl.trans(stored))
    else:
        tl.store(out + group * size + at, sum, stored)


def outer(
    g: torch.Tensor,
    z: torch.Tensor,
    dtype: torch.dtype,
    *,
    scaling: float = 1.0,
    transposed: bool = False,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """scaling g^T drop(z), (R, C), or transposed (C, R), for g (M, R) float32 and z (M, C) with columns
    together.

    With order and bounds, of each adapter's rows: (G, R, C) or (G, C, R); g is in sorted order, z is not.
    """
    rows, rank = g.shape
    columns = z.shape[1]
    groups = 1 if bounds is None else bounds.shape[0] - 1
    block_m, block_c, warps, stages = tiles.tile("outer", rows, rank, z.dtype, z.device)
    splits = tiles.splits(rows, cdiv(columns, block_c) * groups)
    share = cdiv(cdiv(rows, splits), block_m) * block_m
    splits = max(1, cdiv(rows, share)) if share else 1
    partial = torch.empty(splits, groups, rank, columns, dtype=torch.float32, device=z.device)
    shape = (columns, rank) if transposed else (rank, columns)
    out = torch.empty(shape if bounds is None else (groups, *shape), dtype=dtype, device=z.device)
    launch(
        outer_kernel, (cdiv(columns, block_c), splits, groups),
        (
            g, z, partial, z if seed is None else seed, z if order is None else order,
            z if bounds is None else bounds, rows, columns, rank, share, groups, round(dropout_p * 2**32),
            z.stride(0),
        ),
        {
            "RANK": tiles.padded_rank(rank), "DROPOUT": dropout_p > 0.0, "GROUPED": order is not None,
            "BLOCK_M": block_m, "BLOCK_C": block_c,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        reduce_kernel, (cdiv(columns, 64), groups),
        (partial, out, groups, columns, rank, splits, scaling / (1.0 - dropout_p)),
        {"TRANSPOSED": transposed, "RANK": tiles.padded_rank(rank), "BLOCK": 64},
        num_warps=4 if rank <= 64 else 8,
    )  # fmt: skip
    return out

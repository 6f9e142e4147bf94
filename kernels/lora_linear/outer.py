"""dA = dh^T drop(x) and dB = s dy^T h, skinny products over the rows, split over them, both in one launch.

Floor: bytes, x and dy read once. Each program sums its share of the rows for BLOCK_C columns of x or dy into
a float32 partial; of a tile's programs the one that arrives last adds them in order, so the result is the
same in every run.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles
from peft_engine.kernels.lora_linear.parts import arrives_last, kept, sum_of_shares, wide_dot

from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def outer_tile(
    g, z, out, partial, width, arrivals, tile, seed, order, bounds, rows, columns, rank, share, groups,
    scaling, threshold, stride_zm,
    RANK: tl.constexpr, TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[group, r, c] = scaling * sum over the rows m of g[m, r] drop(z)[m, c], for a tile of c.

    TRANSPOSED writes out[group, c, r]. partial is (shares, groups, rank, width).
    """
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
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
        values = tl.load(z + row[:, None] * stride_zm + c[None, :], inside[:, None] & there[None, :], other=0)
        if DROPOUT:
            values = tl.where(kept(seed, row, c, threshold), values, 0.0)
        acc = wide_dot(left, values, acc)
    stored = (r < rank)[:, None] & there[None, :]
    at = (group.to(tl.int64) * rank + r[:, None]) * width + c[None, :]
    size = tl.cast(groups, tl.int64) * rank * width
    tl.store(partial + split * size + at, acc, stored)
    if arrives_last(arrivals + group * tl.num_programs(0) + tl.program_id(0)):
        sum = (sum_of_shares(partial, size, at, stored, RANK, BLOCK_C) * scaling).to(out.dtype.element_ty)
        out += group.to(tl.int64) * rank * columns
        if TRANSPOSED:
            to = out + c[:, None].to(tl.int64) * rank + r[None, :]
            tl.store(to, tl.trans(sum), tl.trans(stored))
        else:
            tl.store(out + r[:, None].to(tl.int64) * columns + c[None, :], sum, stored)


@triton.jit(do_not_specialize=["threshold"])
def outer_kernel(
    dh, x, da, h, dy, db, partial, arrivals, seed, order, bounds, rows, columns_a, columns_b, rank, share,
    groups, tiles_a, scaling_a, scaling_b, threshold, stride_xm, stride_dym,
    RANK: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dA by the first tiles_a tiles, dB by the others."""
    tile = tl.program_id(0)
    width = columns_a + columns_b
    if tile < tiles_a:
        outer_tile(
            dh, x, da, partial, width, arrivals, tile, seed, order, bounds, rows, columns_a, rank, share,
            groups, scaling_a, threshold, stride_xm, RANK, False, DROPOUT, GROUPED, BLOCK_M, BLOCK_C,
        )  # fmt: skip
    else:
        outer_tile(
            h, dy, db, partial + columns_a, width, arrivals, tile - tiles_a, seed, order, bounds, rows,
            columns_b, rank, share, groups, scaling_b, threshold, stride_dym, RANK, True, False, GROUPED,
            BLOCK_M, BLOCK_C,
        )  # fmt: skip


def outer(
    dh: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    dy: torch.Tensor,
    dtype: torch.dtype,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dA = dh^T drop(x) (R, K) and dB = scaling dy^T h (N, R), for dh and h (M, R) float32, x (M, K) and
    dy (M, N) with columns together.

    With order and bounds, of each adapter's rows: (G, R, K) and (G, N, R); dh and h are in sorted order, x
    and dy are not. arrivals: a counter at 0 for each tile, which it is again afterwards.
    """
    rows, rank = h.shape
    columns_a, columns_b = x.shape[1], dy.shape[1]
    groups = 1 if bounds is None else bounds.shape[0] - 1
    block_m, block_c, warps, stages = tiles.tile("outer", rows, rank, x.dtype, x.device)
    tiles_a = cdiv(columns_a, block_c)
    both = tiles_a + cdiv(columns_b, block_c)
    splits = tiles.splits(rows, both * groups)
    share = cdiv(cdiv(rows, splits), block_m) * block_m
    splits = max(1, cdiv(rows, share)) if share else 1
    partial = torch.empty(
        splits, groups, rank, columns_a + columns_b, dtype=torch.float32, device=x.device
    )  # fmt: skip
    many = () if bounds is None else (groups,)
    da = torch.empty(*many, rank, columns_a, dtype=dtype, device=x.device)
    db = torch.empty(*many, columns_b, rank, dtype=dtype, device=x.device)
    if arrivals is None:
        arrivals = torch.zeros(both * groups, dtype=torch.int32, device=x.device)
    launch(
        outer_kernel, (both, splits, groups),
        (
            dh, x, da, h, dy, db, partial, arrivals, x if seed is None else seed,
            x if order is None else order, x if bounds is None else bounds, rows, columns_a, columns_b, rank,
            share, groups, tiles_a, 1.0 / (1.0 - dropout_p), scaling, round(dropout_p * 2**32), x.stride(0),
            dy.stride(0),
        ),
        {
            "RANK": tiles.padded_rank(rank), "DROPOUT": dropout_p > 0.0, "GROUPED": order is not None,
            "BLOCK_M": block_m, "BLOCK_C": block_c,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return da, db

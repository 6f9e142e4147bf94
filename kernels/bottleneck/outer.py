"""The gradients of weights, biases and norm: sums over the rows, split over them, in a fixed order.

Floor: bytes, x and dy read once (for each BLOCK_R of the width). Each program sums its share of the rows into
float32 partials; a second kernel adds these in order. With a norm the first sums are G = dm^T n, n the
normalised x, and the second kernel has all the rest of it:

    dWd = G w + dbd b^T          dw = sum_r Wd[r] G[r]          db = sum_r Wd[r] dbd[r]          dbd = sum(dm)

so dz (M x H) is not formed again.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.bottleneck import tiles
from peft_engine.kernels.bottleneck.parts import activated, product, saved_statistics

from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def outer_kernel(
    left, z, stats, partial, sums, rows, columns, width, share,
    ACTIVATION: tl.constexpr, UP: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[s, r, c] over the rows of share s: dm[m, r] z[m, c] or, UP, act(m)[m, r] dy[m, c].

    sums[s] is of dm (R,) or, UP, of dy (H,). left is dm or the middle, z is x or dy; NORM normalises z.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.program_id(1)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = c < columns
    first = split * share
    last = tl.minimum(rows, first + share)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum = tl.zeros((BLOCK_M, BLOCK_C) if UP else (BLOCK_R, BLOCK_M), tl.float32)  # over BLOCK_M at the end
    for start in range(first, last, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = row < last
        part = tl.load(
            left + row[None, :] * width + r[:, None], (r < width)[:, None] & inside[None, :], other=0
        )  # fmt: skip
        tile = tl.load(z + row[:, None] * columns + c[None, :], inside[:, None] & there[None, :], other=0)
        if UP:
            part = activated(part.to(tl.float32), ACTIVATION).to(left.dtype.element_ty)
            sum += tile.to(tl.float32)
        else:
            sum += part.to(tl.float32)
        if NORM:
            mean, rstd = saved_statistics(stats, row, inside)
            normal = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
            tile = normal.to(left.dtype.element_ty)
        acc = product(part, tile, acc)
    place = split.to(tl.int64)
    at = partial + (place * width + r)[:, None] * columns + c[None, :]
    tl.store(at, acc, (r < width)[:, None] & there[None, :])
    if UP:
        if tl.program_id(2) == 0:
            tl.store(sums + place * columns + c, tl.sum(sum, 0), there)
    else:
        if tl.program_id(0) == 0:
            tl.store(sums + place * width + r, tl.sum(sum, 1), r < width)


@triton.jit
def reduce_kernel(
    partial, sums, down_weight, norm_weight, norm_bias, dweight, dbias, dnorm_weight, dnorm_bias,
    columns, width, splits, scaling,
    UP: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_C columns from the partials; UP writes dWu transposed, (H, R)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < columns
    size = tl.cast(width, tl.int64) * columns
    of_weight = tl.zeros((BLOCK_C,), tl.float32)
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, WIDTH, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        both = (r < width)[:, None] & there[None, :]
        at = r[:, None].to(tl.int64) * columns + c[None, :]
        sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        bias = tl.zeros((BLOCK_R,), tl.float32)
        for s in range(splits):
            sum += tl.load(partial + tl.cast(s, tl.int64) * size + at, both, other=0.0)
            if not UP:
                bias += tl.load(sums + tl.cast(s, tl.int64) * width + r, r < width, other=0.0)
        if UP:
            to = dweight + c[:, None].to(tl.int64) * width + r[None, :]
            tl.store(to, tl.trans(sum * scaling).to(dweight.dtype.element_ty), tl.trans(both))
        else:
            if tl.program_id(0) == 0:
                tl.store(dbias + r, bias.to(dbias.dtype.element_ty), r < width)
            if NORM:
                weight = tl.load(down_weight + at, both, other=0).to(tl.float32)
                of_weight += tl.sum(weight * sum, 0)
                of_bias += tl.sum(weight * bias[:, None], 0)
                sum *= tl.load(norm_weight + c, there, other=0).to(tl.float32)[None, :]
                if NORM_BIAS:
                    shift = tl.load(norm_bias + c, there, other=0).to(tl.float32)
                    sum += bias[:, None] * shift[None, :]
            tl.store(dweight + at, sum.to(dweight.dtype.element_ty), both)
    if UP:
        for s in range(splits):
            of_bias += tl.load(sums + tl.cast(s, tl.int64) * columns + c, there, other=0.0)
        tl.store(dbias + c, (of_bias * scaling).to(dbias.dtype.element_ty), there)
    if NORM:
        tl.store(dnorm_weight + c, of_weight.to(dnorm_weight.dtype.element_ty), there)
        tl.store(dnorm_bias + c, of_bias.to(dnorm_bias.dtype.element_ty), there)


def of_down(call, dm, x, stats) -> tuple[torch.Tensor, ...]:
    """dWd, dbd and, with a norm, dw and db of it, of dm (M, R) and x (M, H)."""
    norm = call.norm_weight is not None
    weight, bias = torch.empty_like(call.down_weight), dm.new_empty(call.width)
    of_norm = [torch.empty_like(call.norm_weight) for _ in range(2)] if norm else [dm, dm]
    _outer(call, dm, x, stats, weight, bias, *of_norm, up=False)
    return weight, bias, *of_norm


def of_up(call, middle, dy, stats) -> tuple[torch.Tensor, torch.Tensor]:
    """dWu and dbu of the middle (M, R) and dy (M, H)."""
    weight = torch.empty_like(call.up_weight)
    bias = weight.new_empty(dy.shape[1])
    _outer(call, middle, dy, stats, weight, bias, middle, middle, up=True)
    return weight, bias


def _outer(call, left, z, stats, dweight, dbias, dnorm_weight, dnorm_bias, *, up: bool) -> None:
    rows, columns = z.shape
    block_m, block_r, block_c, warps, stages = tiles.tile("outer", rows, call, z.device)
    padded = tiles.padded_width(call.width)
    block_r = min(block_r, padded)
    blocks = cdiv(columns, block_c), cdiv(call.width, block_r)
    share = block_m * cdiv(cdiv(rows, tiles.splits(rows, blocks[0] * blocks[1])), block_m)
    splits = max(1, cdiv(rows, share)) if share else 1  # without rows one, which writes zeros
    partial = torch.empty(splits, call.width, columns, dtype=torch.float32, device=z.device)
    sums = partial.new_empty(splits, columns if up else call.width)
    norm = call.norm_weight is not None and not up
    launch(
        outer_kernel, (blocks[0], splits, blocks[1]),
        (left, z, stats, partial, sums, rows, columns, call.width, share),
        {
            "ACTIVATION": call.activation, "UP": up, "NORM": norm, "BLOCK_M": block_m, "BLOCK_R": block_r,
            "BLOCK_C": block_c,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        reduce_kernel, (cdiv(columns, 32),),
        (
            partial, sums, call.down_weight, call.norm_weight if norm else z,
            call.norm_bias if norm and call.norm_bias is not None else z, dweight, dbias, dnorm_weight,
            dnorm_bias, columns, call.width, splits, call.scaling,
        ),
        {
            "UP": up, "NORM": norm, "NORM_BIAS": norm and call.norm_bias is not None, "WIDTH": padded,
            "BLOCK_R": min(32, padded), "BLOCK_C": 32,
        },
        num_warps=4,
    )  # fmt: skip

"""The bottleneck in several launches: programs share a row block's columns, so that few rows fill a GPU.

Down: programs sum their share of the columns for BLOCK_R of the width; with more than one share another
kernel adds them in order. Up: a program for BLOCK_M rows by BLOCK_N columns goes over the width BLOCK_R at a
time, so any width runs. Floor: bytes, as of fused.py, and the middle (M x R) written and read.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.bottleneck import tiles
from peft_engine.kernels.bottleneck.parts import (
    activated,
    contracted,
    gradient_of_middle,
    middle_of,
    norm_gradient,
    product,
    saved_statistics,
    statistics,
    store_result,
    weight_tile,
)

from peft_engine.kernels.launch import cdiv, folded, launch

NORM_ROWS, NORM_COLUMNS = 4, 512  # of a program of statistics_kernel
MEAN_ROWS, MEAN_BLOCKS = 16, 16  # of a program of means_kernel


@triton.jit
def statistics_kernel(x, stats, rows, columns, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and rstd of BLOCK_M rows."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    mean, rstd = statistics(x, row, inside, columns, eps, BLOCK_M, BLOCK_K)
    tl.store(stats + 2 * row, mean, inside)
    tl.store(stats + 2 * row + 1, rstd, inside)


@triton.jit
def finished(
    acc, down_bias, middle, row, inside, r, width, scaling,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, DOWN_BIAS: tl.constexpr,
):  # fmt: skip
    """m of whole sums or, BACKWARD, dm."""
    if BACKWARD:
        acc = gradient_of_middle(acc, middle, row, inside, r, width, scaling, ACTIVATION)
    else:
        acc = middle_of(acc, down_bias, r, width, DOWN_BIAS)
    return acc


@triton.jit
def contract_kernel(
    x, weight, norm_weight, norm_bias, stats, down_bias, middle, out, rows, columns, width, share, scaling,
    stride_wr, stride_wk,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr,
    DOWN_BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, r]: m of LN(x) or, BACKWARD, dm of x = dy.

    Where a program's columns are not the WHOLE: out[s, m, r], the sums of share s. The blocks of the width
    are next to each other: they read the same rows.
    """
    # Where the columns are shared there are few tiles, and the grid's third dimension is the shares'.
    tile = tl.program_id(1)
    split = 0
    if WHOLE:
        tile += tl.program_id(2) * tl.num_programs(1)
    else:
        split = tl.program_id(2)
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if NORM:
        mean, rstd = saved_statistics(stats, row, inside)
    acc = contracted(
        x, weight, norm_weight, norm_bias, mean, rstd, row, inside, r, split * share,
        tl.minimum(columns, split * share + share), columns, width, stride_wr, stride_wk, NORM, NORM_BIAS,
        BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip
    if WHOLE:
        acc = finished(
            acc, down_bias, middle, row, inside, r, width, scaling, BACKWARD, ACTIVATION, DOWN_BIAS
        )
    at = out + (tl.cast(split, tl.int64) * rows + row)[:, None] * width + r[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), inside[:, None] & (r < width)[None, :])


@triton.jit
def finish_kernel(
    partial, down_bias, middle, out, rows, width, shares, scaling,
    BACKWARD: tl.constexpr, ACTIVATION: tl.constexpr, DOWN_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[m, r] of the sums over s of partial[s, m, r], added in order: m or, BACKWARD, dm."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    stored = inside[:, None] & (r < width)[None, :]
    at = row[:, None] * width + r[None, :]
    sum = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for s in range(shares):
        sum += tl.load(partial + tl.cast(s, tl.int64) * rows * width + at, stored, other=0.0)
    sum = finished(sum, down_bias, middle, row, inside, r, width, scaling, BACKWARD, ACTIVATION, DOWN_BIAS)
    tl.store(out + at, sum.to(out.dtype.element_ty), stored)


@triton.jit
def raised_from(
    left, weight, row, inside, n, there, width, stride_wr, stride_wn,
    ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """sum_r left[m, r] weight[r, n], with the activation of left unless it is "none"."""
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, WIDTH, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        some = inside[:, None] & (r < width)[None, :]
        part = tl.load(left + row[:, None] * width + r[None, :], some, other=0)
        if ACTIVATION != "none":
            part = activated(part.to(tl.float32), ACTIVATION).to(weight.dtype.element_ty)
        sum = product(part, weight_tile(weight, r, n, there, width, stride_wr, stride_wn), sum)
    return sum


@triton.jit
def up_kernel(
    middle, residual, up_weight, up_bias, y, rows, columns, width, scaling,
    ACTIVATION: tl.constexpr, UP_BIAS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = residual + scaling (act(m) Wu^T + bu) of BLOCK_M rows and BLOCK_N columns."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    sum = raised_from(
        middle,
        up_weight,
        row,
        inside,
        n,
        there,
        width,
        1,
        width,
        ACTIVATION,
        WIDTH,
        BLOCK_M,
        BLOCK_R,
        BLOCK_N,
    )
    store_result(sum, residual, up_bias, y, row, inside, n, there, columns, scaling, UP_BIAS)


@triton.jit
def dx_kernel(
    dm, down_weight, dy, x, stats, norm_weight, sums, means, dx, rows, columns, width, blocks,
    NORM: tl.constexpr, SUMS: tl.constexpr, RESIDUAL_IS_X: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M rows and BLOCK_N columns.

    The norm's backward takes two launches: with SUMS the first leaves sums[m, block] of g and of g times the
    normalised x over the block's columns, of which means_kernel makes the means that the second reads.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    row = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    dz = raised_from(
        dm, down_weight, row, inside, n, there, width, columns, 1, "none", WIDTH, BLOCK_M, BLOCK_R, BLOCK_N
    )
    at = row[:, None] * columns + n[None, :]
    both = inside[:, None] & there[None, :]
    if NORM:
        mean, rstd = saved_statistics(stats, row, inside)
        g, normal = norm_gradient(dz, tl.load(x + at, both, other=0), mean, rstd, norm_weight, n, there)
        if SUMS:
            to = sums + 2 * (row * blocks)
            tl.store(to + 2 * tl.program_id(0), tl.sum(g, 1), inside)
            tl.store(to + 2 * tl.program_id(0) + 1, tl.sum(g * normal, 1), inside)
        else:
            mean_g = tl.load(means + 2 * row, inside, other=0.0)
            mean_gx = tl.load(means + 2 * row + 1, inside, other=0.0)
            dz = rstd[:, None] * (g - mean_g[:, None] - normal * mean_gx[:, None])
    if not SUMS:
        if RESIDUAL_IS_X:
            dz += tl.load(dy + at, both, other=0).to(tl.float32)
        tl.store(dx + at, dz.to(dx.dtype.element_ty), both)


@triton.jit
def means_kernel(
    sums, means, rows, columns, blocks, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """means[m] = sum over the blocks of sums[m, block] / columns, of two kinds: (M, 2) of (M, blocks, 2).

    By a kernel of its own: the programs of every block of columns would each read all the sums of their rows.
    """
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    sum_g = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    sum_gx = tl.zeros((BLOCK_M, BLOCK), tl.float32)
    for start in range(0, blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        both = inside[:, None] & (block < blocks)[None, :]
        at = sums + 2 * (row[:, None] * blocks + block[None, :])
        sum_g += tl.load(at, both, other=0.0)
        sum_gx += tl.load(at + 1, both, other=0.0)
    tl.store(means + 2 * row, tl.sum(sum_g, 1) / columns, inside)
    tl.store(means + 2 * row + 1, tl.sum(sum_gx, 1) / columns, inside)


def forward(call, x, residual, y, middle, stats) -> None:
    """Writes y (M, H), middle (M, R) and stats (M, 2) of x (M, H) and the residual."""
    rows, columns = x.shape
    if call.norm_weight is not None:
        launch(
            statistics_kernel, (cdiv(rows, NORM_ROWS),), (x, stats, rows, columns, call.eps),
            {"BLOCK_M": NORM_ROWS, "BLOCK_K": NORM_COLUMNS}, num_warps=4,
        )  # fmt: skip
    _contract(call, x, call.down_weight, (columns, 1), stats, middle, middle, backward=False)
    block_m, block_r, block_n, warps, stages = tiles.tile("up", rows, call, x.device)
    launch(
        up_kernel, (cdiv(columns, block_n), *folded(cdiv(rows, block_m))),
        (
            middle, residual, call.up_weight, x if call.up_bias is None else call.up_bias, y, rows, columns,
            call.width, call.scaling,
        ),
        {
            "ACTIVATION": call.activation, "UP_BIAS": call.up_bias is not None,
            "WIDTH": tiles.padded_width(call.width), "BLOCK_M": block_m,
            "BLOCK_R": min(block_r, tiles.padded_width(call.width)), "BLOCK_N": block_n,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def backward(call, dy, x, middle, stats, dm, dx, *, residual_is_x: bool) -> None:
    """Writes dm (M, R) and, unless it is None, dx (M, H)."""
    rows, columns = dy.shape
    _contract(call, dy, call.up_weight, (1, call.width), stats, middle, dm, backward=True)
    if dx is None:
        return
    block_m, block_r, block_n, warps, stages = tiles.tile("dx", rows, call, dy.device)
    norm = call.norm_weight is not None
    blocks = cdiv(columns, block_n)
    sums = torch.empty(rows if norm else 0, blocks, 2, dtype=torch.float32, device=dy.device)
    means = sums.new_empty(sums.shape[0], 2)
    for first in (True, False) if norm else (False,):
        if norm and not first:
            launch(
                means_kernel, (cdiv(rows, MEAN_ROWS),), (sums, means, rows, columns, blocks),
                {"BLOCK_M": MEAN_ROWS, "BLOCK": MEAN_BLOCKS}, num_warps=4,
            )  # fmt: skip
        launch(
            dx_kernel, (blocks, *folded(cdiv(rows, block_m))),
            (
                dm, call.down_weight, dy, x, stats, call.norm_weight if norm else dy, sums, means, dx, rows,
                columns, call.width, blocks,
            ),
            {
                "NORM": norm, "SUMS": first, "RESIDUAL_IS_X": residual_is_x,
                "WIDTH": tiles.padded_width(call.width), "BLOCK_M": block_m,
                "BLOCK_R": min(block_r, tiles.padded_width(call.width)), "BLOCK_N": block_n,
            },
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _contract(call, x, weight, strides, stats, middle, out, *, backward: bool) -> None:
    """out (M, R): m of x, or dm of x = dy; weight[r, k] is at r strides[0] + k strides[1]."""
    rows, columns = x.shape
    block_m, block_r, block_k, warps, stages = tiles.tile("contract", rows, call, x.device)
    block_r = min(block_r, tiles.padded_width(call.width))
    blocks = cdiv(call.width, block_r), cdiv(rows, block_m)
    share = tiles.share(columns, blocks[0] * blocks[1], block_k)
    shares = cdiv(columns, share)
    sums = out if shares == 1 else torch.empty(shares, *out.shape, dtype=torch.float32, device=x.device)
    norm = call.norm_weight is not None and not backward
    down_bias = x if call.down_bias is None else call.down_bias
    finish = {"BACKWARD": backward, "ACTIVATION": call.activation}
    launch(
        contract_kernel, (blocks[0], *folded(blocks[1])) if shares == 1 else (*blocks, shares),
        (
            x, weight, call.norm_weight if norm else x,
            call.norm_bias if norm and call.norm_bias is not None else x,
            stats, down_bias, middle, sums, rows, columns, call.width, share, call.scaling, *strides,
        ),
        {
            **finish, "NORM": norm, "NORM_BIAS": norm and call.norm_bias is not None,
            "DOWN_BIAS": call.down_bias is not None, "WHOLE": shares == 1,
            "BLOCK_M": block_m, "BLOCK_R": block_r, "BLOCK_K": block_k,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if shares > 1:
        block_r = min(64, tiles.padded_width(call.width))
        launch(
            finish_kernel, (cdiv(rows, 16), cdiv(call.width, block_r)),
            (sums, down_bias, middle, out, rows, call.width, shares, call.scaling),
            {**finish, "DOWN_BIAS": call.down_bias is not None, "BLOCK_M": 16, "BLOCK_R": block_r},
            num_warps=4,
        )  # fmt: skip

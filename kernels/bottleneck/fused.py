"""A row block in one program: down, activation and up, and their backward, in a launch each.

Floor: bytes, x read once and y written once; x is read again as the residual and (with a norm) for its
statistics, soon after and by the same program, so mostly from the L2. The middle of BLOCK_M rows stays in
registers, as wide as it is, which bounds the width (tiles.MAX_WIDTH).
"""

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

from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def forward_kernel(
    x, residual, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, y, middle, stats,
    rows, columns, width, scaling, eps,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, DOWN_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y, the middle and the statistics of BLOCK_M rows."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    r = tl.arange(0, WIDTH)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    rstd = tl.zeros((BLOCK_M,), tl.float32)
    if NORM:
        mean, rstd = statistics(x, row, inside, columns, eps, BLOCK_M, BLOCK_K)
        tl.store(stats + 2 * row, mean, inside)
        tl.store(stats + 2 * row + 1, rstd, inside)
    acc = contracted(
        x, down_weight, norm_weight, norm_bias, mean, rstd, row, inside, r, 0, columns, columns, width,
        columns, 1, NORM, NORM_BIAS, BLOCK_M, WIDTH, BLOCK_K,
    )  # fmt: skip
    m = middle_of(acc, down_bias, r, width, DOWN_BIAS).to(middle.dtype.element_ty)
    tl.store(middle + row[:, None] * width + r[None, :], m, inside[:, None] & (r < width)[None, :])
    a = activated(m.to(tl.float32), ACTIVATION).to(up_weight.dtype.element_ty)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < columns
        tile = weight_tile(up_weight, r, n, there, width, 1, width)
        raised = product(a, tile, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        store_result(raised, residual, up_bias, y, row, inside, n, there, columns, scaling, UP_BIAS)


@triton.jit
def backward_kernel(
    dy, x, middle, stats, down_weight, up_weight, norm_weight, dm, dx, rows, columns, width, scaling,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, NEED_DX: tl.constexpr, RESIDUAL_IS_X: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dm and, if asked for, dx of BLOCK_M rows.

    The norm's backward needs two sums over all columns before its first result: dz is formed twice, which is
    exact where sums taken from the rounded middle would not be.
    """
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    r = tl.arange(0, WIDTH)
    none = tl.zeros((BLOCK_M,), tl.float32)
    acc = contracted(
        dy, up_weight, norm_weight, norm_weight, none, none, row, inside, r, 0, columns, columns, width,
        1, width, False, False, BLOCK_M, WIDTH, BLOCK_K,
    )  # fmt: skip
    g_m = gradient_of_middle(acc, middle, row, inside, r, width, scaling, ACTIVATION)
    g_m = g_m.to(dm.dtype.element_ty)
    tl.store(dm + row[:, None] * width + r[None, :], g_m, inside[:, None] & (r < width)[None, :])
    if NEED_DX:
        sum_g = tl.zeros((BLOCK_M,), tl.float32)
        sum_gx = tl.zeros((BLOCK_M,), tl.float32)
        mean = tl.zeros((BLOCK_M,), tl.float32)
        rstd = tl.zeros((BLOCK_M,), tl.float32)
        if NORM:
            mean, rstd = saved_statistics(stats, row, inside)
            for start in range(0, columns, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                there = n < columns
                tile = weight_tile(down_weight, r, n, there, width, columns, 1)
                dz = product(g_m, tile, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
                both = inside[:, None] & there[None, :]
                x_tile = tl.load(x + row[:, None] * columns + n[None, :], both, other=0)
                g, normal = norm_gradient(dz, x_tile, mean, rstd, norm_weight, n, there)
                sum_g += tl.sum(g, 1)
                sum_gx += tl.sum(g * normal, 1)
            sum_g /= columns
            sum_gx /= columns
        for start in range(0, columns, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            there = n < columns
            tile = weight_tile(down_weight, r, n, there, width, columns, 1)
            dz = product(g_m, tile, tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            at = row[:, None] * columns + n[None, :]
            both = inside[:, None] & there[None, :]
            if NORM:
                x_tile = tl.load(x + at, both, other=0)
                g, normal = norm_gradient(dz, x_tile, mean, rstd, norm_weight, n, there)
                dz = rstd[:, None] * (g - sum_g[:, None] - normal * sum_gx[:, None])
            if RESIDUAL_IS_X:
                dz += tl.load(dy + at, both, other=0).to(tl.float32)
            tl.store(dx + at, dz.to(dx.dtype.element_ty), both)


def forward(call, x, residual, y, middle, stats) -> None:
    """Writes y (M, H), middle (M, R) and stats (M, 2) of x (M, H) and the residual."""
    rows, columns = x.shape
    block_m, block_k, block_n, warps, stages = tiles.tile("fused", rows, call, x.device)
    launch(
        forward_kernel, (cdiv(rows, block_m),),
        (
            x, residual, *call.parameters(x), y, middle, stats, rows, columns, call.width, call.scaling,
            call.eps,
        ),
        {
            "ACTIVATION": call.activation, "NORM": call.norm_weight is not None,
            "NORM_BIAS": call.norm_bias is not None, "DOWN_BIAS": call.down_bias is not None,
            "UP_BIAS": call.up_bias is not None, "WIDTH": tiles.padded_width(call.width),
            "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_N": block_n,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def backward(call, dy, x, middle, stats, dm, dx, *, residual_is_x: bool) -> None:
    """Writes dm (M, R) and, unless it is None, dx (M, H)."""
    rows, columns = dy.shape
    block_m, block_k, block_n, warps, stages = tiles.tile("fused_backward", rows, call, dy.device)
    norm_weight = dy if call.norm_weight is None else call.norm_weight
    launch(
        backward_kernel, (cdiv(rows, block_m),),
        (
            dy, x, middle, stats, call.down_weight, call.up_weight, norm_weight, dm,
            dm if dx is None else dx, rows, columns, call.width, call.scaling,
        ),
        {
            "ACTIVATION": call.activation, "NORM": call.norm_weight is not None, "NEED_DX": dx is not None,
            "RESIDUAL_IS_X": residual_is_x, "WIDTH": tiles.padded_width(call.width),
            "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_N": block_n,
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip

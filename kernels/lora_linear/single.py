"""The single kernel: the packed tile decoded on chip, the product, and the adapter in the epilogue.

y = x W^T + bias + s h B^T with h = drop(x) A^T from down.py, and the same transposed for dx. W is NF4 or
dense, and never in memory as a whole. Floor: bytes, the packed weight read once for each BLOCK_M rows, and
its decode as often, so rows are taken as many at a time as fit. (h in the same loop was tried: its three
terms of A cost more than the launch they saved.)
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles
from peft_engine.kernels.lora_linear.down import down
from peft_engine.kernels.lora_linear.parts import kept, wide_dot
from peft_engine.kernels.nf4.dequantize import scale_of
from peft_engine.kernels.nf4.tables import absmax_code, code

from peft_engine.kernels.launch import cdiv, folded, launch


@triton.jit
def weight_tile(
    weight, absmax, nested_absmax, offset, absmax_code, table, row, inside, k, columns, DTYPE: tl.constexpr,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The weight's rows `row` (64-bit) and columns k to k + COLUMNS; columns is a multiple of 64."""
    # Values under one scale: blocks may go on in the next row, and then begin at any multiple of 64.
    SHARE: tl.constexpr = 64 if COLUMNS > 64 else COLUMNS
    SCALES: tl.constexpr = COLUMNS // SHARE
    start = row * columns + k
    part = tl.arange(0, SCALES) * SHARE
    there = inside[:, None] & ((k + part) < columns)[None, :]
    block = (start[:, None] + part[None, :]) // BLOCKSIZE
    scale = scale_of(absmax, nested_absmax, offset, absmax_code, block, there, NESTED)
    # what lies beyond the weight has no scale: whatever was loaded for it must not reach a sum
    scale = tl.where(there, scale, 0.0).reshape(ROWS * SCALES)
    word = tl.arange(0, COLUMNS // 8)
    words = tl.load(
        weight.to(tl.pointer_type(tl.int32)) + (start // 8)[:, None] + word[None, :],
        inside[:, None] & (k + 8 * word < columns)[None, :], other=0,
    ).reshape(ROWS * SCALES, SHARE // 8)  # fmt: skip
    # The 16 values of a block are formed and rounded first, and looked up then: a multiplication for 4
    # weights.
    values = (table[None, :] * scale[:, None]).to(DTYPE)
    j = tl.arange(0, 8)
    index = (words[:, :, None] >> ((j ^ 1) * 4)[None, None, :]) & 15
    return tl.gather(values, index.reshape(ROWS * SCALES, SHARE), 1).reshape(ROWS, COLUMNS)


@triton.jit
def epilogue(h, factor, row, inside_m, column, inside_c, rank, stride_c, stride_r, RANK: tl.constexpr):
    """The adapter's part of a transposed tile: (C, M) sums of factor[c, r] h[m, r]."""
    r = tl.arange(0, RANK)
    up = tl.load(
        factor + column[:, None] * stride_c + r[None, :] * stride_r, inside_c[:, None] & (r < rank)[None, :],
        other=0,
    ).to(tl.float32)  # fmt: skip
    down = tl.load(h + row[None, :] * rank + r[:, None], (r < rank)[:, None] & inside_m[None, :], other=0.0)
    return tl.dot(up, down, input_precision="tf32x3")


@triton.jit
def forward_kernel(
    x, weight, absmax, nested_absmax, offset, code, absmax_code, h, b, bias, y,
    rows, columns, out_features, rank, scaling, stride_xm, stride_bn, stride_br,
    NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias + scaling h B^T; the tile is held as W x^T, so that the decoded one is on the left."""
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    tile_m = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside_n, inside_m = n < out_features, m < rows
    table = tl.load(code + tl.arange(0, 16)) if NF4 else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = k < columns
        tile = tl.load(x + m[:, None] * stride_xm + k[None, :], inside_m[:, None] & there[None, :], other=0)
        if NF4:
            w = weight_tile(
                weight, absmax, nested_absmax, offset, absmax_code, table, n, inside_n, start, columns,
                x.dtype.element_ty, BLOCKSIZE, NESTED, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            w = tl.load(
                weight + n[:, None] * columns + k[None, :], inside_n[:, None] & there[None, :], other=0
            )
        acc = wide_dot(w, tl.trans(tile), acc)
    if RANK:
        acc += epilogue(h, b, m, inside_m, n, inside_n, rank, stride_bn, stride_br, RANK) * scaling
    if BIAS:
        acc += tl.load(bias + n, inside_n, other=0).to(tl.float32)[:, None]
    to = y + m[None, :] * out_features + n[:, None]
    tl.store(to, acc.to(y.dtype.element_ty), inside_n[:, None] & inside_m[None, :])


@triton.jit(do_not_specialize=["threshold"])
def backward_kernel(
    dy, weight, absmax, nested_absmax, offset, code, absmax_code, dh, a, dx, seed,
    rows, columns, out_features, rank, inverse_keep, threshold, stride_ym, stride_ar, stride_ak,
    NF4: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, RANK: tl.constexpr,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = dy W + drop'(dh A); held as W^T dy^T, like the forward."""
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    tile_m = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    there, inside_m = k < columns, m < rows
    table = tl.load(code + tl.arange(0, 16)) if NF4 else 0
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for start in range(0, out_features, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside_n, wide_n = n < out_features, n.to(tl.int64)
        tile = tl.load(
            dy + m[:, None] * stride_ym + n[None, :], inside_m[:, None] & inside_n[None, :], other=0
        )
        if NF4:
            w = weight_tile(
                weight, absmax, nested_absmax, offset, absmax_code, table, wide_n, inside_n,
                tl.program_id(0) * BLOCK_K, columns, dy.dtype.element_ty, BLOCKSIZE, NESTED, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            w = tl.load(
                weight + wide_n[:, None] * columns + k[None, :], inside_n[:, None] & there[None, :], other=0
            )
        acc = wide_dot(tl.trans(w), tl.trans(tile), acc)
    if RANK:
        sum = epilogue(dh, a, m, inside_m, k, there, rank, stride_ak, stride_ar, RANK)
        if DROPOUT:
            sum = tl.where(tl.trans(kept(seed, m, k, threshold)), sum * inverse_keep, 0.0)
        acc += sum
    to = dx + m[None, :] * columns + k[:, None]
    tl.store(to, acc.to(dx.dtype.element_ty), there[:, None] & inside_m[None, :])


def forward(x, base, out_features, a, b, scaling, bias, dropout_p, seed):
    """y (M, N) and h (M, R) float32, for x (M, K) and base = (weight, absmax, nested_absmax, offset,
    blocksize).
    """
    rows, columns = x.shape
    rank = 0 if a is None else a.shape[0]
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    h = down(x, a, 1.0, dropout_p=dropout_p, seed=seed) if rank else x.new_empty(0, 0, dtype=torch.float32)
    if not y.numel():
        return y, h
    block_m, block_n, block_k, warps, stages = tiles.tile("single", rows, rank, x.dtype, x.device)
    launch(
        forward_kernel, (cdiv(out_features, block_n), *folded(cdiv(rows, block_m))),
        (
            x, *_weight(base, x), h if rank else x, b if rank else x, x if bias is None else bias, y, rows,
            columns,
            out_features, rank, scaling, x.stride(0), *(b.stride() if rank else (0, 0)),
        ),
        {
            **_constants(base, rank), "BIAS": bias is not None,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        },
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y, h


def backward(dy, base, columns, a, b, scaling, dropout_p, seed):
    """dx (M, K) and dh (M, R) float32, scaled, for dy (M, N)."""
    rows, out_features = dy.shape
    rank = 0 if a is None else a.shape[0]
    dx = torch.empty(rows, columns, dtype=dy.dtype, device=dy.device)
    dh = down(dy, b.t(), scaling) if rank else None
    if not dx.numel():
        return dx, dh
    block_m, block_k, block_n, warps, stages = tiles.tile("single_backward", rows, rank, dy.dtype, dy.device)
    launch(
        backward_kernel, (cdiv(columns, block_k), *folded(cdiv(rows, block_m))),
        (
            dy, *_weight(base, dy), dh if rank else dy, a if rank else dy, dx, dy if seed is None else seed,
            rows,
            columns, out_features, rank, 1.0 / (1.0 - dropout_p), round(dropout_p * 2**32), dy.stride(0),
            *(a.stride() if rank else (0, 0)),
        ),
        {
            **_constants(base, rank), "DROPOUT": dropout_p > 0.0 and rank > 0,
            "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
        },
        num_warps=warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip
    return dx, dh


def _weight(base, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels' arguments from weight to absmax_code; x stands for what is not there."""
    weight, absmax, nested, offset, _ = base
    if absmax is None:
        return weight, x, x, x, x, x
    return (
        weight, absmax, x if nested is None else nested, x if offset is None else offset, code(x.device),
        absmax_code(x.device),
    )  # fmt: skip


def _constants(base, rank: int) -> dict[str, int]:
    _, absmax, nested, _, blocksize = base
    return {
        "NF4": absmax is not None,
        "BLOCKSIZE": blocksize,
        "NESTED": nested is not None,
        "RANK": tiles.padded_rank(rank) if rank else 0,
    }

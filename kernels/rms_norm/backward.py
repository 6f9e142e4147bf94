"""dx and dw of rms_norm.

    dx_kernel     as the forward: rows in registers, x and dy read once; all that training an adapter needs
    dw_kernel     sums of dy x rstd over a share of the rows; sum_kernel adds the shares in order

Floor: bytes, x and dy read and dx written; for dw x and dy read once more.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.rms_norm.forward import tile_of

from peft_engine.kernels.launch import cdiv, launch
from peft_engine.kernels.tiles import row_shares

BLOCK_M, BLOCK_N = 32, 64  # of dw_kernel
SHARE = 256  # rows of one of its programs, at the least
MULTIPROCESSORS = 132  # an H200's; two programs for each


@triton.jit
def dx_kernel(
    dy, x, weight, rstd, dx, rows, offset,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - x rstd^2 mean(g x)), g = dy (offset + w), of BLOCK_M rows."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    x += row[:, None] * COLUMNS
    dy += row[:, None] * COLUMNS
    dx += row[:, None] * COLUMNS
    scale = tl.load(rstd + row, inside, other=0.0)
    products = tl.zeros((BLOCK_M,), tl.float32)
    for block in tl.static_range(BLOCKS):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < COLUMNS
        both = inside[:, None] & there[None, :]
        factor = offset + tl.load(weight + n, there, other=0).to(tl.float32)
        g = tl.load(dy + n[None, :], both, other=0).to(tl.float32) * factor[None, :]
        normal = tl.load(x + n[None, :], both, other=0).to(tl.float32) * scale[:, None]
        products += tl.sum(g * normal, 1)
    mean = products / COLUMNS
    for block in tl.static_range(BLOCKS):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < COLUMNS
        both = inside[:, None] & there[None, :]
        if BLOCKS > 1:
            factor = offset + tl.load(weight + n, there, other=0).to(tl.float32)
            g = tl.load(dy + n[None, :], both, other=0).to(tl.float32) * factor[None, :]
            normal = tl.load(x + n[None, :], both, other=0).to(tl.float32) * scale[:, None]
        out = (g - normal * mean[:, None]) * scale[:, None]
        tl.store(dx + n[None, :], out.to(dx.dtype.element_ty), both)


@triton.jit
def dw_kernel(dy, x, rstd, partial, rows, columns, share, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """partial[s, n] = sum of dy x rstd over the rows of share s."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    first = tl.program_id(1) * share
    last = tl.minimum(rows, first + share)
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # added up over BLOCK_M once, after the loop
    for start in range(first, last, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = row < last
        both = inside[:, None] & there[None, :]
        at = row[:, None] * columns + n[None, :]
        normal = tl.load(x + at, both, other=0).to(tl.float32)
        normal *= tl.load(rstd + row, inside, other=0.0)[:, None]
        sum += tl.load(dy + at, both, other=0).to(tl.float32) * normal
    tl.store(partial + tl.program_id(1).to(tl.int64) * columns + n, tl.sum(sum, 0), there)


@triton.jit
def sum_kernel(partial, dw, columns, shares, BLOCK_N: tl.constexpr):
    """dw[n] = sum over s of partial[s, n], in order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    sum = tl.zeros((BLOCK_N,), tl.float32)
    for s in range(shares):
        sum += tl.load(partial + tl.cast(s, tl.int64) * columns + n, there, other=0.0)
    tl.store(dw + n, sum.to(dw.dtype.element_ty), there)


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, offset: float,
    need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx and dw, contiguous as dy and x are; the arguments of the raw op rms_norm_backward."""
    rows, columns = rstd.shape[0], weight.shape[0]
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dw = torch.empty_like(weight) if need_dw else weight.new_empty(0)
    if need_dx and x.numel():
        block_m, block_n, warps = tile_of(columns, x.dtype)
        launch(
            dx_kernel, (cdiv(rows, block_m),), (dy, x, weight, rstd, dx, rows, offset),
            {"COLUMNS": columns, "BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps,
        )  # fmt: skip
    if need_dw and columns:
        _weight_gradient(dy, x, rstd, dw, rows, columns)
    return dx, dw


def _weight_gradient(dy, x, rstd, dw, rows: int, columns: int) -> None:
    blocks = cdiv(columns, BLOCK_N)
    wanted = max(1, min(cdiv(2 * MULTIPROCESSORS, blocks), rows // SHARE))
    share, shares = row_shares(rows, wanted, BLOCK_M)
    partial = torch.empty(shares, columns, dtype=torch.float32, device=x.device)
    launch(
        dw_kernel, (blocks, shares), (dy, x, rstd, partial, rows, columns, share),
        {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, num_warps=4,
    )  # fmt: skip
    launch(sum_kernel, (cdiv(columns, 128),), (partial, dw, columns, shares), {"BLOCK_N": 128}, num_warps=4)

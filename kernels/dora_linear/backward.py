"""dy0 and dm of dora_linear.

    backward_kernel  dy0 = (m / n) dy, and the sums of dy y0 over a share of the rows
    sum_kernel       adds the shares in order: dm = sum / n

Floor: bytes, dy and y0 read once and dy0 written.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.dora_linear.forward import TINY, factor_of

from peft_engine.kernels.launch import cdiv, launch
from peft_engine.kernels.tiles import row_shares

BLOCK_M, BLOCK_N, WARPS = 32, 64, 4
PROGRAMS = 8 * 132  # eight of an H200's multiprocessors' programs, for enough bytes in flight. Not timed.
SHARE = 2 * BLOCK_M  # rows of a program, at the least


@triton.jit
def backward_kernel(
    dy, y, magnitude, norm, dy0, partial, rows, columns, share,
    NEED_DM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dy0 = (m / n) dy of the rows of share s, and partial[s, n] = sum of dy y over them."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    factor = factor_of(magnitude, norm, n, there)[None, :]
    first = tl.program_id(1) * share
    last = tl.minimum(rows, first + share)
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # added up over BLOCK_M once, after the loop
    for start in range(first, last, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        both = (row < last)[:, None] & there[None, :]
        at = row[:, None] * columns + n[None, :]
        gradient = tl.load(dy + at, both, other=0).to(tl.float32)
        tl.store(dy0 + at, (gradient * factor).to(dy0.dtype.element_ty), both)
        if NEED_DM:
            sum += gradient * tl.load(y + at, both, other=0).to(tl.float32)
    if NEED_DM:
        tl.store(partial + tl.program_id(1).to(tl.int64) * columns + n, tl.sum(sum, 0), there)


@triton.jit
def sum_kernel(partial, norm, dm, columns, shares, BLOCK_N: tl.constexpr):
    """dm[n] = sum over s of partial[s, n], in order, by norm[n]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    sum = tl.zeros((BLOCK_N,), tl.float32)
    for s in range(shares):
        sum += tl.load(partial + tl.cast(s, tl.int64) * columns + n, there, other=0.0)
    tl.store(dm + n, sum / tl.maximum(tl.load(norm + n, there, other=1.0), TINY), there)


def backward(
    dy: torch.Tensor, y: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, need_dm: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy0 and dm; dy and y (..., N) contiguous, magnitude and norm (N,) float32; the raw op
    dora_linear_backward.
    """
    columns = magnitude.shape[0]
    dy0, dm = torch.empty_like(dy), torch.empty_like(magnitude) if need_dm else magnitude.new_empty(0)
    if not columns:
        return dy0, dm
    rows, blocks = dy.numel() // columns, cdiv(columns, BLOCK_N)
    wanted = max(1, min(cdiv(PROGRAMS, blocks), rows // SHARE))
    share, shares = row_shares(rows, wanted, BLOCK_M)
    partial = torch.empty(shares, columns, dtype=torch.float32, device=dy.device) if need_dm else norm
    launch(
        backward_kernel, (blocks, shares), (dy, y, magnitude, norm, dy0, partial, rows, columns, share),
        {"NEED_DM": need_dm, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, num_warps=WARPS,
    )  # fmt: skip
    if need_dm:
        launch(
            sum_kernel, (cdiv(columns, 128),), (partial, norm, dm, columns, shares), {"BLOCK_N": 128},
            num_warps=4,
        )  # fmt: skip
    return dy0, dm

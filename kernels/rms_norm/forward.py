"""y and rstd of rms_norm: each row read once.

Floor: bytes, x read and y written. A row of up to BLOCK_N columns stays in registers between its sum and its
product; a longer one is read a second time, from L1 or L2.
"""

import torch
import triton
import triton.language as tl

from peft_engine.kernels.launch import cdiv, launch

# Columns that a program holds: 32 in each of 256 threads, 16 in 512 of float32. Not timed on a GPU.
MOST_COLUMNS = 8192


@triton.jit
def forward_kernel(
    x, weight, y, rstd, rows, eps, offset,
    COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = x rstd (offset + w) and rstd = 1 / sqrt(mean(x^2) + eps) of BLOCK_M rows."""
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    inside = row < rows
    x += row[:, None] * COLUMNS
    y += row[:, None] * COLUMNS
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for block in tl.static_range(BLOCKS):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        both = inside[:, None] & (n < COLUMNS)[None, :]
        tile = tl.load(x + n[None, :], both, other=0).to(tl.float32)
        squares += tl.sum(tile * tile, 1)
    variance = squares / COLUMNS + eps
    scale = tl.rsqrt(variance)  # approximate, so one step of Newton's; but of infinity it is 0, and no NaN
    scale += tl.where(scale == 0.0, 0.0, 0.5 * scale * (1.0 - variance * scale * scale))
    tl.store(rstd + row, scale, inside)
    for block in tl.static_range(BLOCKS):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        there = n < COLUMNS
        both = inside[:, None] & there[None, :]
        if BLOCKS > 1:
            tile = tl.load(x + n[None, :], both, other=0).to(tl.float32)
        factor = offset + tl.load(weight + n, there, other=0).to(tl.float32)
        out = tile * scale[:, None] * factor[None, :]
        tl.store(y + n[None, :], out.to(y.dtype.element_ty), both)


def tile_of(columns: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps: short rows share a program; 64 bytes of x for each thread."""
    block_n = min(triton.next_power_of_2(columns), MOST_COLUMNS)
    block_m = max(1, 2048 // block_n)
    return block_m, block_n, max(1, block_m * block_n * dtype.itemsize // 2048)


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y of x (..., N), contiguous, and rstd (rows,) float32; the arguments of the raw op rms_norm_forward."""
    columns = weight.shape[0]
    y = torch.empty_like(x)
    rows = x.numel() // max(columns, 1)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        block_m, block_n, warps = tile_of(columns, x.dtype)
        launch(
            forward_kernel, (cdiv(rows, block_m),), (x, weight, y, rstd, rows, eps, offset),
            {"COLUMNS": columns, "BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps,
        )  # fmt: skip
    return y, rstd

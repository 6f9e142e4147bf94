"""y = (m / n) y0 + bias of dora_linear: y0 read once, y written. Floor: those bytes."""

import torch
import triton
import triton.language as tl

from peft_engine.kernels.launch import cdiv, launch

BLOCK_M, BLOCK_N, WARPS = 32, 256, 8  # 32 elements a thread: 64 bytes of half precision. Not timed on a GPU.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def factor_of(magnitude, norm, n, there):
    """m / n of columns; one of zeros, which has no direction, stays one."""
    return tl.load(magnitude + n, there, other=0.0) / tl.maximum(tl.load(norm + n, there, other=1.0), TINY)


@triton.jit
def forward_kernel(
    y, magnitude, norm, bias, out, rows, columns, blocks,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = (m / n) y + bias of BLOCK_M rows and BLOCK_N columns."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    both = (row < rows)[:, None] & there[None, :]
    at = row[:, None] * columns + n[None, :]
    result = tl.load(y + at, both, other=0).to(tl.float32) * factor_of(magnitude, norm, n, there)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, there, other=0.0)[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), both)


def forward(
    y: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """y (..., N) contiguous, the others (N,) float32; the raw op dora_linear_forward."""
    out = torch.empty_like(y)
    if y.numel():
        columns = y.shape[-1]
        rows, blocks = y.numel() // columns, cdiv(columns, BLOCK_N)
        launch(
            forward_kernel, (cdiv(rows, BLOCK_M) * blocks,),
            (y, magnitude, norm, norm if bias is None else bias, out, rows, columns, blocks),
            {"HAS_BIAS": bias is not None, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}, num_warps=WARPS,
        )  # fmt: skip
    return out

"""The gradient of a range of logits in place of them, from what rows.py left of each row.

Floor: bytes, the logits read and written.
"""

import torch
import triton
import triton.language as tl

from peft_engine.kernels.launch import cdiv, launch

BLOCK, WARPS = 1024, 4  # logits of a program. Not timed on a GPU.


@triton.jit
def columns_kernel(logits, labels, scale, stats, columns, chunks, stride, first_column, BLOCK: tl.constexpr):
    """l_j = scale (exp(l_j - max) / sum - [first_column + j = label]) of a part of a row."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    j = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    there = j < columns
    at = logits + row * stride + j
    most = tl.load(stats + 2 * row)
    inverse = 1.0 / tl.load(stats + 2 * row + 1)
    label = tl.load(labels + row) - first_column
    p = tl.exp(tl.load(at, there, other=float("-inf")).to(tl.float32) - most) * inverse
    gradient = tl.where(j == label, p - 1.0, p) * tl.load(scale + row)
    tl.store(at, gradient.to(logits.dtype.element_ty), there)


def cross_entropy_columns(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, stats: torch.Tensor, first_column: int
) -> None:
    """The raw op of this name: logits (rows, n) of the columns from first_column become their gradient."""
    rows, columns = logits.shape
    chunks = cdiv(columns, BLOCK)
    if rows * columns:
        launch(
            columns_kernel, (rows * chunks,),
            (logits, labels, scale, stats, columns, chunks, logits.stride(0), first_column), {"BLOCK": BLOCK},
            num_warps=WARPS,
        )  # fmt: skip

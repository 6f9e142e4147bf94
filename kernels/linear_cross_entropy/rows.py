"""Losses of rows of logits, and their gradient in place of them.

Floor: bytes, the logits read once for the loss, read again and written for the gradient. A program has a
whole row, whose second reading finds in the L2 what the first left there.
"""

import torch
import triton
import triton.language as tl

from peft_engine.activations import with_spare
from peft_engine.kernels.launch import launch

# Logits at a time: EACH of them lie together and share a maximum, so that the running sum is rescaled by one
# exponential for EACH. Not timed on a GPU.
LANES, EACH, WARPS = 512, 8, 8


@triton.jit
def rows_kernel(
    logits, labels, scale, loss, stats, columns, stride,
    GRADIENT: tl.constexpr, SPARE: tl.constexpr, LANES: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """loss = log sum_j exp(l_j) - l_label of one row, nan where no l_label is; GRADIENT: the row becomes
    scale (exp(l_j - max) / sum - [j = label]).

    stats (rows, 2): max, and the sum of exp(l_j - max). SPARE: there is memory behind a row up to a multiple
    of EACH, which is read and written with it, so that no access is less than 16 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    # Read before the reductions, whose barriers come before the first write to the row.
    of_label = tl.load(logits + label, (label >= 0) & (label < columns), other=float("nan")).to(tl.float32)
    lane = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    # A lane that has seen nothing but -inf has the sum 0.
    top = tl.full((LANES,), float("-inf"), tl.float32)
    sum = tl.zeros((LANES,), tl.float32)
    end = tl.cdiv(columns, EACH) * EACH if SPARE else columns
    for start in range(0, columns, LANES * EACH):
        j = start + lane
        tile = tl.load(logits + j, j < end, other=float("-inf")).to(tl.float32)
        if SPARE:
            tile = tl.where(j < columns, tile, float("-inf"))
        higher = tl.maximum(top, tl.max(tile, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sum = sum * tl.exp(top - base) + tl.sum(tl.exp(tile - base[:, None]), 1)
        top = higher
    most = tl.max(top, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(sum * tl.exp(top - base), 0)
    tl.store(loss + row, tl.log(total) - (of_label - most))
    tl.store(stats + 2 * row, most)
    tl.store(stats + 2 * row + 1, total)
    if GRADIENT:
        factor = tl.load(scale + row)
        inverse = 1.0 / total  # of the row once: a division is a reciprocal and two products
        for start in range(0, columns, LANES * EACH):
            j = start + lane
            tile = tl.load(logits + j, j < end, other=float("-inf")).to(tl.float32)
            p = tl.exp(tile - most) * inverse
            gradient = tl.where(j == label, p - 1.0, p) * factor
            tl.store(logits + j, gradient.to(logits.dtype.element_ty), j < end)


def cross_entropy_rows(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, loss: torch.Tensor, stats: torch.Tensor,
    write_gradient: bool,
) -> None:  # fmt: skip
    """Fills loss (rows,) and stats (rows, 2); logits (rows, N) become their gradient where asked. The raw op
    of this name.
    """
    rows, columns = logits.shape
    whole = with_spare(logits, -columns % EACH) if columns % EACH else None
    spare, whole = whole is not None, logits if whole is None else whole
    if rows:
        launch(
            rows_kernel, (rows,), (whole, labels, scale, loss, stats, columns, logits.stride(0)),
            {"GRADIENT": write_gradient, "SPARE": spare, "LANES": LANES, "EACH": EACH}, num_warps=WARPS,
        )  # fmt: skip

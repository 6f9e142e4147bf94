"""y += drop'(h B^T): the product up from the rank, added to what the base gave, in float32, one rounding.

Floor: bytes, y read and written once. With dropout (of the backward: y is dx, B is A^T) an element that the
forward dropped gets nothing.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.lora_linear import tiles
from peft_engine.kernels.lora_linear.parts import kept, rows_of_tile

from peft_engine.kernels.launch import cdiv, folded, launch


@triton.jit(do_not_specialize=["threshold"])
def up_kernel(
    y, h, b, seed, order, bounds, rows, columns, groups, rank, scaling, threshold,
    stride_ym, stride_bg, stride_bn, stride_br,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, DROPOUT: tl.constexpr, GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[m, n] += scaling * sum_r h[m, r] b[n, r]; with GROUPED, of sorted rows under their own b."""
    tile = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    if GROUPED:
        group, place, row, inside = rows_of_tile(order, bounds, tile, groups, BLOCK_M)
        if group < 0:
            return
        b += group.to(tl.int64) * stride_bg
    else:
        place = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = place < rows
        row = place.to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < columns
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # a part of the rank at a time: the split operands of a whole one would not fit the registers
    for start in tl.range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        down = tl.load(
            h + place.to(tl.int64)[:, None] * rank + r[None, :],
            inside[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        up = tl.load(
            b + n[None, :].to(tl.int64) * stride_bn + r[:, None] * stride_br,
            (r < rank)[:, None] & there[None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        sum = tl.dot(down, up, sum, input_precision="tf32x3")
    sum *= scaling
    if DROPOUT:
        sum = tl.where(kept(seed, row, n, threshold), sum, 0.0)
    at = y + row[:, None] * stride_ym + n[None, :]
    both = inside[:, None] & there[None, :]
    tl.store(at, (tl.load(at, both, other=0).to(tl.float32) + sum).to(y.dtype.element_ty), both)


def up_(
    y: torch.Tensor,
    h: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    bounds: torch.Tensor | None = None,
) -> None:
    """Adds scaling h b^T to y (M, N), in place; h (M, R) float32, b (N, R) of any strides.

    With order and bounds: h (M', R) of sorted rows, b (G, N, R); rows without an adapter stay untouched.
    """
    rank, columns = b.shape[-1], b.shape[-2]
    if not h.shape[0]:
        return
    block_m, block_n, warps, _ = tiles.tile("up", h.shape[0], rank, y.dtype, y.device)
    groups, strides = (1, (0, *b.stride())) if order is None else (b.shape[0], b.stride())
    tiles_of_rows = cdiv(h.shape[0], block_m) + (groups if order is not None else 0)
    launch(
        up_kernel, (cdiv(columns, block_n), *folded(tiles_of_rows)),
        (
            y, h, b, y if seed is None else seed, y if order is None else order,
            y if bounds is None else bounds,
            h.shape[0], columns, groups, rank, scaling / (1.0 - dropout_p), round(dropout_p * 2**32),
            y.stride(0), *strides,
        ),
        {
            "RANK": tiles.padded_rank(rank),
            "BLOCK_R": min(32, tiles.padded_rank(rank)), "DROPOUT": dropout_p > 0.0,
            "GROUPED": order is not None,
            "BLOCK_M": block_m, "BLOCK_N": block_n,
        },
        num_warps=warps,
    )  # fmt: skip

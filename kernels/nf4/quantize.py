"""Dense to NF4; the maths is in peft_engine/ops/nf4.py. The bytes are the reference's, and bitsandbytes'.

Floor: bytes, 2 read and 0.53 written for a bf16 weight; 15 comparisons a weight hide behind them.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.nf4.tables import midpoints

from peft_engine.kernels.launch import cdiv, launch

VALUES = 4096  # values of a program: whole blocks, whatever their size


@triton.jit
def quantize_kernel(weight, packed, absmax, middles, numel, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS blocks of a flat weight: packed indices, and max |w| of each.

    Full blocks are multiplied by 1 / absmax and a short last one is divided by it, as bitsandbytes does:
    the two can differ in the last bit.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, BLOCKSIZE)
    i = block[:, None] * BLOCKSIZE + column[None, :]
    w = tl.load(weight + i, i < numel, other=0.0).to(tl.float32)
    # NaN must not be lost in the maximum: the caller refuses it by the absmax.
    largest = tl.max(tl.where(w == w, tl.abs(w), float("inf")), axis=1)
    short = (block + 1) * BLOCKSIZE > numel
    # a constant this small would be taken for float64
    divisor = tl.maximum(largest, tl.full((BLOCKS,), 1e-38, tl.float32))
    inverse = tl.div_rn(tl.full((BLOCKS,), 1.0, tl.float32), divisor)
    divided = tl.div_rn(w, tl.broadcast_to(divisor[:, None], (BLOCKS, BLOCKSIZE)))
    scaled = tl.where(short[:, None], divided, w * inverse[:, None])
    index = tl.zeros((BLOCKS, BLOCKSIZE), tl.int32)
    for k in tl.static_range(15):
        index += (scaled > tl.load(middles + k)).to(tl.int32)
    high, low = index.reshape(BLOCKS, BLOCKSIZE // 2, 2).split()
    byte = block[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed + byte, (high * 16 + low).to(tl.uint8), 2 * byte < numel)
    stored = tl.where(short, divisor, largest)
    tl.store(absmax + block, stored, block * BLOCKSIZE < numel)


def quantize(flat: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes (ceil(n / 2), 1) and float32 absmax (ceil(n / blocksize),) of a contiguous flat tensor.

    Where a block holds NaN or inf its absmax is inf.
    """
    n = flat.numel()
    packed = flat.new_empty(-(-n // 2), 1, dtype=torch.uint8)
    absmax = flat.new_empty(-(-n // blocksize), dtype=torch.float32)
    if n:
        blocks = VALUES // blocksize
        launch(
            quantize_kernel, (cdiv(absmax.numel(), blocks),),
            (flat, packed, absmax, midpoints(flat.device), n), {"BLOCKSIZE": blocksize, "BLOCKS": blocks},
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return packed, absmax

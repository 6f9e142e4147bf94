"""NF4 to dense in one launch; the maths is in peft_engine/ops/nf4.py.

Floor: bytes, 0.53 read and 2 written for a bf16 weight. The instructions must stay below what hides behind
them: a byte is one lookup in a table of pairs (both codes at once, 8 bytes), so two weights cost one gather.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.nf4.tables import absmax_code, pair_code

BYTES = 1024  # packed bytes of a program


@triton.jit
def scale_of(absmax, nested_absmax, offset, absmax_code, block, mask, NESTED: tl.constexpr):
    """The float32 scales of blocks; double quantisation undone in two roundings, as bitsandbytes does it."""
    scale = tl.load(absmax + block, mask)
    if NESTED:
        nested = tl.load(nested_absmax + (block >> 8), mask)
        scale = tl.load(absmax_code + scale.to(tl.int32), mask) * nested + tl.load(offset)
    return scale


@triton.jit
def pairs_of(packed, pair_code, scale):
    """Packed bytes (S, B) under scales (S,) to float32 (S, 2 B): one lookup of 8 bytes for two weights."""
    pair = tl.load(pair_code + packed.to(tl.int32))
    high = pair.to(tl.uint32).to(tl.float32, bitcast=True)
    low = (pair >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    values = tl.join(high * scale[:, None], low * scale[:, None])
    return values.reshape(packed.shape[0], 2 * packed.shape[1])


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_absmax, offset, pair_code, absmax_code, out, numel,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[i] = code[index[i]] * scale[i // BLOCKSIZE], one rounding; a program takes BYTES packed bytes."""
    SHARE: tl.constexpr = BLOCKSIZE // 2 if BLOCKSIZE // 2 < BYTES else BYTES  # bytes under one scale
    SCALES: tl.constexpr = BYTES // SHARE
    first = tl.program_id(0).to(tl.int64) * BYTES
    left = numel - 2 * first
    row = tl.arange(0, SCALES)
    byte = row[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
    i = row[:, None] * (2 * SHARE) + tl.arange(0, 2 * SHARE)[None, :]
    block = 2 * first // BLOCKSIZE + row
    if left >= 2 * BYTES:  # all but the last: no masks, so that loads and stores are of 16 bytes
        scale = scale_of(absmax, nested_absmax, offset, absmax_code, block, None, NESTED)
        values = pairs_of(tl.load(packed + first + byte), pair_code, scale)
        tl.store(out + 2 * first + i, values.to(out.dtype.element_ty))
    else:
        inside = block * BLOCKSIZE < numel
        scale = scale_of(absmax, nested_absmax, offset, absmax_code, block, inside, NESTED)
        values = pairs_of(tl.load(packed + first + byte, 2 * byte < left, other=0), pair_code, scale)
        tl.store(out + 2 * first + i, values.to(out.dtype.element_ty), i < left)


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    """Writes the weight that an NF4Tensor's fields stand for to `out`, contiguous and of its shape."""
    numel = out.numel()
    if numel == 0:
        return
    nested = nested_absmax is not None
    # A thread takes 8 bytes, 16 weights. No fused multiply-add: the scale is rounded twice, see scale_of.
    dequantize_kernel[(triton.cdiv(numel, 2 * BYTES),)](
        packed, absmax, nested_absmax if nested else absmax, offset if nested else absmax,
        pair_code(out.device), absmax_code(out.device), out, numel,
        BLOCKSIZE=blocksize, NESTED=nested, BYTES=BYTES, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

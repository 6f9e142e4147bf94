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
    stored = tl.load(absmax + block, mask, other=0)
    if NESTED:
        nested = tl.load(nested_absmax + (block >> 8), mask, other=0.0)
        return tl.load(absmax_code + stored.to(tl.int32), mask, other=0.0) * nested + tl.load(offset)
    return stored


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_absmax, offset, pair_code, absmax_code, out, numel,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """out[i] = code[index[i]] * scale[i // BLOCKSIZE], one rounding; a program takes BYTES packed bytes."""
    first = tl.program_id(0).to(tl.int64) * BYTES
    byte = first + tl.arange(0, BYTES)
    indices = tl.load(packed + byte, 2 * byte < numel, other=0).to(tl.int32)
    which = tl.arange(0, 2)
    codes = tl.load(pair_code + (indices[:, None] * 2 + which[None, :]))  # (BYTES, 2)
    SHARE: tl.constexpr = BLOCKSIZE // 2 if BLOCKSIZE // 2 < BYTES else BYTES  # bytes under one scale
    block = first * 2 // BLOCKSIZE + tl.arange(0, BYTES // SHARE)
    scale = scale_of(absmax, nested_absmax, offset, absmax_code, block, block * BLOCKSIZE < numel, NESTED)
    values = codes.reshape(BYTES // SHARE, 2 * SHARE) * scale[:, None]
    i = 2 * first + tl.arange(0, 2 * BYTES)
    tl.store(out + i, values.reshape(2 * BYTES).to(out.dtype.element_ty), i < numel)


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

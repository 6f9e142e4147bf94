"""NF4 to dense in one launch; the maths is in peft_engine/ops/nf4.py.

Floor: bytes, 0.53 read and 2 written for a bf16 weight. The instructions must stay below what hides behind
them: a code is looked up in shared memory, where 16 words lie in 16 banks and no two lanes collide.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.nf4.tables import absmax_code, code

from peft_engine.kernels.launch import cdiv, launch

# Packed bytes of a program, which has a warp for 1024. 4096x14336 on an H200 takes 34 us with 2048, 39 with
# 4096.
BYTES = (2048, 1024, 512)


@triton.jit
def scale_of(absmax, nested_absmax, offset, absmax_code, block, mask, NESTED: tl.constexpr):
    """The float32 scales of blocks; double quantisation undone in two roundings, as bitsandbytes does it."""
    scale = tl.load(absmax + block, mask)
    if NESTED:
        nested = tl.load(nested_absmax + (block >> 8), mask)
        scale = tl.load(absmax_code + scale.to(tl.int32), mask) * nested + tl.load(offset)
    return scale


@triton.jit
def codes_of_words(words, table):
    """Words (S, W) of four packed bytes to float32 codes (S, 8 W); `table` holds the 16 codes."""
    j = tl.arange(0, 8)
    index = (words[:, :, None] >> ((j ^ 1) * 4)[None, None, :]) & 15
    values = tl.gather(table, index.reshape(index.numel), 0)
    return values.reshape(words.shape[0], 8 * words.shape[1])


@triton.jit
def codes_of_bytes(packed, table):
    """Packed bytes (S, B) to float32 codes (S, 2 B); the first of two is in the high nibble."""
    index = tl.join(packed >> 4, packed & 15).to(tl.int32)
    values = tl.gather(table, index.reshape(index.numel), 0)
    return values.reshape(packed.shape[0], 2 * packed.shape[1])


@triton.jit
def dequantize_part(
    program, packed, absmax, nested_absmax, offset, code, absmax_code, out, columns, chunks, stride,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out[r, c] = code[index[r, c]] * scale of its block, one rounding; a program takes BYTES bytes of a row.

    WHOLE: rows are of whole blocks, so that a block is masked as one and its bytes are read 16 at a time.
    """
    SHARE: tl.constexpr = BLOCKSIZE // 2 if BLOCKSIZE // 2 < BYTES else BYTES  # bytes under one scale
    SCALES: tl.constexpr = BYTES // SHARE
    row_of = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * BYTES  # of the row's bytes
    left = columns - 2 * first
    packed += row_of * columns // 2 + first
    out += row_of * stride + 2 * first
    table = tl.load(code + tl.arange(0, 16))
    row = tl.arange(0, SCALES)
    block = (row_of * columns + 2 * first) // BLOCKSIZE + row
    inside = 2 * row * SHARE < left
    scale = scale_of(absmax, nested_absmax, offset, absmax_code, block, inside, NESTED)
    i = row[:, None] * (2 * SHARE) + tl.arange(0, 2 * SHARE)[None, :]
    if WHOLE:
        word = row[:, None] * (SHARE // 4) + tl.arange(0, SHARE // 4)[None, :]
        words = tl.load(packed.to(tl.pointer_type(tl.int32)) + word, inside[:, None], other=0)
        values = codes_of_words(words, table) * scale[:, None]
        tl.store(out + i, values.to(out.dtype.element_ty), inside[:, None])
    else:
        byte = row[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
        values = codes_of_bytes(tl.load(packed + byte, 2 * byte < left, other=0), table) * scale[:, None]
        tl.store(out + i, values.to(out.dtype.element_ty), i < left)


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_absmax, offset, code, absmax_code, out, columns, chunks, stride,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out = the weight, rows `stride` apart."""
    dequantize_part(
        tl.program_id(0), packed, absmax, nested_absmax, offset, code, absmax_code, out, columns, chunks,
        stride, BLOCKSIZE, NESTED, BYTES, WHOLE,
    )  # fmt: skip


def bytes_of_program(columns: int) -> int:
    """The packed bytes of a row that a program takes."""
    return next((b for b in BYTES if 2 * b <= columns), BYTES[-1])


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    """Writes the weight that an NF4Tensor's fields stand for to `out` of its shape.

    out: contiguous, or a matrix whose rows are apart (`out.stride(0)` above its columns).
    """
    if out.numel() == 0:
        return
    rows, columns, stride = (1, out.numel(), 0) if out.is_contiguous() else (*out.shape, out.stride(0))
    if (rows > 1 and columns % blocksize) or packed.data_ptr() % 4:  # blocks that go on in the next row
        whole = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        dequantize(
            packed.clone() if packed.data_ptr() % 4 else packed,
            absmax,
            nested_absmax,
            offset,
            blocksize,
            whole,
        )
        out.copy_(whole)
        return
    nested = nested_absmax is not None
    size = bytes_of_program(columns)
    chunks = cdiv(columns, 2 * size)
    # No fused multiply-add: the scale is rounded twice, see scale_of.
    launch(
        dequantize_kernel, (rows * chunks,),
        (
            packed, absmax, nested_absmax if nested else absmax, offset if nested else absmax,
            code(out.device), absmax_code(out.device), out, columns, chunks, stride,
        ),
        {"BLOCKSIZE": blocksize, "NESTED": nested, "BYTES": size, "WHOLE": columns % blocksize == 0},
        num_warps=max(1, size // 1024), enable_fp_fusion=False,
    )  # fmt: skip

"""NF4 to dense by the CUDA library (csrc/cuda/nf4.cu), for where there is no Triton or "cuda" is pinned."""

import torch

from peft_engine import dispatch, native
from peft_engine.kernels.launch import addresses

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dequantize(packed, absmax, nested_absmax, offset, blocksize: int, out: torch.Tensor) -> None:
    """Writes the weight that an NF4Tensor's fields stand for to `out`, whose rows may be apart.

    In Triton where it can (13.0 us against 13.8 for 4096x4096 on an H200), unless the library is pinned.
    """
    if dispatch.forced() == "cuda" or dispatch.available_backends()["triton"] is not None:
        by_library(packed, absmax, nested_absmax, offset, blocksize, out)
        return
    from peft_engine.kernels.nf4 import dequantize as in_triton

    in_triton.dequantize(packed, absmax, nested_absmax, offset, blocksize, out)


def by_library(packed, absmax, nested_absmax, offset, blocksize: int, out: torch.Tensor) -> None:
    """The same through the library's C ABI, on the current stream of out's device."""
    if not out.numel():
        return
    flat = out.is_contiguous()
    rows, columns, stride = (1, out.numel(), out.numel()) if flat else (*out.shape, out.stride(0))
    weight = addresses("nf4_dequantize", packed, absmax, nested_absmax, offset)
    with native.on_device(out.device.index):
        code = native.cuda().pe_nf4_dequantize(
            *weight, blocksize, *addresses("nf4_dequantize", out), DTYPES[out.dtype], rows, columns, stride,
            out.device.index or 0, stream_of(out),
        )  # fmt: skip
    native.cuda_check(code, "nf4_dequantize")


def stream_of(x: torch.Tensor) -> int:
    """The current stream of x's device, as the library takes it."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0

"""The CUDA product for 1 to 64 rows (csrc/cuda/lora_linear.cu), called through its C ABI."""

import functools

import torch
from peft_engine.kernels.nf4.library import DTYPES, stream_of

from peft_engine import native
from peft_engine.kernels.launch import addresses
from peft_engine.kernels.scratch import zeroed


def forward(x, base, out_features, a, b, scaling, bias, dropout_p, seed):
    """y (M, N) and h (M, R) float32; what it cannot take was refused in paths.py."""
    weight, absmax, nested, offset, blocksize = base
    rows, columns = x.shape
    rank = 0 if a is None else a.shape[0]
    y = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    h = torch.empty(rows if rank else 0, rank, dtype=torch.float32, device=x.device)
    if a is not None:
        a, b = a.contiguous(), b.contiguous()
    bias = None if bias is None else bias.contiguous()
    at_x, *base_at, at_a, at_b, at_bias, at_y = addresses(
        "lora_linear", x, weight, absmax, nested, offset, a, b, bias, y
    )
    library, device = native.cuda(), x.device.index or 0
    with native.on_device(x.device.index):
        stream = stream_of(x)
        size = _workspace(library, rows, out_features, columns, rank, device)
        scratch = zeroed("lora_linear", size, x.device, stream) if size else None
        code = library.pe_lora_linear_nf4(
            at_x, x.stride(0), rows, columns, *base_at, blocksize, out_features, at_a, at_b, rank,
            0 if a is None else DTYPES[a.dtype], scaling, at_bias, at_y, DTYPES[x.dtype],
            h.data_ptr() if rank else None, None if scratch is None else scratch.data_ptr(), device, stream,
        )  # fmt: skip
    native.cuda_check(code, "lora_linear")
    return y, h


@functools.lru_cache(4096)  # a call of the library takes as long as a launch, and a model has few shapes
def _workspace(library, rows: int, n: int, k: int, rank: int, device: int) -> int:
    """Bytes of scratch that calls of these sizes need."""
    size = library.pe_lora_linear_workspace(rows, n, k, rank, device)
    if size < 0:
        raise RuntimeError(
            f"lora_linear: the CUDA library refuses {rows} rows, a {n} x {k} weight and rank {rank}, or "
            f"cannot ask device {device} what it has"
        )
    return size

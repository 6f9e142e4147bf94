"""The CUDA product for 1 to 64 rows (csrc/cuda/lora_linear.cu), called through its C ABI."""

import torch
from peft_engine.kernels.nf4.library import DTYPES, address, stream_of

from peft_engine import native
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
    library, device, stream = native.cuda(), x.device.index or 0, stream_of(x)
    size = library.pe_lora_linear_workspace(rows, out_features, columns, rank, device)
    scratch = zeroed("lora_linear", size, x.device, stream) if size else None
    code = library.pe_lora_linear_nf4(
        x.data_ptr(), x.stride(0), rows, columns, weight.data_ptr(), absmax.data_ptr(), address(nested),
        address(offset), blocksize, out_features, address(a), address(b), rank,
        0 if a is None else DTYPES[a.dtype], scaling, address(bias), y.data_ptr(), DTYPES[x.dtype],
        h.data_ptr() if rank else None, address(scratch), device, stream,
    )  # fmt: skip
    native.cuda_check(code, "lora_linear")
    return y, h

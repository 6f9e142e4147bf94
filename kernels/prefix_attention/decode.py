"""prefix_attention's forward for few queries in CUDA (csrc/cuda/prefix_attention.cu), and when it runs."""

import ctypes

import torch
from peft_engine.kernels.nf4.library import DTYPES, stream_of

from peft_engine import dispatch, native
from peft_engine.kernels.launch import addresses
from peft_engine.kernels.scratch import zeroed
from peft_engine.ops.attention import by_token

# What the arithmetic of the CUDA kernel, which is float32, is not above the bytes for; more is for tensor
# cores. Counted (the top of csrc/cuda/prefix_attention.cu), not measured.
MAX_QUERIES, MAX_ROWS = 8, 16  # rows: queries times the query heads of a key head
MAX_HEAD_DIM, MAX_TARGETS = 256, 16384


def refuse(q, k, bias, softcap=0.0) -> str | None:
    """Why the CUDA kernel does not run a call; None when it does."""
    if not q.is_cuda:
        return f"the tensors are on {q.device}"
    if dispatch.forced() == "triton":
        return "backend 'triton' is pinned"
    return refuse_sizes(q, k, bias, softcap) or native.cuda_error(q.device.index)


def refuse_sizes(q, k, bias, softcap=0.0) -> str | None:
    """The same, of what does not depend on the machine."""
    batch, heads, queries, head_dim = q.shape
    rows = queries * (heads // k.shape[1])
    if bias is not None:
        return "it adds no bias"
    if softcap:
        return "it does not cap scores"
    if q.dtype not in DTYPES:
        return f"it computes in float32, which is less than {q.dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if queries > MAX_QUERIES or rows > MAX_ROWS:
        return f"it takes {MAX_QUERIES} queries and {MAX_ROWS} rows of a key head, got {queries} and {rows}"
    if batch * k.shape[1] * -(-rows // 8) > MAX_TARGETS or k.shape[2] >= 2**31:
        return f"it counts up to {MAX_TARGETS} rows of keys of less than 2^31, got {tuple(k.shape)}"
    return None


def forward(
    q, k, v, prefix_k, prefix_v, first, last, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, Hq, T, D) and lse (B, Hq, T) float32; what it cannot take was refused."""
    out = by_token(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    batch, kv_heads, keys, head_dim = k.shape
    shared = prefix_k.shape[0] == 1
    sizes = (
        batch,
        kv_heads,
        q.shape[1] // kv_heads,
        q.shape[2],
        keys,
        prefix_k.shape[2],
        head_dim,
        int(shared),
    )
    *tensors, at_first, at_last = addresses("prefix_attention", q, k, v, prefix_k, prefix_v, first, last)
    library, device = native.cuda(), q.device.index or 0
    size = library.pe_prefix_attention_workspace(*sizes, device)
    if size < 0:
        raise RuntimeError(
            f"prefix_attention: the CUDA library refuses queries {tuple(q.shape)} with keys {tuple(k.shape)} "
            f"and a prefix {tuple(prefix_k.shape)}, or cannot ask device {device} what it has"
        )
    with native.on_device(q.device.index):
        stream = stream_of(q)
        scratch = zeroed("prefix_attention", size, q.device, stream)
        code = library.pe_prefix_attention_decode(
            *tensors, _strides(q, k, v, prefix_k, prefix_v, out), *sizes, at_first, at_last, int(causal),
            scale, DTYPES[q.dtype], DTYPES[prefix_k.dtype], out.data_ptr(), lse.data_ptr(),
            scratch.data_ptr(), device, stream,
        )  # fmt: skip
    native.cuda_check(code, "prefix_attention")
    return out, lse


def _strides(*tensors: torch.Tensor) -> ctypes.Array:
    """Of each but the last dimension's; 0 from one row of the batch to the next of what has one."""
    strides = [(0 if t.shape[0] == 1 else t.stride(0), t.stride(1), t.stride(2)) for t in tensors]
    flat = [stride for of in strides for stride in of]
    return (ctypes.c_int64 * len(flat))(*flat)

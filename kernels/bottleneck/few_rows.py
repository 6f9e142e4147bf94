"""bottleneck's forward for few rows in CUDA (csrc/cuda/bottleneck.cu), one launch, and when it runs."""

import torch
from peft_engine.kernels.bottleneck import tiles
from peft_engine.kernels.bottleneck.call import Call
from peft_engine.kernels.nf4.library import DTYPES, stream_of

from peft_engine import dispatch, native
from peft_engine.kernels.launch import addresses
from peft_engine.kernels.scratch import zeroed
from peft_engine.ops.bottleneck import refuse_width

MAX_ROWS = 16  # kMaxRows in csrc/cuda/bottleneck_call.cuh
ACTIVATION_CODES = {"relu": 0, "gelu": 1, "silu": 2, "tanh": 3}


def refuse(call: Call, x: torch.Tensor) -> str | None:
    """Why the CUDA kernel does not run a call; None when it does."""
    if not x.is_cuda:
        return f"the tensors are on {x.device}"
    if dispatch.forced() == "triton":
        return "backend 'triton' is pinned"
    if tiles.pinned_path() is not None:
        return f"path {tiles.pinned_path()!r} is pinned"
    return refuse_sizes(*x.shape, call.width) or native.cuda_error(x.device.index)


def refuse_sizes(rows: int, features: int, width: int) -> str | None:
    """The same, of what does not depend on the machine."""
    if rows > MAX_ROWS:
        return f"it takes up to {MAX_ROWS} rows, got {rows}"
    if features >= 2**30:
        return f"it counts less than 2^30 features, got {features}"
    return refuse_width(width)


def forward(call: Call, x, residual, y, middle, stats) -> None:
    """Writes y (M, H), middle (M, R) and stats (M, 2) of x (M, H) and the residual."""
    norm = call.norm_weight
    at_x, at_residual, *weights, at_norm, at_norm_bias = addresses(
        "bottleneck", x, residual, call.down_weight, call.down_bias, call.up_weight, call.up_bias, norm,
        call.norm_bias,
    )  # fmt: skip
    library, device = native.cuda(), x.device.index or 0
    with native.on_device(x.device.index):
        stream = stream_of(x)
        scratch = zeroed("bottleneck", library.pe_bottleneck_workspace(), x.device, stream)
        code = library.pe_bottleneck_forward(
            at_x, at_residual, *x.shape, *weights, call.width, at_norm, at_norm_bias, call.eps,
            ACTIVATION_CODES[call.activation], call.scaling, DTYPES[x.dtype], DTYPES[call.down_weight.dtype],
            0 if norm is None else DTYPES[norm.dtype], y.data_ptr(), middle.data_ptr(), stats.data_ptr(),
            scratch.data_ptr(), device, stream,
        )  # fmt: skip
    native.cuda_check(code, "bottleneck")

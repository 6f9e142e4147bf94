"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467).

    y = x rstd (offset + w),  rstd = 1 / sqrt(mean(x^2) + eps)         offset: 0, or 1 for Gemma
    g = dy (offset + w)       dx = rstd (g - x rstd^2 mean(g x))       dw = sum over rows of dy x rstd

Everything in float32, rounded once to x's dtype. Saved for the backward: x, w and rstd. Whoever takes y may
save x and w in its place (recompute.py).
"""

import functools
from typing import Any, NamedTuple

import torch

from peft_engine import dispatch, native, recompute
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class RmsNormCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    weight: torch.dtype


RMS_NORM = dispatch.Op("rms_norm")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """x / rms(x) * (offset + weight) over the last dimension; x's shape and dtype.

    x (..., N) float32, bfloat16 or float16, any strides; weight (N,) of x's dtype or float32.
    Gradients flow to x and weight.
    """
    if (found := dispatch.at_once(_FORWARD, x, weight, eps, offset)) is not None:
        return found[0]
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: weight must be (features,)={tuple(x.shape[-1:])} as the last dimension of x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}; was it made for another layer?"
        )
    if x.dtype not in DTYPES or weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"rms_norm: x must be float32, bfloat16 or float16 and weight of x's dtype or float32, "
            f"got {x.dtype} and {weight.dtype}; cast them"
        )
    if x.device != weight.device:
        raise ValueError(f"rms_norm: x is on {x.device} and weight on {weight.device}; move one of them")
    call = RmsNormCall(x.device.type, x.dtype, weight.dtype)
    return RMS_NORM.choose(call, x, weight).run(x, weight, eps, offset)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """rms_norm in plain torch, as transformers' models write it: float32 inside (float64 stays)."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
    return (normed.to(x.dtype) * weight).to(x.dtype)


native.library.define(
    "rms_norm_forward(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)"
)
native.library.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, bool need_dx,"
    " bool need_dw) -> (Tensor, Tensor)"
)


_FORWARD = torch.ops.peft_engine.rms_norm_forward.default


@torch.library.register_fake("peft_engine::rms_norm_forward")
def _(x, weight, eps, offset):
    return x.new_empty(x.shape), x.new_empty(x.numel() // max(x.shape[-1], 1), dtype=torch.float32)


@torch.library.register_fake("peft_engine::rms_norm_backward")
def _(dy, x, weight, rstd, offset, need_dx, need_dw):
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(weight.shape if need_dw else (0,))


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "rms_norm_forward", "CUDA")
def _forward_on_gpu(*arguments):
    from peft_engine.kernels.rms_norm.forward import forward

    return forward(*arguments)


@torch.library.impl(native.library, "rms_norm_backward", "CUDA")
def _backward_on_gpu(*arguments):
    from peft_engine.kernels.rms_norm.backward import backward

    return backward(*arguments)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, eps, offset):
        run = _forward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.rms_norm_forward
        y, rstd = run(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        run = _backward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.rms_norm_backward
        dx, dw = run(dy.contiguous(), x, weight, rstd, ctx.offset, need_dx, need_dw)
        return dx if need_dx else None, dw if need_dw else None, None, None


def _alone(x, weight, eps, offset) -> torch.Tensor:
    run = _forward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.rms_norm_forward.default
    return run(x, weight, eps, offset)[0]


def _kernels(x, weight, eps, offset) -> torch.Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = _RmsNorm.apply(x, weight, eps, offset)
        again = functools.partial(_alone, eps=eps, offset=offset)
        return recompute.made_by(y, again, x, weights=(weight,))
    return _alone(x, weight, eps, offset)


RMS_NORM.register("triton", _kernels, refuse_unless_cuda)
RMS_NORM.register("cpu", _kernels, refuse_unless_cpu)
RMS_NORM.register("reference", reference)

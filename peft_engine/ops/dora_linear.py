"""LoRA product with a magnitude for each output (DoRA; Liu et al. 2024, arXiv 2402.09353), W dense or NF4.

    n = ||W + s B A||, the norm of each row, a constant for the gradients (section 4.3 there)
    y0 = x W^T + s x A^T B^T            y = (m / n) y0 + bias
    dy0 = (m / n) dy                    dm = sum over rows of (dy y0) / n

x (..., K), W (N, K) frozen, A (R, K), B (N, R), m (N,). W + s B A is never formed:

    n^2 = ||W||^2 + 2 s (W A^T) . B + s^2 (B (A A^T)) . B        (. sums the products of each row)

which is a product of W with R rows; ||W||^2 does not change while A and B are trained. In float32; digits are
lost where the adapter nearly cancels a row of W. Saved for the backward, besides what lora_linear saves: y0.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.ops import lora_linear as base
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import NF4Tensor, refuse_unless_cpu, refuse_unless_cuda

TINY = torch.finfo(torch.float32).tiny
PIECE = 1 << 21  # elements of a dense weight that are float32 at once


class DoraLinearCall(NamedTuple):
    """What dispatch needs to know of a call: of the step from y0 to y."""

    device: str
    dtype: torch.dtype


DORA_LINEAR = dispatch.Op("dora_linear")


def dora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (magnitude / norm) (x W^T + scaling x A^T B^T) + bias, of shape (..., N) and x's dtype.

    x, weight, lora_a, lora_b, bias: as lora_linear takes them; magnitude (N,) float32 or x's dtype.
    dropped: x after dropout. The magnitude and the adapter then work on it, and the base's product on both:
    y = (x - dropped) W^T + (magnitude / norm) (dropped W^T + scaling dropped A^T B^T) + bias, as PEFT has it.
    norm: dora_norm(weight, lora_a, lora_b, scaling), where the caller has it already.
    Gradients flow to x, dropped, lora_a, lora_b, magnitude and bias; the weight is frozen.
    Raises ValueError or TypeError that says which argument does not fit.
    """
    n = weight.shape[0]
    if magnitude.shape != (n,) or magnitude.device != x.device:
        raise ValueError(
            f"dora_linear: magnitude must be (out_features,)=({n},) on {x.device}, got "
            f"{tuple(magnitude.shape)} on {magnitude.device}; was this adapter trained for another layer?"
        )
    if dropped is not None and (dropped.shape != x.shape or dropped.dtype != x.dtype):
        raise ValueError(
            f"dora_linear: dropped must be as x, {tuple(x.shape)} {x.dtype}, got {tuple(dropped.shape)} "
            f"{dropped.dtype}"
        )
    if bias is not None and (bias.shape != (n,) or bias.device != x.device):
        raise ValueError(
            f"dora_linear: bias must be (out_features,)=({n},) on {x.device}, got {tuple(bias.shape)} on "
            f"{bias.device}"
        )
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scaling)
    elif norm.shape != (n,) or norm.dtype != torch.float32 or norm.device != x.device:
        raise ValueError(
            f"dora_linear: norm must be (out_features,)=({n},) float32 on {x.device}, got "
            f"{tuple(norm.shape)} {norm.dtype} on {norm.device}; dora_norm makes it"
        )
    y = lora_linear(x if dropped is None else dropped, weight, lora_a, lora_b, scaling)
    run = DORA_LINEAR.choose(DoraLinearCall(y.device.type, y.dtype), y, magnitude, bias).run
    if dropped is None:
        return run(y, magnitude.float(), norm, bias)
    return lora_linear(x - dropped, weight, None, None, 1.0, bias=bias) + run(
        y, magnitude.float(), norm, None
    )


def row_squares(weight: torch.Tensor | NF4Tensor) -> torch.Tensor:
    """||W||^2 of each row, float32 (N,)."""
    with torch.no_grad():
        dense = weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else weight.detach()
        return torch.linalg.vector_norm(dense, dim=1, dtype=torch.float32).square()


def dora_norm(
    weight: torch.Tensor | NF4Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    *,
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """||W + scaling B A|| of each row, float32 (N,), without a gradient; squares: row_squares(weight)."""
    if squares is None:
        squares = row_squares(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        a, b = lora_a.detach().float(), lora_b.detach().float()
        both = torch.addmm(_times(weight, a), b, a @ a.t(), beta=2.0 * scaling, alpha=scaling**2)
        return (both * b).sum(1).add_(squares).clamp_min_(0.0).sqrt_()


def _times(weight: torch.Tensor | NF4Tensor, a: torch.Tensor) -> torch.Tensor:
    """W A^T, float32 (N, R)."""
    if isinstance(weight, NF4Tensor):
        return lora_linear(a, weight, None, None, 1.0).t()
    if weight.dtype == torch.float32:
        return F.linear(weight, a)
    # In pieces: the whole weight in float32 is fresh memory, 30 ms for 4096x4096 on two cores instead of 5.
    rows = max(1, PIECE // max(1, weight.shape[1]))
    return torch.cat([F.linear(piece.float(), a) for piece in weight.split(rows)])


# --- reference ----------------------------------------------------------------------------------------------


def reference(
    x, weight, lora_a, lora_b, magnitude, scaling, bias=None, dropped=None, norm=None
) -> torch.Tensor:
    """dora_linear in plain torch: W + s B A and its norm as they are written."""
    dense = weight.dequantize(x.dtype) if isinstance(weight, NF4Tensor) else weight
    if norm is None:
        wide = torch.promote_types(x.dtype, torch.float32)
        whole = dense.to(wide) + scaling * (lora_b.to(wide) @ lora_a.to(wide))
        norm = torch.linalg.vector_norm(whole.detach(), dim=1)
    y = base.reference(x if dropped is None else dropped, dense, lora_a, lora_b, scaling)
    if dropped is None:
        return _scaled(y, magnitude, norm, bias)
    rest = F.linear(x - dropped, dense, None if bias is None else bias.to(x.dtype))
    return rest + _scaled(y, magnitude, norm, None)


def _scaled(y, magnitude, norm, bias) -> torch.Tensor:
    out = y * (magnitude.to(norm.dtype) / norm.clamp_min(TINY))
    return (out if bias is None else out + bias).to(y.dtype)


# --- backends -----------------------------------------------------------------------------------------------

native.library.define("dora_linear_forward(Tensor y, Tensor magnitude, Tensor norm, Tensor? bias) -> Tensor")
native.library.define(
    "dora_linear_backward(Tensor dy, Tensor y, Tensor magnitude, Tensor norm, bool need_dm)"
    " -> (Tensor, Tensor)"
)


@torch.library.register_fake("peft_engine::dora_linear_forward")
def _(y, magnitude, norm, bias):
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.register_fake("peft_engine::dora_linear_backward")
def _(dy, y, magnitude, norm, need_dm):
    return torch.empty_like(dy), magnitude.new_empty(magnitude.shape if need_dm else (0,))


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "dora_linear_forward", "CUDA")
def _forward_on_gpu(y, magnitude, norm, bias):
    from peft_engine.kernels.dora_linear.forward import forward

    return forward(y, magnitude, norm, bias)


@torch.library.impl(native.library, "dora_linear_backward", "CUDA")
def _backward_on_gpu(dy, y, magnitude, norm, need_dm):
    from peft_engine.kernels.dora_linear.backward import backward

    return backward(dy, y, magnitude, norm, need_dm)


class _Scale(torch.autograd.Function):
    """y = (m / n) y0 + bias."""

    @staticmethod
    def forward(ctx: Any, y, magnitude, norm, bias):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, magnitude, norm)
        run = _forward_on_gpu if dispatch.direct(y) else torch.ops.peft_engine.dora_linear_forward
        return run(y, magnitude, norm, bias)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        y, magnitude, norm = ctx.saved_tensors
        dy, learns = dy.contiguous(), ctx.needs_input_grad[1]
        run = _backward_on_gpu if dispatch.direct(dy) else torch.ops.peft_engine.dora_linear_backward
        dy0, dm = run(dy, y if learns else dy, magnitude, norm, learns)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32) if ctx.needs_input_grad[3] else None
        return dy0, dm if learns else None, None, dbias


def _kernels(y, magnitude, norm, bias) -> torch.Tensor:
    y, magnitude, norm = y.contiguous(), magnitude.contiguous(), norm.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y, magnitude, bias)):
        return _Scale.apply(y, magnitude, norm, bias)
    if dispatch.direct(y):
        return _forward_on_gpu(y, magnitude, norm, bias)
    return torch.ops.peft_engine.dora_linear_forward.default(y, magnitude, norm, bias)


DORA_LINEAR.register("triton", _kernels, refuse_unless_cuda)
DORA_LINEAR.register("cpu", _kernels, refuse_unless_cpu)
DORA_LINEAR.register("reference", _scaled)

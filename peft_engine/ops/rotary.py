"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half form of transformers.

With x1, x2 the halves of the rotated part of a head and c1, c2, s1, s2 those of cos and sin:

    y1 = x1 c1 - x2 s1         dx1 = dy1 c1 + dy2 s2
    y2 = x2 c2 + x1 s2         dx2 = dy2 c2 - dy1 s1

The rest of a head (partial rotary) is copied. In float32, rounded once. Saved for the backward: cos and sin.
"""

from typing import Any, NamedTuple

import torch

from peft_engine import dispatch, native
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class RotaryCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype


ROTARY = dispatch.Op("rotary")


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated, as transformers' apply_rotary_pos_emb does.

    q (B, Hq, T, D) and k (B, Hk, T, D), any strides (a view of (B, T, H, D) is read in place and written in
    the same layout); cos and sin (B or 1, T, R) of q's dtype, R even and at most D. Gradients: q and k.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"rotary: q and k must be (batch, heads, tokens, head_dim) and differ in heads only, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, _, tokens, head_dim = q.shape
    if (
        cos.shape != sin.shape
        or cos.dim() != 3
        or cos.shape[0] not in (1, batch)
        or cos.shape[1] != tokens
        or cos.shape[2] % 2
        or cos.shape[2] > head_dim
    ):
        raise ValueError(
            f"rotary: cos and sin must be ({batch} or 1, {tokens}, an even number up to {head_dim}), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or cos.dtype != q.dtype or sin.dtype != q.dtype:
        raise TypeError(
            f"rotary: q, k, cos and sin must have one dtype of float32, bfloat16, float16, "
            f"got {q.dtype}, {k.dtype}, {cos.dtype}, {sin.dtype}; cast them"
        )
    q, k = rotary_by_token(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotated = cos.shape[-1]
    x1, x2 = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    turned = x[..., :rotated] * cos + torch.cat((-x2, x1), dim=-1) * sin
    return torch.cat((turned, x[..., rotated:]), dim=-1)


def reference(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary in plain torch."""
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


native.library.define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)"
)


_ROTARY = torch.ops.peft_engine.rotary.default


@torch.library.register_fake("peft_engine::rotary")
def _(q, k, cos, sin, transposed):
    return q.new_empty(q.shape), k.new_empty(k.shape)


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "rotary", "CUDA")
def _on_gpu(q, k, cos, sin, transposed):
    from peft_engine.kernels.rotary.rotate import rotate

    return rotate(q, k, cos, sin, transposed)


class _Rotary(torch.autograd.Function):
    """Over the (B, T, H, D) layout, in which the linears leave q and k."""

    @staticmethod
    def forward(ctx: Any, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        run = _on_gpu if dispatch.direct(q) else torch.ops.peft_engine.rotary
        return run(q, k, cos, sin, False)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dq, dk):
        cos, sin = ctx.saved_tensors
        dq, dk = _dense_heads(dq), _dense_heads(dk)
        run = _on_gpu if dispatch.direct(dq) else torch.ops.peft_engine.rotary
        return *run(dq, dk, cos, sin, True), None, None


def _dense_heads(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def rotary_by_token(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary without its checks, over (B, T, H, D): for the layers, whose shapes are their config's."""
    found = dispatch.at_once(_ROTARY, q, k, cos, sin, False, strided=True)
    if found is not None:
        return found
    return ROTARY.choose(RotaryCall(q.device.type, q.dtype), q, k).run(q, k, cos, sin)


def _kernels(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, cos, sin = _dense_heads(q), _dense_heads(k), cos.contiguous(), sin.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotary.apply(q, k, cos, sin)
    run = _on_gpu if dispatch.direct(q) else torch.ops.peft_engine.rotary.default
    return run(q, k, cos, sin, False)


def _reference_by_token(q, k, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = reference(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


ROTARY.register("triton", _kernels, refuse_unless_cuda)
ROTARY.register("cpu", _kernels, refuse_unless_cpu)
ROTARY.register("reference", _reference_by_token)

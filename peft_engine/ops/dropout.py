"""Dropout by a hash of a seed, the row and the column: no mask is stored, all backends draw the same.

    y = keep x / (1 - p)      keep = hash(seed, row, column) >= p 2^32      dx = keep dy / (1 - p)

Srivastava et al. 2014; the hash is MurmurHash3's finaliser. Rows are all dimensions but the last, a column is
the place in that. Saved for the backward: the seed. lora_linear and prefix_attention drop by the same mask.
"""

from typing import Any, NamedTuple

import torch

from peft_engine import dispatch, native
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu

_U32 = 0xFFFFFFFF


class DropoutCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype


DROPOUT = dispatch.Op("dropout")


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """x with elements zero with probability p in [0, 1), the others divided by 1 - p; x's shape and dtype.

    x float32, bfloat16 or float16, any strides; seed an int64 tensor of one element (`draw_seed`).
    Gradients: x. Raises ValueError or TypeError that says which argument does not fit.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"dropout: x must be float32, bfloat16 or float16, got {x.dtype}")
    check_dropout("dropout", "x", x, p, seed)
    if p == 0.0 or not x.numel():
        return x
    return DROPOUT.choose(DropoutCall(x.device.type, x.dtype), x).run(x, p, seed)


def draw_seed(p: float, device: torch.device) -> torch.Tensor | None:
    """A seed for a dropout of p, an int64 tensor (1,), None where p is 0.

    From torch's generator: checkpointing restores the generator, so the second forward drops the same.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if p > 0.0 else None


def check_dropout(who: str, name: str, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> None:
    """Raises ValueError unless p is in [0, 1) and there is a seed for it beside x, the argument `name`."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{who}: dropout_p must be in [0, 1), got {p}")
    if p == 0.0:
        return
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{who}: dropout needs seed, an int64 tensor of one element; draw it with torch.randint"
        )
    if seed.device != x.device:
        raise ValueError(
            f"{who}: {name} is on {x.device} and seed on {seed.device}; draw it on {name}'s device"
        )


# --- reference ----------------------------------------------------------------------------------------------


def _mix(h: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3, on uint32 values held in int64."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _U32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _U32
    return h ^ (h >> 16)


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """The (rows, columns) bool mask of the elements kept: hash(seed, row, column) >= p * 2^32."""
    seed = seed.reshape(())
    row = torch.arange(rows, device=seed.device)
    key = _mix((seed & _U32) ^ _mix((row & _U32) ^ _mix((seed >> 32 & _U32) ^ (row >> 32))))
    column = torch.arange(columns, device=seed.device) * 0x9E3779B9 & _U32
    return _mix((key[:, None] + column) & _U32) >= round(p * 2**32)


def reference(x: torch.Tensor, p: float, seed: torch.Tensor) -> torch.Tensor:
    """dropout in plain torch, the mask in full."""
    columns = x.shape[-1] if x.dim() else 1
    kept = dropout_mask(seed, x.numel() // columns, columns, p).view(x.shape)
    return (x.float() * kept / (1.0 - p)).to(x.dtype) if x.dtype in DTYPES else x * kept / (1.0 - p)


# --- backends -----------------------------------------------------------------------------------------------

native.library.define("dropout(Tensor x, float p, Tensor seed) -> Tensor")


@torch.library.register_fake("peft_engine::dropout")
def _(x, p, seed):
    return x.new_empty(x.shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        return torch.ops.peft_engine.dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, dy):
        (seed,) = ctx.saved_tensors
        return _Dropout.apply(dy.contiguous(), ctx.p, seed), None, None


def _kernels(x, p, seed) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1] if x.dim() else 1).contiguous()
    learns = torch.is_grad_enabled() and x.requires_grad
    run = _Dropout.apply if learns else torch.ops.peft_engine.dropout.default
    return run(rows, float(p), seed).view(x.shape)


DROPOUT.register("cpu", _kernels, refuse_unless_cpu)
DROPOUT.register("reference", reference)

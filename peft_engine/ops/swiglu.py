"""SwiGLU's product (Shazeer 2020, arXiv 2002.05202).

    y = gate s up,  s = sigmoid(gate)
    dgate = dy up s (1 + gate (1 - s))        dup = dy gate s

Everything in float32, rounded once. Saved for the backward: gate and up.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class SwigluCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype


SWIGLU = dispatch.Op("swiglu")


NO_ROOM = (0, 0, 0)


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, spare: tuple[int, int, int] = NO_ROOM) -> torch.Tensor:
    """silu(gate) * up, of their common shape and dtype (float32, bfloat16 or float16).

    Both may be strided; halves of one wider last dimension (Phi-3's gate_up) are read in place.
    spare: the columns of room that the GPU's kernels leave behind the rows of the result, and of the
    gradients of gate and of up, for the adapters of the layers that are given these (activations.py).
    """
    dtype, device = gate.dtype, gate.device
    if gate.shape != up.shape or dtype != up.dtype or device != up.device:
        raise ValueError(
            f"swiglu: gate and up must have one shape, dtype and device, got {tuple(gate.shape)} "
            f"{gate.dtype} on {gate.device} and {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"swiglu: gate must be float32, bfloat16 or float16, got {dtype}")
    return SWIGLU.choose(SwigluCall(device.type, dtype), gate, up).run(gate, up, spare)


def reference(gate: torch.Tensor, up: torch.Tensor, spare: tuple[int, int, int] = NO_ROOM) -> torch.Tensor:
    """swiglu in plain torch."""
    return F.silu(gate) * up


native.library.define("swiglu_forward(Tensor gate, Tensor up) -> Tensor")
native.library.define("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)")


@torch.library.register_fake("peft_engine::swiglu_forward")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("peft_engine::swiglu_backward")
def _(dy, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "swiglu_forward", "CUDA")
def _forward_on_gpu(gate, up, spare=0):
    from peft_engine.kernels.swiglu.forward import forward

    return forward(gate, up, spare)


@torch.library.impl(native.library, "swiglu_backward", "CUDA")
def _backward_on_gpu(dy, gate, up, spare=(0, 0)):
    from peft_engine.kernels.swiglu.backward import backward

    return backward(dy, gate, up, spare)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up, spare):
        ctx.save_for_backward(gate, up)
        ctx.spare = spare[1:]
        if dispatch.direct(gate):
            return _forward_on_gpu(gate, up, spare[0])
        return torch.ops.peft_engine.swiglu_forward(gate, up)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        gate, up = ctx.saved_tensors
        if dispatch.direct(gate):
            return *_backward_on_gpu(dy.contiguous(), gate, up, ctx.spare), None
        return *torch.ops.peft_engine.swiglu_backward(dy.contiguous(), gate, up), None


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(rows, n) with stride 1 along n: a view where the layout allows it."""
    rows = t.reshape(-1, t.shape[-1]) if t.numel() else t.reshape(0, 0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _kernels(gate, up, spare) -> torch.Tensor:
    shape = gate.shape
    if len(shape) != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        gate, up = (_rows(t if shape else t[None]) for t in (gate, up))
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Swiglu.apply(gate, up, spare).view(shape)
    if dispatch.direct(gate):
        return _forward_on_gpu(gate, up, spare[0]).view(shape)
    return torch.ops.peft_engine.swiglu_forward.default(gate, up).view(shape)


SWIGLU.register("triton", _kernels, refuse_unless_cuda)
SWIGLU.register("cpu", _kernels, refuse_unless_cpu)
SWIGLU.register("reference", reference)

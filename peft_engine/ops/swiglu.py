"""The product of a gated MLP: SwiGLU and GEGLU (Shazeer 2020, arXiv 2002.05202).

    y = gate s up           s = sigmoid(gate) for silu; for gelu the normal distribution's P(X < gate), and
                            for gelu_tanh sigmoid(2 sqrt(2/pi) (gate + 0.044715 gate^3)), near to that
    dgate = dy up (s + gate s')        dup = dy gate s

Everything in float32, rounded once. Saved for the backward: gate and up, also by whoever takes y, in its
place (recompute.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native, recompute
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class SwigluCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype


SWIGLU = dispatch.Op("swiglu")

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
_NAMES = tuple(ACTIVATIONS)
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}
NO_ROOM = (0, 0, 0)


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    *,
    spare: tuple[int, int, int] = NO_ROOM,
) -> torch.Tensor:
    """act(gate) * up, of their common shape and dtype (float32, bfloat16 or float16).

    activation: silu (SwiGLU), gelu_tanh (GEGLU as Gemma and T5 v1.1 have it) or gelu, by erf.
    Both may be strided; halves of one wider last dimension (Phi-3's gate_up) are read in place.
    spare: the columns of room that the GPU's kernels leave behind the rows of the result, and of the
    gradients of gate and of up, for the adapters of the layers that are given these (activations.py).
    """
    number = _NUMBERS.get(activation, -1)
    if (found := dispatch.at_once(_FORWARD, gate, up, number)) is not None:
        return found
    dtype, device = gate.dtype, gate.device
    if gate.shape != up.shape or dtype != up.dtype or device != up.device:
        raise ValueError(
            f"swiglu: gate and up must have one shape, dtype and device, got {tuple(gate.shape)} "
            f"{gate.dtype} on {gate.device} and {tuple(up.shape)} {up.dtype} on {up.device}"
        )
    if dtype not in DTYPES:
        raise TypeError(f"swiglu: gate must be float32, bfloat16 or float16, got {dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"swiglu: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return SWIGLU.choose(SwigluCall(device.type, dtype), gate, up).run(gate, up, activation, spare)


def reference(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str = "silu",
    spare: tuple[int, int, int] = NO_ROOM,
) -> torch.Tensor:
    """swiglu in plain torch."""
    return ACTIVATIONS[activation](gate) * up


# The activation by its number: of a string that torch's stable ABI hands to C++ 32 bytes leak (torch 2.13).
# They lie between large blocks, which the allocator then cannot join: 3 MiB a step of SmolLM2.
native.library.define("swiglu_forward(Tensor gate, Tensor up, int activation) -> Tensor")
native.library.define(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)"
)


_FORWARD = torch.ops.peft_engine.swiglu_forward.default


@torch.library.register_fake("peft_engine::swiglu_forward")
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("peft_engine::swiglu_backward")
def _(dy, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


# Triton is imported when the first tensor on a GPU asks for it.
@torch.library.impl(native.library, "swiglu_forward", "CUDA")
def _forward_on_gpu(gate, up, activation, spare=0):
    from peft_engine.kernels.swiglu.forward import forward

    return forward(gate, up, _NAMES[activation], spare)


@torch.library.impl(native.library, "swiglu_backward", "CUDA")
def _backward_on_gpu(dy, gate, up, activation, spare=(0, 0)):
    from peft_engine.kernels.swiglu.backward import backward

    return backward(dy, gate, up, _NAMES[activation], spare)


def raw_ops(gate: torch.Tensor) -> tuple[Any, Any]:
    """The raw forward and backward for tensors such as gate."""
    if dispatch.direct(gate):
        return _forward_on_gpu, _backward_on_gpu
    return torch.ops.peft_engine.swiglu_forward.default, torch.ops.peft_engine.swiglu_backward.default


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate, up, activation, spare):
        ctx.save_for_backward(gate, up)
        ctx.settings = activation, spare[1:]
        if dispatch.direct(gate):
            return _forward_on_gpu(gate, up, activation, spare[0])
        return torch.ops.peft_engine.swiglu_forward(gate, up, activation)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        (gate, up), (activation, spare), dy = ctx.saved_tensors, ctx.settings, dy.contiguous()
        if dispatch.direct(dy):
            return *_backward_on_gpu(dy, gate, up, activation, spare), None, None
        return *torch.ops.peft_engine.swiglu_backward(dy, gate, up, activation), None, None


def _rows(t: torch.Tensor) -> torch.Tensor:
    """(rows, n) with stride 1 along n: a view where the layout allows it."""
    rows = t.reshape(-1, t.shape[-1]) if t.numel() else t.reshape(0, 0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _kernels(gate, up, activation, spare) -> torch.Tensor:
    shape, activation = gate.shape, _NUMBERS[activation]
    if len(shape) != 2 or gate.stride(1) != 1 or up.stride(1) != 1:
        gate, up = (_rows(t if shape else t[None]) for t in (gate, up))
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = _Swiglu.apply(gate, up, activation, spare).view(shape)
        return recompute.made_by(y, partial(_alone, activation=activation), gate, up)
    return _alone(gate, up, activation, spare[0]).view(shape)


def _alone(gate, up, activation, spare=0) -> torch.Tensor:
    if dispatch.direct(gate):
        return _forward_on_gpu(gate, up, activation, spare)
    return torch.ops.peft_engine.swiglu_forward.default(gate, up, activation)


SWIGLU.register("triton", _kernels, refuse_unless_cuda)
SWIGLU.register("cpu", _kernels, refuse_unless_cpu)
SWIGLU.register("reference", reference)

"""dgate and dup of swiglu: three tensors read once, two written. Floor: those bytes."""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.swiglu.forward import BLOCK, WARPS, part, place, sizes

from peft_engine.activations import empty_with_spare
from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def slope(g, s, ACTIVATION: tl.constexpr):
    """s + g s', the derivative of act(g) = g s."""
    if ACTIVATION == "silu":
        d = s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu_tanh":
        # s is 0 or 1 beyond 12, where the powers may be infinite; a NaN stays one. 1 - s would cancel.
        c = tl.where(g < -12.0, -12.0, tl.where(g > 12.0, 12.0, g))
        rest = tl.sigmoid(-1.5957691216057308 * c * (1.0 + 0.044715 * c * c))
        d = s * (1.0 + c * rest * (1.5957691216057308 + 0.2140644488178084 * c * c))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        d = s + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    return d


@triton.jit
def backward_kernel(
    dy, gate, up, dgate, dup, columns, chunks, stride_y, stride_g, stride_u, stride_dg, stride_du,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dy up (s + gate s') and dup = dy gate s."""
    row, n, there = place(chunks, columns, BLOCK)
    d = tl.load(dy + row * stride_y + n, there, other=0).to(tl.float32)
    g = tl.load(gate + row * stride_g + n, there, other=0).to(tl.float32)
    u = tl.load(up + row * stride_u + n, there, other=0).to(tl.float32)
    s = part(g, ACTIVATION)
    of_gate = d * u * slope(g, s, ACTIVATION)
    tl.store(dgate + row * stride_dg + n, of_gate.to(dgate.dtype.element_ty), there)
    tl.store(dup + row * stride_du + n, (d * g * s).to(dup.dtype.element_ty), there)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str = "silu",
    spare: tuple[int, int] = (0, 0),
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """dgate and dup (rows, N), of tensors whose last dimension is dense; the raw op swiglu_backward.

    spare: columns of room behind the rows of dgate and of dup.
    """
    dgate, dup = (empty_with_spare(*gate.shape, width, gate.dtype, gate.device) for width in spare)
    if dy.numel():
        rows, columns, strides = sizes(dy, gate, up, dgate, dup)
        chunks = cdiv(columns, BLOCK)
        launch(
            backward_kernel, (rows * chunks,), (dy, gate, up, dgate, dup, columns, chunks, *strides),
            {"ACTIVATION": activation, "BLOCK": BLOCK}, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup

"""dgate and dup of swiglu: three tensors read once, two written. Floor: those bytes."""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.swiglu.forward import BLOCK, WARPS, place, sizes

from peft_engine.activations import empty_with_spare
from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def backward_kernel(
    dy, gate, up, dgate, dup, columns, chunks, stride_y, stride_g, stride_u, stride_dg, stride_du,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dgate = dy up s (1 + gate (1 - s)) and dup = dy gate s, s = sigmoid(gate)."""
    row, n, there = place(chunks, columns, BLOCK)
    d = tl.load(dy + row * stride_y + n, there, other=0).to(tl.float32)
    g = tl.load(gate + row * stride_g + n, there, other=0).to(tl.float32)
    u = tl.load(up + row * stride_u + n, there, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    of_gate = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(dgate + row * stride_dg + n, of_gate.to(dgate.dtype.element_ty), there)
    tl.store(dup + row * stride_du + n, (d * g * s).to(dup.dtype.element_ty), there)


def backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, spare: tuple[int, int] = (0, 0)
) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup (rows, N), of tensors whose last dimension is dense; the raw op swiglu_backward.

    spare: columns of room behind the rows of dgate and of dup.
    """
    dgate, dup = (empty_with_spare(*gate.shape, width, gate.dtype, gate.device) for width in spare)
    if dy.numel():
        rows, columns, strides = sizes(dy, gate, up, dgate, dup)
        chunks = cdiv(columns, BLOCK)
        launch(
            backward_kernel, (rows * chunks,), (dy, gate, up, dgate, dup, columns, chunks, *strides),
            {"BLOCK": BLOCK}, num_warps=WARPS,
        )  # fmt: skip
    return dgate, dup

"""y of swiglu: gate and up read once, y written. Floor: those bytes."""

import torch
import triton
import triton.language as tl

from peft_engine.activations import empty_with_spare
from peft_engine.kernels.launch import cdiv, launch

BLOCK, WARPS = 1024, 4  # elements of a program: 16 bytes of half precision a thread. Not timed on a GPU.


@triton.jit
def place(chunks, columns, BLOCK: tl.constexpr):
    """The row and the columns of this program, and which of them are there."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    n = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, n, n < columns


@triton.jit
def part(g, ACTIVATION: tl.constexpr):
    """s of act(g) = g s."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g * g))
    else:
        tl.static_assert(ACTIVATION == "gelu")
        s = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    return s


@triton.jit
def forward_kernel(
    gate, up, y, columns, chunks, stride_g, stride_u, stride_y, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y = gate s up."""
    row, n, there = place(chunks, columns, BLOCK)
    g = tl.load(gate + row * stride_g + n, there, other=0).to(tl.float32)
    u = tl.load(up + row * stride_u + n, there, other=0).to(tl.float32)
    out = g * part(g, ACTIVATION) * u
    tl.store(y + row * stride_y + n, out.to(y.dtype.element_ty), there)


def sizes(*tensors: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Rows, columns and the strides of the rows of tensors (rows, columns); all is one row where none has a
    gap.
    """
    rows, columns = tensors[0].shape
    if all(t.is_contiguous() for t in tensors):
        return 1, rows * columns, (0,) * len(tensors)
    return rows, columns, tuple(t.stride(0) for t in tensors)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str = "silu", spare: int = 0) -> torch.Tensor:
    """y (rows, N) of gate and up, whose last dimension is dense; the raw op swiglu_forward.

    spare: columns of room behind the rows of y.
    """
    y = empty_with_spare(*gate.shape, spare, gate.dtype, gate.device)
    if y.numel():
        rows, columns, strides = sizes(gate, up, y)
        chunks = cdiv(columns, BLOCK)
        launch(
            forward_kernel, (rows * chunks,), (gate, up, y, columns, chunks, *strides),
            {"ACTIVATION": activation, "BLOCK": BLOCK}, num_warps=WARPS,
        )  # fmt: skip
    return y

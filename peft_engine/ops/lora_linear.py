"""LoRA product over a frozen dense or NF4 weight.

Hu et al. 2021, arXiv 2106.09685; Dettmers et al. 2023, arXiv 2305.14314.

    h = drop(x) A^T                    y = x W^T + bias + s h B^T
    dh = s dy B                        dx = dy W + drop'(dh A)
    dA = dh^T drop(x)                  dB = s dy^T h

x (..., K), W (N, K) frozen, A (R, K), B (N, R). Saved for the backward: the weights, x where A learns and
h (M x R) where B does.
Dropout keeps element (m, k) by a hash of the seed, the row and the column, so no mask is stored.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native, recompute
from peft_engine.kernels import scratch
from peft_engine.ops.dropout import check_dropout, dropout_mask
from peft_engine.ops.nf4 import DTYPES, NF4Tensor, refuse_unless_cpu, refuse_unless_cuda


class LoraLinearCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    base: torch.dtype | str  # the dtype of a dense weight, or "nf4"
    adapter: torch.dtype | None
    in_features: int
    rank: int = 0


LORA_LINEAR = dispatch.Op("lora_linear")


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float,
    *,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + scaling * drop(x) A^T B^T, of shape (..., N) and x's dtype.

    x (..., K) float32, bfloat16 or float16; weight (N, K) of x's dtype, or an NF4Tensor; lora_a (R, K) and
    lora_b (N, R), of x's dtype or float32, or both None; bias (N,); seed an int64 tensor of one element,
    needed when dropout_p > 0 (draw it with torch.randint, so that checkpointing draws it again).
    Gradients flow to x, lora_a, lora_b and bias; the weight is frozen.
    Raises ValueError or TypeError that says which argument does not fit.
    """
    if dropout_p == 0.0 and not torch.is_grad_enabled():
        args = (*flat_base(weight), weight.shape[0], lora_a, lora_b, scaling, bias, 0.0, None)
        if (found := dispatch.at_once(_FORWARD, x, *args)) is not None:
            return found[0]
    if dispatch.in_autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight if isinstance(weight, NF4Tensor) else weight.to(dtype)
    _check(x, weight, lora_a, lora_b, bias, dropout_p, seed)
    call = LoraLinearCall(
        x.device.type,
        x.dtype,
        "nf4" if isinstance(weight, NF4Tensor) else weight.dtype,
        None if lora_a is None else lora_a.dtype,
        x.shape[-1],
        0 if lora_a is None else lora_a.shape[0],
    )
    run = LORA_LINEAR.choose(call, x, weight, lora_a, lora_b, bias).run
    if 0 in weight.shape:  # nothing to multiply: no kernel need know of it
        run = reference
    return run(x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed)


def _check(x, weight, lora_a, lora_b, bias, dropout_p, seed) -> None:
    nf4 = isinstance(weight, NF4Tensor)
    if x.dtype not in DTYPES:
        raise TypeError(f"lora_linear: x must be float32, bfloat16 or float16, got {x.dtype}")
    shape = weight.shape
    if len(shape) != 2:
        raise ValueError(f"lora_linear: weight must be (out_features, in_features), got {tuple(shape)}")
    n, k = shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"lora_linear: x must be (..., in_features)=(..., {k}), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"lora_linear: x is on {x.device} and weight on {weight.device}; move one of them")
    if nf4:
        weight.require_one_device("lora_linear")
    else:
        if weight.dtype != x.dtype:
            raise TypeError(f"lora_linear: x is {x.dtype} and weight {weight.dtype}; cast one of them")
        if weight.requires_grad:
            raise ValueError(
                "lora_linear: weight must be frozen (it gets no gradient here); set requires_grad=False"
            )
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_linear: give both lora_a and lora_b, or neither")
    if lora_a is not None:
        r = lora_a.shape[0]
        if lora_a.shape != (r, k):
            raise ValueError(
                f"lora_linear: A must be (r, in_features)=({r}, {k}), got {tuple(lora_a.shape)}; "
                "was this adapter trained for another layer?"
            )
        if lora_b.shape != (n, r):
            raise ValueError(
                f"lora_linear: B must be (out_features, r)=({n}, {r}), got {tuple(lora_b.shape)}; "
                "was this adapter trained for another layer?"
            )
        if lora_a.dtype != lora_b.dtype or lora_a.dtype not in (torch.float32, x.dtype):
            raise TypeError(
                f"lora_linear: A and B must both be float32 or both {x.dtype} as x, got {lora_a.dtype} and "
                f"{lora_b.dtype}"
            )
        if lora_a.device != x.device or lora_b.device != x.device:
            raise ValueError(
                f"lora_linear: x is on {x.device}, A on {lora_a.device}, B on {lora_b.device}; move them"
            )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"lora_linear: bias must be (out_features,)=({n},), got {tuple(bias.shape)}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"lora_linear: x is on {x.device} and bias on {bias.device}; move one of them")
    check_dropout("lora_linear", "x", x, dropout_p, seed)


# --- reference ----------------------------------------------------------------------------------------------


def reference(x, weight, lora_a, lora_b, scaling, bias=None, dropout_p=0.0, seed=None) -> torch.Tensor:
    """lora_linear in plain torch: the base in x's dtype, the adapter in its own (as PEFT has it)."""
    dense = weight.dequantize(x.dtype) if isinstance(weight, NF4Tensor) else weight
    y = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    if lora_a is None:
        return y
    dropped = x.to(lora_a.dtype)
    if dropout_p > 0.0:
        mask = dropout_mask(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p).view(x.shape)
        dropped = dropped * mask / (1.0 - dropout_p)
    return (y + F.linear(F.linear(dropped, lora_a), lora_b) * scaling).to(x.dtype)


# --- backends -----------------------------------------------------------------------------------------------

BASE = "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int blocksize"
native.library.define(
    f"lora_linear_forward(Tensor x, {BASE}, int out_features, Tensor? lora_a, Tensor? lora_b, float scaling,"
    " Tensor? bias, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
native.library.define(
    f"lora_linear_backward(Tensor dy, Tensor x, {BASE}, Tensor? lora_a, Tensor? lora_b, Tensor? h,"
    " float scaling, float dropout_p, Tensor? seed, bool need_dx, bool need_da) -> (Tensor, Tensor, Tensor)"
)


_FORWARD = torch.ops.peft_engine.lora_linear_forward.default


@torch.library.register_fake("peft_engine::lora_linear_forward")
def _(
    x, weight, absmax, nested_absmax, offset, blocksize, out_features, lora_a, lora_b, scaling, bias,
    dropout_p, seed,
):  # fmt: skip
    rank = 0 if lora_a is None else lora_a.shape[0]
    rows = x.numel() // x.shape[-1]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(
        rows if rank else 0, rank, dtype=torch.float32
    )


@torch.library.register_fake("peft_engine::lora_linear_backward")
def _(
    dy, x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, scaling, dropout_p, seed,
    need_dx, need_da,
):  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    if lora_a is None:
        return dx, x.new_empty(0), x.new_empty(0)
    return dx, torch.empty_like(lora_a), torch.empty_like(lora_b)


# Triton is imported when the first tensor on a GPU asks for it.
def _forward_on_gpu(*arguments):
    from peft_engine.kernels.lora_linear.forward import forward

    return forward(*arguments)


@torch.library.impl(native.library, "lora_linear_forward", "CUDA")
def _(*arguments):
    with scratch.fresh():
        return _forward_on_gpu(*arguments)


@torch.library.impl(native.library, "lora_linear_backward", "CUDA")
def _backward_on_gpu(*arguments):
    from peft_engine.kernels.lora_linear.backward import backward

    return backward(*arguments)


def raw_ops(x: torch.Tensor) -> tuple[Any, Any]:
    """The raw forward and backward for tensors such as x."""
    if dispatch.direct(x):
        return _forward_on_gpu, _backward_on_gpu
    ops = torch.ops.peft_engine
    return ops.lora_linear_forward.default, ops.lora_linear_backward.default


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, absmax, nested_absmax, offset, blocksize, n, lora_a, lora_b, scaling, bias, p,
        seed,
    ):  # fmt: skip
        run, _ = raw_ops(x)
        y, h = run(
            x, weight, absmax, nested_absmax, offset, blocksize, n, lora_a, lora_b, scaling, bias, p, seed
        )
        # x is for dA, h for dB; a frozen adapter (or none) keeps no activation at all.
        again, kept = recompute.instead_of(x) if ctx.needs_input_grad[7] else (None, (None,))
        ctx.save_for_backward(
            weight, absmax, nested_absmax, offset, lora_a, lora_b, h if ctx.needs_input_grad[8] else None,
            seed, *kept,
        )  # fmt: skip
        ctx.settings = blocksize, scaling, p, x.shape, None if bias is None else bias.dtype, again
        return y

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        weight, absmax, nested_absmax, offset, lora_a, lora_b, h, seed, *kept = ctx.saved_tensors
        blocksize, scaling, p, x_shape, bias_dtype, again = ctx.settings
        x = kept[0] if again is None else again(*kept).view(x_shape)
        # The kernels of a GPU read rows that lie apart, and use the columns that may be spare behind them.
        dy = dy if dispatch.on_gpu(dy) else dy.contiguous()
        shaped_x = x if x is not None else dy.new_empty(()).expand(x_shape)  # its shape alone is read
        _, run = raw_ops(dy)
        dx, da, db = run(
            dy, shaped_x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, scaling, p,
            seed, ctx.needs_input_grad[0], ctx.needs_input_grad[7],
        )  # fmt: skip
        need = ctx.needs_input_grad
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(bias_dtype) if need[10] else None
        return (
            dx if need[0] else None, None, None, None, None, None, None,
            da if need[7] else None, db if need[8] else None, None, dbias, None, None,
        )  # fmt: skip


def flat_base(weight: torch.Tensor | NF4Tensor) -> tuple[Any, ...]:
    """The weight as the raw ops take it: packed bytes or dense, absmax, nested_absmax, offset, blocksize."""
    if isinstance(weight, NF4Tensor):
        return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.blocksize
    return weight.contiguous(), None, None, None, 0


def _kernels(x, weight, lora_a, lora_b, scaling, bias, dropout_p, seed) -> torch.Tensor:
    if not dispatch.on_gpu(x):
        x = x.contiguous()
        if lora_a is not None:
            lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
        bias = None if bias is None else bias.contiguous()
    args = (x, *flat_base(weight), weight.shape[0], lora_a, lora_b, float(scaling), bias, dropout_p, seed)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, lora_a, lora_b, bias)
    )
    # An autograd.Function costs 5 us a call, the bare op 1: a token decoded by 30 layers has 210 of them.
    if learns:
        return _LoraLinear.apply(*args)
    return raw_ops(x)[0](*args)[0]


def refuse_unless_triton(call: LoraLinearCall) -> str | None:
    """Why the Triton kernels do not take a call."""
    from peft_engine.kernels.lora_linear.tiles import MAX_RANK

    if call.rank > MAX_RANK:
        return f"rank {call.rank} is above {MAX_RANK}, the most its tiles hold"
    return refuse_unless_cuda(call)


def _refuse_few_rows(call: LoraLinearCall) -> str | None:
    why = refuse_unless_triton(call)
    if why is None and (call.base != "nf4" or call.dtype == torch.float32):
        why = "its product is of half precision over an NF4 weight"
    if why is None and (call.in_features % 64 or call.rank > 64):
        why = f"it takes in_features by 64 and ranks up to 64, got {call.in_features} and {call.rank}"
    return why or dispatch.available_backends()["triton"]  # which runs what has more rows


# "cuda" is "triton" with the few-row product of the CUDA library before it; rows are looked at inside the op.
LORA_LINEAR.register("cuda", _kernels, _refuse_few_rows)
LORA_LINEAR.register("triton", _kernels, refuse_unless_triton)
LORA_LINEAR.register("cpu", _kernels, refuse_unless_cpu)
LORA_LINEAR.register("reference", reference)

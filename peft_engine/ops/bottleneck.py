"""Bottleneck adapter: down, non-linearity, up, residual.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, 2005.00247; He et al. 2021, 2110.04366.

    z = LN(x) or x            m = z Wd^T + bd            a = act(m)            y = residual + s (a Wu^T + bu)
    da = s dy Wu              dm = da act'(m)            dz = dm Wd            dresidual = dy
    dWu = s dy^T a            dbu = s sum(dy)            dWd = dm^T z          dbd = sum(dm)
    dx = LN'(dz) or dz, and dy besides where the residual is x itself

x (..., H), Wd (R, H), Wu (H, R). Saved for the backward: x, m (M x R), the mean and rstd of each row where
there is a norm, and the parameters; a and z are formed again.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.kernels import scratch
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda

# The functions by name; gelu is the exact one, by erf.
ACTIVATIONS: dict[str, Any] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
_NAMES = tuple(ACTIVATIONS)  # the raw ops take their numbers
ALIASES = {"swish": "silu"}
# On the CPU, up to these a kernel of their own runs, which sums in another order: kFewRows in
# csrc/cpu/bottleneck_few.inl. us of one and two rows on two threads of a Zen 4, by it / by tiles: 576
# features and width 36 in float32 8 / 22 and 11 / 22, 2048 and 128 in bfloat16 45 / 53 and 71 / 53, 4096 and
# 64 in float32 34 / 72 and 53 / 71; of four in float32 they are as fast.
FEW_ROWS = 2


class BottleneckCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    weight: torch.dtype
    activation: str
    features: int
    width: int
    norm: bool


class Norm(NamedTuple):
    """The LayerNorm before an adapter: weight (H,), bias (H,) or None, eps."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


BOTTLENECK = dispatch.Op("bottleneck")


def bottleneck(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    up_weight: torch.Tensor,
    *,
    down_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    activation: str = "relu",
    scaling: float = 1.0,
    norm: torch.nn.LayerNorm | tuple[torch.Tensor, torch.Tensor | None, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = residual + scaling (act(LN(x) down_weight^T + down_bias) up_weight^T + up_bias), shaped as x.

    x (..., H) float32, bfloat16 or float16, any strides; down_weight (R, H), up_weight (H, R), down_bias (R,)
    and up_bias (H,), all of x's dtype or all float32 (the adapter then computes in float32); activation relu,
    gelu (by erf), silu (or swish) or tanh; norm None, a torch.nn.LayerNorm over H or (weight, bias or None,
    eps), of x's dtype or float32; residual of x's shape and dtype, None for x itself. y has x's dtype.
    Gradients flow to x, residual, the weights, the biases and the norm's weight and bias.
    Raises ValueError or TypeError that says which argument does not fit.
    """
    if dispatch.in_autocast(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        residual = None if residual is None else residual.to(x.dtype)
    activation = ALIASES.get(activation, activation)
    _check(x, residual, down_weight, down_bias, up_weight, up_bias, activation, scaling)
    norm = _norm_of(norm, x)
    call = BottleneckCall(
        x.device.type,
        x.dtype,
        down_weight.dtype,
        activation,
        x.shape[-1],
        down_weight.shape[0],
        norm is not None,
    )
    tensors = (x, residual, down_weight, down_bias, up_weight, up_bias, *(norm or ()))
    run = BOTTLENECK.choose(call, *tensors).run
    return run(x, residual, down_weight, down_bias, up_weight, up_bias, norm, activation, float(scaling))


def _check(x, residual, down_weight, down_bias, up_weight, up_bias, activation, scaling) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"bottleneck: x must be float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"bottleneck: x must be (..., features) with features > 0, got {tuple(x.shape)}")
    h = x.shape[-1]
    if down_weight.dim() != 2 or down_weight.shape[0] == 0 or down_weight.shape[1] != h:
        raise ValueError(
            f"bottleneck: down_weight must be (width, features)=(width > 0, {h}) for x {tuple(x.shape)}, "
            f"got {tuple(down_weight.shape)}; was this adapter trained for another layer?"
        )
    r = down_weight.shape[0]
    shapes = (
        ("up_weight", up_weight, (h, r), "(features, width)"),
        ("down_bias", down_bias, (r,), "(width,)"),
        ("up_bias", up_bias, (h,), "(features,)"),
    )
    for name, t, shape, letters in shapes:
        if t is not None and t.shape != shape:
            mend = "; transpose it" if name == "up_weight" and t.shape == (r, h) else ""
            raise ValueError(f"bottleneck: {name} must be {letters}={shape}, got {tuple(t.shape)}{mend}")
    parameters = (down_weight, up_weight, down_bias, up_bias)
    dtypes = {t.dtype for t in parameters if t is not None}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        raise TypeError(
            f"bottleneck: the weights and biases must all be float32 or all {x.dtype} as x, got "
            f"{', '.join(sorted(map(str, dtypes)))}; cast them"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"bottleneck: residual must be of x's shape and dtype, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}"
        )
    for t in (residual, *parameters):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"bottleneck: x is on {x.device} and another argument on {t.device}; move one of them"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"bottleneck: activation must be one of {', '.join((*ACTIVATIONS, *ALIASES))}, got {activation!r}"
        )
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"bottleneck: scaling must be a number, got {type(scaling).__name__}")


def _norm_of(norm, x: torch.Tensor) -> Norm | None:
    """`norm` as the backends take it; it fits x, or an error says why not."""
    if norm is None:
        return None
    h = x.shape[-1]
    if isinstance(norm, torch.nn.LayerNorm):
        if tuple(norm.normalized_shape) != (h,):
            raise ValueError(
                f"bottleneck: norm must be a LayerNorm over (features,)=({h},), got {norm.normalized_shape}"
            )
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        if weight is None:  # without parameters of its own
            weight = torch.ones(h, dtype=torch.float32, device=x.device)
    elif isinstance(norm, tuple) and len(norm) == 3:
        weight, bias, eps = norm
    else:
        raise TypeError(
            "bottleneck: norm must be None, a torch.nn.LayerNorm or (weight, bias, eps), "
            f"got {type(norm).__name__}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if name == "bias" and t is None:
            continue
        if t.shape != (h,):
            raise ValueError(
                f"bottleneck: the norm's {name} must be (features,)=({h},), got {tuple(t.shape)}"
            )
        if t.dtype not in (x.dtype, torch.float32) or t.dtype != weight.dtype:
            raise TypeError(
                f"bottleneck: the norm's weight and bias must both be float32 or both {x.dtype} as x, "
                f"its {name} is {t.dtype}; cast it"
            )
        if t.device != x.device:
            raise ValueError(
                f"bottleneck: x is on {x.device} and the norm's {name} on {t.device}; move one of them"
            )
    return Norm(weight, bias, float(eps))


def reference(
    x,
    residual,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    norm: Norm | None,
    activation: str,
    scaling: float,
) -> torch.Tensor:
    """bottleneck in plain torch: the norm in float32 (float64 stays), the products in the weights' dtype."""
    z = x
    if norm is not None:
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = (None if t is None else t.to(wide.dtype) for t in norm[:2])
        z = F.layer_norm(wide, wide.shape[-1:], weight, bias, norm.eps)
    middle = F.linear(z.to(down_weight.dtype), down_weight, down_bias)
    up = F.linear(ACTIVATIONS[activation](middle), up_weight, up_bias)
    return ((x if residual is None else residual) + scaling * up).to(x.dtype)


# --- backends -----------------------------------------------------------------------------------------------

PARAMETERS = (
    "Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? norm_weight,"
    " Tensor? norm_bias, int activation, float scaling"
)
# middle (M, R) is m, in the weights' dtype; stats float32 (M, 2) mean and rstd of each row, (0, 2) without
# norm.
native.library.define(
    f"bottleneck_forward(Tensor x, Tensor? residual, {PARAMETERS}, float eps) -> (Tensor, Tensor, Tensor)"
)
# wanted: which of dx, ddown_weight, ddown_bias, dup_weight, dup_bias, dnorm_weight, dnorm_bias; the others
# come with no elements.
native.library.define(
    f"bottleneck_backward(Tensor dy, Tensor x, Tensor middle, Tensor stats, {PARAMETERS}, bool residual_is_x,"
    " bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("peft_engine::bottleneck_forward")
def _(
    x, residual, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, scaling, eps
):
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(x.shape),
        down_weight.new_empty(rows, down_weight.shape[0]),
        x.new_empty(0 if norm_weight is None else rows, 2, dtype=torch.float32),
    )


@torch.library.register_fake("peft_engine::bottleneck_backward")
def _(
    dy, x, middle, stats, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation,
    scaling, residual_is_x, wanted,
):  # fmt: skip
    sources = (dy, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    return tuple(
        t.new_empty(t.shape) if want and t is not None else dy.new_empty(0)
        for t, want in zip(sources, wanted, strict=True)
    )


# Triton is imported when the first tensor on a GPU asks for it.
def _forward_on_gpu(x, residual, *rest):
    from peft_engine.kernels.bottleneck.forward import forward

    *parameters, activation, scaling, eps = rest
    return forward(x, residual, *parameters, _NAMES[activation], scaling, eps)


@torch.library.impl(native.library, "bottleneck_forward", "CUDA")
def _(*arguments):
    with scratch.fresh():
        return _forward_on_gpu(*arguments)


@torch.library.impl(native.library, "bottleneck_backward", "CUDA")
def _backward_on_gpu(*arguments):
    from peft_engine.kernels.bottleneck.backward import backward

    *tensors, activation, scaling, residual_is_x, wanted = arguments
    return backward(*tensors, _NAMES[activation], scaling, residual_is_x, wanted)


def _rows(t: torch.Tensor | None) -> torch.Tensor | None:
    """(..., features) as contiguous (rows, features)."""
    return None if t is None else t.reshape(-1, t.shape[-1]).contiguous()


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, residual, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation,
        scaling, eps,
    ):  # fmt: skip
        parameters = down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias
        shape, x, residual = (
            x.shape,
            _rows(x),
            _rows(residual),
        )  # in here, where a view adds nothing to the graph
        run = _forward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.bottleneck_forward
        y, middle, stats = run(x, residual, *parameters, activation, scaling, eps)
        # x is needed for dWd and for the norm; a frozen adapter without one keeps the middle alone.
        keep_x = norm_weight is not None or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if keep_x else None, middle, stats, *parameters)
        ctx.settings = activation, scaling, residual is None
        return torch.ops.aten._unsafe_view(y, shape)  # a view could not be written to in place

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        x, middle, stats, *parameters = ctx.saved_tensors
        need = ctx.needs_input_grad
        dresidual = dy if need[1] else None
        wanted = [need[0], *need[2:8]]
        if not any(wanted):
            return None, dresidual, *(None,) * 9
        shape, dy = dy.shape, _rows(dy)
        shaped_x = x if x is not None else dy.new_empty(()).expand(dy.shape)  # its shape alone is read
        run = _backward_on_gpu if dispatch.direct(dy) else torch.ops.peft_engine.bottleneck_backward
        grads = run(dy, shaped_x, middle, stats, *parameters, *ctx.settings, wanted)
        dx, *rest = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
        return None if dx is None else dx.view(shape), dresidual, *rest, None, None, None


def _kernels(
    x,
    residual,
    down_weight,
    down_bias,
    up_weight,
    up_bias,
    norm: Norm | None,
    activation: str,
    scaling: float,
) -> torch.Tensor:
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    parameters = (down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    tensors = [None if t is None else t.contiguous() for t in parameters]
    args = (*tensors, _NAMES.index(activation), scaling, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *tensors)):
        return _Bottleneck.apply(x, residual, *args)
    if not dispatch.on_gpu(x):  # takes x as it is: a view each way costs a decoded token's layer 2 us
        residual = None if residual is None else residual.contiguous()
        return torch.ops.peft_engine.bottleneck_forward.default(x.contiguous(), residual, *args)[0]
    run = _forward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.bottleneck_forward.default
    return run(_rows(x), _rows(residual), *args)[0].view(x.shape)


MAX_WIDTH_OF_FEW = 512  # what its blocks hold: kMaxWidth in csrc/cuda/bottleneck_call.cuh


def refuse_width(width: int) -> str | None:
    """Why the CUDA kernel of few rows does not take this width."""
    return (
        None if width <= MAX_WIDTH_OF_FEW else f"width {width} is above {MAX_WIDTH_OF_FEW}, the most it holds"
    )


def _refuse_unless_few(call: BottleneckCall) -> str | None:
    why = refuse_width(call.width) or refuse_unless_cuda(call)
    return why or dispatch.available_backends()["triton"]  # which runs what has more rows, and the backward


# "cuda" is "triton" with the CUDA library's kernel of few rows before it; rows are looked at inside the op.
BOTTLENECK.register("cuda", _kernels, _refuse_unless_few)
BOTTLENECK.register("triton", _kernels, refuse_unless_cuda)
BOTTLENECK.register("cpu", _kernels, refuse_unless_cpu)
BOTTLENECK.register("reference", reference)

"""Products with a dense weight on the CPU, by the fastest of three: torch's own choice, oneDNN, and ours.

float32: torch multiplies with MKL. oneDNN, which it has for other dtypes and for torch.compile, takes less
time on AMD's processors. On two cores of a Zen 4, torch 2.13, with weights of 576x576 up to 4096x4096 and the
head of 49152x576, y was 1.06 to 3.9 times as fast from two rows on (1.09 to 1.22 times at 512 rows), dx 1.07
to 2.9 times; with one row either was the faster. On two cores of a Zen 3, which has no AVX-512, y had 0.88 to
1.9 times the speed of torch's choice from 16 to 128 rows (median 1.15), 0.9 to 1.2 at 192, 0.88 to 1.13 at
256, from 512 on 0.8 to 0.96; with a transposed weight (dx; y of a Conv1D) 0.9 to 1.6 up to 32 rows, above
as little as 0.65 where rows are 3072 wide. There lora_linear's product of few rows is the fastest of two to
eight (oneDNN's takes 1.03 to 1.9 times as long), and of one row oneDNN's takes 0.5 to 0.9 of torch's time.
Not measured on other processors: they keep torch's choice.

Half precision: oneDNN has no product of bfloat16 on processors without AVX-512, and none of float16 on those
without AVX512-FP16. There torch's own runs, on the same machine, at 39 to 46 GFLOP/s for y, 1 to 3.4 for dx
(the gradient through a head of 49152 takes 8 s), where lora_linear's runs at 130 to 210. It takes torch's
place: of one row torch's y takes 1.15 to 1.7 times as long, of eight 3.3 to 4.2. With a transposed weight its
y is our dx: as fast from 16 rows on, of one row 4 times as long, where torch takes 6 to 10 times that.
Weights that are trained whole have our products too, and dW.
"""

import sys
from typing import Any

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.ops.lora_linear import flat_base, lora_linear
from peft_engine.ops.nf4 import DTYPES

if torch.backends.cpu.get_cpu_capability() == "AVX512":
    ONEDNN_ROWS = dict.fromkeys((True, False), range(2, sys.maxsize))  # by whether the weight is contiguous
    FEW_ROWS = range(0)
else:
    ONEDNN_ROWS = {True: range(1, 193), False: range(1, 33)}
    FEW_ROWS = range(2, 9)


def _measured_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo") as about:  # its start names the maker; all of it is slow on many cores
            return "AuthenticAMD" in about.read(256)
    except OSError:
        return False


def _without_products() -> set[torch.dtype]:
    """The half-precision dtypes that oneDNN does not multiply on this processor."""
    have = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    on = torch.backends.mkldnn.is_available()
    return {
        dtype
        for dtype, name in have.items()
        if not (on and hasattr(torch.ops.mkldnn, name) and getattr(torch.ops.mkldnn, name)())
    }


_TYPES = (torch.Tensor, torch.nn.Parameter)
_BY_ONEDNN = _measured_faster()
_SLOW = _without_products()


def is_slow(dtype: torch.dtype) -> bool:
    """Whether torch's own product of this dtype is many times slower than that of float32 on this CPU."""
    return dtype in _SLOW


def library(weight: torch.Tensor) -> str:
    """Whose product multiplies by `weight`: "oneDNN", "peft-engine", or "torch" for torch's own choice."""
    if weight.device.type != "cpu" or type(weight) not in _TYPES:
        return "torch"
    if weight.dtype == torch.float32:
        return "oneDNN" if _BY_ONEDNN and torch._C._get_mkldnn_enabled() else "torch"
    return "peft-engine" if weight.dtype in _SLOW and _taken_by_us(weight) else "torch"


def _taken_by_us(weight: torch.Tensor) -> bool:
    whole = weight.dim() == 2 and (weight.is_contiguous() or weight.t().is_contiguous())
    return whole and dispatch.forced() in (None, "cpu") and native.load_error() is None


def _library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str:
    """Whose product multiplies x (..., K) by `weight`; torch's, which says what is wrong, where they do not
    fit.
    """
    whose = library(weight)
    if whose == "torch" or not _fit(x, weight, bias) or 0 in (x.numel(), weight.numel()):
        return "torch"
    if whose == "oneDNN":
        rows = x.numel() // x.shape[-1]
        if rows in FEW_ROWS and weight.is_contiguous() and _taken_by_us(weight):
            return "peft-engine"
        return "oneDNN" if rows in ONEDNN_ROWS[weight.is_contiguous()] else "torch"
    return whose


def _fit(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether x (..., K), weight (N, K) and bias (N,) lie dense, in these shapes, one dtype and device."""
    if x.is_nested or x.layout != torch.strided or weight.layout != torch.strided:
        return False
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return False
    of_weight = (weight.shape[:1], weight.dtype, weight.device)
    return bias is None or (bias.shape, bias.dtype, bias.device) == of_weight


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, no gradient recorded: x (..., K), weight (N, K), bias (N,), of one dtype."""
    whose = _library(x, weight, bias)
    if bias is not None and whose != "torch":
        bias = bias.contiguous()  # neither asks how it lies
    if whose == "oneDNN":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if whose != "peft-engine":
        return F.linear(x, weight, bias)
    if weight.is_contiguous():
        return _rows(x, weight, bias)
    y = _columns(x, weight.t())
    return y if bias is None else y.add_(bias)


def _rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b by our kernel, W contiguous."""
    forward = torch.ops.peft_engine.lora_linear_forward
    return forward(x.contiguous(), *flat_base(weight), weight.shape[0], None, None, 1.0, bias, 0.0, None)[0]


def _columns(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W by our kernel, W contiguous."""
    like_x = dy.new_empty(()).expand(*dy.shape[:-1], weight.shape[1])  # its shape alone is read
    backward = torch.ops.peft_engine.lora_linear_backward
    no_adapter = (None, None, None)
    return backward(dy.contiguous(), like_x, *flat_base(weight), *no_adapter, 1.0, 0.0, None, True, False)[0]


def product_back(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dy W, no gradient recorded: dy (..., N), weight (N, K), of one dtype."""
    return product(dy, weight.t())  # a view: each library takes any strides


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """dy^T x, no gradient recorded: dy (M, N), x (M, K), of one dtype; out (N, K)."""
    x = x.contiguous()
    if library(x) != "peft-engine" or dy.dtype != x.dtype or 0 in (*dy.shape, *x.shape):
        return torch.mm(dy.t(), x, out=out)
    found = _columns(dy.t(), x)
    return found if out is None else out.copy_(found)


def _transformed(*tensors: torch.Tensor | None) -> bool:
    """Whether torch.jit.trace records a product or torch.func takes it apart, which know torch's alone."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return torch.jit.is_tracing() or any(t is not None and wrapped(t) for t in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        y = product(x, weight, bias)
        # A view that is made in here could not be changed in place, as a hook of the user's may.
        return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy: torch.Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        return (
            product_back(dy, weight) if needs_x else None,
            weight_gradient(rows, x.reshape(-1, x.shape[-1])) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, by another product where that is faster; of float32 where nothing but x has a gradient."""
    if not isinstance(x, torch.Tensor) or x.device.type != "cpu":  # as torch.fx's proxies
        return F.linear(x, weight, bias)
    grad = torch.is_grad_enabled()
    learns = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if dispatch.has_tangents(x, weight, bias):
        return F.linear(x, weight, bias)
    cast, compiling = torch.is_autocast_enabled("cpu"), torch.compiler.is_compiling()
    if not compiling and _transformed(x, weight, bias):
        return F.linear(x, weight, bias)
    if cast or compiling:  # the compiler has a way of its own to oneDNN
        dtype = torch.get_autocast_dtype("cpu") if cast else weight.dtype
        held = {t.dtype for t in (x, weight, bias) if t is not None}
        if dtype not in _SLOW or type(weight) not in _TYPES or not held.issubset(DTYPES):
            return F.linear(x, weight, bias)
        if cast:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if not compiling:
            with torch.autocast("cpu", enabled=False):
                return linear(x, weight, bias)
        if learns or not _fit(x, weight, bias):
            return F.linear(x, weight, bias)
        return lora_linear(x, weight.detach(), None, None, 1.0, bias=bias)
    if _library(x, weight, bias) == "torch" or (learns and weight.dtype not in _SLOW):
        return F.linear(x, weight, bias)
    if learns or (grad and x.requires_grad):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)

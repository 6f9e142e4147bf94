"""Products with a dense float32 weight on the CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 matrices with MKL. oneDNN, which it has for other dtypes and for torch.compile, takes
less time on AMD's processors. On two cores of a Zen 4, torch 2.13, with weights of 576x576 up to 4096x4096
and the head of 49152x576, y was 1.06 to 3.9 times as fast from two rows on (1.09 to 1.22 times at 512 rows),
dx 1.07 to 2.9 times; with one row either was the faster. Not measured on other processors: they keep torch's
choice.
"""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

LEAST_ROWS = 2


def _measured_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


_BY_ONEDNN = _measured_faster()


def library(weight: torch.Tensor) -> str:
    """Whose product multiplies by `weight`: "oneDNN", or "torch" for torch's own choice."""
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.dtype == torch.float32
    on_cpu = plain and weight.device.type == "cpu"
    return "oneDNN" if on_cpu and _BY_ONEDNN and torch._C._get_mkldnn_enabled() else "torch"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, no gradient recorded: x (..., K), weight (N, K) of any strides, bias (N,), of one dtype."""
    if x.numel() >= LEAST_ROWS * x.shape[-1] > 0 and library(weight) == "oneDNN":
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor):
        (weight,) = ctx.saved_tensors
        return product(dy, weight.t()), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear, whose product is oneDNN's where that is faster and nothing but x asks for a gradient."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    plain = x.dtype == weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if learns or not plain or torch.compiler.is_compiling() or library(weight) != "oneDNN":
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, weight, bias)
    return product(x, weight, bias)

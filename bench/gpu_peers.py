"""The peers on a GPU, at their best: bitsandbytes' kernels, PEFT over them, and the autograd written by hand.

Each maker takes tensors and gives a function to time; one whose package is absent raises Missing. What the
best hand-written peers do (Unsloth's LoRA_W): dequantise into a reused buffer, library products, the adapter
added in place.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench import peers
from bench.gpu_timing import Missing
from peft_engine.ops import NF4Tensor, nf4_dequantize, nf4_quantize
from peft_engine.ops.nf4 import ABSMAX_CODE, CODE, NESTED_BLOCKSIZE

PEFT = {  # how PEFT's adapter is run; the fastest is the peer
    "fp32 adapters": peers.PEFT_BNB,
    "autocast": f"{peers.PEFT_BNB}, autocast",
    "bf16 adapters": f"{peers.PEFT_BNB}, bf16 adapters",
}
BY_HAND, BY_HAND_H_KEPT = "autograd by hand", "autograd by hand, h kept"
UNSLOTH, LIGER = "Unsloth", "Liger"

Step = Callable[[], tuple[torch.Tensor, ...]]  # gives y, dx, dA, dB


@dataclass(frozen=True)
class Layer:
    """One QLoRA layer and what flows through it; the adapter's masters are float32."""

    weight: torch.Tensor  # (N, K), dense
    x: torch.Tensor  # (M, K), asks for a gradient
    dy: torch.Tensor  # (M, N)
    lora_a: torch.Tensor  # (R, K)
    lora_b: torch.Tensor  # (N, R)
    scaling: float


def need(package: str) -> Any:
    """The package imported; Missing where it is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Missing("not installed")
    return importlib.import_module(package)


def quant_state(q: NF4Tensor) -> Any:
    """bitsandbytes' description of the same bytes."""
    state = need("bitsandbytes").functional.QuantState
    nested = state(
        absmax=q.nested_absmax, blocksize=NESTED_BLOCKSIZE, code=ABSMAX_CODE.to(q.device), dtype=torch.float32
    )
    return state(
        absmax=q.absmax, shape=torch.Size(q.shape), code=CODE.to(q.device), blocksize=q.blocksize,
        quant_type="nf4", dtype=q.dtype, offset=q.offset, state2=nested,
    )  # fmt: skip


def dequantizer(q: NF4Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function by which bitsandbytes writes q, double-quantised, to a buffer.

    On a CPU, bitsandbytes 0.50 takes no buffer: the values are copied there.
    """
    dequantize, state = need("bitsandbytes").functional.dequantize_4bit, quant_state(q)
    if q.packed.is_cuda:
        return lambda out: dequantize(q.packed, state, out=out)
    return lambda out: out.copy_(dequantize(q.packed, state))


def product(
    x: torch.Tensor, packed: torch.Tensor, state: Any, lora_a=None, lora_b=None, scaling: float = 1.0
) -> torch.Tensor:
    """x W^T by what bitsandbytes takes for this many rows by itself, the adapter as two products on top."""
    y = need("bitsandbytes").matmul_4bit(x, packed, quant_state=state)
    return y if lora_a is None else y.addmm_(x @ lora_a.t(), lora_b.t(), alpha=scaling)


# --- PEFT ------------------------------------------------------------------------------------------------


def bnb_linear(weight: torch.Tensor) -> torch.nn.Module:
    bnb = need("bitsandbytes")
    n, k = weight.shape
    linear = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    linear.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return linear.to(weight.device).train()


def peft_step(layer: Layer, kind: str) -> Step:
    """PEFT's LoRA over bitsandbytes' Linear4bit, run as `kind` (a key of PEFT) says."""
    need("peft")
    wrapped: Any = peers.peft_layer(bnb_linear(layer.weight)).linear
    a, b = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    a.data = layer.lora_a.clone()
    b.data = layer.lora_b.clone()
    wrapped.scaling["default"] = layer.scaling
    if kind == "bf16 adapters":
        a.data, b.data = a.data.bfloat16(), b.data.bfloat16()
    device, autocast = layer.x.device.type, kind == "autocast"

    def step() -> tuple[torch.Tensor, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = wrapped(layer.x)
        return y.detach(), *torch.autograd.grad(y, (layer.x, a, b), layer.dy)

    return step


# --- by hand ---------------------------------------------------------------------------------------------


class HandWritten(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T around library products, W dequantised into one buffer when it is needed.

    `keep_h` keeps h = x A^T and computes dy B once; without it both are computed a second time in the
    backward, as Unsloth has it. A and B are cast to x's dtype.
    """

    @staticmethod
    def forward(ctx: Any, x, dequantize, buffer, lora_a, lora_b, scaling, keep_h):
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        y = x @ dequantize(buffer).t()
        h = x @ a.t()
        y.addmm_(h, b.t(), alpha=scaling)
        ctx.save_for_backward(x, a, b, h if keep_h else None)
        ctx.settings = dequantize, buffer, scaling, lora_a.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy):
        x, a, b, h = ctx.saved_tensors
        dequantize, buffer, scaling, dtype = ctx.settings
        dh = dy @ b
        da, db = torch.empty_like(a), torch.empty_like(b)
        da.addmm_(dh.t(), x, alpha=scaling, beta=0)
        db.addmm_(dy.t(), x @ a.t() if h is None else h, alpha=scaling, beta=0)
        dx = dy @ dequantize(buffer)
        dx.addmm_(dy @ b if h is None else dh, a, alpha=scaling)
        return dx, None, None, da.to(dtype), db.to(dtype), None, None


def _ours(q: NF4Tensor, out: torch.Tensor) -> torch.Tensor:
    return nf4_dequantize(q, out=out)


def hand_written_step(layer: Layer, keep_h: bool) -> Step:
    """The autograd above over bitsandbytes' dequantise, or ours where bitsandbytes is not installed."""
    q = nf4_quantize(layer.weight, double_quant=True)
    try:
        dequantize = dequantizer(q)
    except Missing:
        dequantize = partial(_ours, q)
    buffer = torch.empty_like(layer.weight)
    a, b = layer.lora_a.clone().requires_grad_(), layer.lora_b.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        y = HandWritten.apply(layer.x, dequantize, buffer, a, b, layer.scaling, keep_h)
        return y.detach(), *torch.autograd.grad(y, (layer.x, a, b), layer.dy)

    return step


def unsloth_step(layer: Layer) -> Step:
    """Unsloth's own autograd. Its import changes other libraries' classes: make it last."""
    need("unsloth")
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    weight = bnb_linear(layer.weight).weight
    a, b = layer.lora_a.clone().requires_grad_(), layer.lora_b.clone().requires_grad_()
    x, dy = layer.x[None], layer.dy[None]

    def step() -> tuple[torch.Tensor, ...]:
        y = function.apply(x, weight, weight.quant_state, a, b, layer.scaling)
        return y.detach()[0], *torch.autograd.grad(y, (layer.x, a, b), dy)

    return step


def liger_loss() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Liger's fused linear cross entropy as loss(x, weight, labels)."""
    need("liger_kernel")
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, labels: loss(weight, x, labels)

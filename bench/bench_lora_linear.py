"""The product over an NF4 weight: suites `nf4_product` and `qlora_layer`, and pytest-benchmark cases.

python -m bench.runner nf4_product qlora_layer
python -m pytest bench/bench_lora_linear.py --benchmark-only
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure, peers
from peft_engine import dispatch
from peft_engine.ops import lora_linear, nf4_quantize


def nf4_product(settings: measure.Settings) -> Iterator[measure.Row]:
    """y = x W^T without adapter, bf16, no gradient, W in canonical NF4 bytes with double quantisation."""
    size = 256 if settings.quick else 4096
    weight = torch.randn(size, size, dtype=torch.bfloat16)
    q = nf4_quantize(weight, double_quant=True)
    training, evaluating = (peers.bnb_linear(weight, training=mode) for mode in (True, False))
    with torch.no_grad():
        # The one in training mode first: nothing of bitsandbytes has evaluated yet.
        training(torch.randn(1, size, dtype=torch.bfloat16))
        for rows in (1, 16) if settings.quick else (1, 4, 16, 64, 128, 512):
            x = torch.randn(rows, size, dtype=torch.bfloat16)
            contenders: dict[str, Callable[[], object]] = {
                "peft-engine": lambda x=x: lora_linear(x, q, None, None, 1.0),
                "dense": lambda x=x: F.linear(x, weight),
                "bitsandbytes, training": lambda x=x: training(x),
                "bitsandbytes, eval (repacked)": lambda x=x: evaluating(x),
                "reference": lambda x=x: on_reference(x, q),
            }
            samples = measure.interleave(contenders, settings.rounds)
            for name, seconds in samples.items():
                case = f"{size}x{size}, {rows} rows" if rows > 1 else f"{size}x{size}, 1 row"
                yield measure.row(case, name, "time", "ms", (s * 1e3 for s in seconds))
    packed_now = getattr(training.weight.quant_state, "packing_format_for_cpu", False)
    if packed_now:
        raise RuntimeError(
            "nf4_product: bitsandbytes' training layer was repacked; its figures are not of training"
        )


def on_reference(x: torch.Tensor, q) -> torch.Tensor:
    with dispatch.force_backend("reference"):
        return lora_linear(x, q, None, None, 1.0)


def forward_backward(layer: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    """One forward and backward: gradients of x and of the adapter."""

    def call() -> None:
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x).backward(dy)

    return call


def qlora_layer(settings: measure.Settings) -> Iterator[measure.Row]:
    """LoRA r=16 (fp32), forward and backward, the adapter's and x's gradients."""
    rows = 32 if settings.quick else 512
    for size in (256,) if settings.quick else (2048, 4096):
        weight = torch.randn(size, size, dtype=peers.DTYPE) / size**0.5
        x = torch.randn(rows, size, dtype=peers.DTYPE, requires_grad=True)
        dy = torch.randn(rows, size, dtype=peers.DTYPE)
        layers = {
            peers.OURS: peers.our_layer(weight),
            peers.PEFT_BNB: peers.peft_layer(peers.bnb_linear(weight, training=True)),
            peers.PEFT_DENSE: peers.peft_layer(peers.dense_linear(weight)),
        }
        contenders = {name: forward_backward(layer, x, dy) for name, layer in layers.items()}
        for name, seconds in measure.interleave(contenders, settings.rounds).items():
            case = f"{size}x{size}, {rows} rows, r={peers.RANK}"
            yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [1, 16, 128])
def test_forward(benchmark, rows: int, base: str):
    weight = torch.randn(1536, 576, dtype=torch.bfloat16)
    held = nf4_quantize(weight, double_quant=True) if base == "nf4" else weight
    x = torch.randn(rows, 576, dtype=torch.bfloat16)
    a, b = torch.randn(16, 576), torch.randn(1536, 16)
    with torch.no_grad():
        benchmark(lora_linear, x, held, a, b, 1.0)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("rows", [128, 512])
def test_forward_backward(benchmark, rows: int, base: str):
    weight = torch.randn(1536, 576, dtype=torch.bfloat16)
    held = nf4_quantize(weight, double_quant=True) if base == "nf4" else weight
    x = torch.randn(rows, 576, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(16, 576, requires_grad=True), torch.randn(1536, 16, requires_grad=True)
    dy = torch.randn(rows, 1536, dtype=torch.bfloat16)

    def call() -> None:
        x.grad = a.grad = b.grad = None
        lora_linear(x, held, a, b, 1.0).backward(dy)

    benchmark(call)

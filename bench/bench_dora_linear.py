"""DoRA: suite `dora`, a layer, a training step and generation; and pytest-benchmark cases.

python -m bench.runner dora
python -m pytest bench/bench_dora_linear.py --benchmark-only
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bench import measure, peers
from bench.bench_generate import greedy
from bench.bench_lora_linear import forward_backward
from bench.bench_train import step_seconds
from peft_engine.ops import dora_linear, lora_linear, nf4_quantize

LORA = "peft-engine, LoRA"  # the same adapter without magnitudes


def dora(settings: measure.Settings) -> Iterator[measure.Row]:
    """r=16 (fp32): a layer with all gradients; SmolLM2 on 4x128 tokens, AdamW; greedy."""
    makers: dict[str, Callable[..., Any]] = {
        **{name: partial(make, dora=True) for name, make in peers.MODELS.items()}, LORA: peers.our_model
    }  # fmt: skip
    yield from _layer(settings)
    case, _, samples = step_seconds(settings, makers)
    for name, seconds in samples.items():
        yield measure.row(case, name, "step", "s", seconds)
    yield from greedy(settings, makers)


def _layer(settings: measure.Settings) -> Iterator[measure.Row]:
    rows, size = (32, 256) if settings.quick else (512, 4096)
    weight = torch.randn(size, size, dtype=peers.DTYPE) / size**0.5
    x = torch.randn(rows, size, dtype=peers.DTYPE, requires_grad=True)
    dy = torch.randn(rows, size, dtype=peers.DTYPE)
    layers = {
        peers.OURS: peers.our_layer(weight, dora=True),
        LORA: peers.our_layer(weight),
        peers.PEFT_BNB: peers.peft_layer(peers.bnb_linear(weight, training=True), dora=True),
        peers.PEFT_DENSE: peers.peft_layer(peers.dense_linear(weight), dora=True),
    }
    contenders = {name: forward_backward(layer, x, dy) for name, layer in layers.items()}
    for name, seconds in measure.interleave(contenders, settings.rounds).items():
        case = f"layer {size}x{size}, {rows} rows, r={peers.RANK}"
        yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))


@pytest.mark.parametrize("side", ["dora_linear", "lora_linear"])
@pytest.mark.parametrize("rows", [1, 512])
def test_dora_linear(benchmark, rows: int, side: str):
    """576x1536 over NF4; one row without gradient and with its norm at hand, 512 forward and backward."""
    q = nf4_quantize(torch.randn(1536, 576, dtype=torch.bfloat16), double_quant=True)
    x, a, b = torch.randn(rows, 576, dtype=torch.bfloat16), torch.randn(16, 576), torch.randn(1536, 16)
    m, norm, dy = torch.ones(1536), torch.ones(1536), torch.randn(rows, 1536, dtype=torch.bfloat16)
    leaves = [x, a, b, m] if side == "dora_linear" else [x, a, b]
    for leaf in leaves:
        leaf.requires_grad_(rows > 1)

    def step():
        if side == "lora_linear":
            y = lora_linear(x, q, a, b, 1.0)
        else:
            y = dora_linear(x, q, a, b, m, 1.0, norm=norm if rows == 1 else None)
        return torch.autograd.grad(y, leaves, dy) if rows > 1 else y

    benchmark(step)

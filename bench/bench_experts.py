"""experts against transformers' grouped products: python -m pytest bench/bench_experts.py --benchmark-only

The peer is what PEFT's target_parameters runs: W + s B A of every expert in new memory, and its gradient.
"""

import types

import pytest
import torch
from transformers.integrations import moe

from peft_engine.ops.experts import Lora, experts


@pytest.mark.parametrize("side", ["peft-engine", "PEFT"])
@pytest.mark.parametrize("tokens", [1, 256])
def test_experts(benchmark, tokens, side):
    """32 experts of 512 x 1024, 4 a token, rank 16 in float32; 256 tokens forward and backward."""
    count, features, width, each = 32, 1024, 512, 4
    x = torch.randn(tokens, features, requires_grad=tokens > 1)
    index = torch.rand(tokens, count).argsort(-1)[:, :each]
    weights = torch.softmax(torch.randn(tokens, each), -1)
    up, down = torch.randn(count, 2 * width, features) / 32, torch.randn(count, features, width) / 32
    loras = [
        Lora(torch.randn(count, 16, k) / 32, torch.randn(count, n, 16) / 32, 2.0)
        for n, k in ((2 * width, features), (features, width))
    ]
    learning = [x, *(t.requires_grad_(tokens > 1) for lora in loras for t in lora[:2])]
    dy = torch.randn(tokens, features)
    layer = types.SimpleNamespace(
        num_experts=count, has_gate=True, has_bias=False, is_transposed=False, has_post_expert_norm=False,
        _is_expert_parallel=False, act_fn=torch.nn.functional.silu,
    )  # fmt: skip
    layer._apply_gate = types.MethodType(moe._default_apply_gate, layer)

    def merged():
        layer.gate_up_proj, layer.down_proj = (
            torch.baddbmm(w, lora.b, lora.a, alpha=lora.scaling)
            for w, lora in zip((up, down), loras, strict=True)
        )
        return moe.grouped_mm_experts_forward(layer, x, index, weights)

    def fused():
        return experts(x, index, weights, up, down, gate_up_lora=loras[0], down_lora=loras[1])

    run = merged if side == "PEFT" else fused

    def step():
        y = run()
        return torch.autograd.grad(y, learning, dy) if tokens > 1 else y

    assert torch.allclose(fused(), merged(), rtol=1e-3, atol=1e-4)
    benchmark(step)

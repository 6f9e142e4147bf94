"""rms_norm against transformers' own: python -m pytest bench/bench_rms_norm.py --benchmark-only"""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from peft_engine.ops.rms_norm import rms_norm


@pytest.mark.parametrize("side", ["peft-engine", "transformers"])
@pytest.mark.parametrize("rows", [1, 512])
def test_rms_norm(benchmark, rows, side):
    """576 features in bf16; one row without gradient, as in decoding, 512 forward and backward."""
    norm = LlamaRMSNorm(576).bfloat16().requires_grad_(False)
    x = torch.randn(rows, 576, dtype=torch.bfloat16, requires_grad=rows > 1)
    dy = torch.randn(rows, 576, dtype=torch.bfloat16)

    def step():
        y = norm(x) if side == "transformers" else rms_norm(x, norm.weight, norm.variance_epsilon)
        return torch.autograd.grad(y, x, dy) if rows > 1 else y

    benchmark(step)

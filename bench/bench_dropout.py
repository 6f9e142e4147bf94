"""dropout against torch's: python -m pytest bench/bench_dropout.py --benchmark-only"""

import pytest
import torch
from torch.nn import functional as F

from peft_engine.ops.dropout import draw_seed, dropout


@pytest.mark.parametrize("side", ["peft-engine", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_forward_and_backward(benchmark, dtype, side):
    """4 x 256 tokens of 768 features, p = 0.1."""
    x = torch.randn(4, 256, 768, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        y = F.dropout(x, 0.1) if side == "torch" else dropout(x, 0.1, draw_seed(0.1, x.device))
        return torch.autograd.grad(y, x, dy)

    benchmark(step)

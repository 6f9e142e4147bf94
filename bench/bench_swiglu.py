"""swiglu against silu(gate) * up in torch: python -m pytest bench/bench_swiglu.py --benchmark-only"""

import pytest
import torch

from peft_engine.ops.swiglu import reference, swiglu


@pytest.mark.parametrize("side", ["peft-engine", "torch"])
@pytest.mark.parametrize("rows", [1, 512])
def test_swiglu(benchmark, rows, side):
    """1536 features in bf16; one row without gradient, as in decoding, 512 forward and backward."""
    inputs = [torch.randn(rows, 1536, dtype=torch.bfloat16, requires_grad=rows > 1) for _ in range(2)]
    dy = torch.randn(rows, 1536, dtype=torch.bfloat16)
    run = reference if side == "torch" else swiglu

    def step():
        y = run(*inputs)
        return torch.autograd.grad(y, inputs, dy) if rows > 1 else y

    benchmark(step)

"""rotary against transformers' own: python -m pytest bench/bench_rotary.py --benchmark-only"""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from peft_engine.ops.rotary import rotary


@pytest.mark.parametrize("side", ["peft-engine", "transformers"])
@pytest.mark.parametrize("batch,tokens", [(1, 1), (4, 128)])
def test_rotary(benchmark, batch, tokens, side):
    """9 query and 3 key heads of 64 in bf16; one token without gradient, 4 x 128 forward and backward."""
    gradient = tokens > 1
    q, k = (torch.randn(batch, tokens, h, 64, dtype=torch.bfloat16).transpose(1, 2) for h in (9, 3))
    q, k = q.requires_grad_(gradient), k.requires_grad_(gradient)
    cos, sin = (torch.randn(1, tokens, 64, dtype=torch.bfloat16) for _ in range(2))
    dout = [torch.randn_like(q), torch.randn_like(k)]
    run = apply_rotary_pos_emb if side == "transformers" else rotary

    def step():
        out = run(q, k, cos, sin)
        return torch.autograd.grad(out, (q, k), dout) if gradient else out

    benchmark(step)

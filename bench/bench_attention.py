"""attention against torch's SDPA: python -m pytest bench/bench_attention.py --benchmark-only

`packed` is a row of 1024 tokens in documents of 32: SDPA gets the dense mask that transformers makes.
"""

import pytest
import torch
from torch.nn import functional as F

from peft_engine.ops.attention import attention, intervals_from_mask


@pytest.mark.parametrize("side", ["peft-engine", "sdpa"])
@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_attention_forward_and_backward(benchmark, kind, side):
    """9 query and 3 key heads of 64 in bf16."""
    batch, tokens = (4, 128) if kind == "causal" else (1, 1024)
    q, k, v = (
        torch.randn(batch, tokens, h, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for h in (9, 3, 3)
    )
    dout = torch.randn_like(q)
    document = torch.arange(tokens) // 32
    mask = (document[:, None] == document)[None, None].tril() if kind == "packed" else None
    intervals = None if mask is None else intervals_from_mask(mask)

    def step():
        if side == "sdpa":
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        else:
            out = attention(q, k, v, intervals=intervals)
        return torch.autograd.grad(out, (q, k, v), dout)

    benchmark(step)

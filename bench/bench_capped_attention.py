"""Attention with capped scores, as a layer of Gemma 2 (2B) has it: suite `capped_attention`.

    python -m bench.runner capped_attention

8 query and 4 key heads of 256, causal, a softcap of 50; forward and backward, and what a step asks of torch's
allocator beside its results. The peer is the attention that transformers runs for such models, since SDPA has
no cap.
"""

import math
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace

import torch
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from bench import measure
from bench.bench_prefix_attention import extra_bytes, training_step
from peft_engine.ops import prefix_attention

HEADS, KEY_HEADS, HEAD_DIM, SOFTCAP = 8, 4, 256, 50.0
OURS, EAGER = "peft-engine", "transformers, eager"


def ours(q, k, v) -> torch.Tensor:
    none = k.detach()[:1, :, :0]
    return prefix_attention(q, k, v, none, none, is_causal=True, softcap=SOFTCAP)


def eager(q, k, v) -> torch.Tensor:
    layer = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, head_dim=HEAD_DIM, training=True)
    lowest, queries = torch.finfo(q.dtype).min, q.shape[2]
    mask = torch.full((queries, queries), lowest, dtype=q.dtype).triu(1)[None, None]
    how = {"scaling": 1 / math.sqrt(HEAD_DIM), "softcap": SOFTCAP}
    return eager_attention_forward(layer, q, k, v, mask, **how)[0].transpose(1, 2)


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    sizes = (HEADS, KEY_HEADS, KEY_HEADS)
    rows = (torch.randn(1, tokens, heads, HEAD_DIM, dtype=dtype) for heads in sizes)
    return tuple(row.transpose(1, 2).requires_grad_() for row in rows)


def capped_attention(settings: measure.Settings) -> Iterator[measure.Row]:
    """One row of 512 tokens in both dtypes, and one of 2048 in float32."""
    lengths = (16,) if settings.quick else (512, 2048)
    for dtype, tokens in product((torch.float32, torch.bfloat16), lengths):
        if dtype == torch.bfloat16 and tokens == 2048:
            continue  # half a minute a step where torch has no products of bfloat16
        tensors, contenders = inputs(tokens, dtype), {OURS: ours, EAGER: eager}
        case = f"{str(dtype).removeprefix('torch.')}, {tokens} tokens"
        calls = {name: (lambda f=f, t=tensors: training_step(f, t)) for name, f in contenders.items()}
        for name, seconds in measure.interleave(calls, min(settings.rounds, 7)).items():
            yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))
        for name, function in contenders.items():
            extra = extra_bytes(function, tensors) / 1e6
            yield measure.row(case, name, "memory beside the results", "MB", [extra])

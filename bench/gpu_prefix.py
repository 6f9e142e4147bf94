"""The GPU suite's prefix attention in training: ours beside torch over [prefix; keys].

PEFT joins prefix and keys anew in every layer, as torch does here. Scores with a softcap, as Gemma 2 has
them, are beside the attention that transformers runs for it. Decoding is in gpu_decode.py.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from bench import peers
from bench.gpu_sections import Sizes, off, peak_bytes
from bench.gpu_timing import Call, Section, flat
from peft_engine import ops

OURS = peers.OURS
TORCH = "torch, cat + SDPA"
EAGER, SOFTCAP = "transformers, eager", 50.0
Tensors = list[torch.Tensor]  # q, k, v, prefix_k, prefix_v


def prefix_attention(section: Section, sizes: Sizes) -> None:
    """Forward and backward of a causal batch; bf16, grouped heads."""
    for batch, tokens, prefix in sizes.prefix_training:
        functions = {OURS: partial(ops.prefix_attention, is_causal=True), TORCH: by_torch}
        training(section, sizes.prefix_heads, batch, tokens, prefix, functions)
    for batch, tokens, prefix in sizes.capped_training:
        functions = {OURS: partial(ops.prefix_attention, is_causal=True, softcap=SOFTCAP), EAGER: by_eager}
        training(section, sizes.capped_heads, batch, tokens, prefix, functions)


def tensors(section: Section, heads, batch: int, queries: int, keys: int, prefix: int) -> Tensors:
    """As linears leave them, (B, H, T, D) views of (B, T, H, D); the prefix one copy."""
    query_heads, kv_heads, head_dim = heads
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=section.device)
    q = bf16(batch, queries, query_heads, head_dim).transpose(1, 2)
    k, v = (bf16(batch, keys, kv_heads, head_dim).transpose(1, 2) for _ in range(2))
    return [q, k, v, *(bf16(kv_heads, prefix, head_dim) for _ in range(2))]


def joined(prefix: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.cat((prefix.expand(t.shape[0], -1, -1, -1), t), 2)


def by_torch(q, k, v, prefix_k, prefix_v) -> torch.Tensor:
    """Causal over the real keys, all of the prefix: a triangle that ends in the lower right corner."""
    k, v = joined(prefix_k, k), joined(prefix_v, v)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), enable_gqa=True
    )


def by_eager(q, k, v, prefix_k, prefix_v) -> torch.Tensor:
    """The same with capped scores. (The mask a model makes once for all its layers.)"""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    layer = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], head_dim=q.shape[3], training=True)
    size, lowest = q.shape[2], torch.finfo(q.dtype).min
    mask = torch.full((size, size), lowest, dtype=q.dtype, device=q.device).triu(1)
    mask = F.pad(mask, (prefix_k.shape[-2], 0))[None, None]
    k, v = joined(prefix_k, k), joined(prefix_v, v)
    how = {"scaling": q.shape[3] ** -0.5, "softcap": SOFTCAP}
    return eager_attention_forward(layer, q, k, v, mask, **how)[0].transpose(1, 2)


def training(
    section: Section, heads, batch: int, tokens: int, prefix: int, functions: dict[str, Callable]
) -> None:
    *_, plain = functions.values()
    capped = ", capped" if plain is by_eager else ""
    if not section.begin(f"training, {batch}x{tokens} tokens, prefix {prefix}, heads {heads}{capped}"):
        return
    given = [t.requires_grad_() for t in tensors(section, heads, batch, tokens, tokens, prefix)]
    dout = torch.randn_like(given[0])

    def step(function, given: Tensors = given, dout: torch.Tensor = dout) -> Tensors:
        out = function(*given)
        return [out.detach(), *torch.autograd.grad(out, given, dout)]

    exact = step(plain, [t.detach().float().requires_grad_() for t in given], dout.float())
    makers = {name: (lambda f=f: partial(step, f)) for name, f in functions.items()}

    def check(name: str, call: Call) -> None:
        for got, right in zip(call(), exact, strict=True):
            off(got, right)

    calls = section.make(makers, check)
    for name, call in calls.items():
        if section.device.type == "cuda":
            section.add(name, "peak over inputs", "MiB", [peak_bytes(call, section.device) / 2**20])
    for name, rounds in section.interleave(calls, turn_seconds=0.05).items():
        section.add(name, "forward and backward", "us", (s * 1e6 for s in flat(rounds)))

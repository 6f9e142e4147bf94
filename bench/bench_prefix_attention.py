"""prefix_attention against torch.cat and SDPA: suite `prefix_attention`, and cases.

    python -m bench.runner prefix_attention
    python -m pytest bench/bench_prefix_attention.py --benchmark-group-by=group

9 query and 3 key heads of 64. Training: causal, 256 tokens, all five gradients. SDPA takes concatenated keys
with a boolean mask, as PEFT's models give it, or, to have no mask, as many zero queries in front as the
prefix is long. Decoding: one query against a cache; SDPA has its keys concatenated once, beforehand, and with
`cat` at each step.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure
from peft_engine.ops import prefix_attention

QUERY_HEADS, HEADS, HEAD_DIM = 9, 3, 64
OURS, MASKED, PADDED = "peft-engine", "cat + SDPA, mask", "cat + SDPA, zero queries"
Tensors = tuple[torch.Tensor, ...]


def inputs(batch: int, queries: int, keys: int, prefix: int, dtype: torch.dtype) -> Tensors:
    """q, k, v, prefix_k, prefix_v; the first three as a linear leaves them."""
    torch.manual_seed(0)
    sizes = ((QUERY_HEADS, queries), (HEADS, keys), (HEADS, keys))
    q, k, v = (
        torch.randn(batch, n, heads, HEAD_DIM, dtype=dtype).transpose(1, 2).requires_grad_()
        for heads, n in sizes
    )
    prefix_k, prefix_v = (torch.randn(HEADS, prefix, HEAD_DIM, dtype=dtype, requires_grad=True) for _ in "kv")
    return q, k, v, prefix_k, prefix_v


def concatenated(k: torch.Tensor, v: torch.Tensor, prefix_k: torch.Tensor, prefix_v: torch.Tensor) -> Tensors:
    rows = (k.shape[0], -1, -1, -1)
    return torch.cat((prefix_k.expand(rows), k), 2), torch.cat((prefix_v.expand(rows), v), 2)


def masked(q, k, v, prefix_k, prefix_v) -> torch.Tensor:
    queries, prefix = q.shape[2], prefix_k.shape[1]
    seen = torch.ones(queries, prefix + queries, dtype=torch.bool).tril(prefix)
    k, v = concatenated(k, v, prefix_k, prefix_v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


def padded(q, k, v, prefix_k, prefix_v) -> torch.Tensor:
    prefix = prefix_k.shape[1]
    k, v = concatenated(k, v, prefix_k, prefix_v)
    q = F.pad(q, (0, 0, prefix, 0))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, prefix:]


def ours(q, k, v, prefix_k, prefix_v) -> torch.Tensor:
    return prefix_attention(q, k, v, prefix_k, prefix_v, is_causal=True)


TRAINING: dict[str, Callable[..., torch.Tensor]] = {OURS: ours, MASKED: masked, PADDED: padded}


def training_step(function: Callable[..., torch.Tensor], tensors: Tensors) -> Tensors:
    out = function(*tensors)
    return torch.autograd.grad(out, tensors, torch.ones_like(out))


def decoders(tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """One token of each row: no mask, the keys are all before it."""
    q, k, v, prefix_k, prefix_v = (t.detach() for t in tensors)
    whole = concatenated(k, v, prefix_k, prefix_v)

    def sdpa(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return {
        OURS: lambda: prefix_attention(q, k, v, prefix_k, prefix_v),
        "SDPA, keys concatenated before": lambda: sdpa(*whole),
        "cat + SDPA": lambda: sdpa(*concatenated(k, v, prefix_k, prefix_v)),
    }


def extra_bytes(function: Callable[..., torch.Tensor], tensors: Tensors) -> int:
    """What a training step asks of torch's allocator in all, less its results: output and gradients."""
    with torch.profiler.profile(profile_memory=True) as profile:
        out = function(*tensors)
        grads = torch.autograd.grad(out, tensors, out.detach())
    results = sum(t.numel() * t.element_size() for t in (out, *grads))
    asked = (event.self_cpu_memory_usage for event in profile.events())
    return sum(bytes_ for bytes_ in asked if bytes_ > 0) - results


def suite(settings: measure.Settings) -> Iterator[measure.Row]:
    """Training steps, decoding steps, and the memory of a training step as the batch grows."""
    batch, tokens, cache = (2, 16, 32) if settings.quick else (8, 256, 1000)
    prefixes = (4,) if settings.quick else (32, 128)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for prefix in prefixes:
            tensors = inputs(batch, tokens, tokens, prefix, dtype)
            calls = {n: (lambda f=f, t=tensors: training_step(f, t)) for n, f in TRAINING.items()}
            for contender, seconds in measure.interleave(calls, settings.rounds).items():
                case = f"{name}, {batch} x {tokens} tokens, prefix {prefix}"
                yield measure.row(case, contender, "forward and backward", "ms", (s * 1e3 for s in seconds))
        for rows in (1, batch):
            steps = decoders(inputs(rows, 1, cache, prefixes[-1], dtype))
            with torch.no_grad():
                for contender, seconds in measure.interleave(steps, settings.rounds).items():
                    case = f"{name}, {rows} x 1 token, cache {cache}, prefix {prefixes[-1]}"
                    yield measure.row(case, contender, "one token", "us", (s * 1e6 for s in seconds))
    for rows in (1, 2) if settings.quick else (1, 8, 32):
        tensors = inputs(rows, tokens, tokens, prefixes[-1], torch.float32)
        for contender, function in TRAINING.items():
            extra = extra_bytes(function, tensors) / 1e6
            case = f"float32, {rows} x {tokens} tokens, prefix {prefixes[-1]}"
            yield measure.row(case, contender, "memory beside the results", "MB", [extra])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [32, 128])
@pytest.mark.parametrize("side", list(TRAINING))
def test_training_step(benchmark, side, prefix, dtype):
    benchmark.group = f"{dtype}, prefix {prefix}"
    tensors = inputs(8, 256, 256, prefix, dtype)
    benchmark.pedantic(lambda: training_step(TRAINING[side], tensors), rounds=5, warmup_rounds=1)

"""Calls of pe_prefix_attention_decode, checked by the accuracy rule; its counters, and what it does twice."""

import ctypes
import functools

import cuda_on_cpu
import torch
from accuracy import assert_twice_as_good
from cuda_cases import TYPE_CODES, blank, same_bits
from torch.nn import functional as F

from peft_engine.ops.attention import Intervals, mask_from_intervals
from peft_engine.ops.prefix_attention import reference

COUNTERS = 16384  # kMaxTargets in prefix_attention_call.cuh


@functools.cache
def kernels() -> cuda_on_cpu.Library:
    """Of csrc/cuda only this op."""
    sources = [path for path in cuda_on_cpu.sources() if path.stem == "prefix_attention"]
    return cuda_on_cpu.Library(cuda_on_cpu.build(sources, "library", level="-O1"))


def workspace(*sizes: int, multiprocessors: int = 132) -> torch.Tensor:
    """Scratch of the size that is asked for: counters, and NaN."""
    with cuda_on_cpu.settings(multiprocessors=multiprocessors):
        ask = kernels().dll.pe_prefix_attention_workspace
        ask.restype = ctypes.c_int64
        size = ask(*sizes, 0)
    assert size % 4 == 0 and size >= 0, size
    scratch = blank(size // 4)
    scratch[:COUNTERS] = 0
    return scratch


def strides_of(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([t.stride()[:3] for t in tensors], dtype=torch.int64)


def apart(t: torch.Tensor, gap: int) -> torch.Tensor:
    """The same values, with `gap` numbers that are none after each row."""
    if gap == 0:
        return t
    wide = blank(*t.shape[:3], t.shape[3] + gap, dtype=t.dtype)
    wide[..., : t.shape[3]] = t
    return wide[..., : t.shape[3]]


def padded(batch: int, queries: int, keys: int) -> Intervals:
    """Padding on the left, another in each row of the batch, and a row that sees nothing of the keys."""
    at = torch.arange(keys - queries, keys) + 1
    first = (torch.arange(batch) * 37 % max(1, keys)).int()[:, None].expand(batch, queries)
    last = at.int().expand(batch, queries).clone()
    last[-1] = first[-1] if batch > 1 else last[-1]
    return Intervals(first.contiguous(), last.contiguous())


def windows(batch: int, queries: int, keys: int, width: int) -> Intervals:
    """The last `width` keys up to each query's place."""
    last = (torch.arange(keys - queries, keys) + 1).int().expand(batch, queries).contiguous()
    return Intervals((last - width).clamp(min=0), last)


def check(
    target, batch, kv_heads, group, queries, keys, prefix, head_dim, dtype, *, shared=True, wide=False,
    causal=False, intervals=None, gap=0, magnitude=1.0, scale=None, times=1, multiprocessors=132, **settings,
) -> torch.Tensor:  # fmt: skip
    """out of one call, or of `times`; lse as well."""
    scale = head_dim**-0.5 if scale is None else scale
    heads = kv_heads * group
    q = torch.randn(batch, queries, heads, head_dim).to(dtype).transpose(1, 2)
    k, v = ((torch.randn(batch, kv_heads, keys, head_dim) * magnitude).to(dtype) for _ in range(2))
    groups = 1 if shared else batch
    pk, pv = (
        (torch.randn(groups, kv_heads, prefix, head_dim) * magnitude).to(torch.float32 if wide else dtype)
        for _ in range(2)
    )
    q, k, v, pk, pv = (apart(t, gap) for t in (q, k, v, pk, pv))
    out = blank(batch, queries, heads, head_dim, dtype=dtype).transpose(1, 2)
    lse = blank(batch, heads, queries)
    sizes = batch, kv_heads, group, queries, keys, prefix, head_dim, int(shared)
    scratch = workspace(*sizes, multiprocessors=multiprocessors)
    strides = strides_of(q, k, v, pk, pv, out)
    if shared:
        strides[3:5, 0] = 0
    first, last = (None, None) if intervals is None else intervals
    call = (
        "pe_prefix_attention_decode", q, k, v, pk, pv, strides, *sizes, first, last, int(causal),
        float(scale), TYPE_CODES[dtype], TYPE_CODES[pk.dtype], out, lse, scratch, 0, 0,
    )  # fmt: skip
    what = (sizes, dtype, wide, causal, intervals is not None, gap, magnitude, settings)
    before = None
    for _ in range(times):
        out.fill_(float("nan"))
        target.run(call, multiprocessors=multiprocessors, **settings)
        assert not scratch[:COUNTERS].any(), f"the counters are not as they were found: {what}"
        assert before is None or same_bits(out, before), f"another result the second time: {what}"
        before = out.clone()
    tensors = q, k, v, pk.to(dtype), pv.to(dtype)
    double = [t.double() for t in tensors]
    rest = first, last, None, causal, scale
    assert_twice_as_good(out, reference(*tensors, *rest), reference(*double, *rest), what=f"out of {what}")
    exact, plain = (lse_of(*t[:2], t[3], *rest) for t in (double, tensors))
    empty = exact == float("-inf")
    assert torch.equal(lse == float("-inf"), empty), f"empty rows of {what}"
    rows = (t.masked_fill(empty, 0.0) for t in (lse, plain.float(), exact))
    assert_twice_as_good(*rows, what=f"lse of {what}")
    return out


def lse_of(q, k, pk, first, last, bias, causal, scale) -> torch.Tensor:
    """lse, in q's dtype up to the scores as the reference has them."""
    prefix, keys = pk.shape[2], k.shape[2]
    k = torch.cat((pk.expand(q.shape[0], -1, -1, -1), k), 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.transpose(-1, -2) * scale
    if first is not None or causal:
        seen = mask_from_intervals(q, keys, None if first is None else Intervals(first, last))
        scores = scores.masked_fill(~F.pad(seen, (prefix, 0), value=True), float("-inf"))
    return scores.to(torch.float64 if q.dtype == torch.float64 else torch.float32).logsumexp(-1)

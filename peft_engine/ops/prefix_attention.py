"""Attention over learned keys and values in front of the real ones (Li and Liang 2021, arXiv 2101.00190).

    S = cap(scale q [P_k ; K]^T) + [0 ; bias]      -inf where a query does not see a key
    P = softmax(S) = exp(S - lse)             lse = log sum exp S             out = P [P_v ; V]
    d[P_v ; V] = P^T dout      dP = dout [P_v ; V]^T      dS = P (dP - sum(dout out))
    dq = scale dS [P_k ; K]    d[P_k ; K] = scale dS^T q  where a prefix is shared, summed over the batch

With a softcap c, as Gemma 2 has it, cap(x) = c tanh(x / c), and dS then counts times 1 - (cap(x) / c)^2;
without, cap(x) = x.
With dropout, m = keep / (1 - p), and out = (m P) [P_v ; V], d[P_v ; V] = (m P)^T dout, dP = m (dout [P_v ;
V]^T); lse is that of all. keep is the hash of peft_engine/ops/dropout.py, of the row (b Hq + h) T + t and the
column in [P_k ; K]: the backward makes it again.
q (B, Hq, T, D), K and V (B, Hkv, S, D), P_k and P_v (Hkv, P, D). Every query sees the whole prefix; of the
real keys it sees one interval (causal, packed documents, padding, a sliding window), less what bias makes
-inf. The prefix is read from its one copy: nothing is concatenated, nothing expanded. Saved for the backward:
q, k, v and the prefix; on a GPU also out and lse (B, Hq, T).
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.kernels import scratch
from peft_engine.ops.attention import (
    Intervals,
    by_token,
    check_causal,
    check_heads,
    check_mask,
    dense,
    drop,
    fit_intervals,
    in_autocast,
    intervals_from_mask,
    mask_from_intervals,
)
from peft_engine.ops.dropout import check_dropout
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class PrefixAttentionCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    head_dim: int
    biased: bool = False
    bias_learns: bool = False
    learns: bool = False
    dropout: bool = False
    softcap: bool = False


PREFIX_ATTENTION = dispatch.Op("prefix_attention")


def prefix_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    attn_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    window: int | None = None,
    intervals: Intervals | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax over [prefix_k ; k], times [prefix_v ; v]; (B, Hq, T, D), a view of (B, T, Hq, D).

    q (B, Hq, T, D), k and v (B, Hkv, S, D) of one dtype, any strides, Hq a multiple of Hkv; prefix_k and
    prefix_v (Hkv, P, D), shared by the batch, or (B, Hkv, P, D), of q's dtype or float32 (rounded to q's when
    read); scale 1/sqrt(D) when None. Every query sees the whole prefix, and of the S real keys

    - all, unless one of the following is given; they narrow each other, but `intervals` goes with attn_mask
      alone;
    - is_causal: those up to its own place, the last query at the last key (T <= S);
    - window: the last `window` of those, itself included (so it is causal);
    - cu_seqlens, int32 (n + 1,), for B = 1 and T = S: those of its own document, of tokens cu_seqlens[i] to
      cu_seqlens[i + 1];
    - attn_mask (B or 1, Hq or 1, T or 1, S): bool, True where it may look, or added to the scaled scores;
    - intervals: a mask already worked out (`ops.attention.intervals_from_mask`), first <= key < last.

    position_bias (B or 1, Hq or 1, T or 1, S), as T5's, is added to the scaled scores. Both, where they are
    added, are of q's dtype or float32. A query that sees nothing at all gives zeros.
    softcap, a number above 0: scaled scores, the prefix's too, become softcap * tanh(scores / softcap) before
    anything is added to them.
    dropout_p of what the softmax gives is dropped; seed is then an int64 tensor of one element (draw it with
    torch.randint, so that checkpointing draws it again).
    Gradients: q, k, v, prefix_k, prefix_v, in the dtype of each; a shared prefix's is summed over the batch
    in float32. That of position_bias is given by the reference alone. Under autocast q, k and v are taken in
    its dtype, as torch's attention takes them.
    Raises ValueError or TypeError that says which argument does not fit.
    """
    q, k, v = in_autocast(q, k, v)
    if prefix_k.dtype != prefix_v.dtype:
        prefix_k, prefix_v = in_autocast(prefix_k, prefix_v)
    _check(q, k, v, prefix_k, prefix_v)
    check_dropout("prefix_attention", "q", q, dropout_p, seed)
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"prefix_attention: softcap must be a number above 0, or None, got {softcap}")
    keys = k.shape[2]
    intervals, is_causal = _structure(q, keys, is_causal, cu_seqlens, window, intervals)
    intervals, bias = _masks(q, keys, is_causal, attn_mask, position_bias, intervals)
    if intervals is not None:
        is_causal = False
    if prefix_k.dim() == 3:
        prefix_k, prefix_v = prefix_k[None], prefix_v[None]
    tensors = (q, k, v, prefix_k, prefix_v)
    grad = torch.is_grad_enabled()
    call = PrefixAttentionCall(
        q.device.type,
        q.dtype,
        q.shape[3],
        bias is not None,
        grad and bias is not None and bias.requires_grad,
        grad and any(t.requires_grad for t in tensors),
        dropout_p > 0.0,
        softcap is not None,
    )
    first, last = (None, None) if intervals is None else intervals
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    arguments = *tensors, first, last, bias, is_causal, scale, float(dropout_p), seed, float(softcap or 0.0)
    return PREFIX_ATTENTION.choose(call, *tensors, bias).run(*arguments)


# --- the door -----------------------------------------------------------------------------------------------


def _check(q, k, v, prefix_k, prefix_v) -> None:
    check_heads("prefix_attention", q, k, v)
    if q.dtype not in (*DTYPES, torch.float64) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "prefix_attention: q, k, v must have one dtype of float32, bfloat16, float16, float64, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}; cast them to q's"
        )
    if q.shape[3] == 0:
        raise ValueError("prefix_attention: head_dim must be at least 1, got 0")
    b, heads, _, d = k.shape
    length = prefix_k.shape[-2] if prefix_k.dim() > 1 else 0
    wanted = ((heads, length, d), (b, heads, length, d), (1, heads, length, d))
    if tuple(prefix_k.shape) not in wanted or prefix_k.shape != prefix_v.shape:
        raise ValueError(
            f"prefix_attention: prefix_k and prefix_v must both be (kv_heads, prefix, head_dim)=({heads}, P, "
            f"{d}), or one for each row of the batch, ({b}, {heads}, P, {d}), got {tuple(prefix_k.shape)} "
            f"and {tuple(prefix_v.shape)}; was this prefix trained for another model?"
        )
    if prefix_k.dtype != prefix_v.dtype or prefix_k.dtype not in (torch.float32, q.dtype):
        raise TypeError(
            f"prefix_attention: prefix_k and prefix_v must both be float32 or both {q.dtype} as q, got "
            f"{prefix_k.dtype} and {prefix_v.dtype}; cast them"
        )
    _check_devices(q, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)


def _check_devices(q, **others: torch.Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != q.device:
            raise ValueError(
                f"prefix_attention: q is on {q.device} and {name} on {t.device}; move one of them"
            )


def _structure(q, keys: int, is_causal, cu_seqlens, window, intervals) -> tuple[Intervals | None, bool]:
    """The masks but attn_mask and position_bias: as intervals, or, without any, whether it is causal."""
    if intervals is not None:
        if is_causal or cu_seqlens is not None or window is not None:
            raise ValueError(
                "prefix_attention: intervals already say what each query sees; give them without is_causal, "
                "cu_seqlens and window"
            )
        intervals = fit_intervals("prefix_attention", intervals, q)
        _check_devices(q, **{"intervals.first": intervals.first, "intervals.last": intervals.last})
        return intervals, False
    if is_causal or window is not None:
        check_causal("prefix_attention", q, keys)
    if window is None and cu_seqlens is None:
        return None, bool(is_causal)
    batch, queries = q.shape[0], q.shape[2]
    at = torch.arange(keys - queries, keys, device=q.device)
    first, last = torch.zeros_like(at), torch.full_like(at, keys)
    if cu_seqlens is not None:
        first, last = _documents(q, keys, at, cu_seqlens)
    if window is not None:
        if window < 1:
            raise ValueError(
                "prefix_attention: window is the number of keys that a query sees, itself included, and must "
                f"be at least 1, got {window}; None means no window"
            )
        first = torch.maximum(first, at + 1 - window)
    if is_causal or window is not None:
        last = torch.minimum(last, at + 1)
    ends = (t.int().expand(batch, queries).contiguous() for t in (first, last))
    return Intervals(*ends), False


def _documents(q, keys: int, at, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
    """The first key of each token's document, and the one behind its last."""
    if q.shape[0] != 1 or q.shape[2] != keys:
        raise ValueError(
            "prefix_attention: packed documents need a batch of 1 and as many keys as queries, got a batch "
            f"of {q.shape[0]}, {q.shape[2]} queries and {keys} keys; give attn_mask"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.numel() < 2:
        raise ValueError(
            "prefix_attention: cu_seqlens must be int32 (documents + 1,), [0, ..., tokens], got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    _check_devices(q, cu_seqlens=cu_seqlens)
    # On a GPU the values are not read: that would wait for it.
    if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != keys or any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"prefix_attention: cu_seqlens must rise from 0 to the number of tokens, {keys}, got "
                f"{ends if len(ends) < 9 else [*ends[:4], '...', *ends[-4:]]}"
            )
    document = torch.searchsorted(cu_seqlens, at.int(), right=True).clamp(max=cu_seqlens.numel() - 1)
    return cu_seqlens[document - 1].to(at.dtype), cu_seqlens[document].to(at.dtype)


def _masks(q, keys: int, is_causal: bool, attn_mask, position_bias, intervals):
    """Intervals and what is added to the scores, each or both None."""
    for name, t in (("attn_mask", attn_mask), ("position_bias", position_bias)):
        check_mask("prefix_attention", name, t, q, keys)
    _check_devices(q, attn_mask=attn_mask, position_bias=position_bias)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        if intervals is not None or is_causal:
            attn_mask = attn_mask & mask_from_intervals(q, keys, intervals)
        found = intervals_from_mask(attn_mask)
        if found is not None:
            intervals = fit_intervals("prefix_attention", found, q)
            attn_mask = None
        else:
            nothing = torch.zeros((), dtype=q.dtype, device=q.device)
            attn_mask = torch.where(attn_mask, nothing, -torch.inf)
    parts = [t for t in (attn_mask, position_bias) if t is not None]
    if not parts:
        return intervals, None
    bias = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    # A stride of 0 where it is the same for all: no copy.
    return intervals, dense(bias).expand(q.shape[0], q.shape[1], q.shape[2], keys)


# --- reference ----------------------------------------------------------------------------------------------


def reference(
    q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p=0.0, seed=None, softcap=0.0
) -> torch.Tensor:
    """prefix_attention in plain torch: keys concatenated, the softmax in float32 (float64 stays)."""
    keys, prefix, repeats = k.shape[2], prefix_k.shape[2], q.shape[1] // k.shape[1]
    rows = (q.shape[0], -1, -1, -1)
    k, v = (
        torch.cat((p.to(q.dtype).expand(rows), t), 2).repeat_interleave(repeats, 1)
        for p, t in ((prefix_k, k), (prefix_v, v))
    )
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + F.pad(bias, (prefix, 0))
    if first is not None or causal:
        seen = mask_from_intervals(q, keys, None if first is None else Intervals(first, last))
        scores = scores.masked_fill(~F.pad(seen, (prefix, 0), value=True), float("-inf"))
    # A row that sees nothing is all -inf: zeros in its place, and no gradient.
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    p = scores.masked_fill(empty, 0.0).softmax(-1, dtype=wide).masked_fill(empty, 0.0).to(q.dtype)
    if dropout_p > 0.0:
        p = drop(p, dropout_p, seed)
    return (p @ v).transpose(1, 2).contiguous().transpose(1, 2)


# --- backends -----------------------------------------------------------------------------------------------

# The prefix is (G, Hkv, P, D), G 1 or B. first and last are int32 (B, T), contiguous, both or neither;
# without them the real keys are all seen, or with `causal` those up to the query's place. bias is
# (B, Hq, T, S), its strides often 0. lse (B, Hq, T) is float32, -inf where a query sees nothing. softcap 0
# is none.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v"
_MASKS = (
    "Tensor? first, Tensor? last, Tensor? bias, bool causal, float scale, float dropout_p, Tensor? seed,"
    " float softcap"
)
native.library.define(f"prefix_attention_forward({_INPUTS}, {_MASKS}) -> (Tensor, Tensor)")
native.library.define(
    f"prefix_attention_backward(Tensor dout, {_INPUTS}, Tensor? out, Tensor? lse, {_MASKS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("peft_engine::prefix_attention_forward")
def _(q, k, v, prefix_k, prefix_v, *how):
    return by_token(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("peft_engine::prefix_attention_backward")
def _(dout, q, k, v, prefix_k, prefix_v, *rest):
    shares = (prefix_k.new_empty(prefix_k.shape), prefix_v.new_empty(prefix_v.shape))
    return by_token(q), by_token(k), by_token(v), *shares


# Triton is imported when the first tensor on a GPU asks for it.
def _forward_on_gpu(q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p, seed, softcap):
    from peft_engine.kernels.prefix_attention import decode

    # By the number of queries, inside the op, so that no trace depends on it.
    if not dropout_p and decode.refuse(q, k, bias, softcap) is None:
        return decode.forward(q, k, v, prefix_k, prefix_v, first, last, causal, scale)
    from peft_engine.kernels.prefix_attention.forward import forward

    return forward(q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p, seed, softcap)


@torch.library.impl(native.library, "prefix_attention_forward", "CUDA")
def _(*arguments):
    with scratch.fresh():
        return _forward_on_gpu(*arguments)


@torch.library.impl(native.library, "prefix_attention_backward", "CUDA")
def _backward_on_gpu(*arguments):
    from peft_engine.kernels.prefix_attention.backward import backward

    return backward(*arguments)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, prefix_k, prefix_v, *how):
        run = _forward_on_gpu if dispatch.direct(q) else torch.ops.peft_engine.prefix_attention_forward
        out, lse = run(q, k, v, prefix_k, prefix_v, *how)
        first, last, bias, causal, scale, dropout_p, seed, softcap = how
        results = (out, lse) if dispatch.on_gpu(q) else (None, None)  # the CPU's backward reads neither
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, *results, first, last, bias, seed)
        ctx.settings = causal, scale, dropout_p, softcap
        return out

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dout):
        run = _backward_on_gpu if dispatch.direct(dout) else torch.ops.peft_engine.prefix_attention_backward
        *saved, seed = ctx.saved_tensors
        *settings, softcap = ctx.settings
        grads = run(dense(dout), *saved, *settings, seed, softcap)
        needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *needed, *(None,) * 8


def kernels(
    q, k, v, prefix_k, prefix_v, first, last, bias, causal, scale, dropout_p=0.0, seed=None, softcap=0.0
) -> torch.Tensor:
    tensors = [dense(t) for t in (q, k, v, prefix_k, prefix_v)]
    arguments = (*tensors, first, last, bias, causal, scale, dropout_p, seed, softcap)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _PrefixAttention.apply(*arguments)
    run = _forward_on_gpu if dispatch.direct(q) else torch.ops.peft_engine.prefix_attention_forward.default
    return run(*arguments)[0]


def refuse(call: PrefixAttentionCall) -> str | None:
    """Why no kernel takes a call, whatever the device."""
    if call.dtype not in DTYPES:
        return f"its kernels compute in float32, which is less than {call.dtype}"
    if call.bias_learns:
        return "the bias asks for a gradient, and the kernels give it none"
    return None


MAX_HEAD_DIM = 256  # what the Triton kernels' tiles hold


def refuse_head_dim(head_dim: int) -> str | None:
    """Why the Triton kernels do not take heads of this width."""
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}, the most its tiles hold"
    return None


def refuse_unless_triton(call: PrefixAttentionCall) -> str | None:
    """Why the Triton kernels do not take a call."""
    return refuse_head_dim(call.head_dim) or refuse(call) or refuse_unless_cuda(call)


def _refuse_unless_decode(call: PrefixAttentionCall) -> str | None:
    why = refuse_unless_triton(call)
    if why is None and call.biased:
        why = "its kernel of few queries adds no bias"
    if why is None and call.dropout:
        why = "its kernel of few queries has no dropout"
    if why is None and call.softcap:
        why = "its kernel of few queries does not cap scores"
    return why or dispatch.available_backends()["triton"]  # which runs what has more queries


def _refuse_unless_cpu(call: PrefixAttentionCall) -> str | None:
    return refuse(call) or refuse_unless_cpu(call)


# "cuda" is "triton" with the CUDA library's kernel of few queries before it.
PREFIX_ATTENTION.register("cuda", kernels, _refuse_unless_decode)
PREFIX_ATTENTION.register("triton", kernels, refuse_unless_triton)
PREFIX_ATTENTION.register("cpu", kernels, _refuse_unless_cpu)
PREFIX_ATTENTION.register("reference", reference)

"""Attention in which each query sees one interval of keys (Dao 2023, arXiv 2307.08691, for the backward).

    S = scale q k^T on first <= key < last, else -inf      P = softmax(S)      out = P v
    dv = P^T dout      dP = dout v^T      dS = P (dP - sum(P dP)) scale      dq = dS k      dk = dS^T q

Intervals are what decoders use: causal, documents packed in a row, left or right padding, sliding windows, a
cache. A query whose interval is empty gives zeros. It is prefix_attention without a prefix, and runs by that
op's kernels. Saved for the backward: q, k, v, on a GPU also out and the log-sum-exp of S; blocks of S are
computed again. S and P are never held as a whole, and keys that no query of a block sees cost nothing.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.ops.dropout import check_dropout, dropout_mask
from peft_engine.ops.nf4 import DTYPES, refuse_unless_cpu, refuse_unless_cuda


class Intervals(NamedTuple):
    """The keys each query sees, first <= key < last: two int32 tensors (B or 1, Tq or 1), contiguous."""

    first: torch.Tensor
    last: torch.Tensor


class AttentionCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    head_dim: int


ATTENTION = dispatch.Op("attention")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    intervals: Intervals | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v over the keys each query sees; (B, Hq, Tq, D), a view of (B, Tq, Hq, D).

    q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D) of one dtype, any strides, Hq a multiple of Hkv; scale 1/sqrt(D)
    when None. intervals None is causal, with the last query at the last key (Tq <= Tk). Gradients: q, k, v.
    dropout_p and seed are those of prefix_attention.
    Under autocast q, k and v are taken in its dtype, as torch's attention takes them.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p == 0.0 and q.dim() == k.dim() == 4:
        ends = (None, None) if intervals is None else fit_intervals("attention", intervals, q)
        how = *ends, None, intervals is None, scale, 0.0, None, 0.0
        op = torch.ops.peft_engine.prefix_attention_forward.default
        found = dispatch.at_once(op, q, k, v, *no_prefix(k), *how, strided=True)
        if found is not None:
            return found[0]
    q, k, v = in_autocast(q, k, v)
    check_heads("attention", q, k, v)
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "attention: q, k, v must have one dtype of float32, bfloat16, float16, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if intervals is None:
        check_causal("attention", q, k.shape[2])
    else:
        intervals = fit_intervals("attention", intervals, q)
    check_dropout("attention", "q", q, dropout_p, seed)
    call = AttentionCall(q.device.type, q.dtype, q.shape[3])
    return ATTENTION.choose(call, q, k, v).run(q, k, v, intervals, scale, float(dropout_p), seed)


def in_autocast(q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in autocast's dtype, where it is on: rotary and norms leave q and k in float32 beside v."""
    kind = q.device.type
    if not dispatch.in_autocast(kind):
        return q, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in (q, *others))


def check_heads(who: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises ValueError unless q, k, v are heads that go together, with grouped query heads."""
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[::3] != k.shape[::3]:
        raise ValueError(
            f"{who}: q must be (batch, heads, queries, head_dim) and k, v both (batch, kv_heads, keys, "
            f"head_dim), got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{who}: query heads must be a multiple of key heads, got {q.shape[1]} and {k.shape[1]}"
        )


def check_causal(who: str, q: torch.Tensor, keys: int) -> None:
    """Raises ValueError where the first queries would lie before the first key."""
    if q.shape[2] > keys:
        raise ValueError(
            f"{who}: causal needs as many keys as queries, got {keys} and {q.shape[2]}; give intervals"
        )


def check_mask(who: str, name: str, t: torch.Tensor | None, q: torch.Tensor, keys: int) -> None:
    """ValueError or TypeError for a mask, or what is added to scores, that does not fit (B, Hq, T, keys)."""
    if t is None:
        return
    b, heads, queries = q.shape[:3]
    sizes = tuple(t.shape)
    if len(sizes) != 4 or sizes[3] != keys or any(
        size not in (1, n) for size, n in zip(sizes, (b, heads, queries), strict=False)
    ):  # fmt: skip
        raise ValueError(
            f"{who}: {name} must be ({b} or 1, {heads} or 1, {queries} or 1, {keys}), the real "
            f"keys without the prefix, got {sizes}"
        )
    kinds = (torch.float32, q.dtype, *((torch.bool,) if name == "attn_mask" else ()))
    if t.dtype not in kinds:
        raise TypeError(
            f"{who}: {name} must be of {', '.join(map(str, dict.fromkeys(kinds)))}, got {t.dtype}; cast it"
        )


def fit_intervals(who: str, intervals: Intervals, q: torch.Tensor) -> Intervals:
    """Both ends as the raw ops read them: one row, or one query, that stands for all is written out.

    Raises ValueError where they are not for q.
    """
    shape = q.shape[0], q.shape[2]
    for name, t in zip(("first", "last"), intervals, strict=True):
        fits = t.shape == shape or (
            t.dim() == 2 and all(a in (1, b) for a, b in zip(t.shape, shape, strict=True))
        )
        if not fits or t.dtype != torch.int32 or not t.is_contiguous():
            raise ValueError(
                f"{who}: intervals.{name} must be int32, contiguous, "
                f"(batch or 1, queries or 1)=({shape[0]}, {shape[1]}), got {t.dtype} {tuple(t.shape)}"
            )
    if intervals.first.shape == intervals.last.shape == shape:
        return intervals
    return Intervals(*(t.expand(shape).contiguous() for t in intervals))


def is_readable(mask: torch.Tensor) -> bool:
    """Whether the host can read values of the mask: not while torch.compile traces or a CUDA graph is
    captured, whose answer would be that of other masks as well, nor on the meta device.
    """
    return not (torch.compiler.is_compiling() or mask.is_meta or dispatch.is_captured(mask))


def intervals_from_mask(mask: torch.Tensor) -> Intervals | None:
    """The intervals a boolean mask (B, 1, Tq, Tk) stands for; None when a row is not one interval, or where
    its values cannot be read: while torch.compile traces or a CUDA graph is captured.
    """
    if not is_readable(mask):
        return None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-1] == 0:
        return None
    if mask.stride(0) == 0 and mask.shape[0] > 1:  # one row that stands for all
        return intervals_from_mask(mask[:1])
    rows = mask[:, 0].to(torch.uint8)
    first = rows.argmax(-1)
    last = first + rows.sum(-1)
    key = torch.arange(rows.shape[-1], device=mask.device)
    if not torch.equal((key >= first[..., None]) & (key < last[..., None]), mask[:, 0]):
        return None
    return Intervals(first.int().contiguous(), last.int().contiguous())


def causal_mask(queries: int, keys: int, device: torch.device | str) -> torch.Tensor:
    """(1, 1, T, S): each query sees the keys from the first up to its own place; with its intervals, kept."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril_()[None, None]
    last = torch.arange(1, queries + 1, dtype=torch.int32, device=device)[None]
    mask._peft_engine_intervals = mask._version, Intervals(torch.zeros_like(last), last)  # type: ignore[attr-defined]
    return mask


def mask_from_intervals(q: torch.Tensor, keys: int, intervals: Intervals | None) -> torch.Tensor:
    """The boolean mask (B or 1, 1, Tq, keys) that intervals stand for; None is causal, as in `attention`."""

    key = torch.arange(keys, device=q.device)
    if intervals is None:
        queries = q.shape[2]
        return (key <= torch.arange(queries, device=q.device)[:, None] + keys - queries)[None, None]
    first, last = (t[:, None, :, None] for t in intervals)
    return (key >= first) & (key < last)


def kept_intervals(mask: torch.Tensor) -> Intervals | None:
    """intervals_from_mask, worked out by the first layer and kept on the mask, which all layers get.

    None where its values cannot be read, and for a mask that is no boolean one.
    """
    if mask.dtype != torch.bool or not is_readable(mask):
        return None
    kept = getattr(mask, "_peft_engine_intervals", None)
    if mask.is_inference():  # counts no versions: a copy tells whether it was changed in place
        if kept is None or not torch.equal(kept[0], mask):
            kept = mask._peft_engine_intervals = mask.clone(), intervals_from_mask(mask)  # type: ignore[attr-defined]
    elif kept is None or kept[0] != mask._version:
        kept = mask._peft_engine_intervals = mask._version, intervals_from_mask(mask)  # type: ignore[attr-defined]
    return kept[1]


def drop(p: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """What dropout leaves of the softmax p (B, Hq, T, columns), whose rows are those of the hash."""
    kept = dropout_mask(seed, p.shape[:-1].numel(), p.shape[-1], dropout_p).view(p.shape)
    return p * kept / (1.0 - dropout_p)


def reference(q, k, v, intervals: Intervals | None, scale: float, dropout_p=0.0, seed=None) -> torch.Tensor:
    """attention in plain torch: the mask in full, the softmax in float32 (float64 stays)."""
    seen = mask_from_intervals(q, k.shape[2], intervals)
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    # A row that sees nothing is all -inf: zeros in its place, and no gradient.
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(empty, 0.0).softmax(-1, dtype=wide).masked_fill(empty, 0.0).to(q.dtype)
    if dropout_p > 0.0:
        p = drop(p, dropout_p, seed)
    return (p @ v).transpose(1, 2).contiguous().transpose(1, 2)


def by_token(t: torch.Tensor) -> torch.Tensor:
    """An empty (B, H, T, D) of t's shape, a view of (B, T, H, D): the layout the next linear reads."""
    b, h, n, d = t.shape
    return t.new_empty(b, n, h, d).transpose(1, 2)


def dense(t: torch.Tensor) -> torch.Tensor:
    """t with a dense last dimension, which is all that the kernels ask of its strides."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _kernels(q, k, v, intervals, scale, dropout_p, seed) -> torch.Tensor:
    """The kernels of prefix_attention, without a prefix; on a GPU torch's flash kernel where all is causal.

    That has no intervals but by a mask in full, which takes torch's slow kernel, and of float32 with grouped
    heads none that does not hold all scores.
    """
    grouped = q.shape[1] != k.shape[1]
    flash = dispatch.on_gpu(q) and (q.dtype != torch.float32 or not grouped)
    if flash and intervals is None and q.shape[2] == k.shape[2] and not dropout_p:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    from peft_engine.ops.prefix_attention import kernels  # which imports this module

    first, last = (None, None) if intervals is None else intervals
    causal = intervals is None
    return kernels(q, k, v, *no_prefix(k), first, last, None, causal, scale, dropout_p, seed)


def no_prefix(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a prefix without tokens, for k (B, Hkv, S, D)."""
    shape = 1, k.shape[1], 0, k.shape[3]
    return k.new_empty(shape), k.new_empty(shape)  # two: torch.compile traces no Function given one twice


def _refuse_unless_triton(call: AttentionCall) -> str | None:
    from peft_engine.ops.prefix_attention import refuse_head_dim

    return refuse_head_dim(call.head_dim) or refuse_unless_cuda(call)


ATTENTION.register("triton", _kernels, _refuse_unless_triton)
ATTENTION.register("cpu", _kernels, refuse_unless_cpu)
ATTENTION.register("reference", reference)

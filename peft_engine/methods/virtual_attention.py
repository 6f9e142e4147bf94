"""Attention behind virtual tokens: what transformers' attention interface calls while an adapter has any.

What stands in front of a layer's keys in the forward that runs lies in the layer's Live, where
virtual_tokens.py puts it. Rows without any run the model's own attention.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.methods import copies
from peft_engine.methods.attention_sites import dropout_of, heads_of
from peft_engine.methods.copies import thread, whose
from peft_engine.ops.attention import Intervals, causal_mask, is_readable, kept_intervals
from peft_engine.ops.dropout import draw_seed
from peft_engine.ops.prefix_attention import PREFIX_ATTENTION, PrefixAttentionCall, prefix_attention

SITE = "peft_engine_site"
NAME = "peft_engine_"  # + the implementation that rows without virtual tokens run
# Arguments with which a layer's attention is not the softmax that the op computes.
SPECIAL = ("s_aux", "cache")
Part = tuple[list[int] | None, torch.Tensor, torch.Tensor]


class Live:
    """What stands in front of one attention layer's keys in the forward that runs; copies start empty."""

    def __init__(self) -> None:
        self.each: dict[int, list[Part]] = {}  # what each thread's last forward left; `last`: the last of all
        self.last: list[Part] = []
        self.waiting = False  # an adapter was made active, and its stack has not run yet
        self.passes: dict[int, Any] = {}  # what the layer leaves of its own keys and values, by thread

    @property
    def parts(self) -> list[Part]:
        """Rows (None: all), keys and values (kv_heads, P, head_dim).

        A thread that left none runs a backward, and goes through a checkpointed layer again.
        """
        return self.each.get(thread(), self.last)

    @parts.setter
    def parts(self, parts: list[Part]) -> None:
        self.each[thread()] = self.last = parts

    def clear(self) -> None:
        """Nothing stands in front any more."""
        self.each, self.last = {}, []

    @property
    def catch(self) -> bool:
        """Whether the layer leaves its own keys and values here, and sees nothing in front of them."""
        return bool(self.passes) and whose(self.passes) in self.passes

    @property
    def caught(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The keys and values that the layer has left in this thread."""
        return self.passes[whose(self.passes)]

    def __deepcopy__(self, memo: dict) -> "Live":
        return Live()

    def __reduce__(self) -> tuple:
        return Live, ()


def stands_before(module: Any) -> bool:
    """Whether something stands in front of an attention layer's keys in this forward, or they are caught."""
    live: Live | None = module.__dict__.get(SITE)
    return live is not None and (live.catch or live.waiting or bool(live.parts))


def attend(base, module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, Any]:
    """Attention of `module` behind its virtual tokens; `base`, called as by the interface, without any."""
    live: Live | None = module.__dict__.get(SITE)
    if live is not None and live.catch:
        if live.caught is not None:
            raise ValueError(
                f"virtual tokens: {type(module).__name__} runs more than once in a forward, with other keys "
                "each time, and a prompt (or a prefix that starts from text) has those of one; take a prefix "
                "that starts at random, or LoRA"
            )
        live.passes[whose(live.passes)] = key, value
        return base(module, query, key, value, attention_mask, **kwargs)
    if live is not None and live.waiting:
        raise RuntimeError(
            f"virtual tokens: {type(module).__name__} runs outside of the stack whose forward puts them in "
            "front, so that they would do nothing; call the model's own forward, or deactivate the adapter"
        )
    if live is None or not live.parts:
        return base(module, query, key, value, attention_mask, **kwargs)
    rows, prefix_k, prefix_v = live.parts[0]
    if rows is None:
        out = with_prefix(base, module, query, key, value, attention_mask, prefix_k, prefix_v, **kwargs)
    else:
        out = _mixed(base, module, query, key, value, attention_mask, live.parts, **kwargs)
    return out, None


def forward_over_sdpa(module, query, key, value, attention_mask, **kwargs):
    """Attention behind virtual tokens, for a model set to sdpa; (B, T, heads, head_dim)."""
    return attend(_base("sdpa", module), module, query, key, value, attention_mask, **kwargs)


def forward_over_eager(module, query, key, value, attention_mask, **kwargs):
    """Attention behind virtual tokens, for a model set to eager."""
    return attend(_base("eager", module), module, query, key, value, attention_mask, **kwargs)


def forward_over_fused(module, query, key, value, attention_mask, **kwargs):
    """Attention behind virtual tokens, for a model whose attention optimize has fused."""
    from peft_engine.methods import fused_attention

    return attend(fused_attention.attend, module, query, key, value, attention_mask, **kwargs)


def forward_over_capped(module, query, key, value, attention_mask, **kwargs):
    """Attention behind virtual tokens, for a model of capped scores whose attention optimize has fused."""
    from peft_engine.methods import fused_attention

    kwargs["is_causal"] = False  # what a mask does not hide is seen, as in fused_attention.attend_capped
    return attend(fused_attention.attend_capped, module, query, key, value, attention_mask, **kwargs)


FORWARDS = {
    "sdpa": forward_over_sdpa,
    "eager": forward_over_eager,
    "fused_sdpa": forward_over_fused,
    "fused_capped": forward_over_capped,
}


def register(own: str) -> str:
    """The name under which transformers knows our attention, for a model set to `own`."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    name = NAME + own
    # Without a mask function of that name, masks would arrive as None, and padding and causality be lost.
    AttentionMaskInterface.register(name, masks(own))
    AttentionInterface.register(name, FORWARDS[own])
    return name


def masks(own: str) -> Any:
    """The function that makes the masks of a model set to `own`."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if own == "fused_capped":
        return whole_mask
    return ALL_MASK_ATTENTION_FUNCTIONS["eager" if own == "eager" else "sdpa"]


def whole_mask(*args, **kwargs) -> torch.Tensor | None:
    """sdpa's boolean mask where eager has one: also of what is causal, which sdpa leaves to the layer to say.

    Some layers say otherwise than their eager mask (Gemma 2 with use_bidirectional_attention, PaliGemma 2).
    """
    from transformers.masking_utils import sdpa_mask

    with dispatch.outside_inference():  # where a change is counted, and no copy tells of it (kept_intervals)
        causal = kwargs.get("allow_is_causal_skip", True) and not kwargs.get("allow_is_bidirectional_skip")
        queries, padding = kwargs.get("q_length", 1), kwargs.get("attention_mask")
        readable = not torch.compiler.is_compiling() and (padding is None or is_readable(padding))
        if causal and queries > 1 and readable and not args:
            mask = sdpa_mask(**kwargs)
            return causal_mask(queries, kwargs["kv_length"], kwargs["device"]) if mask is None else mask
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def set_attention(config: Any, name: str) -> None:
    """Sets the attention of a config."""
    config._attn_implementation = {"": name}  # a plain string goes to the configs inside it too


def _base(own: str, module: Any) -> Any:
    if own == "sdpa":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward
    return eager(module)


def eager(module: Any) -> Any:
    """The attention that an attention layer's own file writes out."""
    kind = next(k for k in type(module).__mro__ if k.__module__.startswith("transformers."))
    return vars(sys.modules[kind.__module__])["eager_attention_forward"]


def is_capped(config: Any) -> bool:
    """Whether the attention layers of a config cap their scores."""
    return getattr(config, "attn_logit_softcapping", None) is not None


def bias_learns(bias: torch.Tensor) -> bool:
    """Whether somebody reads the gradient of a position bias that requires one.

    Nobody reads that of the zeros which T5's layers without a bias make in a checkpoint. The older ones
    (use_reentrant) hand every bias on without its graph: there its values tell, in the forward as when it is
    run again, which must draw the same dropout.
    """
    if not bias.requires_grad or (torch.is_grad_enabled() and not bias.is_leaf):
        return bias.requires_grad
    return not torch.compiler.is_compiling() and bool(bias.any())


def why_by_cat(call: PrefixAttentionCall, kwargs: dict) -> str:
    """Why attention behind virtual tokens runs by concatenation, or nothing."""
    special = [name for name in SPECIAL if kwargs.get(name) is not None]
    if special:
        return f"{special[0]} changes the softmax: prefix and keys are joined, the model's attention runs"
    if (call.dropout or call.softcap) and dispatch.forced() is None:
        choice = PREFIX_ATTENTION.choose(call)
        if choice.backend == "reference":  # which would hold the mask: the model's attention has both itself
            what = "capped scores" if call.softcap else "attention dropout"
            return f"{what}, and {choice.reason}: prefix and keys are joined, the model's attention runs"
    return ""


def with_prefix(
    base, module, query, key, value, mask, prefix_k, prefix_v, *, dropout=0.0, scaling=None, is_causal=None,
    position_bias=None, intervals=None, softcap=None, **kwargs,
):  # fmt: skip
    """Attention of `module` over [prefix ; keys] as (B, T, heads, head_dim)."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and mask is None and query.shape[2] > 1
    if (
        causal and key.shape[2] > query.shape[2]
    ):  # a static cache before its first token: later slots are empty
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    capped = {} if softcap is None else {"softcap": softcap}
    call = PrefixAttentionCall(
        query.device.type, query.dtype, query.shape[3], dropout=dropout > 0.0, softcap=bool(capped)
    )
    if why_by_cat(call, kwargs):
        return _by_cat(
            base, module, query, key, value, mask, prefix_k, prefix_v, causal,
            dropout=dropout, scaling=scaling, position_bias=position_bias, **capped, **kwargs,
        )  # fmt: skip
    if intervals is None and mask is not None:
        intervals = kept_intervals(mask)
    if intervals is not None and intervals.first.shape[0] != query.shape[0]:  # one mask for all rows
        shape = query.shape[0], query.shape[2]
        intervals = Intervals(*(t.expand(shape).contiguous() for t in intervals))
    if position_bias is not None and not bias_learns(position_bias):
        position_bias = position_bias.detach()
    out = prefix_attention(
        query, key, value, prefix_k, prefix_v, is_causal=causal, scale=scaling,
        attn_mask=mask if intervals is None else None, position_bias=position_bias, intervals=intervals,
        dropout_p=dropout, seed=draw_seed(dropout, query.device), softcap=softcap,
    )  # fmt: skip
    return out.transpose(1, 2)


def _by_cat(base, module, query, key, value, mask, prefix_k, prefix_v, causal, *, position_bias, **kwargs):
    batch, _, queries, _ = query.shape
    keys, columns = key.shape[2], prefix_k.shape[1]
    if causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[
            None, None
        ]
    if mask is not None:
        mask = F.pad(mask, (columns, 0), value=mask.dtype == torch.bool)
    if position_bias is not None:
        kwargs["position_bias"] = F.pad(position_bias, (columns, 0))
    key, value = (
        torch.cat([part.to(t.dtype).expand(batch, -1, -1, -1), t], dim=2)
        for part, t in ((prefix_k, key), (prefix_v, value))
    )
    return base(module, query, key, value, mask, is_causal=False, **kwargs)[0]


def _mixed(base, module, query, key, value, mask, parts: Sequence[Part], *, position_bias=None, **kwargs):
    """Each group of rows with its own virtual tokens, the others by the model's attention."""
    rows = query.shape[0]
    named = {row for group, _, _ in parts for row in group or ()}
    rest = [row for row in range(rows) if row not in named]

    def pick(t: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
        return t if t is None or t.shape[0] != rows else t.index_select(0, index)

    kept = None if mask is None else kept_intervals(mask)
    outs: list[torch.Tensor] = []
    groups: list[list[int]] = []
    for group, *prefix in [*parts, *([(rest,)] if rest else [])]:
        index = copies.rows_at(tuple(group), query.device)  # type: ignore[arg-type]
        q, k, v, m, bias = (pick(t, index) for t in (query, key, value, mask, position_bias))
        extra = kwargs if bias is None else {**kwargs, "position_bias": bias}
        if prefix:
            seen = None if kept is None else Intervals(*(pick(t, index) for t in kept))  # type: ignore[arg-type]
            outs.append(with_prefix(base, module, q, k, v, m, *prefix, intervals=seen, **extra))
        else:
            outs.append(base(module, q, k, v, m, **extra)[0])
        groups.append(group)  # type: ignore[arg-type]
    return copies.back_in_order(outs, groups)


# --- what runs ----------------------------------------------------------------------------------------------


def describe(module: Any, device: str, dtype: torch.dtype) -> tuple[str, str] | None:
    """The backend behind whose virtual tokens an attention layer's queries run, and why no faster one.

    None for a layer that has none in front now. The backend is "" where torch's attention runs over the
    joined keys.
    """
    if SITE not in module.__dict__ or not module.config._attn_implementation.startswith(NAME):
        return None
    _, head_dim = heads_of(module)
    dropped, capped = module.training and dropout_of(module) > 0.0, is_capped(module.config)
    call = PrefixAttentionCall(device, dtype, head_dim, dropout=dropped, softcap=capped)
    why = why_by_cat(call, {})
    if why:
        return "", why
    choice = PREFIX_ATTENTION.choose(call)
    return choice.backend, choice.reason

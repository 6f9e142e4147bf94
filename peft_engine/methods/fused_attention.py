"""Attention of layers that no fused class stands for: what `optimize` sets in transformers' interface.

The config of such layers, set to sdpa, names IMPLEMENTATION instead, registered with sdpa's masks; calls that
kernels take on a CPU run ops.prefix_attention without a prefix (causal, bidirectional, padding, windows,
packed rows, T5's bias, attention dropout), all others transformers' sdpa. Virtual tokens go in front of it.
Models that cap their scores (Gemma 2), which sdpa cannot, are set to eager: theirs names CAPPED, whose calls
kernels take on a GPU too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from peft_engine import dispatch
from peft_engine.methods import virtual_attention
from peft_engine.methods.attention_sites import dropout_of, heads_of, names_sdpa, uses_interface
from peft_engine.ops.attention import kept_intervals
from peft_engine.ops.prefix_attention import PREFIX_ATTENTION, PrefixAttentionCall

IMPLEMENTATION = "fused_sdpa"
CAPPED = "fused_capped"
OWN = {IMPLEMENTATION: "sdpa", CAPPED: "eager"}
MARK = "_peft_engine_attention"


class Registered:
    """Stands in an attention layer: whoever reads a pickle of it knows the name that its config has."""

    def __reduce__(self) -> tuple:
        return _registered, ()


def _registered() -> Registered:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, function in ((IMPLEMENTATION, attend), (CAPPED, attend_capped)):
        AttentionMaskInterface.register(name, virtual_attention.masks(name))
        AttentionInterface.register(name, function)
    return Registered()


def put(model: nn.Module, left: Iterable[nn.Module]) -> None:
    """Sets the configs of the model's attention layers; not those of the layers in `left`."""
    others = {id(module.config) for module in left} | refused(model)
    wanted = [(c, _fused(c)) for c in _configs(model) if _fused(c) and id(c) not in others]
    named = {id(config) for config, _ in wanted}
    for module in model.modules():
        if _through(module) and id(module.config) in named:
            module.__dict__[MARK] = _registered()
    for config, name in wanted:
        _rename(config, name)


def take(model: nn.Module) -> None:
    """Undoes `put`."""
    for module in model.modules():
        module.__dict__.pop(MARK, None)
    for config in _configs(model):
        if _own(config) in OWN:
            _rename(config, OWN[_own(config)])


def attend(module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, Any]:
    """Attention without virtual tokens, called as transformers' interface calls its functions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    if _by_torch(module, query, key, value, attention_mask, **kwargs):
        return sdpa(module, query, key, value, attention_mask, **kwargs)
    none = key.detach()[:1, :, :0]
    how = virtual_attention.with_prefix
    return how(sdpa, module, query, key, value, attention_mask, none, none, **kwargs), None


def attend_capped(module, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, Any]:
    """The same of a model that caps its scores; where no kernel takes a call, the model's own attention.

    Without a mask every query sees all keys, as with the model's own, whatever the layer's is_causal says.
    """
    kwargs["is_causal"] = False
    if _by_torch(module, query, key, value, attention_mask, **kwargs):
        return _eager(module, query, key, value, attention_mask, **kwargs)
    none = key.detach()[:1, :, :0]
    how = virtual_attention.with_prefix
    out = how(_eager, module, query, key, value, attention_mask, none, none, **kwargs)
    if attention_mask is not None:
        out = _with_blind(out, module, query, key, value, attention_mask, **kwargs)
    return out, None


def _with_blind(out, module, query, key, value, mask, **kwargs) -> torch.Tensor:
    """out (B, T, heads, D), by the model's own attention where a query, as of padding, sees nothing.

    The lowest number, added to all of its scores, makes them alike: it gives the mean of all values, and what
    follows the padding of a row is trained on it.
    """
    kept = kept_intervals(mask)
    assert kept is not None  # else no kernel has run
    blind = kept.first >= kept.last
    at = blind.any(0).nonzero()[:, 0]
    if not len(at):
        return out
    own, _ = _eager(module, query.index_select(2, at), key, value, mask.index_select(2, at), **kwargs)
    own = torch.where(blind[:, at, None, None], own, out.index_select(1, at))
    return out.index_copy(1, at, own)


def _eager(module, query, key, value, mask, *, is_causal, **kwargs) -> tuple[torch.Tensor, Any]:
    """The attention that the model writes out, which adds its mask, given one of sdpa's."""
    if mask is not None and mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    return virtual_attention.eager(module)(module, query, key, value, mask, **kwargs)


def _by_torch(
    module, query, key, value, mask, *, dropout=0.0, position_bias=None, softcap=None, **kwargs
) -> bool:
    """Whether a call is one that no kernel takes, or that torch's runs as fast (layers._attend)."""
    device = query.device.type
    if device != "cpu" and (softcap is None or device != "cuda"):
        return True
    if torch.compiler.is_compiling():
        return True
    if query.shape[2] == 1 and query.dtype == torch.float32 and softcap is None:
        return True
    if any(kwargs.get(name) is not None for name in virtual_attention.SPECIAL) or key.shape != value.shape:
        return True
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return True  # no kernel holds them
    learns = position_bias is not None and _learns(module, position_bias)
    if mask is not None and (mask.shape[-1] != key.shape[2] or kept_intervals(mask) is None):
        return True
    if learns or dispatch.forced() is not None:
        return learns
    dropped, capped = dropout > 0.0, softcap is not None
    return _choose(device, query.dtype, query.shape[3], dropped, capped).backend == "reference"


def _learns(module: Any, bias: torch.Tensor) -> bool:
    """Whether a position bias is trained; so it is where a checkpoint's first forward records nothing."""
    table = getattr(module, "relative_attention_bias", None)
    own = table is not None and module.training and table.weight.requires_grad
    return own or virtual_attention.bias_learns(bias)


def _choose(device: str, dtype: torch.dtype, head_dim: int, dropout: bool, softcap: bool) -> Any:
    call = PrefixAttentionCall(device, dtype, head_dim, dropout=dropout, softcap=softcap)
    return PREFIX_ATTENTION.choose(call)


# --- which configs ------------------------------------------------------------------------------------------


def refused(model: nn.Module) -> set[int]:
    """Which configs, by id, keep the name that they have, because a module of theirs asks for it."""
    return {id(m.config) for m in model.modules() if hasattr(m, "config") and names_sdpa(type(m))}  # type: ignore[arg-type]


def _configs(model: nn.Module) -> list[Any]:
    """Those of the attention layers that go through the interface, each once."""
    return list({id(m.config): m.config for m in model.modules() if _through(m)}.values())


def _through(module: nn.Module) -> bool:
    return uses_interface(module) and hasattr(module, "config")


def _own(config: Any) -> str:
    return str(config._attn_implementation).removeprefix(virtual_attention.NAME)


def _fused(config: Any) -> str:
    """What the config names once it is fused; "" where nothing stands for its attention."""
    if _own(config) == "eager" and virtual_attention.is_capped(config):
        return CAPPED
    return IMPLEMENTATION if _own(config) == "sdpa" else ""


def _rename(config: Any, own: str) -> None:
    behind = config._attn_implementation.startswith(virtual_attention.NAME)
    virtual_attention.set_attention(config, virtual_attention.register(own) if behind else own)


# --- what runs ----------------------------------------------------------------------------------------------


def describe(module: Any, device: str, dtype: torch.dtype, others: set[int]) -> tuple[str, str] | None:
    """The backend that runs a layer's attention, and why no faster one; "": transformers' own, and "" for the
    reason: because `put` was not called.

    others: what `refused` gives. None for a module that does not go through the interface.
    """
    if not _through(module):
        return None
    own = _own(module.config)
    if device != "cpu" and not virtual_attention.is_capped(module.config):
        return "", "on a GPU torch's own kernels run"
    if _fused(module.config):
        asks = id(module.config) in others
        return "", 'the model does something of its own where attention is named "sdpa"' if asks else ""
    if own not in OWN:
        return "", f"attention is set to {own}; the fused one stands for sdpa"
    dropped = module.training and dropout_of(module) > 0.0
    choice = _choose(device, dtype, heads_of(module)[1], dropped, own == CAPPED)
    return ("" if choice.backend == "reference" else choice.backend), choice.reason

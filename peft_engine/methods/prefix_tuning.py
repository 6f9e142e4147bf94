"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): learned keys and values at every attention layer.

    layer i:   softmax(q [P_k^i ; K]^T / sqrt(D)) [P_v^i ; V]      P_k^i, P_v^i (kv_heads, P, D) learned

One table (P, layers x 2 x kv_heads x D) holds them, in PEFT's order: key and value of the first layer, then
of the next. An encoder-decoder has a table for each half; the decoder's covers its self-attention and its
cross-attention. With prefix_projection the table is made by an MLP from one vector a token, and folded when
it is saved.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn

from peft_engine.methods import peft_config, prompt_learning, virtual_tokens
from peft_engine.methods.attention_sites import Stack, stacks
from peft_engine.methods.prompt_learning import (
    STORED,
    check_attention,
    check_fields,
    check_length,
    check_transformers,
    copied,
    fingerprint,
    start_tokens,
)


@dataclass(frozen=True)
class PrefixTuningConfig:
    """A prefix's settings, with PEFT's field names and meanings.

    num_virtual_tokens   P, the length of the prefix
    prefix_projection    whether an MLP makes the prefix in training; encoder_hidden_size: its middle
    init_weights         None, or "zero": a prefix that starts as zeros
    prefix_init          "RANDOM": normal, as PEFT; "TEXT": the keys and values that the model has for the
                         tokens of prefix_init_text (tokenizer_name_or_path reads it), over and over up to P;
                         "SAMPLE_VOCAB": for tokens drawn from the vocabulary
    modules_to_save      names of modules to train whole, in a copy
    task_type            PEFT's word for the task; with those of `attach` the new head is trained too

    Raises TypeError or ValueError that names the field.
    """

    num_virtual_tokens: int = 20
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False
    init_weights: str | None = None
    prefix_init: str = "RANDOM"
    prefix_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    inference_mode: InitVar[bool] = field(default=False, kw_only=True)  # as PEFT's examples give it

    def __post_init__(self, inference_mode: bool) -> None:
        peft_config.check_inference_mode("PrefixTuningConfig", inference_mode)
        check_fields(self, "prefix_init")
        if type(self.prefix_projection) is not bool:
            raise TypeError(
                f"PrefixTuningConfig: prefix_projection must be True or False, got {self.prefix_projection!r}"
            )
        hidden = self.encoder_hidden_size
        if hidden is not None and (type(hidden) is not int or hidden < 1):
            raise ValueError(
                f"PrefixTuningConfig: encoder_hidden_size must be an integer of at least 1, got {hidden!r}"
            )
        if self.init_weights not in (None, "zero"):
            raise ValueError(
                f"PrefixTuningConfig: init_weights must be None or 'zero', got {self.init_weights!r}"
            )
        if self.prefix_init != "RANDOM" and (self.prefix_projection or self.init_weights):
            raise ValueError(
                f"PrefixTuningConfig: prefix_init={self.prefix_init!r} sets the prefix itself, and neither "
                "prefix_projection nor init_weights goes with it; leave them out"
            )


@dataclass(frozen=True)
class PrefixPlan:
    """What a config means on a model: the stacks that get a prefix, and the parameters to copy."""

    stacks: tuple[Stack, ...]
    copied: list[str]


class PrefixEncoder(nn.Module):
    """The prefix of one stack: a table of keys and values, or the MLP that makes it."""

    runs_the_stack = False

    def __init__(self, config: PrefixTuningConfig, stack: Stack, folded: bool):
        super().__init__()
        self.positions = config.num_virtual_tokens
        self.sites = sites = stack.sites
        self.causal = stack.causal
        self.started: float | None = None  # a fingerprint; None for what was loaded
        width = sum(2 * site.width for site in sites)
        self.transform: nn.Sequential | None = None
        if config.prefix_projection and not folded:
            dim = sites[0].width
            hidden = config.encoder_hidden_size or dim
            self.embedding = nn.Embedding(self.positions, dim)
            self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, width))
            last = [*self.transform[-1].parameters()]
        else:
            self.embedding = nn.Embedding(self.positions, width)
            last = [*self.embedding.parameters()]
        if config.init_weights == "zero":
            for tensor in last:
                nn.init.zeros_(tensor)

    @property
    def makes_a_graph(self) -> bool:
        """Whether keys and values come from a forward of their own."""
        return self.transform is not None

    def table(self) -> torch.Tensor:
        """(P, sum of 2 x kv_heads x head_dim over the layers)."""
        weight = self.embedding.weight
        return weight if self.transform is None else self.transform(weight)

    def keys_and_values(
        self, stack: nn.Module, tokens: Any, row: int | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each attention layer its keys and values, (kv_heads, P, head_dim) each."""
        first, rows = self.sites[0], self.positions
        if all(site.width == first.width and site.head_dim == first.head_dim for site in self.sites):
            heads = self.table().view(rows, -1, first.kv_heads, first.head_dim).permute(1, 2, 0, 3).unbind()
        else:
            widths = [width for site in self.sites for width in (site.width, site.width)]
            dims = [dim for site in self.sites for dim in (site.head_dim, site.head_dim)]
            parts = self.table().split(widths, dim=1)
            heads = tuple(p.view(rows, -1, d).transpose(0, 1) for p, d in zip(parts, dims, strict=True))
        return list(zip(heads[::2], heads[1::2], strict=True))

    def change_inputs(self, stack: nn.Module, kwargs: dict) -> dict:
        """The inputs of a stack stay as they are."""
        return kwargs


def resolve(model: Any, config: PrefixTuningConfig, who: str = "attach", strict: bool = True) -> PrefixPlan:
    """What `config` means on `model`; TypeError for a model whose attention takes no prefix."""
    check_transformers(model, who)
    check_length(model, config, who)
    found = stacks(model)
    check_attention(model, found, "prefix", who)
    for stack in found:
        if not stack.sites:
            kind = type(model.get_submodule(stack.path)).__name__
            raise TypeError(
                f"{who}: the attention of {kind}, one of the two halves of {type(model).__name__}, does not "
                "go through transformers' attention interface, so no prefix can be put in front of its keys; "
                "take LoRA, or bottleneck adapters"
            )
    return PrefixPlan(found, copied(model, config, who, strict))


def label(causal: bool, stacks: int) -> str:
    """The key of a stack's table in the file: PEFT's where the model is one stack."""
    return STORED if stacks == 1 else f"{'decoder' if causal else 'encoder'}.{STORED}"


def shapes(
    model: Any, config: PrefixTuningConfig, plan: PrefixPlan, header: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The tables that `install` takes, and their shapes; ValueError for PEFT's file of an encoder-decoder."""
    if len(plan.stacks) > 1 and header is not None and STORED in header:
        raise ValueError(
            "PEFT's prefix for an encoder-decoder is not read: it stands in front of the decoder's "
            "self-attention alone, and PEFT cuts it wrongly there, so what it was trained as cannot be run; "
            "train it here, where encoder, decoder and cross-attention have prefixes of their own"
        )
    return {
        label(stack.causal, len(plan.stacks)): (
            config.num_virtual_tokens,
            sum(2 * site.width for site in stack.sites),
        )
        for stack in plan.stacks
    }


def install(
    model: Any,
    config: PrefixTuningConfig,
    name: str,
    plan: PrefixPlan,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Puts a prefix into the plan's stacks: `values` by `label`, None: fresh ones."""
    ids = None if values is not None else start_tokens(model, config, "prefix_init", "attach")
    for stack in plan.stacks:
        encoder = PrefixEncoder(config, stack, folded=values is not None)
        if values is not None:
            encoder.embedding.weight.data = values[label(stack.causal, len(plan.stacks))].float()
        device = next(model.get_submodule(stack.path).parameters()).device
        encoder.to(device=device, dtype=torch.float32).requires_grad_(False)
        virtual_tokens.put(model, stack, name, encoder)
    if ids is not None:
        _start_from(model, name, plan, ids)
    if values is None:
        for encoder in _encoders(model, name).values():
            encoder.started = fingerprint(encoder.parameters())


def refuse_mixed(model: nn.Module, name: str) -> str | None:
    """Why a batch of several adapters cannot run: never."""
    return None


def tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name`, by their stack's path and their own name."""
    return {
        f"{path}.{inner}".removeprefix("."): parameter
        for path, encoder in _encoders(model, name).items()
        for inner, parameter in encoder.named_parameters()
    }


def _encoders(model: nn.Module, name: str) -> dict[str, PrefixEncoder]:
    found = virtual_tokens.encoders(model, name)
    return {path: encoder for path, encoder in found if isinstance(encoder, PrefixEncoder)}


@torch.no_grad()
def _start_from(model: Any, name: str, plan: PrefixPlan, ids: torch.Tensor) -> None:
    """Sets the tables to the keys and values that the base has for the tokens `ids`."""
    hidden = None
    training = [module for module in model.modules() if module.training]
    model.eval()
    virtual_tokens.activate(model, name)  # the layers leave their keys only under our attention
    try:
        for stack in plan.stacks:
            module: Any = model.get_submodule(stack.path)
            tokens = module._modules[virtual_tokens.CHILD]
            crossed: dict[str, Any] = {} if hidden is None else {"encoder_hidden_states": hidden}
            with virtual_tokens.own_pass(module, tokens, None) as lives:
                out = module(input_ids=ids[None], use_cache=False, **crossed)
                rows = [t[0].transpose(0, 1).flatten(1).float() for live in lives for t in live.caught]  # type: ignore[union-attr]
            tokens.encoders[name].embedding.weight.copy_(torch.cat(rows, dim=1))
            hidden = out[0]
    finally:
        virtual_tokens.activate(model, None)
        for module in training:
            module.training = True


# --- PEFT's file --------------------------------------------------------------------------------------------


@torch.no_grad()
def stored(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What the file holds: the tables, the MLP folded into them."""
    found = _encoders(model, name).values()
    return {label(encoder.causal, len(found)): encoder.table() for encoder in found}


def untouched(model: nn.Module, name: str) -> str:
    """Why the prefix is as it was before training; empty when it is not."""
    return prompt_learning.untouched(_encoders(model, name))


def to_file(model: Any, config: PrefixTuningConfig, name: str) -> dict[str, Any]:
    """The fields of PEFT's adapter_config.json for this prefix on this model; the MLP is folded away."""
    found = list(_encoders(model, name).values())
    sites = [site for encoder in found for site in encoder.sites]
    return {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": sites[0].width,
        "num_attention_heads": sites[0].kv_heads,
        "num_layers": len(found[0].sites),
        "num_transformer_submodules": len(found),
        "encoder_hidden_size": None,
        "prefix_projection": False,
        "inference_mode": True,
        "modules_to_save": config.modules_to_save,
        "task_type": prompt_learning.task_type(model, config),
    }


def owns(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is a prefix's."""
    return fields.get("peft_type") == "PREFIX_TUNING"


def from_file(fields: Any, where: str) -> PrefixTuningConfig:
    """The config in an adapter_config.json; a file holds the prefix itself, whatever made it."""
    start = ("encoder_hidden_size", "prefix_projection", "init_weights", "prefix_init", "prefix_init_text")
    inert = (*start, "tokenizer_name_or_path")
    return prompt_learning.from_file(PrefixTuningConfig, fields, "PREFIX_TUNING", inert, where)


NAME, SLOT, DOES = "prefix", "virtual tokens", "stand in front of the first token"
CONFIG = PrefixTuningConfig
WEIGHTS, ROOT, keys = prompt_learning.WEIGHTS, prompt_learning.ROOT, prompt_learning.keys
activate, remove = virtual_tokens.activate, virtual_tokens.take

"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): learned vectors at the input, max log p(y | [P ; x]).

In a decoder a prompt's hidden states do not depend on what follows, so the stack runs over the P vectors once
for the batch, and every row sees their keys and values (`virtual_tokens`): inputs, labels and logits keep
their length, packed documents each see the prompt, and generation stores it once. Under a sliding window the
prompt stays visible to all. An encoder sees both ways: there [P ; E[ids]] is written at its input, and its
output is P longer, as PEFT has it.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn

from peft_engine.methods import peft_config, prompt_learning, sharded, virtual_tokens
from peft_engine.methods.attention_sites import Stack, mixes_outside, stacks
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
from peft_engine.ops.prompt_embedding import extend_inputs, prompt_embedding


@dataclass(frozen=True)
class PromptTuningConfig:
    """A prompt's settings, with PEFT's field names, defaults and meanings.

    num_virtual_tokens       P, the length of the prompt
    prompt_tuning_init       "RANDOM": normal; "TEXT": the embeddings of prompt_tuning_init_text's tokens
                             (tokenizer_name_or_path reads it), over and over up to P; "SAMPLE_VOCAB": of
                             tokens drawn from the vocabulary
    modules_to_save          names of modules to train whole, in a copy
    task_type                PEFT's word for the task; with those of `attach` the new head is trained too

    Raises TypeError or ValueError that names the field.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    inference_mode: InitVar[bool] = field(default=False, kw_only=True)  # as PEFT's examples give it

    def __post_init__(self, inference_mode: bool) -> None:
        peft_config.check_inference_mode("PromptTuningConfig", inference_mode)
        check_fields(self, "prompt_tuning_init")


@dataclass(frozen=True)
class PromptPlan:
    """What a config means on a model: the stack that gets the prompt, those that see it, the copies."""

    stack: Stack
    readers: tuple[Stack, ...]
    copied: list[str]


class PromptEncoder(nn.Module):
    """The learned vectors of one prompt, (P, H)."""

    def __init__(self, config: PromptTuningConfig, hidden: int, causal: bool):
        super().__init__()
        self.embedding = nn.Embedding(config.num_virtual_tokens, hidden)
        self.length = config.num_virtual_tokens
        self.causal = causal
        self.started: float | None = None  # a fingerprint; None for what was loaded

    @property
    def added(self) -> int:
        """How much longer the stack's input becomes."""
        return 0 if self.causal else self.length

    @property
    def makes_a_graph(self) -> bool:
        """Whether keys and values come from a forward of their own."""
        return self.causal

    @property
    def runs_the_stack(self) -> bool:
        """Whether they come from the stack itself, and from what is stacked there."""
        return self.causal

    @property
    def positions(self) -> int:
        """How far real tokens move in a stack whose inputs keep their length."""
        return self.length if self.causal else 0

    def keys_and_values(self, stack: Any, tokens: Any, row: int | None) -> list[tuple]:
        """For each attention layer the keys and values of the prompt, from its own pass through the stack."""
        if not self.causal:
            return [()] * len(tokens.lives)
        dtype = stack.get_input_embeddings().weight.dtype
        with virtual_tokens.own_pass(stack, tokens, row) as lives:
            # A copy: some models scale their embeddings in place.
            out = stack(inputs_embeds=self.embedding.weight[None].to(dtype, copy=True), use_cache=False)
            # A decoder's attention to an encoder does not run where there is none.
            found: list[tuple] = [
                () if live.caught is None else (live.caught[0][0], live.caught[1][0]) for live in lives
            ]
        if torch.is_grad_enabled() and sharded.gathers(stack):
            found = [tuple(sharded.after(out[0], kv)) if kv else () for kv in found]
        return found

    def change_inputs(self, stack: Any, kwargs: dict) -> dict:
        """The inputs of an encoder, with the prompt written in front of their embeddings."""
        if self.causal:
            return kwargs
        embeds, table = kwargs.get("inputs_embeds"), stack.get_input_embeddings()
        if embeds is None and type(table) is nn.Embedding:
            embeds = prompt_embedding(kwargs["input_ids"], table.weight, self.embedding.weight)
        else:  # embeddings that are given, or that the model scales
            embeds = table(kwargs["input_ids"]) if embeds is None else embeds
            prompt = self.embedding.weight.to(embeds.dtype).expand(embeds.shape[0], -1, -1)
            embeds = torch.cat((prompt, embeds), dim=1)
        kwargs = {**kwargs, "input_ids": None, "inputs_embeds": embeds}
        return kwargs | extend_inputs(
            self.length,
            attention_mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            token_type_ids=kwargs.get("token_type_ids"),
            is_causal=False,
        )


class PromptReader(nn.Module):
    """In the decoder of an encoder-decoder: the mask of the encoder's output, which is P longer."""

    positions = 0
    makes_a_graph = runs_the_stack = False

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def keys_and_values(self, stack: Any, tokens: Any, row: int | None) -> list[tuple]:
        """None: the decoder sees the prompt in the encoder's output."""
        return [()] * len(tokens.lives)

    def change_inputs(self, stack: Any, kwargs: dict) -> dict:
        """The inputs of the decoder, with a mask as long as the encoder's output."""
        mask, hidden = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or hidden is None or mask.shape[1] + self.length != hidden.shape[1]:
            return kwargs
        longer = extend_inputs(self.length, attention_mask=mask)["attention_mask"]
        return kwargs | {"encoder_attention_mask": longer}


def resolve(model: Any, config: PromptTuningConfig, who: str = "attach", strict: bool = True) -> PromptPlan:
    """What `config` means on `model`; TypeError for a decoder whose attention takes nothing in front."""
    check_transformers(model, who)
    check_length(model, config, who)
    found = stacks(model)
    if found[0].causal or (not found[0].sites and model.can_generate()):
        check_attention(model, found[:1], "prompt", who)
        mixer = mixes_outside(model, found[0])
        if mixer is not None:
            raise TypeError(
                f"{who}: {mixer} of {type(model).__name__} mixes tokens too, and a prompt reaches them by "
                "attention alone; take a prefix, which is keys and values of attention layers, or LoRA"
            )
    return PromptPlan(found[0], found[1:], copied(model, config, who, strict))


def shapes(
    model: Any, config: PromptTuningConfig, plan: PromptPlan, header: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The one table that `install` takes, and its shape.

    PEFT's file of an encoder-decoder holds a second half, which PEFT neither trains nor runs.
    """
    count, width = config.num_virtual_tokens, model.get_input_embeddings().weight.shape[1]
    if plan.readers and header is not None and header.get(STORED) == (2 * count, width):
        count *= 2
    return {STORED: (count, width)}


def install(
    model: Any,
    config: PromptTuningConfig,
    name: str,
    plan: PromptPlan,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Puts a prompt on the model: `values` as `stored` gives them, None: a fresh one."""
    table = model.get_input_embeddings()
    ids = None if values is not None else start_tokens(model, config, "prompt_tuning_init", "attach")
    encoder = PromptEncoder(config, table.weight.shape[1], plan.stack.causal)
    if values is not None:
        encoder.embedding.weight.data = values[STORED][: config.num_virtual_tokens].float()
    elif ids is not None:
        encoder.embedding.weight.data = table(ids).detach().float().clone()
    encoder.to(device=table.weight.device, dtype=torch.float32).requires_grad_(False)
    encoder.started = fingerprint(encoder.parameters()) if values is None else None
    virtual_tokens.put(model, plan.stack, name, encoder)
    for stack in plan.readers:
        virtual_tokens.put(model, stack, name, PromptReader(config.num_virtual_tokens))


def refuse_mixed(model: nn.Module, name: str) -> str | None:
    """Why a batch of several adapters cannot run: a prompt makes the inputs of an encoder longer."""
    if any(isinstance(e, PromptEncoder) and not e.causal for _, e in virtual_tokens.encoders(model, name)):
        return (
            f"{name!r} is a prompt at the input of an encoder, whose rows become longer than those of other "
            "adapters; run its rows as a batch of their own"
        )
    return None


def tensors(model: nn.Module, name: str) -> dict[str, Any]:
    """The parameter of adapter `name`, by its stack's path."""
    return {
        f"{path}.{STORED}".removeprefix("."): encoder.embedding.weight
        for path, encoder in _encoders(model, name).items()
    }


def _encoders(model: nn.Module, name: str) -> dict[str, PromptEncoder]:
    found = virtual_tokens.encoders(model, name)
    return {path: encoder for path, encoder in found if isinstance(encoder, PromptEncoder)}


# --- PEFT's file --------------------------------------------------------------------------------------------


def stored(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What the file holds."""
    return {STORED: next(iter(_encoders(model, name).values())).embedding.weight}


def untouched(model: nn.Module, name: str) -> str:
    """Why the prompt is as it was before training; empty when it is not."""
    return prompt_learning.untouched(_encoders(model, name))


def to_file(model: Any, config: PromptTuningConfig, name: str) -> dict[str, Any]:
    """The fields of PEFT's adapter_config.json for this prompt on this model."""
    text = config.prompt_tuning_init == "TEXT"
    whole = model.config.get_text_config()
    return {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": model.get_input_embeddings().weight.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": getattr(whole, "num_attention_heads", None),
        "num_layers": getattr(whole, "num_hidden_layers", None),
        "prompt_tuning_init": config.prompt_tuning_init,
        "prompt_tuning_init_text": config.prompt_tuning_init_text if text else None,
        "tokenizer_name_or_path": config.tokenizer_name_or_path if text else None,
        "inference_mode": True,
        "modules_to_save": config.modules_to_save,
        "task_type": prompt_learning.task_type(model, config),
    }


def owns(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is a prompt's."""
    return fields.get("peft_type") == "PROMPT_TUNING"


def from_file(fields: Any, where: str) -> PromptTuningConfig:
    """The config in an adapter_config.json; how the prompt started is past."""
    start = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
    return prompt_learning.from_file(PromptTuningConfig, fields, "PROMPT_TUNING", start, where)


NAME, SLOT, DOES = "prompt", "virtual tokens", "stand in front of the first token"
CONFIG = PromptTuningConfig
WEIGHTS, ROOT, keys = prompt_learning.WEIGHTS, prompt_learning.ROOT, prompt_learning.keys
activate, remove = virtual_tokens.activate, virtual_tokens.take

"""The methods: what attach, checkpoint and the command need of each, by the class of its config."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft_engine.methods import lora_layers, prefix_tuning, prompt_tuning, targets, virtual_tokens
from peft_engine.methods.lora import LoraConfig
from peft_engine.methods.prefix_tuning import PrefixTuningConfig
from peft_engine.methods.prompt_tuning import PromptTuningConfig

Config = LoraConfig | PrefixTuningConfig | PromptTuningConfig


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    slot          the place it takes: adapters of one slot do not stack; does: that place, for the error
    resolve       (model, config, who, strict) -> its plan; raises before anything is changed
    shapes        (model, config, plan) -> the tensors that install takes, by path
    install       (model, config, name, plan, values or None)
    remove        (model, name), tensors (model, name) -> its parameters by path
    activate      (model, which), for all adapters of the slot: a name, a tuple with one per row, or None
    refuse_mixed  (model, name) -> why it cannot run in a batch of several adapters, or None
    """

    name: str
    config: type
    slot: str
    does: str
    resolve: Callable[..., Any]
    shapes: Callable[..., dict[str, tuple[int, ...]]]
    install: Callable[..., None]
    remove: Callable[..., None]
    activate: Callable[..., None]
    tensors: Callable[..., dict[str, Any]]
    refuse_mixed: Callable[..., str | None]


METHODS = (
    Method(
        "lora", LoraConfig, "lora", "add to the same linear layers",
        targets.resolve, lora_layers.shapes, lora_layers.install, lora_layers.remove, lora_layers.activate,
        lora_layers.tensors, lora_layers.refuse_mixed,
    ),
    Method(
        "prefix", PrefixTuningConfig, "virtual tokens", "stand in front of the first token",
        prefix_tuning.resolve, prefix_tuning.shapes, prefix_tuning.install, virtual_tokens.take,
        virtual_tokens.activate, prefix_tuning.tensors, prefix_tuning.refuse_mixed,
    ),
    Method(
        "prompt", PromptTuningConfig, "virtual tokens", "stand in front of the first token",
        prompt_tuning.resolve, prompt_tuning.shapes, prompt_tuning.install, virtual_tokens.take,
        virtual_tokens.activate, prompt_tuning.tensors, prompt_tuning.refuse_mixed,
    ),
)  # fmt: skip


def method_of(config: Any, who: str = "attach") -> Method:
    """The method of a config; TypeError for what is none."""
    for method in METHODS:
        if type(config) is method.config:
            return method
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    known = ", ".join(f"peft_engine.{method.config.__name__}" for method in METHODS)
    raise TypeError(
        f"{who}: config must be one of {known} (their fields have PEFT's names), got {kind}"
    )

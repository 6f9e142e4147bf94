"""The methods: each is a module with what attach, checkpoint and the command need of it."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from peft_engine.methods import bottleneck, lora_layers, prefix_tuning, prompt_tuning
from peft_engine.methods.bottleneck_config import BottleneckConfig
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.methods.prefix_tuning import PrefixTuningConfig
from peft_engine.methods.prompt_tuning import PromptTuningConfig

Config = LoraConfig | PrefixTuningConfig | PromptTuningConfig | BottleneckConfig
Shape = tuple[int, ...]


class Method(Protocol):
    """What a module of a method has.

    NAME     the method's, in messages and on the command line
    SLOT     the place it takes: adapters of one slot do not stack. DOES: that place, for the error
    CONFIG   the class of its configs
    WEIGHTS  the file that holds its tensors. ROOT: what stands in front of every key in it
    """

    NAME: str
    SLOT: str
    DOES: str
    WEIGHTS: str
    ROOT: str

    @property
    def CONFIG(self) -> type: ...

    def resolve(self, model: Any, config: Any, who: str = "attach", strict: bool = True) -> Any:
        """What a config means on a model; its `copied` are the parameters trained whole. Changes nothing."""

    def shapes(
        self, model: Any, config: Any, plan: Any, header: Mapping[str, Shape] | None = None
    ) -> dict[str, Shape]:
        """The tensors that install takes, by path; of a file with `header`, where its shapes may differ."""

    def install(
        self,
        model: Any,
        config: Any,
        name: str,
        plan: Any,
        values: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Puts the adapter on the model: `values` by the paths of `shapes`, None: fresh ones."""

    def remove(self, model: nn.Module, name: str) -> None:
        """Takes the adapter, which is not active, off."""

    def activate(self, model: nn.Module, which: str | tuple[str | None, ...] | None) -> None:
        """For all adapters of the slot: the one that runs, one or None per row, or none."""

    def tensors(self, model: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by path."""

    def refuse_mixed(self, model: nn.Module, name: str) -> str | None:
        """Why it cannot run in a batch of several adapters."""

    def untouched(self, model: nn.Module, name: str) -> str:
        """Why the adapter is as it was before training; empty when it is not."""

    def stored(self, model: nn.Module, name: str) -> Mapping[str, torch.Tensor]:
        """What the file holds, by the paths of `shapes`."""

    def keys(self, model: nn.Module, paths: Iterable[str], name: str) -> dict[str, str]:
        """The keys in the file of all of `shapes`, and of the parameters trained whole, by path."""

    def to_file(self, model: nn.Module, config: Any, name: str) -> dict[str, Any]:
        """The fields of adapter_config.json."""

    def owns(self, fields: Mapping[str, Any]) -> bool:
        """Whether an adapter_config.json is this method's."""

    def from_file(self, fields: Any, where: str) -> Any:
        """The config in an adapter_config.json; ValueError for what it does not know."""


METHODS: tuple[Method, ...] = (lora_layers, prefix_tuning, prompt_tuning, bottleneck)


def method_of(config: Any, who: str = "attach") -> Method:
    """The method of a config; TypeError for what is none."""
    for method in METHODS:
        if type(config) is method.CONFIG:
            return method
    kind = f"{type(config).__module__}.{type(config).__qualname__}"
    known = ", ".join(f"peft_engine.{method.CONFIG.__name__}" for method in METHODS)
    raise TypeError(f"{who}: config must be one of {known} (their fields have PEFT's names), got {kind}")

"""The settings of LoRA, with PEFT's field names, and the fields of PEFT's adapter_config.json."""

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_engine.methods import peft_config

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")
NAMED = ("modules_to_save", "target_parameters")  # lists, never a pattern


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter's settings, with PEFT's field names, defaults and meanings.

    r, lora_alpha        rank, and numerator of the scaling
    target_modules       names (a layer's path, or the end of it), one regular expression for the whole path,
                         or "all-linear" (every linear layer but the output head); None: PEFT's choice
    exclude_modules      names or one regular expression: what they match is left out
    rank_pattern         regular expression for the end of a path: the rank there; alpha_pattern alike
    use_dora             DoRA: a trained magnitude for each output, times the direction that W + s B A gives
    target_parameters    ends of the paths of experts' weights ("experts.gate_up_proj", "experts.down_proj")
                         to adapt, each expert's apart; no dropout and no DoRA there
    bias                 "none", "all" or "lora_only" (of the adapted layers): biases to train, in a copy
    modules_to_save      names of modules to train whole, in a copy
    init_lora_weights    True: A kaiming-uniform, B zero; "gaussian": A normal with deviation 1/r, B zero;
                         False: both random, so that the adapter changes the model at once
    layers_to_transform  indices of the layers to adapt, when target_modules is a list
    layers_pattern       the name of the list that the index is in
    task_type            PEFT's word for the task ("CAUSAL_LM"), written to the file; with "SEQ_CLS",
                         "TOKEN_CLS" and "QUESTION_ANS" the model's head is trained whole
    inference_mode       False, as PEFT's examples give it; and fan_in_fan_out, which a layer's class says

    Raises TypeError or ValueError that names the field.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = field(default=None, kw_only=True)
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    task_type: str | None = None
    inference_mode: dataclasses.InitVar[bool] = field(default=False, kw_only=True)
    fan_in_fan_out: dataclasses.InitVar[bool] = field(default=False, kw_only=True)

    def __post_init__(self, inference_mode: bool, fan_in_fan_out: bool) -> None:
        peft_config.check_inference_mode("LoraConfig", inference_mode)
        _integer("r", self.r)
        for pattern, r in _mapping("rank_pattern", self.rank_pattern).items():
            _integer(f"rank_pattern[{pattern!r}]", r)
        _number("lora_alpha", self.lora_alpha)
        for pattern, alpha in _mapping("alpha_pattern", self.alpha_pattern).items():
            _number(f"alpha_pattern[{pattern!r}]", alpha)
        _number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"LoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        for name in ("target_modules", "exclude_modules", *NAMED, "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in NAMED:
            if isinstance(given := getattr(self, name), str):
                raise TypeError(f"LoraConfig: {name} must be a list of names, got {given!r}")
        if self.target_modules == [] and not self.target_parameters:
            raise ValueError("LoraConfig: target_modules is empty; name the layers, or leave it out")
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError(
                "LoraConfig: target_parameters (experts) has neither dropout nor DoRA, in PEFT and here; set "
                "lora_dropout=0 and use_dora=False, or adapt the linear layers by an adapter of their own"
            )
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        elif isinstance(self.target_modules, str):
            _regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            _regex("exclude_modules", self.exclude_modules)
        for pattern in (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        ):
            _regex("layers_pattern", pattern)
        peft_config.check_task("LoraConfig", self.task_type)
        for name in ("use_rslora", "use_dora"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"LoraConfig: {name} must be True or False, got {getattr(self, name)!r}")
        if self.bias not in BIASES:
            raise ValueError(f"LoraConfig: bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            raise ValueError(
                f"LoraConfig: init_lora_weights must be one of {INITS}, got {self.init_lora_weights!r}"
            )
        if self.layers_to_transform is not None:
            if isinstance(self.target_modules, str):
                raise ValueError("LoraConfig: layers_to_transform needs target_modules to be a list of names")
            if not isinstance(self.layers_to_transform, int):
                object.__setattr__(self, "layers_to_transform", list(self.layers_to_transform))
            wanted: Any = self.layers_to_transform
            for i in wanted if isinstance(wanted, list) else [wanted]:
                if type(i) is not int or i < 0:
                    raise ValueError(f"LoraConfig: layers_to_transform must hold indices from 0, got {i!r}")
        elif self.layers_pattern:
            raise ValueError("LoraConfig: layers_pattern has a meaning only with layers_to_transform")


# --- checks -------------------------------------------------------------------------------------------------


def _integer(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"LoraConfig: {name} must be an integer of at least 1, got {value!r}")


def _number(name: str, value: Any) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"LoraConfig: {name} must be a finite number, got {value!r}")


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"LoraConfig: {name} must map regular expressions to numbers, got {value!r}")
    for pattern in value:
        _regex(name, pattern)
    return value


def _regex(name: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError) as error:  # a stranger's may be anything
        shown = textwrap.shorten(repr(value), 100, placeholder=" ...")
        raise ValueError(f"LoraConfig: {name}: {shown} is not a regular expression: {error}") from None


def _names(name: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    # A map or filter gives its items once.
    held: list[Any] = list(value) if isinstance(value, Iterable) else [None]
    if not all(isinstance(v, str) and v for v in held):
        raise TypeError(f"LoraConfig: {name} must be a list of names, got {value!r}")
    return sorted(held) if isinstance(value, (set, frozenset)) else held


# --- PEFT's adapter_config.json -----------------------------------------------------------------------------

# Fields of PEFT's file that say nothing about the adapter's maths, besides those of every method;
# fan_in_fan_out is what a layer's class says.
INERT = ("megatron_core", "qalora_group_size", "eva_config", "fan_in_fan_out")
# Switches and settings of methods that are not offered: the file may hold them at the values that mean "off".
SWITCHES = ("use_qalora", "lora_bias", "ensure_weight_tying")
SETTINGS = (
    "megatron_config", "trainable_token_indices", "loftq_config", "corda_config",
    "lora_ga_config", "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
    "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SWITCHES, (False, None)),
    **dict.fromkeys(SETTINGS, (None, {}, [])),
}
# Ways to start that PEFT has besides INITS: those that leave the base alone, and those that change it.
STARTS = ("eva", "orthogonal", "mica")
BASE_CHANGERS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def to_file(config: LoraConfig) -> dict[str, Any]:
    """The contents of PEFT's adapter_config.json."""
    return {
        **dataclasses.asdict(config),
        "peft_type": "LORA",
        "inference_mode": True,
    }


def from_file(fields: Any, where: str) -> LoraConfig:
    """The config in an adapter_config.json; ValueError names what is unknown, unsupported or broken."""
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    peft_config.check(fields, "LORA", (*known, *INERT, *UNSUPPORTED), where)
    for name, off in UNSUPPORTED.items():
        if name in fields and fields[name] not in off:
            raise ValueError(f"{where}: {name}={fields[name]!r} is not supported; only {off[0]!r} is")
    given = {name: fields[name] for name in known if fields.get(name) is not None}
    init = given.get("init_lora_weights")
    if isinstance(init, str) and init in STARTS:
        given["init_lora_weights"] = True  # A and B are in the file: how they started is past
    elif isinstance(init, str) and init.startswith(BASE_CHANGERS):
        raise ValueError(
            f"{where}: init_lora_weights={init!r} took the adapter's start out of the base's weights, so "
            "that it fits that changed base only; convert it to plain LoRA with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return peft_config.build(LoraConfig, given, where)

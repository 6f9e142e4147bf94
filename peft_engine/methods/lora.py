"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + b + s (drop(x) A^T) B^T, W frozen, A (r, K), B (N, r).

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv 2312.03732). QLoRA is
the same adapter over a weight in NF4; with use_dora each output also has a magnitude (dora.py). This file:
the config, the two layers, and how A and B start.
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.dropout import draw_seed
from peft_engine.methods import copies, derived, dora, peft_config
from peft_engine.nn import NF4Linear
from peft_engine.ops.lora_groups import lora_groups, sort_rows
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import NF4Tensor

BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter's settings, with PEFT's field names, defaults and meanings.

    r, lora_alpha        rank, and numerator of the scaling
    target_modules       names (a layer's path, or the end of it), one regular expression for the whole path,
                         or "all-linear" (every linear layer but the output head); None: PEFT's choice
    exclude_modules      names or one regular expression: what they match is left out
    rank_pattern         regular expression for the end of a path: the rank there; alpha_pattern alike
    use_dora             DoRA: a trained magnitude for each output, times the direction that W + s B A gives
    bias                 "none", "all" or "lora_only" (of the adapted layers): biases to train, in a copy
    modules_to_save      names of modules to train whole, in a copy
    init_lora_weights    True: A kaiming-uniform, B zero; "gaussian": A normal with deviation 1/r, B zero;
                         False: both random, so that the adapter changes the model at once
    layers_to_transform  indices of the layers to adapt, when target_modules is a list
    layers_pattern       the name of the list that the index is in
    task_type            PEFT's word for the task ("CAUSAL_LM"), written to the file

    Raises TypeError or ValueError that names the field.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
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

    def __post_init__(self) -> None:
        _integer("r", self.r)
        for pattern, r in _mapping("rank_pattern", self.rank_pattern).items():
            _integer(f"rank_pattern[{pattern!r}]", r)
        _number("lora_alpha", self.lora_alpha)
        for pattern, alpha in _mapping("alpha_pattern", self.alpha_pattern).items():
            _number(f"alpha_pattern[{pattern!r}]", alpha)
        _number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"LoraConfig: lora_dropout must be in [0, 1), got {self.lora_dropout}")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise TypeError(
                f"LoraConfig: modules_to_save must be a list of names, got {self.modules_to_save!r}"
            )
        if self.target_modules == []:
            raise ValueError("LoraConfig: target_modules is empty; name the layers, or leave it out")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            object.__setattr__(self, "target_modules", "all-linear")
        elif isinstance(self.target_modules, str):
            _regex("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            _regex("exclude_modules", self.exclude_modules)
        for pattern in (
            [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ()
        ):
            _regex("layers_pattern", pattern)
        if self.task_type is not None and not isinstance(self.task_type, str):
            raise TypeError(f"LoraConfig: task_type must be a string, got {self.task_type!r}")
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


@dataclass(frozen=True)
class LoraSettings:
    """What one adapter does in one layer: its rank, the factor s, the dropout in training, and whether it is
    DoRA.
    """

    r: int
    scaling: float
    dropout: float
    dora: bool = False


class _Lora(nn.Module):
    """What both layers hold besides the base's: A and B of each adapter by name, and which is active.

    lora_magnitude_vector is there when one of them is DoRA.
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    lora: dict[str, LoraSettings]
    active_adapter: str | tuple[str | None, ...] | None

    def train(self, mode: bool = True) -> Any:
        derived.forget(self, but=derived.BASE)
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self._modules.get("lora_magnitude_vector"):  # torch.compile takes what is there
            dora.squares(self, dora.base_of(self))


class LoraLinear(_Lora, nn.Linear):
    """A linear layer with adapters; a name in a mixed batch stands for consecutive rows of the input.

    Rows without an adapter run nn.Linear's own product: to the bit as before attach, and as fast. A fused
    layer around it gives the one that it runs itself as `linear`.
    """

    def forward(self, input: torch.Tensor, linear: Callable[..., torch.Tensor] = F.linear) -> torch.Tensor:
        return _forward(self, input, self._parameters["weight"], linear)  # type: ignore[arg-type]


class LoraNF4Linear(_Lora, NF4Linear):
    """An NF4 layer with adapters (QLoRA)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        if dtype is None or dtype == input.dtype:
            return _forward(self, input, self.nf4)
        return _forward(self, input.to(dtype), self.nf4).to(input.dtype)


LAYERS: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: LoraLinear, NF4Linear: LoraNF4Linear}
BASES = {adapted: base for base, adapted in LAYERS.items()}


def _forward(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    linear: Callable[..., torch.Tensor] = F.linear,
) -> torch.Tensor:
    active = layer.active_adapter
    if not isinstance(active, tuple):
        return _product(layer, x, weight, active, layer._parameters["bias"], linear)
    groups = copies.row_groups(active, x.shape[0], "active")
    # Two adapters that this layer knows nothing of are one group: the base alone.
    known: dict[str | None, list[int]] = {}
    for name, rows in groups.items():
        known.setdefault(name if name in layer.lora or copies.has(layer, name) else None, []).extend(rows)
    if len(known) == 1:
        name = next(iter(known))
        return _product(layer, x, weight, name, copies.value(layer, "bias", name), linear)
    if dispatch.on_gpu(x) and _groups(layer, known):
        return _grouped(layer, x, weight, known)
    parts = []
    for name, rows in known.items():
        index = copies.rows_at(tuple(rows), x.device)
        bias = copies.value(layer, "bias", name)
        if name not in layer.lora and not isinstance(weight, NF4Tensor):
            # Of fewer rows torch's product has other bits than of the batch.
            parts.append(linear(x, weight, bias).index_select(0, index))
        else:
            parts.append(_apart(layer, x, index, weight, name, bias))
    return copies.back_in_order(parts, known.values())


# From this many on, lora_linear on a CPU computes rows in one way: their bits do not depend on how many there
# are. On a GPU no number does that: torch's library chooses its kernel by the rows.
MANY_ROWS = 17


def _apart(
    layer: Any,
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    name: str | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The product of some of the batch's rows under one adapter, on a CPU with the whole batch's bits."""
    part = x.index_select(0, index)
    flat = part.reshape(-1, x.shape[-1])
    short = min(math.prod(x.shape[:-1]), MANY_ROWS) - flat.shape[0]
    if short <= 0:
        return _product(layer, part, weight, name, bias)
    # Any rows do: they stand for the others of the batch, and what comes of them is dropped.
    more = flat[:1].detach().expand(short, -1)
    y = _product(layer, torch.cat((flat, more)), weight, name, bias)[: flat.shape[0]]
    return y.view(*part.shape[:-1], -1)


def _groups(layer: Any, known: Mapping[str | None, list[int]]) -> bool:
    """Whether the rows of a mixed batch run as one grouped product: no dropout, one bias, adapters of this
    layer, none of them DoRA.
    """
    names = [name for name in known if name is not None]
    return all(
        name in layer.lora
        and not layer.lora[name].dora
        and not (layer.training and layer.lora[name].dropout)
        and copies.value(layer, "bias", name) is copies.value(layer, "bias", None)
        for name in names
    )


def _grouped(
    layer: Any, x: torch.Tensor, weight: torch.Tensor | NF4Tensor, known: Mapping[str | None, list[int]]
) -> torch.Tensor:
    """The mixed batch in one product: adapters stacked, smaller ranks padded with zeros, rows sorted by
    adapter.
    """
    names = sorted(name for name in known if name is not None)
    held = [t[name] for name in names for t in (layer.lora_A, layer.lora_B)]
    if torch.compiler.is_compiling() or derived.learns(layer, *held):
        a, b = _stacked(layer, names)
    else:  # 15 launches a layer, for each decoded token
        scalings = tuple(layer.lora[name].scaling for name in names)
        a, b = derived.kept(layer, "stack", tuple(held), lambda: _stacked(layer, names), scalings)
    number = {row: names.index(name) for name in names for row in known[name]}
    adapters = tuple(number.get(row, -1) for row in range(x.shape[0]))
    rows = sort_rows(adapters, math.prod(x.shape[1:-1]), len(names), x.device)
    bias = layer._parameters["bias"]
    return lora_groups(x, weight, a, b, rows, bias=bias)


def _stacked(layer: Any, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (G, R, K) and s B (G, N, R) of the adapters, with zeros up to the largest rank."""
    rank = max(layer.lora[name].r for name in names)
    stack_a, stack_b = [], []
    for name in names:
        settings, a, b = layer.lora[name], layer.lora_A[name], layer.lora_B[name] * layer.lora[name].scaling
        missing = rank - settings.r
        stack_a.append(F.pad(a, (0, 0, 0, missing)) if missing else a)
        stack_b.append(F.pad(b, (0, missing)) if missing else b)
    return torch.stack(stack_a), torch.stack(stack_b)


def _product(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    name: str | None,
    bias: torch.Tensor | None,
    linear: Callable[..., torch.Tensor] = F.linear,
) -> torch.Tensor:
    settings = None if name is None else layer.lora.get(name)
    if settings is None and not isinstance(weight, NF4Tensor):
        return linear(x, weight, bias)
    if name is None or settings is None:
        return lora_linear(x, weight, None, None, 1.0, bias=bias)
    p = settings.dropout if layer.training else 0.0
    # Not through attributes and ParameterDict: 5 us less a layer, and a decoded token passes 210 of them.
    a, b = layer._modules["lora_A"]._parameters[name], layer._modules["lora_B"]._parameters[name]
    if settings.dora:
        m = layer._modules["lora_magnitude_vector"]._parameters[name]
        return dora.product(layer, x, weight, name, a, b, m, settings.scaling, bias, p)
    return lora_linear(x, weight, a, b, settings.scaling, bias=bias, dropout_p=p, seed=draw_seed(p, x.device))


def settings_for(config: LoraConfig, r: int, alpha: float) -> LoraSettings:
    """The settings of a layer of rank r."""
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    return LoraSettings(r, scaling, config.lora_dropout, config.use_dora)


def initial(
    in_features: int, out_features: int, r: int, init: bool | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (out_features, r), float32 on the CPU.

    Draws from torch's generator as PEFT does, so that a seed gives PEFT's adapter: PEFT builds two nn.Linear,
    each of which draws its weight, and then draws A again.
    """
    a, b = torch.empty(r, in_features, dtype=torch.float32), torch.empty(out_features, r, dtype=torch.float32)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    if init is False:
        return a, b
    if init == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.init.zeros_(b)


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

# Fields of PEFT's file that say nothing about the adapter's maths, besides those of every method.
INERT = ("megatron_core", "qalora_group_size", "eva_config")
# Switches and settings of methods that are not offered: the file may hold them at the values that mean "off".
SWITCHES = ("fan_in_fan_out", "use_qalora", "lora_bias", "ensure_weight_tying")
SETTINGS = (
    "megatron_config", "trainable_token_indices", "loftq_config", "corda_config",
    "lora_ga_config", "velora_config", "alora_invocation_tokens", "monteclora_config", "layer_replication",
    "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
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
        "fan_in_fan_out": False,
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

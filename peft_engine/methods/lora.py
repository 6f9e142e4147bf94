"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + b + s (drop(x) A^T) B^T, W frozen, A (r, K), B (N, r).

s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv 2312.03732). QLoRA is
the same adapter over a weight in NF4; with use_dora each output also has a magnitude (dora.py). This file:
the layers, and how A and B start. The settings are in lora_config.py.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.conv1d import is_conv1d
from peft_engine.methods import copies, derived, dora
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.nn import NF4Linear
from peft_engine.ops.dropout import draw_seed
from peft_engine.ops.lora_groups import lora_groups, sort_rows
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import NF4Tensor


@dataclass(frozen=True)
class LoraSettings:
    """What one adapter does in one layer: its rank, the factor s, the dropout in training, and whether it is
    DoRA.
    """

    r: int
    scaling: float
    dropout: float
    dora: bool = False


class WithLora(nn.Module):
    """What the layers hold besides the base's: A and B of each adapter by name, and which is active.

    lora_magnitude_vector is there when one of them is DoRA. base_weight is W (out_features, in_features).
    """

    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    lora_magnitude_vector: nn.ParameterDict
    lora: dict[str, LoraSettings]
    active_adapter: str | tuple[str | None, ...] | None
    base_weight: torch.Tensor | NF4Tensor

    def train(self, mode: bool = True) -> Any:
        derived.forget(self, but=derived.BASE)
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self._modules.get("lora_magnitude_vector"):  # torch.compile takes what is there
            dora.squares(self, self.base_weight)


class LoraLinear(WithLora, nn.Linear):
    """A linear layer with adapters; a name in a mixed batch stands for consecutive rows of the input.

    Rows without an adapter run the product of the layer before attach, to the bit.
    """

    linear: Callable[..., torch.Tensor] = staticmethod(F.linear)

    @property
    def base_weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return run(self, input, self._parameters["weight"], self.linear)  # type: ignore[arg-type]


class LoraNF4Linear(WithLora, NF4Linear):
    """An NF4 layer with adapters (QLoRA)."""

    @property
    def base_weight(self) -> NF4Tensor:  # type: ignore[override]
        return self.nf4

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        if dtype is None or dtype == input.dtype:
            return run(self, input, self.nf4)
        return run(self, input.to(dtype), self.nf4).to(input.dtype)


LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, NF4Linear: LoraNF4Linear}
BASES = {adapted: base for base, adapted in LAYERS.items()}


def layer_class(kind: type) -> type[nn.Module] | None:
    """The class of a layer with adapters by that without; None where LoRA has none."""
    if is_conv1d(kind) and kind not in LAYERS:
        importlib.import_module("peft_engine.methods.lora_conv1d")  # imports transformers; adds to both
    return LAYERS.get(kind)


def run(
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
    in_features: int, out_features: int, r: int, init: bool | str, experts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in_features) and B (out_features, r), float32 on the CPU; of experts (r experts, ...) and (...).

    Draws from torch's generator as PEFT does, so that a seed gives PEFT's adapter: PEFT builds two nn.Linear,
    each of which draws its weight, and then draws A again.
    """
    a = torch.empty(r * experts, in_features, dtype=torch.float32)
    b = torch.empty(out_features, r * experts, dtype=torch.float32)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    if init is False:
        return a, b
    if init == "gaussian":
        nn.init.normal_(a, std=1 / r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, nn.init.zeros_(b)

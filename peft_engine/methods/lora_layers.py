"""Puts a LoRA adapter into the layers a plan names, and takes it out: what attach needs of the method."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peft_engine.conv1d import as_made, by_rows, features, is_conv1d, is_linear
from peft_engine.methods import (
    copies,
    derived,
    dora,
    experts,
    lora_config,
    lora_experts,
    peft_config,
    sharded,
    targets,
)
from peft_engine.methods.experts import ExpertWeights
from peft_engine.methods.lora import BASES, initial, layer_class
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.methods.names import DEFAULT_TARGETS, short_names
from peft_engine.methods.targets import Plan
from peft_engine.methods.walks import kept

NAME, SLOT, DOES = "lora", "lora", "add to the same linear layers"
CONFIG = LoraConfig
WEIGHTS = "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name, in layers and files
ROOT = "base_model.model"  # what PEFT puts in front of every key
resolve, from_file = targets.resolve, lora_config.from_file


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers with their paths."""
    return ((path, module) for path, module in model.named_modules() if is_adapted(module))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a linear layer with adapters."""
    return sharded.class_of(module) in BASES


def refuse_mixed(model: nn.Module, name: str) -> str | None:
    """Why a batch of several adapters cannot run: a layer that sees tokens out of the batch's order."""
    for path, layer in layers(model):
        if name in layer.lora and isinstance(layer, ExpertWeights):
            return f"{path} {copies.ROUTED}; activate one adapter"
    return copies.out_of_order(model, (path for path, layer in layers(model) if name in layer.lora))


def shapes(
    model: nn.Module, config: LoraConfig, plan: Plan, header: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The adapter's tensors that `install` takes, by path, and their shapes."""
    out: dict[str, tuple[int, ...]] = {}
    for path, settings in plan.layers.items():
        if (found := experts.owner(model, path)) is not None:
            count, n, k = experts.shape_of(*found)
            out[f"{path}.lora_A.weight"] = (count * settings.r, k)
            out[f"{path}.lora_B.weight"] = (n, settings.r * count)
            continue
        layer: Any = model.get_submodule(path)
        k, n = _features(layer)
        out[f"{path}.lora_A.weight"] = (settings.r, k)
        out[f"{path}.lora_B.weight"] = (n, settings.r)
        if settings.dora:
            out[f"{path}.{MAGNITUDE}"] = (n,)
    return out


def install(
    model: nn.Module,
    config: LoraConfig,
    name: str,
    plan: Plan,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Adds A and B, and DoRA's magnitudes, to the layers of the plan: `values` as `tensors` gives them, None:
    fresh ones.
    """
    for path, settings in plan.layers.items():
        found = experts.owner(model, path)
        layer: Any = model.get_submodule(path) if found is None else experts.hold(*found)
        count, n, k = (1, *reversed(_features(layer))) if found is None else layer.weight_shape
        if values is None:
            a, b = initial(k, n, settings.r, config.init_lora_weights, count)
        else:
            a, b = values[f"{path}.lora_A.weight"].float(), values[f"{path}.lora_B.weight"].float()
        if found is not None:
            a, b = lora_experts.from_file(a, b, count)
        adapted = layer_class(type(layer))
        if adapted is None and not is_adapted(layer):
            adapted = lora_experts.router_class(type(layer))  # type: ignore[arg-type]
        if adapted is not None:
            if is_conv1d(type(layer)):
                by_rows(layer)
            layer.__class__ = adapted
            layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
            layer.lora, layer.active_adapter = {}, None
        device = layer.weight.device
        layer.lora_A[name] = nn.Parameter(a.to(device))
        layer.lora_B[name] = nn.Parameter(b.to(device))
        layer.lora[name] = settings
        if settings.dora:
            given = None if values is None else values[f"{path}.{MAGNITUDE}"].float().to(device)
            if MAGNITUDE not in layer._modules:
                setattr(layer, MAGNITUDE, nn.ParameterDict())
            start = _direction_alone(layer, name)  # also keeps ||W||^2, which torch.compile finds there
            layer.lora_magnitude_vector[name] = nn.Parameter(start if given is None else given)


def _features(layer: Any) -> tuple[int, int]:
    """in_features and out_features of a linear layer or a router."""
    return features(layer) if is_linear(layer) else tuple(reversed(layer._parameters["weight"].shape))


def _direction_alone(layer: Any, name: str) -> torch.Tensor:
    """The magnitudes with which a DoRA adapter leaves W + s B A as it is: its norms."""
    weight = layer.base_weight
    if weight.device.type == "meta":
        return torch.empty(weight.shape[0], device="meta")
    return dora.norm(
        layer, weight, name, layer.lora_A[name], layer.lora_B[name], layer.lora[name].scaling
    ).clone()


def remove(model: nn.Module, name: str) -> None:
    """Takes adapter `name` out of every layer; a layer without any is of the base's class again."""
    for path, layer in [(path, layer) for path, layer in layers(model) if name in layer.lora]:
        remove_from_layer(layer, name)
        if type(layer) is ExpertWeights:
            experts.release(*experts.owner(model, path))  # type: ignore[misc]


def remove_from_layer(layer: Any, name: str) -> None:
    """Takes one adapter's tensors out of a layer; without any left it is of the base's class again."""
    if layer.lora[name].dora:
        del layer.lora_magnitude_vector[name]
        if not layer.lora_magnitude_vector:
            del layer.lora_magnitude_vector
    layer.__dict__.pop(derived.KEPT, None)
    del layer.lora_A[name], layer.lora_B[name], layer.lora[name]
    if not layer.lora:
        del layer.lora_A, layer.lora_B, layer.lora, layer.active_adapter
        layer.__class__ = BASES[type(layer)]
        if is_conv1d(type(layer)):
            as_made(layer)


def activate(model: nn.Module, which: str | tuple[str | None, ...] | None) -> None:
    """Sets which adapter runs: a name, one or None per row, or none."""
    for layer in kept(model, NAME, lambda: [found for _, found in layers(model)]):
        layer.__dict__["active_adapter"] = which


def tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The tensors of adapter `name`: `<layer>.lora_A.weight`, `<layer>.lora_B.weight` and, of DoRA,
    `<layer>.lora_magnitude_vector`.
    """
    out: dict[str, nn.Parameter] = {}
    for path, layer in layers(model):
        if name in layer.lora:
            out[f"{path}.lora_A.weight"] = layer.lora_A[name]
            out[f"{path}.lora_B.weight"] = layer.lora_B[name]
            if layer.lora[name].dora:
                out[f"{path}.{MAGNITUDE}"] = layer.lora_magnitude_vector[name]
    return out


def stored(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What the file holds: the tensors, those of experts as PEFT has them."""
    out: dict[str, torch.Tensor] = dict(tensors(model, name))
    for path, t in out.items():
        layer, leaf = path.removesuffix(".weight").rpartition(".")[::2]
        if leaf in ("lora_A", "lora_B") and isinstance(model.get_submodule(layer), ExpertWeights):
            out[path] = lora_experts.to_file(leaf, t)
    return out


# --- the file -----------------------------------------------------------------------------------------------


def untouched(model: nn.Module, name: str) -> str:
    """Why the adapter does nothing, or nothing."""
    mine = [layer for _, layer in layers(model) if name in layer.lora]
    if any(layer.lora_B[name].any() for layer in mine):
        return ""
    scaled = [layer for layer in mine if layer.lora[name].dora and not sharded.is_sharded(layer.weight)]
    if any(
        not torch.equal(layer.lora_magnitude_vector[name], _direction_alone(layer, name)) for layer in scaled
    ):
        return ""
    return "every B is zero, so it does nothing"


def keys(model: nn.Module, paths: Iterable[str], name: str) -> dict[str, str]:
    """The tensors' keys in PEFT's file: an adapted layer's own bias lies below its base_layer."""
    split = {path: path.removesuffix(".weight").rpartition(".") for path in paths}
    adapted = {layer for layer, _, part in split.values() if part in ("lora_A", "lora_B")}
    moved = lora_experts.nested(layer for layer in adapted if experts.owner(model, layer) is not None)
    out = {}
    for path, (layer, _, part) in split.items():
        if part in ("lora_A", "lora_B"):
            key = f"{moved.get(layer, layer)}.{part}.weight"
        elif part != MAGNITUDE and layer in adapted:
            key = f"{layer}.base_layer.{path.rpartition('.')[2]}"
        else:
            key = path
        out[path] = f"{ROOT}.{key}"
    return out


def to_file(model: nn.Module, config: LoraConfig, name: str) -> dict[str, Any]:
    """The fields of adapter_config.json, the targets spelled out: it means the same to whoever reads it."""
    targets = config.target_modules
    if targets == lora_config.ALL_LINEAR or (targets is None and not config.target_parameters):
        kind = getattr(getattr(model, "config", None), "model_type", "")
        if targets is None and kind in DEFAULT_TARGETS:
            wanted = list(DEFAULT_TARGETS[kind])
        else:
            mine = [path for path, layer in layers(model) if name in layer.lora and is_linear(layer)]
            wanted = short_names(mine, model)
        config = dataclasses.replace(config, target_modules=wanted)
    bases = {BASES[sharded.class_of(layer)] for _, layer in layers(model) if name in layer.lora}
    task = config.task_type or peft_config.language_task(model)  # for PEFT's AutoPeftModel
    return lora_config.to_file(config) | {"fan_in_fan_out": any(map(is_conv1d, bases)), "task_type": task}


def owns(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is this method's; one that names no method too, for the error."""
    # "config" alone is the `adapters` library's file, which names no peft_type.
    return fields.get("peft_type", None if "config" in fields else "LORA") == "LORA"

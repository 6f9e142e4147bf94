"""Bottleneck adapters, to the letter of the `adapters` library: what attach and checkpoint need of them.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, 2005.00247; He et al. 2021, 2110.04366.

A layer's sublayer reads s and gives h, and the layer goes on with s + h, or LN(s + h). With an adapter
f(x) = scaling up(act(down(x))), h becomes

    h + f(h)                    sequential (Houlsby)
    h + f(LN(s + h))            with original_ln_before (Pfeiffer); f(s + h) where the layer norms first
    h + f(s)                    parallel (He)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_engine.methods import bottleneck_files, bottleneck_layers, copies, prompt_learning
from peft_engine.methods.bottleneck_config import BottleneckConfig
from peft_engine.methods.bottleneck_layers import CHILD, Adapter, leaf_names, of, tensors
from peft_engine.methods.bottleneck_sites import ATTENTION, CROSS_ATTENTION, OUTPUT, Site, find
from peft_engine.methods.prompt_learning import fingerprint

NAME, SLOT, DOES = "bottleneck", "bottleneck", "stand behind the same sublayers"
CONFIG = BottleneckConfig
WEIGHTS, ROOT = bottleneck_files.WEIGHTS, "base_model.model"
activate, remove, stored = bottleneck_layers.activate, bottleneck_layers.take, tensors
keys, from_file, to_file = (
    bottleneck_files.keys,
    bottleneck_files.config_from_file,
    bottleneck_files.config_to_file,
)


@dataclass(frozen=True)
class BottleneckPlan:
    """What a config means on a model: its sites and the width at each, by path; the parameters to copy."""

    sites: dict[str, tuple[Site, int]]
    copied: list[str]


def resolve(
    model: nn.Module, config: BottleneckConfig, who: str = "attach", strict: bool = True
) -> BottleneckPlan:
    """What `config` means on `model`; TypeError for a model with no place for it."""
    found = find(model)
    layers = {site.layer for site in found}
    if strict and not set(config.leave_out) <= layers:
        wrong = min(set(config.leave_out) - layers)
        raise ValueError(f"{who}: leave_out names layer {wrong}, and the model has {len(layers)} (from 0)")
    sites: dict[str, tuple[Site, int]] = {}
    for kind in (ATTENTION, CROSS_ATTENTION, OUTPUT):
        if not getattr(config, kind):
            continue
        mine = [site for site in found if site.kind == kind]
        if not mine:
            raise TypeError(_nothing(model, kind, who))
        for site in mine:
            if site.layer not in config.leave_out:
                _check_site(model, site, config, who)
                sites[site.path] = site, config.width_of(site.width, site.layer)
    if not sites:
        raise ValueError(f"{who}: leave_out={config.leave_out} leaves no layer an adapter; name fewer")
    return BottleneckPlan(sites, prompt_learning.copied(model, config, who, strict))


def shapes(
    model: nn.Module, config: BottleneckConfig, plan: BottleneckPlan, header: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The tensors that `install` takes, by path, and their shapes."""
    out: dict[str, tuple[int, ...]] = {}
    for path, (site, width) in plan.sites.items():
        for inner, leaf in leaf_names(config).items():
            shape: tuple[int, ...] = (site.width,)
            if inner.endswith("_weight"):
                shape = (width, site.width) if inner.startswith("down") else (site.width, width)
            elif inner == "down_bias":
                shape = (width,)
            out[f"{path}.{CHILD}.{leaf}"] = shape
    return out


def install(
    model: nn.Module,
    config: BottleneckConfig,
    name: str,
    plan: BottleneckPlan,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Puts an adapter at each site of the plan: `values` as `tensors` gives them, None: fresh ones."""
    for path, (site, width) in plan.sites.items():
        adapter = Adapter(config, site.width, width)
        if values is None:
            adapter.started = fingerprint(adapter.parameters())
        else:
            for leaf, parameter in adapter.leaves().items():
                parameter.data = values[f"{path}.{CHILD}.{leaf}"].float()
        adapter.to(device=_device(model, path), dtype=torch.float32).requires_grad_(False)
        bottleneck_layers.put(model, site, name, adapter, _source(site, config))


def refuse_mixed(model: nn.Module, name: str) -> str | None:
    """Why a batch of several adapters cannot run: a site that sees tokens out of the batch's order."""
    return copies.out_of_order(model, (path for path, held in of(model).items() if name in held.adapters))


def untouched(model: nn.Module, name: str) -> str:
    """Why the adapter is as it was before training; empty when it is not."""
    adapters: list[Any] = [held.adapters[name] for held in of(model).values() if name in held.adapters]
    same = all(fingerprint(a.parameters()) == a.started for a in adapters)
    return "its weights are those that it started from" if same else ""


def owns(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is the `adapters` library's, of a bottleneck adapter or another."""
    return "peft_type" not in fields and "config" in fields


# --- parts --------------------------------------------------------------------------------------------------


def _source(site: Site, config: BottleneckConfig) -> str | None:
    """The module whose input the adapter needs; beside a sublayer of no known family it is that one's own."""
    if not (config.is_parallel or config.original_ln_before):
        return None
    return site.source or site.path


def _check_site(model: nn.Module, site: Site, config: BottleneckConfig, who: str) -> None:
    """ValueError for a placement that cannot be had at a sublayer of no known family."""
    if not site.generic:
        return
    if config.original_ln_before and not config.is_parallel:
        raise ValueError(
            f"{who}: original_ln_before=True needs to know what {site.path} is added to, and "
            f"{type(model).__name__} is of no family known here; take original_ln_before=False, as "
            "the placement houlsby has it (--placement houlsby), or --placement parallel"
        )
    if config.is_parallel and site.path.endswith("fc2"):
        raise ValueError(
            f"{who}: is_parallel=True needs the input of the feed-forward that ends in {site.path}, and "
            f"{type(model).__name__} is of no family known here; take is_parallel=False"
        )


def _nothing(model: nn.Module, kind: str, who: str) -> str:
    places = {ATTENTION: "attention", CROSS_ATTENTION: "attention to an encoder", OUTPUT: "feed-forward"}
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    return (
        f"{who}: {kind}=True, and no {places[kind]} was found in {type(model).__name__} (its children: "
        f"{children}); set {kind}=False, or use LoRA, which takes any linear layer"
    )


def _device(model: nn.Module, path: str) -> torch.device:
    """That of the parameters nearest to a site."""
    while path:
        for parameter in model.get_submodule(path).parameters():
            return parameter.device
        path = path.rpartition(".")[0]
    return next(model.parameters()).device

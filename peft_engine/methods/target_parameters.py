"""What a config means on a mixture of experts: target_parameters, and what "all-linear" means besides."""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from peft_engine.conv1d import is_linear
from peft_engine.methods import copies, experts
from peft_engine.methods.lora_config import ALL_LINEAR, LoraConfig
from peft_engine.methods.names import default_targets, named

# Names of linear layers of a mixture (those of a shared expert) that PEFT takes for the experts' weights.
TAKEN = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def with_experts(model: nn.Module, config: Any) -> Any:
    """The config with what "all-linear" means besides on a mixture of experts, in target_parameters.

    As PEFT has it: what were linear layers before transformers 5. Gates and ups, one weight now, have the
    rank of both.
    """
    if type(config) is not LoraConfig or config.target_parameters is not None:
        return config
    if (config.target_modules or default_targets(model)) != ALL_LINEAR:
        return config
    if not _fit(model):
        return config  # refused in resolve
    if config.lora_dropout or config.use_dora:
        raise ValueError(
            'attach: "all-linear" means the experts of this model too, which have neither dropout nor DoRA, '
            "in PEFT and here; set lora_dropout=0 and use_dora=False, or leave them out: target_parameters=[]"
        )
    names = [*experts.weights(model), *(f"{path}.weight" for path in experts.routers(model))]
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    both = [re.escape(end) for end in ends if end.endswith(experts.LEAVES[0])]
    return replace(
        config,
        target_parameters=ends,
        rank_pattern=dict.fromkeys(both, 2 * config.r) | config.rank_pattern,
        alpha_pattern=dict.fromkeys(both, 2 * config.lora_alpha) | config.alpha_pattern,
    )


def apart(model: nn.Module, paths: list[str]) -> list[str]:
    """Those of the linear layers that "all-linear" means.

    On a mixture not those whose name PEFT takes for the experts': to it the file would mean other layers.
    """
    if not _fit(model):
        return paths
    routers = experts.routers(model)
    return [path for path in paths if path.rpartition(".")[2] not in TAKEN and path not in routers]


def _fit(model: nn.Module) -> bool:
    """Whether a model has experts, all of a kind that LoRA adapts."""
    there = experts.weights(model)
    return bool(there) and not any(experts.fused_class(module)[2] for module, _ in there.values())


def matching(
    model: nn.Module, config: LoraConfig, who: str, strict: bool
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, nn.Module], list[str]]:
    """What target_parameters names: weights of experts, by path, with their owner and name there; routers, by
    path; and the paths of linear layers whose weight it names.
    """
    names = config.target_parameters or []
    if not names:
        return {}, {}, []
    there, routers = experts.weights(model), experts.routers(model)
    linear = {path: m for path, m in model.named_modules() if path and is_linear(m) and own(path)}
    found = {path: there[path] for path in there if named(path, names)}
    chosen = {path: router for path, router in routers.items() if named(f"{path}.weight", names)}
    layers = [path for path in linear if path not in routers and named(f"{path}.weight", names)]
    reached = [*found, *(f"{path}.weight" for path in (*chosen, *layers))]
    idle = [name for name in names if not any(named(path, [name]) for path in reached)]
    if idle and (strict or not reached):
        every = [*there, *(f"{path}.weight" for path in routers)]
        ends = sorted({".".join(path.split(".")[-2:]) for path in every}) or ["none"]
        raise ValueError(
            f"{who}: target_parameters {', '.join(map(repr, idle))} name no weight of experts, a router or a "
            f"linear layer; those of experts and routers: {', '.join(ends)}"
        )
    for path, (module, leaf) in found.items():
        if leaf not in module._modules and (why := experts.fused_class(module)[2]):
            raise TypeError(f"{who}: LoRA cannot adapt {path}: {why}; leave it out of target_parameters")
    return found, chosen, layers


def refuse_unnamed(model: nn.Module, wanted: list[str] | str | None, who: str) -> None:
    """ValueError for weights of experts held in one 3-D parameter, which no linear layer stands for."""
    there = {path: experts.shape_of(*found) for path, found in experts.weights(model).items()}
    for path, parameter in model.named_parameters():
        module = path.rpartition(".")[0]
        stacked = parameter.dim() == 3 and min(parameter.shape) > 1 and own(path)
        if stacked and module not in there and not in_convolution(model, module):
            there.setdefault(path, tuple(parameter.shape))
    for path, shape in there.items():
        if wanted is None or named(path, wanted) or named(path.rpartition(".")[0], wanted):
            mends = ["leave it out: name the linear layers in target_modules, or pass target_parameters=[] "]
            what = "which is no linear layer"
            if _fit(model):
                ends = ", ".join(f'"{".".join(path.split(".")[-2:-1])}.{leaf}"' for leaf in experts.LEAVES)
                mends.insert(0, f"adapt it by target_parameters=[{ends}], or ")
            elif (found := experts.owner(model, path)) is not None:
                what = f"of a kind that LoRA cannot adapt: {experts.fused_class(found[0])[2]}"
            raise ValueError(
                f"{who}: {path} {shape} holds expert weights in one 3-D parameter, {what}; {''.join(mends)}"
                'with "all-linear"'
            )


def own(path: str) -> bool:
    """Whether a module is the base's, and not one that an adapter put there."""
    return not copies.is_ours(path) and not copies.LORA_PARTS & set(path.split("."))


def in_convolution(model: nn.Module, path: str) -> bool:
    """Whether a module is a convolution, or holds what a convolution's weight is made from (weight_norm)."""
    owner, _, made = f"{path}.".partition(".parametrizations.")
    return isinstance(model.get_submodule(owner if made else path), nn.modules.conv._ConvNd)

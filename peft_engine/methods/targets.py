"""Which modules a config targets, by PEFT's rules: names.py has those for names and patterns.

"all-linear" is every linear layer but the output head; on a mixture of experts see target_parameters.py.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peft_engine.conv1d import features, is_linear
from peft_engine.heads import FusedHeadLinear
from peft_engine.methods import copies, experts, target_parameters
from peft_engine.methods.lora import BASES, LAYERS, LoraSettings, layer_class, settings_for
from peft_engine.methods.lora_config import ALL_LINEAR, LoraConfig
from peft_engine.methods.names import (
    default_targets,
    excluded,
    in_layers,
    named,
    near_modules,
    near_names,
    pattern_key,
    pattern_value,
)
from peft_engine.methods.read_directly import in_fast_path, never_called
from peft_engine.nn import NF4Linear

RANK_MEND = "lower r, or set a smaller one for this layer in rank_pattern, or exclude it"
# Heads of classifiers: "all-linear" leaves them out. HEADS: by task, what is trained whole, as PEFT does.
HEAD_NAMES = ("score", "classifier")
HEADS = {"SEQ_CLS": HEAD_NAMES, "TOKEN_CLS": HEAD_NAMES, "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Plan:
    """What a config means on a model: the layers to adapt, and the parameters to copy, both by path."""

    layers: dict[str, LoraSettings]
    copied: list[str]


def with_head(model: nn.Module, config: Any) -> Any:
    """The config with the new head of its task_type trained whole, as PEFT does."""
    if config.task_type not in HEADS:
        return config
    heads = [name for name in HEADS[config.task_type] if isinstance(getattr(model, name, None), nn.Module)]
    named = config.modules_to_save or []
    return replace(config, modules_to_save=[*named, *(name for name in heads if name not in named)] or None)


def resolve(model: nn.Module, config: LoraConfig, who: str = "attach", strict: bool = True) -> Plan:
    """What `config` means on `model`. strict: every name and pattern in it must match something."""
    found = copies.root_paths(model, config.modules_to_save or ())
    roots = list(dict.fromkeys(path for group in found.values() for path in group))
    held, routers, linear = target_parameters.matching(model, config, who, strict)
    paths = list(dict.fromkeys((*_matching(model, config, roots, who, strict), *linear, *held, *routers)))
    if strict:
        for which in ("rank_pattern", "alpha_pattern"):
            used = {pattern_key(getattr(config, which), path) for path in paths}
            idle = [pattern for pattern in getattr(config, which) if pattern not in used]
            if idle:
                raise ValueError(f"{who}: {which}: {', '.join(map(repr, idle))} decides no targeted layer")
    layers, unused = {}, never_called(model) | in_fast_path(model)
    for path in paths:
        if path in held:
            _, n, k = experts.shape_of(*held[path])
        elif path in routers:
            n, k = routers[path]._parameters["weight"].shape  # type: ignore[union-attr]
        else:
            module: Any = model.get_submodule(path)
            _check_layer(path, module, who)
            k, n = features(module)
        if path in unused:
            raise TypeError(
                f"{who}: an adapter on {path} would do nothing: its weight {unused[path]}; or leave "
                "the layer out of target_modules (exclude_modules)"
            )
        r = pattern_value(config.rank_pattern, path, config.r)
        if r > min(k, n) and n > 1 and path not in routers:  # gates: of so few outputs any rank is too many
            mend = RANK_MEND
            if tasks := [repr(task) for task, names in HEADS.items() if path in names]:
                mend = f"a head is trained whole, and left out here, with task_type={' or '.join(tasks)}"
            raise ValueError(
                f"{who}: rank {r} is above what {path} ({n} x {k}) can hold, {min(k, n)}; {mend}"
            )
        layers[path] = settings_for(config, r, pattern_value(config.alpha_pattern, path, config.lora_alpha))
    for name, group in found.items():
        if not group and strict:
            near = near_modules(name, model)
            raise ValueError(f"{who}: modules_to_save names {name!r}, which no module has{near}")
    copied = copies.whole(model, roots)
    if config.bias != "none":
        for path, parameter in model.named_parameters(remove_duplicate=False):
            parent, _, leaf = path.rpartition(".")
            mine = leaf == "bias" and not copies.is_ours(path) and path not in copied
            if mine and (config.bias == "all" or parent in layers) and parameter.is_floating_point():
                copied.append(path)
    return Plan(layers, copied)


# --- the rules ----------------------------------------------------------------------------------------------


def all_linear(model: nn.Module, task_type: str | None = None) -> list[str]:
    """The paths of every linear layer but the output head, and those that are never called."""
    get = getattr(model, "get_output_embeddings", None)
    head = None if get is None else get()
    if head is None and task_type == "SEQ_CLS":
        head = next((h for h in (getattr(model, name, None) for name in HEAD_NAMES) if h is not None), None)
    uncalled = never_called(model)
    return [
        path
        for path, module in model.named_modules()
        if is_linear(module)
        and path not in uncalled
        and module is not head
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and not copies.is_ours(path)
    ]


# --- refusals -----------------------------------------------------------------------------------------------


def _matching(model: nn.Module, config: LoraConfig, roots: list[str], who: str, strict: bool) -> list[str]:
    """The paths of the layers that a config targets; ValueError when a name matches nothing.

    roots: the modules that it trains whole, of which nothing is adapted.
    """
    wanted = config.target_modules
    if not wanted and config.target_parameters:
        return []
    if wanted is None:
        wanted = list(found) if isinstance(found := default_targets(model), tuple) else found
    if wanted == ALL_LINEAR:
        if strict and config.target_parameters is None:
            target_parameters.refuse_unnamed(model, None, who)
        chosen = target_parameters.apart(model, all_linear(model, config.task_type))
    else:
        target_parameters.refuse_unnamed(model, wanted, who)
        chosen = [p for p, m in model.named_modules() if p and target_parameters.own(p) and named(p, wanted)]
    if strict and config.exclude_modules:
        names = (
            [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        )
        for name in names:
            pattern = name if isinstance(config.exclude_modules, str) else [name]
            if not any(named(path, pattern) for path, _ in model.named_modules()):
                raise ValueError(
                    f"{who}: exclude_modules {name!r} matches no module{near_modules(name, model)}"
                )
    kept = [p for p in chosen if not excluded(p, config.exclude_modules, roots)]
    if isinstance(wanted, list):
        used = [name for name in wanted if any(named(path, [name]) for path in chosen)]
        idle = [name for name in wanted if name not in used]
        if idle and (strict or not used):
            near = ", ".join(near_names(idle, model)) or "none"
            raise ValueError(
                f"{who}: target_modules {', '.join(map(repr, idle))} match no module; the model's linear "
                f"layers with near names: {near}"
            )
        layers = config.layers_to_transform
        kept = [p for p in kept if p in wanted or in_layers(p, layers, config.layers_pattern)]
    if not kept:
        left_out = f"all {len(chosen)} that match are excluded" if chosen else "no module's path matches"
        near = ", ".join(near_names([wanted] if isinstance(wanted, str) else wanted, model)) or "none"
        if isinstance(wanted, str):
            near += "; a string is one expression for whole paths: give a list of names, or 'all-linear'"
        raise ValueError(
            f"{who}: target_modules={config.target_modules!r} targets nothing: {left_out} (exclude_modules, "
            f"modules_to_save and layers_to_transform count); linear layers: {near}"
        )
    return kept


def _check_layer(path: str, module: Any, who: str) -> None:
    """TypeError for a target that no adapter can be put on, with the reason."""
    if layer_class(type(module)) is not None or type(module) in BASES:
        if copies.runs_apart(module):
            raise ValueError(
                f"{who}: {path} runs a mixed batch whose rows have biases or modules of their own; activate "
                "one adapter first: active(model, name)"
            )
        if "forward" in module.__dict__:
            raise TypeError(
                f"{who}: {path} has its forward replaced (by a device map?); load the model on one device"
            )
        if "weight" not in module._parameters:
            raise TypeError(
                f"{who}: the weight of {path} is no parameter (pruned, or under weight_norm?); make it one "
                "first: torch.nn.utils.prune.remove, or remove_weight_norm"
            )
        if copies.CHILD in module._modules and "weight" in module._modules[copies.CHILD][copies.BASE]:
            raise TypeError(
                f"{who}: {path} is trained whole by another adapter (modules_to_save); a module is adapted "
                "or trained whole, the same for all adapters of a model"
            )
        nf4 = type(module) in (NF4Linear, LAYERS[NF4Linear])
        if not nf4 and not module.weight.is_floating_point():
            raise TypeError(
                f"{who}: {path} has a weight of {module.weight.dtype}; only NF4 weights may be quantised"
            )
        return
    kind = type(module)
    if kind is FusedHeadLinear:
        raise TypeError(
            f"{who}: {path} is the output head, joined with the loss by optimize; call "
            "peft_engine.unoptimize(model) first, and optimize after"
        )
    # A fused layer of ours is a subclass of the one it stands for.
    kind = next(c for c in kind.__mro__ if not c.__module__.startswith("peft_engine."))
    mend = "; leave it out of target_modules"
    library = kind.__module__.split(".")[0]
    if library == "bitsandbytes":
        why, mend = f"bitsandbytes' {kind.__name__}", "; load the checkpoint with load_quantized instead"
    elif isinstance(module, nn.Linear):
        why = f"{kind.__name__}, a subclass of nn.Linear whose forward may differ"
    else:
        why = kind.__name__
    raise TypeError(f"{who}: LoRA adapts nn.Linear, NF4Linear and Conv1D, but {path} is {why}{mend}")

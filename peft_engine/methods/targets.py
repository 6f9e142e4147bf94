"""Which modules a config targets, by PEFT's rules.

A list matches a module whose path is one of its entries or ends with "." + an entry; a string is a regular
expression for the whole path; "all-linear" is every linear layer but the output head. `rank_pattern` and
`alpha_pattern` are regular expressions for the end of the path, and the first that matches counts.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import regex
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peft_engine.conv1d import features, is_linear
from peft_engine.heads import FusedHeadLinear
from peft_engine.methods import copies, experts
from peft_engine.methods.lora import BASES, LAYERS, LoraSettings, layer_class, settings_for
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.methods.read_directly import in_fast_path, never_called
from peft_engine.nn import NF4Linear

ALL_LINEAR = "all-linear"
MOST_SECONDS = 1.0  # for a pattern and a path

# PEFT's defaults: what target_modules=None means, by the model_type of the model's config.
_DEFAULTS = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox falcon RefinedWeb RefinedWebModel chatglm",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("in_proj",): "deberta",
    ("query_proj", "value_proj"): "deberta-v2",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
}
DEFAULT_TARGETS = {kind: names for names, kinds in _DEFAULTS.items() for kind in kinds.split()}
# Heads of classifiers: "all-linear" leaves them out. HEADS: by task, what is trained whole, as PEFT does.
HEAD_NAMES = ("score", "classifier")
HEADS = {"SEQ_CLS": HEAD_NAMES, "TOKEN_CLS": HEAD_NAMES, "QUESTION_ANS": ("qa_outputs",)}

T = TypeVar("T")


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
    held, routers = _matching_experts(model, config, who, strict)
    paths = [*_matching(model, config, roots, who, strict), *held, *routers]
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
        if r > min(k, n) and path not in routers:  # of few experts any rank is one of them all
            raise ValueError(
                f"{who}: rank {r} is above what {path} ({n} x {k}) can hold, {min(k, n)}; lower r, or set a "
                "smaller one for this layer in rank_pattern, or exclude it"
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


def default_targets(model: nn.Module) -> tuple[str, ...] | str:
    """What target_modules=None stands for on this model."""
    return DEFAULT_TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""), ALL_LINEAR)


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


def in_convolution(model: nn.Module, path: str) -> bool:
    """Whether a module is a convolution, or holds what a convolution's weight is made from (weight_norm)."""
    owner, _, made = f"{path}.".partition(".parametrizations.")
    return isinstance(model.get_submodule(owner if made else path), nn.modules.conv._ConvNd)


def named(path: str, names: str | Iterable[str]) -> bool:
    """Whether a module's path is meant by a regular expression, or by one name of a list."""
    if isinstance(names, str):
        return _match(names, path, whole=True) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _match(pattern: str, path: str, whole: bool = False) -> Any:
    """re.match or re.fullmatch, with an end for a stranger's pattern that is made to take forever."""
    try:
        return (regex.fullmatch if whole else regex.match)(pattern, path, timeout=MOST_SECONDS)
    except TimeoutError:
        raise ValueError(
            f"the pattern {pattern!r} takes over {MOST_SECONDS} s to compare with {path!r}; write it without "
            "a repeat inside a repeat, or as a list of names"
        ) from None


def excluded(path: str, exclude_modules: str | Iterable[str] | None, roots: Iterable[str]) -> bool:
    """Whether a path is excluded by name, or lies in one of the modules at `roots`, trained whole."""
    if exclude_modules and named(path, exclude_modules):
        return True
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def in_layers(path: str, layers: int | Iterable[int] | None, pattern: str | Iterable[str] | None) -> bool:
    """Whether the first layer index in a path is in `layers`; `pattern` names the list it follows."""
    if layers is None or layers == []:
        return True
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    else:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        found = next((m for p in patterns if (m := _match(rf"(?:^|.*?\.)(?:{p})\.(\d+)\.", path))), None)
    return found is not None and int(found[1]) in wanted


def pattern_key(patterns: Iterable[str], path: str) -> str | None:
    """The first pattern that matches the end of a path at a dot, or None."""
    return next((p for p in patterns if _match(rf"(.*\.)?({p})$", path)), None)


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches a path."""
    key = pattern_key(patterns, path)
    return default if key is None else patterns[key]


def near_names(wanted: Iterable[str], model: nn.Module) -> list[str]:
    """Names of linear layers that look like the wanted ones; all of their last parts when none does."""
    paths = [
        path
        for path, module in model.named_modules()
        if path and is_linear(module) and not copies.is_ours(path)
    ]
    leaves = sorted({path.rsplit(".", 1)[-1] for path in paths})
    near: list[str] = []
    for name in wanted:
        near += difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=3, cutoff=0.5)
        if "." in name:
            near += difflib.get_close_matches(name, paths, n=3, cutoff=0.7)
    return list(dict.fromkeys(near)) or leaves


def short_names(paths: Iterable[str], model: nn.Module) -> list[str]:
    """A list that targets exactly `paths`: their last parts where these name nothing else, else the paths."""
    wanted = set(paths)
    leaves = sorted({path.rsplit(".", 1)[-1] for path in wanted})
    everything = {path for path, _ in model.named_modules() if path and named(path, leaves)}
    return leaves if everything == wanted else sorted(wanted)


def near_modules(wanted: str, model: nn.Module) -> str:
    """The end of an error: "; near it: ..." with the names of modules that look like `wanted`, or nothing."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path, _ in model.named_modules() if path})
    near = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], leaves, n=3, cutoff=0.5)
    return f"; near it: {', '.join(near)}" if near else ""


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
            _refuse_experts(model, None, who)
        chosen = all_linear(model, config.task_type)
    else:
        _refuse_experts(model, wanted, who)
        chosen = [p for p, m in model.named_modules() if p and _own(p) and named(p, wanted)]
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
        raise ValueError(
            f"{who}: target_modules={config.target_modules!r} targets nothing: {left_out} (exclude_modules, "
            f"modules_to_save and layers_to_transform count); linear layers: {near}"
        )
    return kept


def _own(path: str) -> bool:
    """Whether a module is the base's, and not one that an adapter put there."""
    return not copies.is_ours(path) and not copies.LORA_PARTS & set(path.split("."))


def with_experts(model: nn.Module, config: Any) -> Any:
    """The config with what "all-linear" means besides on a mixture of experts, in target_parameters.

    As PEFT has it: what were linear layers before transformers 5. Gates and ups, one weight now, have the
    rank of both.
    """
    if type(config) is not LoraConfig or config.target_parameters is not None:
        return config
    if (config.target_modules or default_targets(model)) != ALL_LINEAR:
        return config
    there = experts.weights(model)
    if not there or any(experts.fused_class(module)[2] for module, _ in there.values()):
        return config  # refused in resolve
    if config.lora_dropout or config.use_dora:
        raise ValueError(
            'attach: "all-linear" means the experts of this model too, which have neither dropout nor DoRA, '
            "in PEFT and here; set lora_dropout=0 and use_dora=False, or leave them out: target_parameters=[]"
        )
    names = [*there, *(f"{path}.weight" for path in experts.routers(model))]
    ends = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    both = [re.escape(end) for end in ends if end.endswith(experts.LEAVES[0])]
    return replace(
        config,
        target_parameters=ends,
        rank_pattern=dict.fromkeys(both, 2 * config.r) | config.rank_pattern,
        alpha_pattern=dict.fromkeys(both, 2 * config.lora_alpha) | config.alpha_pattern,
    )


def _matching_experts(
    model: nn.Module, config: LoraConfig, who: str, strict: bool
) -> tuple[dict[str, tuple[nn.Module, str]], dict[str, nn.Module]]:
    """The weights of experts that target_parameters names, by path, with their owner and name there; and the
    routers of which it names the weight.
    """
    names, there = config.target_parameters or [], experts.weights(model)
    found = {path: there[path] for path in there if named(path, names)}
    routers = experts.routers(model) if names else {}
    chosen = {path: router for path, router in routers.items() if named(f"{path}.weight", names)}
    reached = [*found, *(f"{path}.weight" for path in chosen)]
    idle = [name for name in names if not any(named(path, [name]) for path in reached)]
    if idle and (strict or not reached):
        every = [*there, *(f"{path}.weight" for path in routers)]
        ends = sorted({".".join(path.split(".")[-2:]) for path in every}) or ["none"]
        raise ValueError(
            f"{who}: target_parameters {', '.join(map(repr, idle))} name no weight of experts or of their "
            f"router; the model's: "
            f"{', '.join(ends)} (linear layers are named in target_modules)"
        )
    for path, (module, leaf) in found.items():
        if leaf not in module._modules and (why := experts.fused_class(module)[2]):
            raise TypeError(f"{who}: LoRA cannot adapt {path}: {why}; leave it out of target_parameters")
    return found, chosen


def _refuse_experts(model: nn.Module, wanted: list[str] | str | None, who: str) -> None:
    """ValueError for weights of experts held in one 3-D parameter, which no linear layer stands for."""
    there = {path: experts.shape_of(*found) for path, found in experts.weights(model).items()}
    for path, parameter in model.named_parameters():
        module = path.rpartition(".")[0]
        stacked = parameter.dim() == 3 and min(parameter.shape) > 1 and _own(path)
        if stacked and module not in there and not in_convolution(model, module):
            there.setdefault(path, tuple(parameter.shape))
    for path, shape in there.items():
        if wanted is None or named(path, wanted) or named(path.rpartition(".")[0], wanted):
            ends = ", ".join(f'"{".".join(path.split(".")[-2:-1])}.{leaf}"' for leaf in experts.LEAVES)
            raise ValueError(
                f"{who}: {path} {shape} holds expert weights in one 3-D parameter, which is no linear layer: "
                f"adapt it by target_parameters=[{ends}], or leave it out: name the linear layers in "
                'target_modules, or pass target_parameters=[] with "all-linear"'
            )


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
    library = kind.__module__.split(".")[0]
    if library == "bitsandbytes":
        why = f"bitsandbytes' {kind.__name__}; load the checkpoint with load_quantized instead"
    elif isinstance(module, nn.Linear):
        why = f"{kind.__name__}, a subclass of nn.Linear whose forward may differ"
    else:
        why = kind.__name__
    raise TypeError(
        f"{who}: LoRA adapts nn.Linear, NF4Linear and Conv1D, but {path} is {why}; leave it out of "
        "target_modules"
    )

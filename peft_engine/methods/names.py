"""What the names and patterns of a config match, by PEFT's rules.

A list matches a module whose path is one of its entries or ends with "." + an entry; a string is a regular
expression for the whole path. `rank_pattern` and `alpha_pattern` are regular expressions for the end of the
path, and the first that matches counts.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import regex
from torch import nn

from peft_engine.conv1d import is_linear
from peft_engine.methods import copies
from peft_engine.methods.lora_config import ALL_LINEAR

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

T = TypeVar("T")


def default_targets(model: nn.Module) -> tuple[str, ...] | str:
    """What target_modules=None stands for on this model."""
    return DEFAULT_TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""), ALL_LINEAR)


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

"""What prefix and prompt tuning share: PEFT's fields, tokens to start from, and their file."""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_engine.methods import copies, peft_config
from peft_engine.methods.attention_sites import Stack, goes_by_name, heads_of, parameters_of, stacks
from peft_engine.methods.virtual_attention import FORWARDS, NAME

STORED = "prompt_embeddings"  # the key in PEFT's file, without anything in front
ROOT = "base_model"  # what PEFT puts in front of other keys: these methods do not wrap the model's layers
WEIGHTS = "adapter_model.safetensors"
# Fields of PEFT's file that follow from the model; the shape in the file is what is checked.
GEOMETRY = ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
INITS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


def check_fields(config: Any, init_field: str) -> None:
    """Raises TypeError or ValueError that names a field of prefix or prompt tuning that cannot be."""
    who = type(config).__name__
    count, init = config.num_virtual_tokens, getattr(config, init_field)
    if type(count) is not int or count < 1:
        raise ValueError(f"{who}: num_virtual_tokens must be an integer of at least 1, got {count!r}")
    if init not in INITS:
        raise ValueError(f"{who}: {init_field} must be one of {', '.join(INITS)}, got {init!r}")
    text, tokenizer = getattr(config, f"{init_field}_text"), config.tokenizer_name_or_path
    for name, value in ((f"{init_field}_text", text), ("tokenizer_name_or_path", tokenizer)):
        if init == "TEXT" and not isinstance(value, str):
            raise ValueError(f"{who}: {init_field}='TEXT' needs {name}, a string, got {value!r}")
    peft_config.check_task(who, config.task_type)
    saved = config.modules_to_save
    if saved is not None:
        if isinstance(saved, str) or not isinstance(saved, Iterable):
            raise TypeError(f"{who}: modules_to_save must be a list of names, got {saved!r}")
        object.__setattr__(config, "modules_to_save", list(saved))


def task_type(model: Any, config: Any) -> str | None:
    """PEFT's word for the task, by the model's class where the config has none: a PeftModel without a task
    would run without the virtual tokens, and say nothing.
    """
    name = type(model).__name__
    if config.task_type is not None:
        return config.task_type
    if (task := peft_config.language_task(model)) is not None:
        return task
    if getattr(model, "base_model", None) is model:
        return "FEATURE_EXTRACTION"
    warnings.warn(  # a classifier's task would have PEFT ask for the weights of its head
        f"save_adapter: a {name} says no task, and without one PEFT reads virtual tokens as if there were "
        "none; for PEFT give task_type in the config that is attached (SEQ_CLS, TOKEN_CLS, ...)",
        stacklevel=2,
    )
    return None


def start_tokens(model: Any, config: Any, init_field: str, who: str) -> torch.Tensor | None:
    """The num_virtual_tokens token ids to start from; None to start at random.

    Raises ValueError for a text of which the tokenizer makes nothing.
    """
    init, count = getattr(config, init_field), config.num_virtual_tokens
    table = model.get_input_embeddings()
    if init == "RANDOM":
        return None
    if init == "SAMPLE_VOCAB":
        return torch.randint(0, table.num_embeddings, (count,)).to(table.weight.device)
    from transformers import AutoTokenizer

    text = getattr(config, f"{init_field}_text")
    ids = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)(text)["input_ids"]
    if not ids:
        raise ValueError(
            f"{who}: {init_field}_text={text!r} gives no token with {config.tokenizer_name_or_path}; "
            "give some text, or start from SAMPLE_VOCAB"
        )
    whole = (ids * (-(-count // len(ids))))[:count]
    if max(whole) >= table.num_embeddings:
        raise ValueError(
            f"{who}: {config.tokenizer_name_or_path} makes token {max(whole)}, and the model has only "
            f"{table.num_embeddings}; give the model's own tokenizer"
        )
    return torch.tensor(whole, device=table.weight.device)


def check_length(model: Any, config: Any, who: str) -> None:
    """ValueError when virtual tokens leave no room for real ones; TypeError when a prompt has no way in."""
    stack = model.get_submodule(stacks(model)[0].path)
    if hasattr(config, "prompt_tuning_init") and "inputs_embeds" not in parameters_of(stack):
        raise TypeError(
            f"{who}: {type(stack).__name__} takes token ids only (its forward has no inputs_embeds), so no "
            "prompt can be put in front of them; take a prefix, or LoRA"
        )
    if hasattr(config, "prompt_tuning_init") and getattr(stack.config, "hidden_size_per_layer_input", None):
        raise TypeError(
            f"{who}: the layers of {type(stack).__name__} read embeddings of their own for each token id "
            "(hidden_size_per_layer_input), and a prompt has no ids; take a prefix, or LoRA"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 <= limit <= config.num_virtual_tokens:  # XLNet says -1
        raise ValueError(
            f"{who}: num_virtual_tokens={config.num_virtual_tokens} leaves no room for tokens: the model has "
            f"{limit} positions; take fewer"
        )


def check_transformers(model: Any, who: str) -> None:
    """TypeError for a model that is none of transformers', or that reads something other than tokens."""
    kind = type(model).__name__
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"{who}: {kind} is no transformers model; virtual tokens need one")
    why, mend = "virtual tokens stand in front of tokens, and", "take LoRA, or bottleneck adapters"
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(table, nn.Embedding):
        what = "none" if table is None else type(table).__name__
        raise TypeError(
            f"{who}: {why} {kind} has no one table of their embeddings (get_input_embeddings gives {what}); "
            f"{mend}"
        )
    for stack in stacks(model):
        module = model.get_submodule(stack.path)
        reads = getattr(module, "main_input_name", "input_ids")
        if reads != "input_ids":
            raise TypeError(f"{who}: {why} {type(module).__name__} of {kind} reads {reads}; {mend}")


def check_attention(model: Any, found: Iterable[Stack], what: str, who: str) -> None:
    """TypeError for attention without sites to put keys in front of, ValueError where another one is set."""
    layers = [model.get_submodule(site.path) for stack in found for site in stack.sites]
    named = next((type(layer).__name__ for layer in layers if goes_by_name(layer)), None)
    if named is not None:
        raise TypeError(
            f"{who}: {named} chooses the keys that a query sees only under attention that transformers knows "
            f"by name, so no {what} can be put in front of its keys; take LoRA, or bottleneck adapters"
        )
    if not layers:
        raise TypeError(
            f"{who}: the attention of {type(model).__name__} does not go through transformers' attention "
            f"interface, so no {what} can be put in front of its keys; take LoRA, or bottleneck adapters"
        )
    for layer in layers:
        keys = heads_of(layer)[1]
        values = getattr(layer, "v_head_dim", keys)
        if values != keys:
            raise TypeError(
                f"{who}: {type(layer).__name__} has keys of {keys} values a head and values of {values}, and "
                f"a {what} is put in front of those of one width alone; take LoRA, or bottleneck adapters"
            )
    now = model.config._attn_implementation
    if now.removeprefix(NAME) not in FORWARDS:
        raise ValueError(
            f"{who}: the model's attention is set to {now!r}, which cannot put keys in front; call "
            "model.set_attn_implementation('sdpa') first"
        )


def copied(model: nn.Module, config: Any, who: str, strict: bool) -> list[str]:
    """The parameters of modules_to_save, by path; ValueError for a name that no module has."""
    found = copies.root_paths(model, config.modules_to_save or ())
    for name, roots in found.items():
        if not roots and strict:
            raise ValueError(f"{who}: modules_to_save names {name!r}, which no module has")
    return copies.whole(model, dict.fromkeys(path for group in found.values() for path in group))


# --- the file -----------------------------------------------------------------------------------------------


def keys(model: nn.Module, paths: Iterable[str], name: str) -> dict[str, str]:
    """The keys in the file: a table's as it is, a parameter trained whole behind ROOT."""
    return {path: path if path.endswith(STORED) else f"{ROOT}.{path}" for path in paths}


def from_file(kind: Any, fields: Any, peft_type: str, inert: Iterable[str], where: str) -> Any:
    """The config in an adapter_config.json. inert: fields of `kind` that say how the training started."""
    names = {field.name for field in dataclasses.fields(kind)}
    inert = (*inert, *GEOMETRY)
    fields = peft_config.check(fields, peft_type, (*names, *inert), where)
    given = {n: fields[n] for n in names - set(inert) if fields.get(n) is not None}
    return peft_config.build(kind, given, where)


def fingerprint(tensors: Iterable[torch.Tensor]) -> float:
    """A number that training changes."""
    return sum(float(t.detach().double().sum()) for t in tensors)


def untouched(encoders: Mapping[str, Any]) -> str:
    """Why the virtual tokens of some encoders are as they were before training, or nothing."""
    same = all(fingerprint(e.parameters()) == e.started for e in encoders.values())
    return "its virtual tokens are those that it started from" if same else ""

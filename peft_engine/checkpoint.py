"""Adapters on disk, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

What strangers wrote is checked before memory is taken: a closed config schema, and the file's header against
the tensors that the config means on this model. Every key lands or the load fails and lists them. A save is
written beside its folder first, so that a full disk or a kill leaves what was there.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from peft_engine.adapter_files import in_order, read_header, write_at_once
from peft_engine.merge import merge_
from peft_engine.methods import copies
from peft_engine.methods.attach import check_name, install, require, tensors, unwrap
from peft_engine.methods.lora import LoraConfig, from_file, to_file
from peft_engine.methods.targets import DEFAULT_TARGETS, resolve, short_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
PREFIX = "base_model.model."
OURS = "peft_engine"  # the key of our entry in the safetensors metadata
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
CONFIG_LIMIT = 1 << 20  # bytes


# --- saving -------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> Path:
    """Writes adapter `name` to `directory` as PEFT would, and returns the folder.

    The two files appear at once or not at all: a failed write leaves what the folder held before. Other files
    in it stay. Raises ValueError for an adapter that is not attached, is empty, holds NaN or inf, or is
    untouched by training (every B is zero, and every copied bias or module equals the base's); OSError when
    the disk refuses.
    """
    base = unwrap(model)
    config = require(base, name, "save_adapter")
    held = {path: tensor.detach() for path, tensor in tensors(base, name).items()}
    _refuse_worthless(base, held, name)
    adapted = {path.removesuffix(".lora_A.weight") for path in held if path.endswith(".lora_A.weight")}
    stored = {PREFIX + _stored(path, adapted): t.cpu().contiguous() for path, t in held.items()}
    fields = to_file(_explicit(base, config, adapted), _base_name(base))
    ours = {"name": name, "base_sample": _base_sample(base)}
    data = in_order(safetensors.torch.save(stored, {"format": "pt", OURS: json.dumps(ours)}))
    text = json.dumps(fields, indent=2, sort_keys=True)
    return write_at_once(Path(directory), {CONFIG: text.encode(), WEIGHTS: data})


def _refuse_worthless(model: nn.Module, held: dict[str, torch.Tensor], name: str) -> None:
    who = f"save_adapter: adapter {name!r}"
    if not held or not any(t.numel() for t in held.values()):
        raise ValueError(f"{who} is empty: it has no tensors")
    broken = [path for path, t in held.items() if not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{who} holds NaN or inf in {_some(broken)}; go back to the last good checkpoint")
    for path, t in held.items():
        if path.endswith(".lora_B.weight"):
            touched = bool(t.any())
        elif path.endswith(".lora_A.weight"):
            touched = False
        else:
            touched = not torch.equal(t, copies.base_of(*copies.owner(model, path)))
        if touched:
            return
    raise ValueError(
        f"{who} is untouched by training: every B is zero, so it does nothing; was its gradient cut off? "
        "(adapters_without_gradient tells after a step)"
    )


def _explicit(model: nn.Module, config: LoraConfig, adapted: set[str]) -> LoraConfig:
    """The config with the targets spelled out, so that the file means the same to whoever reads it."""
    if isinstance(config.target_modules, list) or config.target_modules not in (None, "all-linear"):
        return config
    wanted: list[str] = short_names(adapted, model)
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if config.target_modules is None and kind in DEFAULT_TARGETS:
        wanted = list(DEFAULT_TARGETS[kind])
    return dataclasses.replace(config, target_modules=wanted)


def _stored(path: str, adapted: set[str]) -> str:
    """The path as PEFT writes it: without wrappers, and an adapted layer's bias below its base_layer."""
    parent, _, leaf = path.rpartition(".")
    if parent in adapted:
        path = f"{parent}.base_layer.{leaf}"
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


# --- loading ------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module, directory: str | os.PathLike[str], name: str | None = None, *, any_base: bool = False
) -> str:
    """Attaches the adapter in `directory`, ours or PEFT's, makes it active, and returns its name.

    name: None takes the name it was saved under, or "default" when PEFT wrote it. any_base: load it although
    its file says that it was trained on a model with other weights. The model is unchanged when anything is
    wrong. Raises FileNotFoundError when a file is missing; ValueError for a pickle, a broken file, an unknown
    or unsupported config key, another base, and for tensors that are missing, left over, of another shape, or
    hold NaN or inf, with their keys.
    """
    base, folder = unwrap(model), Path(directory)
    where = f"load_adapter: {folder}"
    fields = _read_config(folder)
    config = from_file(fields, f"load_adapter: {folder / CONFIG}")
    header, metadata = read_header(folder / WEIGHTS)
    ours = _our_entry(metadata, where)
    name = name if name is not None else str(ours.get("name") or "default")
    check_name(base, name, "load_adapter")

    trained_on, here = fields.get("base_model_name_or_path"), _base_name(base)
    bases = f"the adapter is for base {trained_on!r}, this model is {here!r}"
    try:
        plan = resolve(base, config, "load_adapter", strict=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {bases}: {error}") from None
    wanted: dict[str, tuple[int, ...]] = {}
    for path, settings in plan.layers.items():
        layer: Any = base.get_submodule(path)
        wanted[f"{path}.lora_A.weight"] = (settings.r, layer.in_features)
        wanted[f"{path}.lora_B.weight"] = (layer.out_features, settings.r)
    for path in plan.copied:
        wanted[path] = tuple(copies.base_of(*copies.owner(base, path)).shape)
    keys, repeated = _match(base, header, wanted, f"{where}: {bases}")
    if not any_base:
        _check_base(base, ours, f"{where}: {bases}")

    values: dict[str, torch.Tensor] = {}
    broken = []
    with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
        for path, key in keys.items():
            values[path] = file.get_tensor(key)
            if not torch.isfinite(values[path]).all():
                broken.append(key)
        for path, key in repeated.items():
            parameter = base.get_parameter(path)
            if not torch.equal(file.get_tensor(key).to(parameter.device, parameter.dtype), parameter):
                raise ValueError(
                    f"{where}: {bases}: {key} is a weight of the base, and this model's differs; was the "
                    "vocabulary resized or the weight trained? List the module in modules_to_save"
                )
    if broken:
        raise ValueError(f"{where}: NaN or inf in {_some(broken)}")
    install(base, config, name, plan, values)
    return name


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"load_adapter: {folder} is no folder; give one with {CONFIG} and {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        pickles = [file for file in PICKLES if (folder / file).exists()]
        if pickles:
            raise ValueError(
                f"load_adapter: {folder / pickles[0]} is a pickle, which can run code when it is read; have "
                "its author save it as safetensors (PEFT: save_pretrained(..., safe_serialization=True))"
            )
        raise FileNotFoundError(f"load_adapter: {folder} has no {WEIGHTS}")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"load_adapter: {folder} has no {CONFIG}")
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(
            f"load_adapter: {path} has {path.stat().st_size} bytes; a config has at most {CONFIG_LIMIT}"
        )
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_adapter: {path} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"load_adapter: {path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def _our_entry(metadata: Any, where: str) -> dict[str, Any]:
    try:
        ours = json.loads(metadata.get(OURS, "{}"))
        if not isinstance(ours, dict):
            raise TypeError(f"expected an object, got {ours!r}")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: the metadata of {WEIGHTS} is broken: {error}") from None
    return ours


def _canonical(key: str, model: nn.Module | None = None) -> str:
    """A key without what wrappers put before and between its parts."""
    parts = [part for part in key.split(".") if part not in (*WRAPPERS, "base_layer")]
    if parts[:2] == ["base_model", "model"] or (
        parts[0] == "module" and (model is None or not hasattr(model, "module"))
    ):
        return _canonical(".".join(parts[2:] if parts[0] == "base_model" else parts[1:]), model)
    if len(parts) > 3 and parts[-3] in ("lora_A", "lora_B") and parts[-1] == "weight":
        del parts[-2]  # the adapter's name, in the raw state dict of a PeftModel
    return ".".join(parts)


def _match(
    model: nn.Module, header: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    """The file's key for each path, and for each weight of the base that the file repeats.

    PEFT's files repeat the embedding and the head when one is targeted. ValueError lists each key that does
    not land.
    """
    paths = {_canonical(path): path for path in wanted}
    found: dict[str, str] = {}
    repeated: dict[str, str] = {}
    extra, double = [], []
    heads = _embeddings(model)
    for key in header:
        path = paths.get(_canonical(key, model))
        if path is None and header[key] == heads.get(_canonical(key, model)):
            repeated[_canonical(key, model)] = key
        elif path is None:
            extra.append(key)
        elif path in found:
            double.append(key)
        else:
            found[path] = key
    shapes = [
        f"{key} must be {wanted[path]}, got {header[key]}"
        for path, key in found.items()
        if header[key] != wanted[path]
    ]
    missing = [PREFIX + path for path in wanted if path not in found]
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for what, keys in (
            ("of another shape", shapes),
            ("missing", missing),
            ("with no place in the model", extra),
            ("there twice", double),
        )
        if keys
    ]  # fmt: skip
    if problems:
        raise ValueError(f"{where}; tensors {'; '.join(problems)}")
    return found, repeated


def _embeddings(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of the input embedding and the output head, by path."""
    own = {
        id(weight)
        for get in ("get_input_embeddings", "get_output_embeddings")
        if (weight := _weight(model, get)) is not None
    }
    named = model.named_parameters(remove_duplicate=False)
    return {path: tuple(p.shape) for path, p in named if id(p) in own and copies.CHILD not in path}


def _weight(model: nn.Module, get: str) -> torch.Tensor | None:
    try:
        return getattr(getattr(model, get, lambda: None)(), "weight", None)
    except NotImplementedError:
        return None


def _some(items: list[str], most: int = 20) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# --- which base ---------------------------------------------------------------------------------------------


def _base_name(model: nn.Module) -> str | None:
    """What the model was loaded from."""
    config = getattr(model, "config", None)
    return getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None) or None


def _base_sample(model: nn.Module) -> list[float] | None:
    """256 values of the input embedding, which quantisation leaves alone: they tell one base from another."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, nn.Embedding) or embedding.weight.device.type == "meta":
        return None
    weight = copies.base_of(embedding, "weight").detach()
    rows = torch.linspace(0, min(weight.shape[0], 1024) - 1, 16).long()
    columns = torch.linspace(0, weight.shape[1] - 1, 16).long()
    return weight[rows.to(weight.device)][:, columns.to(weight.device)].float().flatten().tolist()


def _check_base(model: nn.Module, ours: dict[str, Any], where: str) -> None:
    then, now = ours.get("base_sample"), _base_sample(model)
    if then is None or now is None:
        return
    try:
        a, b = torch.tensor(then, dtype=torch.float32), torch.tensor(now, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: base_sample in the metadata is broken: {error}") from None
    # Half the mantissa of bfloat16: the same base loaded in any float dtype agrees, another one does not.
    if a.shape != b.shape or not torch.allclose(a, b, rtol=2**-7, atol=1e-6):
        raise ValueError(
            f"{where}; the weights of this model differ from the base it was trained on: load that base, or "
            "pass any_base=True to try it on this one"
        )


__all__ = ["load_adapter", "merge_", "save_adapter"]

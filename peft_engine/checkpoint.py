"""Adapters on disk, in PEFT's format both ways: adapter_config.json and adapter_model.safetensors.

What strangers wrote is checked before memory is taken: a closed config schema, and the file's header against
the tensors that the config means on this model. Every key lands or the load fails and lists them. A save is
written beside its folder first, so that a full disk or a kill leaves what was there.
"""

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from peft_engine.adapter_files import in_order, read_header, write_at_once
from peft_engine.heads import unwrap
from peft_engine.merge import merge_
from peft_engine.methods import copies, sharded
from peft_engine.methods.attach import check_name, install, require, tensors
from peft_engine.methods.lora_layers import MAGNITUDE
from peft_engine.methods.registry import METHODS, Method, method_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin")
OURS = "peft_engine"  # the key of our entry in the safetensors metadata
INNER = ("base_layer", "lora_A", "lora_B")
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
CONFIG_LIMIT = 1 << 20  # bytes


# --- saving -------------------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], name: str = "default") -> Path:
    """Writes adapter `name` to `directory` as PEFT would, and returns the folder.

    The two files appear at once or not at all: a failed write leaves what the folder held before. Other files
    in it stay. Of a model that fully_shard has spread over processes each must call this; the first writes.
    Raises ValueError for an adapter that is not attached, is empty, holds NaN or inf, or is untouched by
    training (it does nothing, or is as it started, and every copied bias or module equals the base's), and
    for copies of modules that were replaced or resized since; OSError when the disk refuses.
    """
    base = unwrap(model)
    config = require(base, name, "save_adapter")
    sharded.refuse_flat(base, "save_adapter")
    method = method_of(config, "save_adapter")
    copied = copies.of(base, name)
    _refuse_outdated(base, config, name, copied)
    parts = {**method.stored(base, name), **copied}
    held = {path: sharded.whole(t.detach()) for path, t in parts.items()}
    _refuse_worthless(base, method, held, name)
    keys = method.keys(base, held, name)
    stored = {_plain(keys[path]): t.cpu().contiguous() for path, t in held.items()}
    fields = {"base_model_name_or_path": _base_name(base), **method.to_file(base, config, name)}
    ours = {"name": name, "base": _base_kind(base), "base_sample": _base_sample(base)}
    data = in_order(safetensors.torch.save(stored, {"format": "pt", OURS: json.dumps(ours)}))
    text = json.dumps(fields, indent=2, sort_keys=True)
    files = {CONFIG: text.encode(), method.WEIGHTS: data}
    sharded.on_first(lambda: write_at_once(Path(directory), files), list(parts.values()))
    return Path(directory)


def _refuse_worthless(model: nn.Module, method: Method, held: dict[str, torch.Tensor], name: str) -> None:
    who = f"save_adapter: adapter {name!r}"
    if not held or not any(t.numel() for t in held.values()):
        raise ValueError(f"{who} is empty: it has no tensors")
    broken = [path for path, t in held.items() if not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{who} holds NaN or inf in {_some(broken)}; go back to the last good checkpoint")
    why = method.untouched(model, name)
    copied = copies.of(model, name)
    if why and not any(
        not torch.equal(held[p], sharded.whole(copies.base_of(*copies.owner(model, p)))) for p in copied
    ):
        raise ValueError(
            f"{who} is untouched by training: {why}; was its gradient cut off? (peft_engine.methods."
            "adapters_without_gradient(model) tells after a step)"
        )


def _refuse_outdated(model: nn.Module, config: Any, name: str, copied: dict[str, Any]) -> None:
    """ValueError for tensors that went with their module, or copies of another shape than the base's."""
    there = {_plain(path) for path in tensors(model, name)}
    then: Any = model.peft_engine_tensors
    wrong = [f"{path} is gone with its module" for path in sorted(then[name]) if _plain(path) not in there]
    for roots in copies.root_paths(model, getattr(config, "modules_to_save", None) or ()).values():
        for root in roots:
            for path, _ in model.get_submodule(root).named_parameters(root, remove_duplicate=False):
                if not copies.is_ours(path) and not copies.has(copies.owner(model, path)[0], name):
                    wrong.append(f"{path} has none (its module is another one now)")
    for path, copy in copied.items():
        if copy.shape != (shape := copies.base_of(*copies.owner(model, path)).shape):
            wrong.append(f"that of {path} must be {tuple(shape)} like the base's, got {tuple(copy.shape)}")
    if wrong:
        raise ValueError(
            f"save_adapter: adapter {name!r}: the model has changed under the adapter: {_some(wrong)}; call "
            "resize_token_embeddings, or whatever replaced modules, before attach, and train again"
        )


def _plain(key: str) -> str:
    """The key without the parts that wrappers put in."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


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
    sharded.refuse(base, "load_adapter")
    where = f"load_adapter: {folder}"
    fields = _read_config(folder)
    method = _method_of_file(fields, f"load_adapter: {folder / CONFIG}")
    config = method.from_file(fields, f"load_adapter: {folder / CONFIG}")
    weights = _weights(folder, method)
    header, metadata = read_header(weights)
    ours = _our_entry(metadata, where)
    saved_as = str(ours.get("name") or fields.get("name") or "default")
    name = name if name is not None else saved_as
    check_name(base, name, "load_adapter")

    trained_on, here = fields.get("base_model_name_or_path"), _base_name(base)
    bases = f"the adapter is for base {trained_on!r}, this model is {here!r}"
    try:
        plan = method.resolve(base, config, "load_adapter", strict=False)
        wanted = method.shapes(base, config, plan, header)
    except (TypeError, ValueError) as error:
        of = "" if trained_on is None and here is None else f"{bases}: "
        raise ValueError(f"{where}: {of}{error}") from None
    for path in plan.copied:
        wanted[path] = tuple(copies.base_of(*copies.owner(base, path)).shape)
    paths = {key: path for path, key in method.keys(base, wanted, saved_as).items()}
    keys, repeated = _match(base, method, header, wanted, paths, f"{where}: {bases}")
    if not any_base:
        _check_base(base, ours, f"{where}: {bases}")

    values: dict[str, torch.Tensor] = {}
    broken = []
    with safetensors.safe_open(weights, framework="pt") as file:
        for path, key in keys.items():
            # A copy: what is read lies in the file's pages, at any address, and a file may be written over.
            values[path] = file.get_tensor(key).clone()
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


def _method_of_file(fields: dict[str, Any], where: str) -> Method:
    for method in METHODS:
        if method.owns(fields):
            return method
    kinds = ", ".join(method.NAME for method in METHODS)
    raise ValueError(
        f"{where}: peft_type must be that of a method of peft-engine ({kinds}), "
        f"got {fields.get('peft_type')!r}"
    )


def _weights(folder: Path, method: Method) -> Path:
    """The file with the tensors; FileNotFoundError when there is none, ValueError for a pickle."""
    for file in (method.WEIGHTS, WEIGHTS):
        if (folder / file).is_file():
            return folder / file
    pickles = [file for file in PICKLES if (folder / file).exists()]
    if pickles:
        raise ValueError(
            f"load_adapter: {folder / pickles[0]} is a pickle, which can run code when it is read; have "
            "its author save it as safetensors (PEFT: save_pretrained(..., safe_serialization=True))"
        )
    raise FileNotFoundError(f"load_adapter: {folder} has no {method.WEIGHTS}")


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"load_adapter: {folder} is no folder; give one with {CONFIG} and {WEIGHTS}")
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


def _canonical(key: str, root: str, model: nn.Module | None = None) -> str:
    """A key without what wrappers put before and between its parts; root: what its method puts in front."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    bare: list[str] = []
    for part in reversed(parts):
        # Around experts each of PEFT's wrappers has an A and a B: there the word tells one's from another's.
        if part != "base_layer" or (bare and bare[-1] in INNER):
            bare.append(part)
    parts = bare[::-1]
    front, wrapped, at = root.split("."), model is None or not hasattr(model, "module"), 0
    while True:  # a stranger's key may have any number of them
        if parts[at : at + len(front)] == front:
            at += len(front)
        elif wrapped and parts[at : at + 1] == ["module"]:
            at += 1
        else:
            break
    parts = parts[at:]
    if len(parts) > 3 and parts[-1] == "weight":  # the adapter's name, in the raw state dict of a PeftModel
        if parts[-3] in ("lora_A", "lora_B"):
            del parts[-2]
        elif parts[-3] == MAGNITUDE:
            del parts[-2:]
    return ".".join(parts)


def _match(
    model: nn.Module,
    method: Method,
    header: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    named: dict[str, str],
    where: str,
) -> tuple[dict[str, str], dict[str, str]]:
    """The file's key for each path, and for each weight of the base that the file repeats.

    named: the path of each key that the file should have. PEFT's files repeat the embedding and the head when
    one is targeted. ValueError lists each key that does not land.
    """
    paths = {_canonical(key, method.ROOT): path for key, path in named.items()}
    found: dict[str, str] = {}
    repeated: dict[str, str] = {}
    extra, double = [], []
    heads = _embeddings(model)
    for key in header:
        plain = _canonical(key, method.ROOT, model)
        path = paths.get(plain)
        if path is None and header[key] == heads.get(plain):
            repeated[plain] = key
        elif path is None and _written_again(plain, paths):
            continue
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
    missing = [key for key, path in named.items() if path not in found]
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


def _written_again(plain: str, paths: dict[str, str]) -> bool:
    """Whether a key is a bias of modules_to_save by its name in PEFT's wrapper, the copy's or the original's:
    with bias="all" PEFT writes both beside the copy's own key.
    """
    for wrapper in (".modules_to_save.", ".original_module."):
        outer, _, inner = plain.partition(wrapper)
        # Deeper inside, the adapter's name stands in front.
        if inner.endswith("bias") and not paths.keys().isdisjoint(
            (f"{outer}.{inner}", f"{outer}.{inner.partition('.')[2]}")
        ):
            return True
    return False


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


def _base_kind(model: nn.Module) -> str:
    """ "nf4" where linear layers are held in 4 bit, by us or bitsandbytes; else "none"."""
    packed = any(isinstance(m, nn.Linear) and m.weight.dtype == torch.uint8 for m in model.modules())
    return "nf4" if packed else "none"


def trained_on(directory: str | os.PathLike[str]) -> str | None:
    """What the adapter in `directory` says of its base: "nf4", "none" (dense), or None where it does not say.

    Raises nothing for a folder that is none, or is broken: load_adapter tells of that.
    """
    for weights in sorted(Path(directory).glob("adapter*.safetensors")):
        try:
            kind = _our_entry(read_header(weights)[1], "").get("base")
        except (OSError, ValueError):
            continue
        return kind if kind in ("nf4", "none") else None
    return None


def _base_sample(model: nn.Module) -> list[float] | None:
    """256 values of the input embedding, which quantisation leaves alone: they tell one base from another."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(embedding, nn.Embedding) or embedding.weight.device.type == "meta":
        return None
    weight = sharded.whole(copies.base_of(embedding, "weight").detach())
    sizes = min(weight.shape[0], 1024), weight.shape[1]
    # In float32 whatever torch's default is: bfloat16 rounds 1023 to 1024.
    rows, columns = (torch.linspace(0, n - 1, 16, dtype=torch.float32, device="cpu").long() for n in sizes)
    return weight[rows.to(weight.device)][:, columns.to(weight.device)].float().flatten().tolist()


def _check_base(model: nn.Module, ours: dict[str, Any], where: str) -> None:
    then, now = ours.get("base_sample"), _base_sample(model)
    if then is None or now is None:
        return
    try:
        a, b = (torch.tensor(t, dtype=torch.float32, device="cpu") for t in (then, now))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: base_sample in the metadata is broken: {error}") from None
    # Half the mantissa of bfloat16: the same base loaded in any float dtype agrees, another one does not.
    if a.shape != b.shape or not torch.allclose(a, b, rtol=2**-7, atol=1e-6):
        raise ValueError(
            f"{where}; the weights of this model differ from the base it was trained on: load that base, or "
            "pass any_base=True to try it on this one"
        )


__all__ = ["load_adapter", "merge_", "save_adapter"]

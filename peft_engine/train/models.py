"""Loads a base model and its tokenizer as the command's options say, and puts saved adapters on it.

Every failure a user can cause (a missing folder, an unreachable hub, a base that is quantised already) is one
ModelError that names the option to change.
"""

import contextlib
import hashlib
import json
import os
import pickle
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_engine.checkpoint import load_adapter, trained_on
from peft_engine.methods import active, lora_layers
from peft_engine.methods.attach import attached
from peft_engine.quantize import load_quantized
from peft_engine.train import encoder_decoder, memory
from peft_engine.train.console import say
from peft_engine.train.data import DataError
from peft_engine.train.packing import why_no_decoder

RECORD = "run.json"
MERGED = "peft_engine_merged"  # in config.json: the adapters that the weights contain, by `merged_as`
TOKENIZERS = ("*token*", "vocab*", "*.model")  # most have a file of such a name
ANY_BASE = "load that base, or pass any_base=True to try it on this one"  # load_adapter's mend, from Python


class ModelError(ValueError):
    """A model that cannot be had; the message names what was looked for and the option to change."""


def load_config(name: str) -> Any:
    """The model's config. Raises ModelError for a missing folder, one without a model, an unreachable hub."""
    from transformers import AutoConfig

    _check_folder(name)
    with _explained(name, "config.json"):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer; ModelError as `load_config`."""
    from transformers import AutoTokenizer

    load_config(name)  # the tokenizer's loader reads it too, and would be blamed for it
    none = ModelError(
        f"--model {name}: the folder holds no tokenizer; save it there: tokenizer.save_pretrained(...)"
    )
    with _explained(name, "tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception:
            folder = Path(name).expanduser()
            if folder.is_dir() and not any(file for form in TOKENIZERS for file in folder.glob(form)):
                raise none from None
            raise
    if len(tokenizer) == 0:
        raise none
    return tokenizer


def check_vocabulary(config: Any, tokenizer: Any, rows: Iterable[Sequence[int]]) -> None:
    """DataError for a token that the model has no embedding of: one that its tokenizer alone was given."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    top = max((max(ids, default=0) for ids in rows), default=0)
    if size is not None and top >= size:
        raise DataError(
            f"the token {tokenizer.convert_ids_to_tokens(top)!r} has the number {top}, and the model knows "
            f"{size} tokens, from 0: it was added to the tokenizer alone; call resize_token_embeddings and "
            "save the model again, or leave the token out of the texts"
        )


def load_base(name: str, *, quantize: str | None, dtype: str = "auto") -> Any:
    """The model in eval mode, its weights frozen, on the GPU when there is one.

    quantize: "nf4" reads it into NF4 layer by layer, "none" leaves it dense, None takes it as it is stored.
    dtype: "auto" is the checkpoint's own.
    Raises ModelError for one that writes no text, and for a checkpoint that lacks some of its weights.
    """
    config = load_config(name)
    if not encoder_decoder.reads_text(config):
        raise ModelError(
            f"--model {name}: its encoder reads no text; this command is for models of text alone"
        )
    stored = getattr(config, "quantization_config", None) is not None
    if stored and quantize == "none":
        raise ModelError(
            f"--quantize none: {name} is stored quantised; take --quantize nf4, or give the dense model"
        )
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    with _explained(name, "weights"):
        if stored or quantize == "nf4":
            model = load_quantized(name, dtype=wanted)
        else:
            kind = encoder_decoder.auto_class(config)
            found: Any = kind.from_pretrained(name, dtype=wanted, output_loading_info=True)
            model, read = found
            _check_all_read(name, model, read)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
    why = why_no_decoder(model)
    if why is not None:
        raise ModelError(
            f"--model {name}: {why}; this command trains and runs models that write text: decoders, and "
            "decoders behind an encoder of text"
        )
    return model


def _check_all_read(name: str, model: Any, read: dict[str, Any]) -> None:
    """ModelError for weights that no file holds: transformers makes them up, and only logs it."""
    kind = type(model).__name__
    if read["missing_keys"]:
        raise ModelError(
            f"--model {name}: the checkpoint has no {_some(read['missing_keys'])}, which {kind} needs; is it "
            "of another kind of model (a classifier, a bare encoder), or not whole?"
        )
    if read["unexpected_keys"]:
        say(f"Not read: {_some(read['unexpected_keys'])}, which {kind} has no place for")


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def adapter_fields(folder: Path) -> dict[str, Any]:
    """An adapter's config, read before the model is: ModelError for a folder without one, and {} for one that
    is broken, which load_adapter tells of.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"--adapter {folder}: has no {path.name}; give the folder that train wrote")
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def virtual_tokens_of(folders: Iterable[Path]) -> int:
    """`virtual_tokens`, before the adapters are loaded."""
    counts = [adapter_fields(folder).get("num_virtual_tokens") for folder in folders]
    return max((count for count in counts if isinstance(count, int)), default=0)


def load(
    name: str, adapters: Sequence[Path], quantize: str | None, dtype: str | None
) -> tuple[Any, list[str]]:
    """The model with its adapters, and their names; says what it loads.

    quantize and dtype: None takes what the adapters were trained on.
    """
    config = load_config(name)
    merged = getattr(config, MERGED, None) or ()
    for folder in adapters:
        adapter_fields(folder)
        if merged and merged_as(folder) in merged:
            raise ModelError(
                f"--adapter {folder}: it was merged into the weights of {name} already; leave it out, or "
                "give the model that it was merged into as --model"
            )
    quantize = quantize or recorded(adapters, "quantize")
    quantize = quantize or _agreed(adapters, map(trained_on, adapters), "quantize")
    dtype = dtype or recorded(adapters, "dtype") or "auto"
    how = {"nf4": "in NF4", "none": "dense", None: "as stored"}[quantize]
    words = memory.dtype_in_words(name, dtype, config)
    say(f"Loading {name}, {how}, dtype {words}" + "".join(f", adapter {folder}" for folder in adapters))
    model = load_base(name, quantize=quantize, dtype=dtype)
    return model, load_adapters(model, adapters)


def load_adapters(model: Any, folders: Sequence[Path]) -> list[str]:
    """Puts each folder's adapter on the model, the first one active; returns their names."""
    names = []
    for i, folder in enumerate(folders):
        try:
            names.append(load_adapter(model, folder, None if len(folders) == 1 else f"adapter{i}"))
        except ValueError as error:
            raise ModelError(str(error).replace(ANY_BASE, "give that base as --model")) from error
    if names:
        active(model, names[0])
    return names


def merged_as(folder: Path) -> str:
    """What a LoRA adapter is called in the config of a model that contains it: its weights' SHA-256."""
    weights = folder / lora_layers.WEIGHTS
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""


def virtual_tokens(model: Any) -> int:
    """The most positions of the model that one of its adapters takes."""
    return max((getattr(config, "num_virtual_tokens", 0) for config in attached(model).values()), default=0)


def run_record(folder: Path) -> dict[str, Any]:
    """The record that `train` left beside an adapter; empty when there is none (another tool made it)."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; it is written by train, mend or delete it") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ModelError(
            f"{path}: expected an object with settings; it is written by train, mend or delete it"
        )
    return record


def recorded(folders: Sequence[Path], setting: str) -> Any:
    """What the adapters' records say of a setting (None: nothing); ModelError when they disagree."""
    return _agreed(folders, [_setting(folder, setting) for folder in folders], setting)


def _setting(folder: Path, setting: str) -> Any:
    return run_record(folder).get("settings", {}).get(setting)


def evaluated_on(folder: Path) -> str | None:
    """The file that an adapter's run was evaluated on, if it is there."""
    data = _setting(folder, "eval_data")
    return data if isinstance(data, str) and Path(data).is_file() else None


def _agreed(folders: Sequence[Path], found: Iterable[Any], setting: str) -> Any:
    said = [(folder, value) for folder, value in zip(folders, found, strict=True) if value is not None]
    if len({value for _, value in said}) > 1:
        each = ", ".join(f"{folder} with {value}" for folder, value in said)
        raise ModelError(
            f"the adapters were trained with different {setting}: {each}; run them apart, or give "
            f"--{setting} for all"
        )
    return said[0][1] if said else None


def _check_folder(name: str) -> None:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"--model {name}: the folder has no config.json; give one that save_pretrained wrote"
            )
    elif path.exists():
        raise ModelError(f"--model {name}: is a file; give the folder that save_pretrained wrote")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"--model {name}: there is no such folder")


@contextlib.contextmanager
def _explained(name: str, what: str):
    """Makes a ModelError of what transformers raises, which for a broken file may be anything."""
    try:
        yield
    except (ImportError, MemoryError, ModelError):  # they say what is missing
        raise
    except Exception as error:
        if "allocate" in str(error) or "out of memory" in str(error):
            raise
        if isinstance(error, pickle.UnpicklingError):  # whose text says how to run the code
            raise ModelError(
                f"--model {name}: its {what} are a pickle with more in it than tensors, which could run code "
                "when it is read; do not trust it, and have its author save it as safetensors"
            ) from error
        usual = isinstance(error, (OSError, ValueError))
        first = _first_line(error) if usual else _one_line(error)
        if Path(name).expanduser().is_dir() or not usual:
            told = first.startswith("load_quantized: ")  # with its mend
            mend = "" if told else "; is the folder whole, as save_pretrained wrote it? copy it again"
            raise ModelError(f"--model {name}: its {what} cannot be read: {first}{mend}") from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise ModelError(
            f"--model {name}: no such folder, and the hub cannot be reached or has no such model{offline}: "
            f"{first} Give the path of a local folder instead: --model DIR, as save_pretrained wrote it"
        ) from error


def _first_line(error: Exception) -> str:
    """Without the advice that transformers puts behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _one_line(error: Exception) -> str:
    """The kind too: a KeyError's text is the key alone."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")

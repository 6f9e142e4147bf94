"""How load_quantized reads a checkpoint: transformers' own loader, with our quantiser plugged in.

transformers builds the skeleton without memory, maps the names in the files to the model's, reads one tensor
at a time if it quantises on the way, ties weights and builds the buffers that no file holds. What is ours
is here: which weights are quantised, and how the bytes of one that is quantised already are read.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_engine.conv1d import is_conv1d
from peft_engine.methods import experts
from peft_engine.nn import STORED
from peft_engine.ops.nf4 import NF4Tensor
from peft_engine.quantize import (
    check_weight,
    hold,
    is_dense,
    keep_packed,
    parameter,
    quantized,
    select_linears,
    write_config,
)

METHOD = "peft_engine_nf4"
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
REFUSED_ARGUMENTS = {
    "gguf_file": "GGUF weights are not read here; load with from_pretrained and "
    "quantization_config=GgufConfig(dequantize=True), then quantize_ the model",
    "quantization_config": "blocksize, double_quant and skip_modules say what is wanted",
    "state_dict": "the weights are read from the files; load with from_pretrained, then quantize_ the model",
}


def load(
    path: str,
    blocksize: int,
    double_quant: bool,
    skip_modules: Iterable[str] | None,
    arguments: dict[str, Any],
) -> Any:
    """What load_quantized says."""
    for name, why in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"load_quantized: {name} is not taken: {why}")
    arguments = dict(arguments)
    config = arguments.pop("config", None) or read_config(path, arguments)
    stored = _is_stored(path, config)
    if stored:
        config = copy.copy(config)  # it may be the caller's
        del config.quantization_config
    settings = _Settings(stored, blocksize, double_quant, skip_modules)
    _check_pickled(path, config, arguments)
    _check_shards(path, config, arguments)
    wants_info = arguments.pop("output_loading_info", False)
    try:
        model, info = _model_class(config).from_pretrained(
            path,
            config=config,
            quantization_config=settings,
            output_loading_info=True,
            **(arguments | {"use_safetensors": True, "ignore_mismatched_sizes": True}),
        )
    except _Stop as stop:
        raise stop.error from None
    except SafetensorError as error:
        raise ValueError(
            f"load_quantized: {path}: {_broken_file(path)} is no whole safetensors file ({error}); "
            "was the download or the disk cut short?"
        ) from None
    _check_all_read(path, type(model).__name__, info)
    return (model, info) if wants_info else model


def read_config(path: str, arguments: dict[str, Any]) -> Any:
    """The model's config; OSError that says where was looked, and what else may be given."""
    if Path(path).is_dir() and not (Path(path, arguments.get("subfolder") or "") / "config.json").is_file():
        raise OSError(
            f"load_quantized: the folder {path} has no config.json; is it a model saved by save_pretrained?"
        )
    try:
        hub = {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}
        return transformers.AutoConfig.from_pretrained(path, **hub)
    except OSError as error:
        raise OSError(
            f"load_quantized: {path!r} is no folder here, and as a name on the hub it could not be had (hub "
            "unreachable, HF_HUB_OFFLINE set, a private model, or no such name); give the path of a local "
            "folder with config.json and *.safetensors instead"
        ) from error


def _is_stored(path: str, config: Any) -> bool:
    """Whether the checkpoint is in NF4 already; ValueError when it is quantised in another way."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if stored.get("load_in_4bit") and stored.get("bnb_4bit_quant_type") == "nf4":
        return True
    kind = stored.get("bnb_4bit_quant_type") if stored.get("load_in_4bit") else stored.get("quant_method")
    raise ValueError(
        f"load_quantized: {path} is quantised already, in {kind!r}; only bitsandbytes' NF4 is read as it is: "
        "start from the dense checkpoint"
    )


def _check_pickled(path: str, config: Any, arguments: dict[str, Any]) -> None:
    """FileNotFoundError for a local folder whose weights are pickles alone, with what writes the others."""
    folder = Path(path, arguments.get("subfolder") or "")
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors*")):
        kind = _model_class(config).__name__
        raise FileNotFoundError(
            f"load_quantized: {path} holds {pickles[0].name} and no safetensors, which alone are read one "
            f'tensor at a time; write them: transformers.{kind}.from_pretrained("{path}", dtype="auto")'
            '.save_pretrained("NEW_FOLDER"), and its tokenizer the same way'
        )


def _check_shards(path: str, config: Any, arguments: dict[str, Any]) -> None:
    """Of a local folder in shards: that those its index names lie in it, so that no other file is read.

    ValueError for an index that cannot be read or names a file outside, FileNotFoundError for a missing one.
    """
    folder = Path(path, arguments.get("subfolder") or "")
    variant = f".{arguments['variant']}" if arguments.get("variant") else ""
    whole = getattr(config, "transformers_weights", None) or f"model{variant}.safetensors"
    index = folder / (whole if whole.endswith(".json") else f"model.safetensors.index{variant}.json")
    if not index.is_file() or ((folder / whole).is_file() and not whole.endswith(".json")):
        return
    where = f"load_quantized: {path}: its {index.name}"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        parts = [os.path.normpath(name).split(os.sep) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is no index of shards ({type(error).__name__}: {error}); copy or download it again"
        ) from None
    # By the names alone: in the hub's cache the files of a folder are links to other folders.
    outside = [name for name, of in zip(names, parts, strict=True) if of[0] in ("..", "")]
    if outside:
        raise ValueError(
            f"{where} names {', '.join(outside)}, outside of the folder; the shards must lie in it: mend the "
            "index, and do not trust the model before you know who wrote it"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{where} names {shown}, of {len(names)} shards, which the folder does not hold; was the "
            "download cut short? copy or download what is missing"
        )


def _check_all_read(path: str, model: str, info: dict[str, Any]) -> None:
    """ValueError when the keys of the files and of the model are not the same, or a shape is not."""
    for name, got, expected in sorted(info["mismatched_keys"]):
        raise ValueError(_shape_error(name, expected, got))
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            names = sorted(info[what])
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            if any(".lora_" in name or "peft_engine" in name for name in names):
                raise ValueError(
                    f"load_quantized: {path} was saved with an adapter attached: {shown}; save the base "
                    "alone (detach or merge_ before save_pretrained) and the adapter with save_adapter"
                )
            raise ValueError(
                f"load_quantized: {path}: {what.replace('_', ' ')} for {model}: {shown}; "
                "is the checkpoint whole, and of this model?"
            )


def _broken_file(path: str) -> str:
    for file in sorted(Path(path).glob("*.safetensors")):
        try:
            safe_open(file, framework="pt")
        except SafetensorError:
            return file.name
    return "a file of it"


def _shape_error(name: str, expected: Iterable[int], got: Iterable[int]) -> str:
    return (
        f"load_quantized: {name}: config.json makes it {tuple(expected)}, the file holds {tuple(got)}; "
        "are both of one model?"
    )


def _model_class(config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return found[0] if found else transformers.AutoModelForCausalLM


class _Stop(BaseException):
    """Carries an error of ours out of transformers' loader, which logs an Exception and reads on."""

    def __init__(self, error: Exception):
        self.error = error


class _Settings(QuantizationConfigMixin):
    """What load_quantized was asked for."""

    def __init__(self, stored: bool, blocksize: int, double_quant: bool, skip_modules: Iterable[str] | None):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.stored = stored
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.skip_modules = skip_modules

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class _Quantizer(HfQuantizer):
    """Quantises the linears and experts of a model while transformers loads it.

    A layer stays a plain nn.Linear that holds packed bytes until all is read, because transformers builds
    anew every buffer that is not in the file; its scales wait in `ready`, by the name that select_linears
    gives it.
    """

    quantization_config: _Settings

    def __init__(self, quantization_config: _Settings, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = quantization_config.stored
        self.ready: dict[str, NF4Tensor] = {}
        self.chosen: set[str] = set()
        self.parents: set[str] = set()  # what a model calls its experts

    def __deepcopy__(self, memo: dict) -> "_Quantizer":
        return self  # transformers copies the converters for each weight; all must fill the one `ready`

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        settings = self.quantization_config
        self.parents = {path.split(".")[-2] for path in experts.weights(model)}
        if not settings.stored:
            names, _ = select_linears(model, settings.skip_modules, "load_quantized", settings.blocksize)
            self.chosen = set(names)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name = _name(model, param_name)
        return name in (self.ready if self.quantization_config.stored else self.chosen)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.quantization_config.stored:
            return []
        read = [WeightConverter([f"weight{end}" for end in STORED], "weight", [_Read(self)])]
        for name in sorted(f".{parent}.{leaf}" for parent in self.parents for leaf in experts.LEAVES):
            read.append(WeightConverter([f"{name}{end}$" for end in STORED], name, [_Read(self)]))
        return read

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise ValueError('load_quantized: device_map must name one device, such as "cpu" or "cuda:0"')
        if not self.ready:
            raise ValueError("load_quantized: the checkpoint holds no weight in NF4")
        for name, q in self.ready.items():
            hold(model, name, dataclasses.replace(q, packed=model.get_parameter(parameter(model, name))))
        _unmark(self, model)
        dense = [name for name, module in model.named_modules() if is_dense(module)]
        first = next(iter(self.ready.values()))
        write_config(model, dense, first.dtype, first.nested_absmax is not None)
        keep_packed(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _name(model: Any, param_name: str) -> str:
    """What select_linears calls a parameter; "" for what is no weight."""
    if experts.owner(model, param_name) is not None:
        return param_name
    name, _, end = param_name.rpartition(".")
    return name if end == "weight" else ""


def _unmark(quantizer: _Quantizer, model: Any) -> None:
    """Takes off transformers' marks of a quantised model: they forbid casts and training, ours allow both."""
    quantizer.remove_quantization_config(model)
    del model.is_quantized
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_is_quantized", False):
            del config._is_quantized
    # The converter that reads NF4 is no part of the model: saving would try to revert it.
    model._weight_conversions = [
        step
        for step in model._weight_conversions
        if not any(isinstance(op, _Read) for op in getattr(step, "operations", ()))
    ]


class _Quantize(ConversionOps):
    """One dense weight to packed bytes."""

    def __init__(self, hf_quantizer: _Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        settings, out = self.hf_quantizer.quantization_config, {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = _name(model, key)
            try:
                expected = model.get_parameter_or_buffer(key).shape
                if weight.shape != expected:
                    raise ValueError(_shape_error(key, expected, weight.shape))
                check_weight(weight, name, "load_quantized")
                q = quantized(model, name, weight, settings.blocksize, settings.double_quant)
            except (ValueError, TypeError) as error:
                raise _Stop(error) from None
            self.hf_quantizer.ready[name] = q
            out[key] = q.packed
        return out


class _Read(ConversionOps):
    """The stored tensors of one weight to packed bytes; a dense weight passes, cast to the model's dtype."""

    def __init__(self, hf_quantizer: _Quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        target = kwargs["target_patterns"][0]  # "weight", or of experts the end of their name
        stored = {
            key.removesuffix("$").replace(target, "weight", 1): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
        weight = stored.get("weight")
        old = model.get_parameter_or_buffer(full_layer_name)
        if weight is not None and len(stored) == 1 and weight.is_floating_point():
            return {target: weight.to(old.dtype)}
        try:
            q = NF4Tensor.from_bnb_state_dict(stored)
        except ValueError as error:
            raise _Stop(ValueError(f"load_quantized: {full_layer_name}: {error}")) from None
        name = _name(model, full_layer_name)
        turned = name != full_layer_name and is_conv1d(type(model.get_submodule(name)))
        expected = tuple(reversed(old.shape)) if turned else tuple(old.shape)
        if q.shape != expected:
            raise _Stop(ValueError(_shape_error(full_layer_name, expected, q.shape)))
        self.hf_quantizer.ready[name] = q
        return {target: q.packed}

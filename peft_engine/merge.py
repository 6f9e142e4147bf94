"""Folds an adapter into its base: W + s B A, accumulated in float32, layer by layer."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from peft_engine.conv1d import is_conv1d, is_linear
from peft_engine.heads import unwrap
from peft_engine.methods import copies, derived, experts, lora_layers, sharded
from peft_engine.methods.attach import attached, detach, require, tensors
from peft_engine.methods.experts import ExpertWeights, apart
from peft_engine.methods.lora import layer_class
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.nn import NF4Linear, NF4Weight, dense_class
from peft_engine.ops.dora_linear import TINY
from peft_engine.ops.nf4 import nf4_quantize

ModelType = TypeVar("ModelType", bound=nn.Module)


def merge_(
    model: ModelType,
    name: str = "default",
    *,
    requantize: bool = False,
    untie: bool = False,
    watch: Callable[[int], None] | None = None,
) -> ModelType:
    """Folds adapter `name` into the model's own weights, in place, takes it off, and returns the model.

    A dense weight keeps its dtype: W + s B A is summed in float32 and rounded once. An NF4 layer becomes a
    dense layer of the dtype it was quantised from; requantize=True keeps it in NF4, and the new weight is
    rounded to it. Copied biases and modules become the base's. Other adapters stay attached, over the changed
    base. untie: a weight that the adapter changes and that another module shares (an output head tied to the
    embedding) becomes the changed module's own, and the config says so; without it such a merge is refused.
    watch: called with the number of steps done, of two for each layer: it is checked, and merged.
    Raises ValueError, nothing changed, for a name that is not attached, for NaN or inf in the adapter or a
    merged weight, and for a tied weight.
    """
    base = unwrap(model)
    sharded.refuse(base, "merge_")
    if not isinstance(require(base, name, "merge_"), LoraConfig):
        raise ValueError(
            f"merge_: {name!r} is no LoRA adapter, and what it computes is no change of a weight: keep it "
            "beside the base"
        )
    broken = [path for path, t in tensors(base, name).items() if not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"merge_: adapter {name!r} holds NaN or inf in {', '.join(broken[:5])}")
    layers = {path: layer for path, layer in lora_layers.layers(base) if name in layer.lora}
    copied = copies.of(base, name)
    tied = _tied(base, [*(f"{path}.weight" for path in layers), *copied])
    if tied and not untie:
        raise ValueError(
            f"merge_: {', '.join(tied)} is tied to another module, which the merge would change too; pass "
            "untie=True to give it a weight of its own"
        )
    for count, (path, layer) in enumerate(layers.items(), 1):
        if not torch.isfinite(merged_weight(layer, name).to(_dtype(layer))).all():
            raise ValueError(
                f"merge_: the merged weight of {path} overflows {_dtype(layer)}; load the base in a wider "
                "dtype"
            )
        if watch is not None:
            watch(count)

    trainable: Any = base.peft_engine_trainable
    for count, (path, layer) in enumerate(layers.items(), len(layers) + 1):
        _fold(layer, name, requantize, own=f"{path}.weight" in tied)
        if watch is not None:
            watch(count)
    values = {path: parameter.detach() for path, parameter in copied.items()}
    detach(base, name)
    for path, value in values.items():
        module, leaf = copies.owner(base, path)
        _set_base(module, leaf, nn.Parameter(value, requires_grad=not attached(base) and path in trainable))
    if tied:
        _config_untied(base)
    _config_quantized(base)
    return model


def merged_weight(layer: Any, name: str) -> torch.Tensor:
    """W + s B A of one layer, float32 (out_features, in_features); of DoRA that with m as its rows' norms.

    Of experts (E, out_features, in_features).
    """
    with torch.no_grad():
        nf4 = isinstance(layer, NF4Weight)
        weight = layer.dequantize(torch.float32) if nf4 else layer.base_weight.float()
        a, b = layer.lora_A[name].float(), layer.lora_B[name].float()
        if weight.dim() == 3:  # of experts
            return torch.baddbmm(weight, b, a, alpha=layer.lora[name].scaling)
        merged = torch.addmm(weight, b, a, alpha=layer.lora[name].scaling)
        if layer.lora[name].dora:
            norm = torch.linalg.vector_norm(merged, dim=1).clamp_min(TINY)
            merged *= (layer.lora_magnitude_vector[name].float() / norm)[:, None]
        return merged


def _dtype(layer: Any) -> torch.dtype:
    return layer.weight_dtype if isinstance(layer, NF4Weight) else layer.weight.dtype


def _fold(layer: Any, name: str, requantize: bool, own: bool) -> None:
    """Puts the merged weight into a layer that still has the adapter; `own`: in a Parameter of its own."""
    weight, dtype = merged_weight(layer, name), _dtype(layer)
    derived.forget(layer)  # what is made of W, for the adapters that stay
    if not isinstance(layer, NF4Weight):
        if own:
            layer.weight = _parameter(layer, weight.to(dtype), layer.weight.requires_grad)
        else:
            layer.base_weight.data.copy_(weight)
    elif requantize:
        old = layer.nf4
        new = nf4_quantize(weight, blocksize=old.blocksize, double_quant=old.nested_absmax is not None)
        new = dataclasses.replace(new, dtype=dtype)
        layer._hold(apart(new) if isinstance(layer, ExpertWeights) else new)
    else:
        layer._release()
        plain = dense_class(layer) if isinstance(layer, NF4Linear) else ExpertWeights
        dense = layer_class(plain)
        setattr(layer, "__class__", dense)  # noqa: B010 (mypy takes the plain form for a narrowing)
        if is_conv1d(plain):
            del layer.in_features, layer.out_features
        layer.weight = _parameter(layer, weight.to(dtype), False)


def _parameter(layer: Any, weight: torch.Tensor, learns: bool) -> nn.Parameter:
    """W as the layer holds it."""
    by_rows = isinstance(layer, (nn.Linear, ExpertWeights))
    return nn.Parameter(weight if by_rows else weight.t(), requires_grad=learns)


def _set_base(module: nn.Module, leaf: str, parameter: nn.Parameter) -> None:
    """Makes `parameter` the base's; it is in place too when no adapter's copy is."""
    old = copies.base_of(module, leaf)
    held: Any = module._modules.get(copies.CHILD)
    if held is not None and leaf in held[copies.BASE]:
        held[copies.BASE][leaf] = parameter
    if module._parameters[leaf] is old:
        module._parameters[leaf] = parameter


def _tied(model: nn.Module, paths: list[str]) -> list[str]:
    """Those of `paths` whose base parameter another module has too."""
    owners = Counter(
        id(copies.base_of(module, leaf))
        for path, module in model.named_modules()
        if copies.CHILD not in path
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    )
    return [path for path in paths if owners[id(copies.base_of(*copies.owner(model, path)))] > 1]


def _config_untied(model: nn.Module) -> None:
    """Tells transformers that nothing is tied any more, or saving and loading would tie it again."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    if getattr(model, "all_tied_weights_keys", None):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]


def _config_quantized(model: nn.Module) -> None:
    """Takes the layers that became dense out of the config's description of the quantisation."""
    config = getattr(model, "config", None)
    described = getattr(config, "quantization_config", None)
    if not isinstance(described, dict) or config is None:
        return
    if not any(isinstance(m, NF4Weight) for m in model.modules()):
        del config.quantization_config
        return
    linears = [path for path, m in model.named_modules() if is_linear(m) and not isinstance(m, NF4Weight)]
    held = {path for path, m in model.named_modules() if isinstance(m, NF4Weight)}
    dense = [*linears, *(path for path in experts.weights(model) if path not in held)]
    described["llm_int8_skip_modules"] = sorted({*(described.get("llm_int8_skip_modules") or ()), *dense})


__all__ = ["merge_", "merged_weight"]

"""A line for each layer of a model: what runs in it, and why nothing faster. Changes nothing."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from peft_engine import dense, dense_layers, dropout, native, stand_ins
from peft_engine.conv1d import is_conv1d, is_linear, plain
from peft_engine.dispatch import BackendError, noted
from peft_engine.heads import describe_head
from peft_engine.methods import (
    copies,
    experts,
    fused_attention,
    lora_experts,
    lora_layers,
    virtual_attention,
)
from peft_engine.methods.bottleneck_layers import Bottlenecks
from peft_engine.methods.sharded import class_of
from peft_engine.nn import NF4Linear
from peft_engine.ops.bottleneck import ALIASES, BOTTLENECK, BottleneckCall
from peft_engine.ops.lora_linear import LORA_LINEAR, LoraLinearCall
from peft_engine.ops.nf4 import NF4Tensor
from peft_engine.report import LayerReport, Report

ROUTER = "its own code, over W + s B A of its few values"
NOT_YET = "its own code runs; peft_engine.optimize(model) fuses it"
DENSE_ALONE = "a dense weight without an adapter: torch's product is as fast"
FASTER = "a dense weight without an adapter: peft_engine.optimize(model) has a faster product for it"
BY_ONEDNN = "a dense float32 weight without an adapter: multiplied by oneDNN where that is the faster one"
SLOW = "a dense weight without an adapter, and torch has no fast product of {} here; float32 has"
MEND = "; peft_engine.optimize(model) has"
SHARDED = "fully_shard has made it a class of its own; call peft_engine.optimize first"
REPLACED = "its forward was replaced on the instance (a hook of accelerate?), so a class would have no effect"


def lines(model: torch.nn.Module) -> Iterator[LayerReport]:
    inside = None  # the adapter layer whose parts follow: its line speaks for them
    head = _head(model)
    # The embedding comes first and has the dtype of the activations, which adapters in float32 have not.
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    by_name = fused_attention.refused(model)
    for name, module in model.named_modules():
        if head is not None and module is head:
            line = _head_line(name, model, head)
            yield line
            if line.fused or _is_plain_linear(head):
                continue
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Bottlenecks):
            yield _bottleneck_line(name, module, dtype)
        if copies.is_ours(name):  # an adapter's own part: a line speaks for all of it
            continue
        if stand_ins.is_peft_layer(module):
            inside = f"{name}." if name else ""
            yield _peft_line(name, module, dtype)
        elif stand_ins.is_bnb_linear(module):
            yield _bnb_line(name, module)
        elif isinstance(module, experts.ExpertWeights):
            continue  # the line of the experts speaks for it
        elif lora_experts.is_router(module):
            yield _own(name, module, "router", ROUTER)
        elif isinstance(module, NF4Linear) or lora_layers.is_adapted(module):
            yield _our_line(name, module) or _dense_line(name, module)
        elif is_linear(module):
            yield _dense_line(name, module)
        else:
            own = _model_line(model, name, module, dtype, by_name)
            found = _virtual_tokens_line(name, module, dtype, own) or own
            if found is not None:
                yield found


def slow(report: Report) -> str:
    """A line on the layers whose products take torch many times as long as in float32; "" where none does."""
    dtypes = {SLOW.format(dtype): dtype for dtype in (torch.bfloat16, torch.float16)}
    reasons = [line.reason.removesuffix(MEND) for line in report.layers]
    found = [dtypes[reason] for reason in reasons if reason in dtypes]
    if not found:
        return ""
    name = str(found[0]).removeprefix("torch.")
    return f"{len(found)} layers are multiplied by torch, which has no fast product of {name} here"


def _head(model: Any) -> torch.nn.Module | None:
    """The output head, for which the loss is an op of its own."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _head_line(name: str, model: torch.nn.Module, head: torch.nn.Module) -> LayerReport:
    line = dataclasses.replace(describe_head(model), name=name)
    if stand_ins.is_stand_in(head):  # a fused adapter around the head: name the class that the model had
        kind = _kind(head)
        reason = line.reason.replace(type(head).__name__, kind)
        line = dataclasses.replace(line, kind=kind, reason=reason)
    if line.fused and plain(type(head)) is torch.nn.Linear:  # it could be, and is not
        line = dataclasses.replace(line, backend="transformers", fused=False, reason=NOT_YET)
    return line


def _is_plain_linear(module: torch.nn.Module) -> bool:
    """A dense linear layer without an adapter, the fused head among them."""
    return plain(type(module)) is torch.nn.Linear or type(module).__module__ == "peft_engine.heads"


def _line(name: str, module: torch.nn.Module, op: str, backend: str, fused: bool, reason: str) -> LayerReport:
    return LayerReport(name, op, backend, fused, reason, _kind(module))


def _kind(module: torch.nn.Module) -> str:
    """The class as the model had it, with its package."""
    kind = stand_ins.stood_for(module)
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _ran(name: str, module: torch.nn.Module, op: str, backend: str, reason: str) -> LayerReport:
    """A line for a layer that calls an op, with the backend that dispatch chooses."""
    fused = backend != "reference"
    reason = reason or ("" if fused else "plain torch; this backend is pinned")
    return _line(name, module, op, backend, fused, reason)


def _either(name: str, module: torch.nn.Module, op: str, backend: str, reason: str) -> LayerReport:
    """A line for a layer that calls an op, or, where the backend is "", whose own code runs."""
    return _ran(name, module, op, backend, reason) if backend else _own(name, module, op, reason)


def _own(name: str, module: torch.nn.Module, op: str, reason: str) -> LayerReport:
    """A line for a layer whose own code runs."""
    return _line(name, module, op, stand_ins.stood_for(module).__module__.split(".")[0], False, reason)


def _not_fused(name: str, module: torch.nn.Module) -> LayerReport:
    """A line for a layer that is no stand-in, although its kind may have one."""
    fused, op, reason = stand_ins.fused_class(module)
    if not stand_ins.unreplaced(module):
        reason = REPLACED
    elif fused is not None:
        reason = NOT_YET if type(module) is class_of(module) else SHARDED
    return _own(name, module, op, reason)


def _product_line(
    name: str,
    module: torch.nn.Module,
    weight: torch.Tensor | NF4Tensor,
    dtype: torch.dtype,
    adapter: torch.Tensor | None,
    op: str = "lora_linear",
) -> LayerReport:
    """A line for a layer that calls ops.lora_linear, or an op around it, with an input of `dtype`."""
    call = LoraLinearCall(
        device=weight.device.type,
        dtype=dtype,
        base="nf4" if isinstance(weight, NF4Tensor) else weight.dtype,
        adapter=None if adapter is None else dtype if adapter.dtype == dtype else torch.float32,
        in_features=weight.shape[1],
        rank=0 if adapter is None else adapter.shape[0],
    )
    try:
        choice = LORA_LINEAR.choose(call)
    except BackendError as error:
        return _line(name, module, op, "none", False, str(error))
    reason = "; ".join(filter(None, (choice.reason, noted("lora_linear"))))
    return _ran(name, module, op, choice.backend, reason)


def _dense_line(name: str, module: Any) -> LayerReport:
    """A line for a dense linear layer without an adapter."""
    kind = plain(class_of(module))
    if kind is not torch.nn.Linear and not is_conv1d(kind) and not lora_layers.is_adapted(module):
        return _own(name, module, "linear", f"no kernel for {type(module).__name__}")
    whose, weight = dense_layers.library(module), module.weight
    if plain(class_of(module)) is not class_of(module):
        if whose == "peft-engine":
            return _line(name, module, "linear", "cpu", True, "")
        mend, reason = "", BY_ONEDNN if whose == "oneDNN" else DENSE_ALONE
    else:
        mend, reason = ("", DENSE_ALONE) if whose == "torch" else (MEND, FASTER)
    if weight.device.type == "cpu" and dense.is_slow(weight.dtype):
        reason = SLOW.format(weight.dtype) + mend
    return _line(name, module, "linear", "torch", False, reason)


def _our_line(name: str, module: Any) -> LayerReport | None:
    """A line for a layer of ours; None for a dense one without an active adapter."""
    nf4 = isinstance(module, NF4Linear)
    weight = module.nf4 if nf4 else module.base_weight
    dtype = (module.compute_dtype or module.weight_dtype) if nf4 else weight.dtype
    adapters = module._modules.get("lora_A", {})
    active = getattr(module, "active_adapter", None)
    names = active if isinstance(active, tuple) else (active,)
    used = next((n for n in names if n in adapters), None)
    if used is None and not nf4:
        return None
    adapter = None if used is None else adapters[used]
    op = "dora_linear" if used is not None and module.lora[used].dora else "lora_linear"
    return _product_line(name, module, weight, dtype, adapter, op)


def _bottleneck_line(name: str, module: Bottlenecks, dtype: torch.dtype) -> LayerReport:
    """A line for the adapters behind a sublayer, with the backend of the one that runs (or of the first)."""
    names = module.active if isinstance(module.active, tuple) else (module.active,)
    adapters: Any = module.adapters
    adapter = next((adapters[n] for n in names if n in adapters), None) or next(iter(adapters.values()))
    config, weight = adapter.config, adapter.down_weight
    norm = config.ln_before or (config.original_ln_before and module.norm[0] is not None)
    call = BottleneckCall(
        device=weight.device.type,
        dtype=dtype,
        weight=weight.dtype,
        activation=ALIASES.get(config.non_linearity, config.non_linearity),
        features=weight.shape[1],
        width=weight.shape[0],
        norm=norm,
    )
    try:
        choice = BOTTLENECK.choose(call)
    except BackendError as error:
        return _line(name, module, "bottleneck", "none", False, str(error))
    guessed = "of no family known here: placed by its name" if module.site.generic else ""
    return _ran(name, module, "bottleneck", choice.backend, "; ".join(filter(None, (guessed, choice.reason))))


def _bnb_line(name: str, module: Any) -> LayerReport:
    if not stand_ins.is_stand_in(module):
        return _not_fused(name, module)
    return _product_line(name, module, module.nf4, module.compute_dtype or module.nf4.dtype, None)


def _peft_line(name: str, module: Any, given: torch.dtype) -> LayerReport:
    from peft_engine import peft_layers

    if not stand_ins.is_stand_in(module):
        return _not_fused(name, module)
    if stand_ins.is_peft_experts(module):
        from peft_engine import peft_experts

        if (why := peft_experts.own_reason(module)) is not None:
            return _own(name, module, "experts", why)
        base, loras = peft_experts.innermost(module), peft_experts.loras(module)
        return _either(name, module, "experts", *experts.running(base, given, loras))
    base = module.get_base_layer()
    names = peft_layers.active_names(module)
    why = peft_layers.own_reason(module, names)
    alone = peft_layers.base_alone(module)
    if why is not None and (not alone or plain(type(base)) is torch.nn.Linear or is_conv1d(type(base))):
        return _own(name, module, "lora_linear", why)
    weight = peft_layers.base_weight(base)
    if isinstance(weight, NF4Tensor) and not alone:
        why = peft_layers.narrowed(given, base.compute_dtype)
        if why is not None:
            return _own(name, module, "lora_linear", why)
    dtype = (base.compute_dtype or weight.dtype) if isinstance(weight, NF4Tensor) else weight.dtype
    adapter = None if alone else module.lora_A[names[0]].weight
    op = "lora_linear" if alone or names[0] not in module.lora_variant else "dora_linear"
    return _product_line(name, module, weight, dtype, adapter, op)


def _virtual_tokens_line(
    name: str, module: torch.nn.Module, dtype: torch.dtype, own: LayerReport | None
) -> LayerReport | None:
    """The line of an attention layer behind virtual tokens, in place of `own`; None where there are none."""
    device = next(module.parameters(), torch.empty(0)).device.type
    found = virtual_attention.describe(module, device, dtype)
    if found is None:
        return None
    backend, reason = found
    if own is not None and own.reason == NOT_YET:  # what is around the attention
        reason = "; ".join(filter(None, (reason, f"the rest: {NOT_YET}")))
    return _either(name, module, "prefix_attention", backend, reason)


def _model_line(
    model: torch.nn.Module, name: str, module: torch.nn.Module, dtype: torch.dtype, by_name: set[int]
) -> LayerReport | None:
    device = next(model.parameters(), torch.empty(0)).device.type
    if isinstance(module, dropout.FusedDropout):
        return _either(name, module, "dropout", *dropout.running(device, dtype))
    fused, op, _ = stand_ins.fused_class(module)
    if fused is not None and not op:
        return None  # torch's own
    if op == "experts" and (stand_ins.is_stand_in(module) or experts.AS_IT_WAS in module.__dict__):
        return _either(name, module, op, *experts.running(module, dtype))
    if op == "gelu" and stand_ins.fused_class(model.get_submodule(name.rpartition(".")[0]))[1] == "swiglu":
        return None  # its line speaks for the activation too
    if stand_ins.is_stand_in(module):
        from peft_engine import layers

        return _either(name, module, *layers.running(module, dtype))
    found = fused_attention.describe(module, device, dtype, by_name) if fused is None else None
    if found is not None:
        backend, why = found
        return _either(name, module, "attention", backend, why or ("" if backend else NOT_YET))
    # What holds another layer of its op leaves the computing to that: T5LayerSelfAttention to T5Attention.
    if not op or any(
        inner is not module and stand_ins.fused_class(inner)[1] == op for inner in module.modules()
    ):
        return None
    return _not_fused(name, module)


def cpu() -> str:
    why = native.load_error()
    return why if why is not None else native.isa()

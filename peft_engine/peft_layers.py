"""Fused stand-ins for PEFT's LoRA layers over Linear and Linear4bit; imports PEFT, so only where it is used.

y = W x + b + sum over the active adapters of s_i B_i A_i drop_i(x), in one call of ops.lora_linear. Several
adapters are one of their summed rank: A = [A_1; A_2; ...], s B = [s_1 B_1, s_2 B_2, ...]. One DoRA adapter is
a call of ops.dora_linear.

PEFT's tensors stay where they are, so its own save, load, merge and switching work on. Whatever is not the
plain case (another variant, a batch of mixed adapters, hooks on the inner layers, ...) runs PEFT's forward
over the fused base, and `own_reason` or `narrowed` says why.
"""

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as lora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from peft_engine import dispatch
from peft_engine.conv1d import is_conv1d, plain
from peft_engine.methods import derived, dora
from peft_engine.methods.lora_layers import MAGNITUDE
from peft_engine.nn import NF4Linear
from peft_engine.ops.dropout import draw_seed
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import DTYPES, NF4Tensor


class _FusedLora(nn.Module):
    """The forward of a LoRA layer through ops.lora_linear."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer: Any = self
        names = active_names(layer)
        if args or kwargs or x.dtype not in DTYPES or own_reason(layer, names) is not None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        base = layer._modules["base_layer"]
        weight, given = base_weight(base), x
        if isinstance(weight, NF4Tensor):
            dtype = base.compute_dtype if isinstance(base, NF4Linear) else base.dtype_for(x)
            if narrowed(x.dtype, dtype) and not dispatch.in_autocast(x.device.type):
                return super().forward(x)  # type: ignore[misc]
            x = x if dtype is None else x.to(dtype)
        a, b, scaling, bias = _adapters(layer, names, x.dtype)
        p = _dropout(layer, names[0])
        if names[0] in layer.lora_variant:
            m = _weight(layer._modules[MAGNITUDE]._modules[names[0]])
            y = dora.product(layer, x, weight, names[0], a, b, m, scaling, bias, p)
        else:
            seed = draw_seed(p, x.device)
            y = lora_linear(x, weight, a, b, scaling, bias=bias, dropout_p=p, seed=seed)
        # bitsandbytes' layer gives back the input's dtype; ours does so where compute_dtype made it another.
        keeps = isinstance(weight, NF4Tensor) and (not isinstance(base, NF4Linear) or x.dtype != given.dtype)
        return y.to(given.dtype) if keeps else y

    def train(self, mode: bool = True) -> Any:
        derived.forget(self, but=derived.BASE)
        return super().train(mode)


class FusedLoraLinear(_FusedLora, lora.Linear):
    """PEFT's lora.Linear, over a dense or an NF4 layer."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if isinstance(self.get_base_layer(), NF4Linear):
            raise ValueError(
                "merge: PEFT adds to the weight itself, and this one is in NF4; save the adapter, load it "
                "with peft_engine.load_adapter and fold it with peft_engine.merge_"
            )
        super().merge(safe_merge, adapter_names)


FUSED: dict[type, type] = {lora.Linear: FusedLoraLinear}

# bitsandbytes' 4-bit layers, to the class with which their product is fused.
BNB: dict[type, type] = {}

if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    from peft_engine import bnb_layers

    class FusedLoraLinear4bit(_FusedLora, Linear4bit):
        """PEFT's lora.Linear4bit, over bitsandbytes' Linear4bit."""

    FUSED[Linear4bit] = FusedLoraLinear4bit
    BNB.update(bnb_layers.FUSED)


def fused_class(layer: Any) -> tuple[type | None, str, str]:
    """The class to give an adapter layer of PEFT, the op, and the reason when there is none."""
    kind = type(layer)
    if kind not in FUSED and kind not in FUSED.values():
        method = kind.__module__.split(".")[-2]
        return None, "lora_linear", f"no fused layer for PEFT's {method}.{kind.__name__}"
    why = _unfit(layer)
    base = layer._modules["base_layer"]
    if why is None and type(base) in BNB:
        why = bnb_layers.fused_class(base)[2] or None
    variants = [_variant(layer, [name], name) for name in layer.lora_A]
    if why is None and variants and all(variants):
        why = variants[0]
    return (FUSED.get(kind, kind) if why is None else None), "lora_linear", why or ""


def active_names(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    held = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in held]


def base_alone(layer: Any) -> bool:
    """Whether the layer now computes its base's product only."""
    return bool(layer.disable_adapters or layer.merged or not active_names(layer))


def base_weight(base: Any) -> torch.Tensor | NF4Tensor:
    """The weight of a base layer that is fit, as ops.lora_linear takes it."""
    if is_conv1d(type(base)):
        return _weight(base).t()
    return _weight(base) if plain(type(base)) is nn.Linear else base.nf4


def own_reason(layer: Any, names: list[str]) -> str | None:
    """Why the layer, as it is set now, runs PEFT's forward; None when it runs the fused one."""
    if layer.disable_adapters:
        return "the adapters are disabled: the base layer runs alone"
    if layer.merged:
        return "the adapters are merged: the base layer runs alone"
    if not names:
        return "none of its adapters is active: the base layer runs alone"
    why = _unfit(layer)
    if why is not None:
        return why
    inner = layer._modules
    if type(inner["base_layer"]) in BNB:
        return "its base layer is not a fused one; call peft_engine.optimize(model) again"
    if not layer.cast_input_dtype_enabled:
        return "PEFT's cast of the input is switched off"
    for name in names:
        if (why := _variant(layer, names, name)) is not None:
            return why
        for part in ("lora_A", "lora_B"):
            module = inner[part]._modules[name]
            if plain(type(module)) is not nn.Linear or _hooked(module):
                return f"{part}.{name} is wrapped or has hooks, which the fused product would pass by"
        if _hooked(inner["lora_dropout"]._modules[name]):
            return f"lora_dropout.{name} has hooks, which the fused product would pass by"
    if len(names) > 1 and any(_dropout(layer, name) > 0.0 for name in names):
        return "several adapters are active with dropout, and each draws a mask of its own"
    return None


def narrowed(given: torch.dtype, compute_dtype: torch.dtype | None) -> str | None:
    """Why inputs of dtype `given` over a 4-bit base keep PEFT's forward, or None.

    One product in compute_dtype would round what the adapter adds, which PEFT keeps in the input's dtype.
    prepare_model_for_kbit_training leads to this: the norms, and so the inputs, are float32.
    """
    if given == compute_dtype or compute_dtype is None:
        return None
    if torch.promote_types(given, compute_dtype) == compute_dtype:
        return None
    return (
        f"inputs are {given} and compute_dtype is {compute_dtype}: the base's product is fused, the "
        "adapter's runs in PEFT at the input's precision; with a compute_dtype as wide, both are one"
    )


def _unfit(layer: Any) -> str | None:
    """What keeps the layer from the fused forward, whichever adapter is active."""
    base = layer._modules["base_layer"]
    turned = is_conv1d(type(base))
    if layer.fan_in_fan_out and not turned:
        return "the weight is stored transposed (fan_in_fan_out)"
    dense = plain(type(base)) is nn.Linear or turned
    if dense and "weight" not in base._parameters:
        return "the base weight is no parameter (pruned, or under weight_norm?)"
    if dense:
        weight = _weight(base)
        if weight.requires_grad:
            return "the base weight is trained too; the kernels take it frozen"
        if weight.dtype not in DTYPES:
            return f"the base weight is {weight.dtype}; the kernels take float32, bfloat16 and float16"
        if weight.device.type == "meta":
            return "the base weight is on the meta device; load the weights first"
    elif type(base) is not NF4Linear and type(base) not in (*BNB, *BNB.values()):
        return f"its base layer is a {type(base).__name__}, which has no kernel"
    if _hooked(base):
        return "the base layer has hooks, which the fused product would pass by"
    return None


def _weight(linear: Any) -> torch.Tensor:
    return linear._parameters["weight"]  # not through Module.__getattr__, which is felt at one token


def _variant(layer: Any, names: list[str], name: str) -> str | None:
    """Why `name`, one of the active ones, is a variant that keeps PEFT's forward; None for LoRA and DoRA."""
    if name not in layer.lora_variant:
        return None
    what, why = type(layer.lora_variant[name]).__name__.removesuffix("Variant").removesuffix("Linear"), ""
    if layer.use_dora.get(name):
        magnitude = layer._modules[MAGNITUDE]._modules[name]
        what = "DoRA"
        if len(names) > 1:
            why = " beside another adapter"
        elif layer._modules["lora_B"]._modules[name].bias is not None:
            why = " with a bias in B"
        elif type(magnitude) is not DoraLinearLayer or _hooked(magnitude):
            why = " whose magnitude is wrapped or has hooks"
        else:
            return None
    return f"adapter {name!r} is {what}{why}; PEFT's own forward runs"


def _hooked(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _dropout(layer: Any, name: str) -> float:
    module = layer._modules["lora_dropout"]._modules[name]
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _adapters(
    layer: Any, names: list[str], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
    """A, B, scaling and bias of the active adapters together; another dtype than `dtype` goes to float32."""
    inner = layer._modules
    downs = [_weight(inner["lora_A"]._modules[name]) for name in names]
    ups = [inner["lora_B"]._modules[name]._parameters for name in names]
    scales = [float(layer.scaling[name]) for name in names]
    bias = inner["base_layer"]._parameters["bias"]
    for up, scale in zip(ups, scales, strict=True):
        if up["bias"] is not None:  # lora_bias
            bias = scale * up["bias"] if bias is None else bias + scale * up["bias"]
    if len(names) == 1:
        a, b, scaling = downs[0], ups[0]["weight"], scales[0]
    else:
        # float32 for all: the scale must not cost a rounding of B to a short dtype
        a = torch.cat([down.float() for down in downs])
        b = torch.cat([scale * up["weight"].float() for up, scale in zip(ups, scales, strict=True)], dim=1)
        scaling = 1.0
    if a.dtype != b.dtype or a.dtype != dtype:
        a, b = a.float(), b.float()
    return a, b, scaling, bias

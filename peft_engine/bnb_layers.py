"""Fused stand-ins for bitsandbytes' 4-bit linear layers; imports bitsandbytes, so only where it is in use.

A fused layer keeps bitsandbytes' tensors where they are and reads them as an NF4Tensor. It never repacks its
weight: bitsandbytes' own forward does so at the first evaluation on a CPU with AVX512-BF16, and rounds the
scales to bfloat16.
"""

from typing import Any, cast

import torch
from bitsandbytes.nn import Linear4bit, LinearNF4
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import ABSMAX_CODE, BLOCKSIZES, CODE, DTYPES, NESTED_BLOCKSIZE, NF4Tensor


class _Fused4bit(torch.nn.Linear):
    """Linear4bit with its product done by ops.lora_linear, from the same bytes."""

    compute_dtype: torch.dtype | None
    compute_type_is_set: bool

    @property
    def nf4(self) -> NF4Tensor:
        """The weight as an NF4Tensor that shares bitsandbytes' tensors."""
        if getattr(self._parameters["weight"], "quant_state", None) is None:
            fix_4bit_weight_quant_state_from_module(cast(Linear4bit, self))
        weight: Any = self._parameters["weight"]
        state = weight.quant_state
        held = self.__dict__.get("_nf4")
        if held is None or held[0] is not weight or held[1].absmax is not state.absmax:
            if is_repacked(self):
                raise ValueError(REPACKED.format(name="this Linear4bit"))
            held = self.__dict__["_nf4"] = (weight, _view(weight, state))
        return held[1]

    def dtype_for(self, x: torch.Tensor) -> torch.dtype:
        """The dtype of the product for this input, settled by the first input as bitsandbytes does."""
        if not self.compute_type_is_set:
            self.set_compute_type(x)  # type: ignore[operator]
            self.compute_type_is_set = True
        return self.compute_dtype or x.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x.to(self.dtype_for(x)), self.nf4, None, None, 1.0, bias=self.bias).to(x.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_nf4"}


class FusedLinear4bit(_Fused4bit, Linear4bit):
    """bitsandbytes' Linear4bit, NF4."""


class FusedLinearNF4(_Fused4bit, LinearNF4):
    """bitsandbytes' LinearNF4."""


FUSED: dict[type, type] = {Linear4bit: FusedLinear4bit, LinearNF4: FusedLinearNF4}

REPACKED = (
    "{name} was repacked by bitsandbytes at an evaluation, which rounds its scales and stops gradients; "
    "load the model again and call optimize before the first evaluation (a fused layer never repacks)"
)


def is_repacked(layer: torch.nn.Module) -> bool:
    """Whether bitsandbytes has changed the bytes to its layout for evaluation."""
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def fused_class(layer: torch.nn.Module) -> tuple[type | None, str, str]:
    """The class to give a 4-bit linear layer, the op, and the reason when there is none."""
    kind = type(layer)
    if kind not in FUSED and kind not in FUSED.values():
        return None, "lora_linear", f"no fused layer for {kind.__name__}"
    why = _unfit(layer)
    return (FUSED.get(kind, kind) if why is None else None), "lora_linear", why or ""


def _unfit(layer: Any) -> str | None:
    if is_repacked(layer):
        return REPACKED.format(name="the weight")
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        return "the weight is not quantised yet; move the model to its device first"
    if state.quant_type != "nf4":
        return f"the weight is {state.quant_type}; only nf4 has kernels (bnb_4bit_quant_type='nf4')"
    if layer.weight.device.type == "meta":
        return "the weight is on the meta device; load the weights first"
    if tuple(state.shape) != (layer.out_features, layer.in_features):
        return f"the weight was packed as {tuple(state.shape)}, not (out_features, in_features)"
    if state.blocksize not in BLOCKSIZES:
        return f"blocksize {state.blocksize}; the kernels take {BLOCKSIZES[0]} to {BLOCKSIZES[-1]}"
    if state.dtype not in DTYPES:
        return f"quantised from {state.dtype}; the kernels take float32, bfloat16 and float16"
    if state.nested and state.state2.blocksize != NESTED_BLOCKSIZE:
        return f"nested blocksize {state.state2.blocksize}; the kernels take {NESTED_BLOCKSIZE}"
    if not state.nested and state.absmax.dtype != torch.float32:
        return f"scales in {state.absmax.dtype}; the kernels take float32, or double quantisation"
    tables = [(state.code, CODE)] + ([(state.state2.code, ABSMAX_CODE)] if state.nested else [])
    if not all(torch.equal(ours, theirs.float().cpu()) for theirs, ours in tables):
        return "the weight was quantised with a table of its own"
    return None


def _view(weight: torch.Tensor, state: Any) -> NF4Tensor:
    packed = weight.detach().as_subclass(torch.Tensor).contiguous().view(torch.uint8).reshape(-1, 1)
    nested = state.state2.absmax if state.nested else None
    offset = state.offset if state.nested else None
    return NF4Tensor(packed, state.absmax, nested, offset, tuple(state.shape), state.blocksize, state.dtype)

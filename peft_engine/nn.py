"""Modules: NF4Linear, a linear layer whose frozen weight is held in NF4, and what others that hold one share.

Its tensors are bitsandbytes': `weight` holds the packed bytes, and the state dict has the keys of Linear4bit
(`weight.absmax`, `weight.quant_state.bitsandbytes__nf4`, ...), so files go both ways.
"""

from collections.abc import Callable
from typing import Any

import torch

from peft_engine.conv1d import features, plain
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import SCALES, NF4Tensor, nf4_quantize

# What follows `weight` in the keys of one layer in a file.
STORED = (
    "",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
)


class NF4Weight(torch.nn.Module):
    """A module's frozen weight in NF4.

    weight          Parameter, uint8 (ceil(numel / 2), 1), never trained
    absmax          buffer, uint8 when double-quantised, else float32
    nested_absmax   buffer, float32, or None; with it offset, a float32 scalar

    A cast (`.to(torch.bfloat16)`, `.half()`) does not reach these: what holds the weight stays as it is.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    blocksize: int
    weight_dtype: torch.dtype
    weight_shape: tuple[int, ...]
    _nf4: NF4Tensor | None = None

    @property
    def nf4(self) -> NF4Tensor:
        """The weight as an NF4Tensor that shares this module's tensors."""
        weight, held, cached = self._parameters["weight"], self._buffers, self._nf4
        if (
            cached is None
            or cached.packed is not weight
            or cached.absmax is not held["absmax"]
            or cached.nested_absmax is not held["nested_absmax"]
            or cached.offset is not held["offset"]
        ):
            scales = (self.absmax, self.nested_absmax, self.offset)
            cached = NF4Tensor(self.weight, *scales, self.weight_shape, self.blocksize, self.weight_dtype)
            self._nf4 = cached
        return cached

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, dense, of `dtype` (None: the one it was quantised from); a layer's as (out_features,
        in_features).
        """
        return self.nf4.dequantize(dtype)

    def extra_repr(self) -> str:
        dtype, nested = str(self.weight_dtype).removeprefix("torch."), self.nested_absmax is not None
        about = f"blocksize={self.blocksize}, double_quant={nested}, dtype={dtype}"
        return ", ".join(filter(None, (super().extra_repr(), about)))

    def _hold(self, q: NF4Tensor) -> None:
        """Takes the tensors of `q` in place of the weight there is."""
        packed = q.packed
        if not isinstance(packed, torch.nn.Parameter):
            packed = torch.nn.Parameter(packed, requires_grad=False)
        self.weight = packed
        for name in SCALES:
            self.register_buffer(name, getattr(q, name), persistent=False)
        self.blocksize, self.weight_dtype = q.blocksize, q.dtype
        self._nf4 = None

    def _release(self) -> None:
        """Gives up all that says NF4, for a dense weight that comes in its place."""
        for buffer in SCALES:
            del self._buffers[buffer]
            self._non_persistent_buffers_set.discard(buffer)
        for attribute in ("blocksize", "weight_dtype", "compute_dtype", "_nf4"):
            self.__dict__.pop(attribute, None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A move must reach the 4-bit data and a cast must not; `fn` may be either, or both at once.
        data = {id(t) for t in (self.weight, self.absmax, self.nested_absmax, self.offset) if t is not None}

        def move(t: torch.Tensor) -> torch.Tensor:
            moved = fn(t)
            return moved if id(t) not in data or moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)
        if self.weight.is_cuda:
            _ = self.nf4  # what its kernels read beside it is made now, not inside a graph's capture
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self.nf4.to_bnb_state_dict(f"{prefix}weight").items():
            if key != f"{prefix}weight":
                destination[key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        key = f"{prefix}weight"
        stored = {k: v for k, v in state_dict.items() if k == key or k.startswith(f"{key}.")}
        # The weight and its scales are read together below; torch reads the rest (bias, children).
        rest = {k: v for k, v in state_dict.items() if k not in stored} | {key: self.weight}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # What hooks added for the layer's children (copies.py): torch looks for that in state_dict.
        state_dict.update({k: v for k, v in rest.items() if k not in state_dict and k != key})
        if strict:
            unexpected_keys += [k for k in stored if k.removeprefix(key) not in STORED]
        if not stored:
            missing_keys.append(key)
            return
        try:
            q = _read(stored, key, self.weight_shape)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if local_metadata.get("assign_to_params_buffers", False):
            self._hold(q)
            return
        with torch.no_grad():
            self.weight.copy_(q.packed)
        self._hold(q.to(self.weight.device, packed=self.weight))


class NF4Linear(NF4Weight, torch.nn.Linear):
    """y = x W^T + bias with W (out_features, in_features) frozen in NF4, as NF4Weight holds it.

    bias            Parameter or None, as the dense layer had it
    compute_dtype   dtype of the product; None (the default) takes the input's

    A cast (`.to(torch.bfloat16)`, `.half()`) reaches the bias only.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
    ):
        """A layer as torch initialises it, quantised; `dtype`: of the bias and of `dequantize()`."""
        super().__init__(in_features, out_features, bias, device, dtype)
        self._hold(nf4_quantize(self.weight, blocksize=blocksize, double_quant=double_quant))

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *, blocksize: int = 64, double_quant: bool = True
    ) -> "NF4Linear":
        """A new layer with the weight of `linear` quantised, on its device, sharing its bias Parameter.

        Raises TypeError for another class, and for a weight that is not float32, bfloat16 or float16.
        """
        if plain(type(linear)) is not torch.nn.Linear:
            raise TypeError(f"NF4Linear.from_linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        q = nf4_quantize(linear.weight, blocksize=blocksize, double_quant=double_quant)
        new = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        new.bias = linear.bias
        new.train(linear.training)
        return become_nf4(new, q)

    @property
    def weight_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.out_features, self.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype
        if dtype is None or dtype == input.dtype:
            return lora_linear(input, self.nf4, None, None, 1.0, bias=self.bias)
        return lora_linear(input.to(dtype), self.nf4, None, None, 1.0, bias=self.bias).to(input.dtype)


def _read(stored: dict[str, torch.Tensor], key: str, shape: tuple[int, ...]) -> NF4Tensor:
    if key in stored and len(stored) == 1 and stored[key].is_floating_point():
        raise ValueError(
            f"NF4Linear: {key} is a dense weight ({stored[key].dtype}), expected NF4; load it into the dense "
            "model and quantise then, or use load_quantized"
        )
    q = NF4Tensor.from_bnb_state_dict(stored, key)
    if q.shape != shape:
        raise ValueError(f"NF4Linear: {key} must have shape {shape}, got {q.shape}; is it of another model?")
    return q


def become_nf4(linear: torch.nn.Module, q: NF4Tensor) -> NF4Linear:
    """`linear` itself, turned into an NF4Linear that holds `q`: hooks, bias and references to it stay.

    A Conv1D of transformers' too, whose transposed weight `q` is, as bitsandbytes has it.
    """
    k, n = features(linear)
    linear.__class__ = NF4Linear
    assert isinstance(linear, NF4Linear)
    linear.in_features, linear.out_features = k, n
    linear._hold(q)
    return linear


def dense_class(layer: NF4Linear) -> type[torch.nn.Module]:
    """The class that a layer had before it became an NF4Linear."""
    if "nx" not in layer.__dict__:
        return torch.nn.Linear
    from transformers.pytorch_utils import Conv1D

    return Conv1D

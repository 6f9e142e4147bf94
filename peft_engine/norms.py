"""Fused norms, as methods for the classes of transformers' norms (layers.py): RMSNorm and LayerNorm."""

# mypy: disable-error-code="misc"
# (the mixins come first in the order of resolution in order to override what the models declare)

import functools

import torch
from torch.nn import functional as F

from peft_engine import dispatch, recompute
from peft_engine.ops.rms_norm import rms_norm


class RMSNorm:
    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            # A float32 weight beside a half-precision input gives float32, as the layer's own product does.
            dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        return rms_norm(hidden_states, weight, self.variance_epsilon)


class RMSNormOfInput(RMSNorm):
    """As OLMo 2 has it: the result has the input's dtype whatever the weight's."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, _beside(hidden_states, self.weight), self.variance_epsilon)


class RMSNormOfWeight(RMSNorm):
    """As T5 has it: the result has the weight's dtype, if that is half precision, whatever the input's."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        y = super().forward(hidden_states)
        return y if self.weight.dtype == torch.float32 else y.to(self.weight.dtype)


class RMSNormOfOnes:
    """As Gemma has it: the weight is what is added to 1."""

    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, _beside(x, self.weight), self.eps, offset=1.0)


class RMSNormWithScale(RMSNormOfOnes):
    """As Gemma 4 has it, where it has a weight, by which it multiplies."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, _beside(hidden_states, self.weight), self.eps)


def _beside(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The weight of a norm that gives x's dtype: of that dtype or float32."""
    return weight if weight.dtype == x.dtype else weight.float()


class LayerNorm:
    """torch's own, whose output the layers behind it need not keep."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if dispatch.in_autocast(input.device.type):
            return y  # autocast, which the backward is without, may have computed in float32
        parts = [t for t in (self.weight, self.bias) if t is not None]
        run = functools.partial(_layer_norm, self.normalized_shape, self.weight is not None, self.eps)
        return recompute.made_by(y, run, input, weights=parts)


def _layer_norm(shape, has_weight: bool, eps: float, x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    weight = parts[0] if has_weight else None
    return F.layer_norm(x, shape, weight, parts[-1] if len(parts) > has_weight else None, eps)

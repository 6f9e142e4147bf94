"""The experts of transformers' models: a fused layer, and what holds their weights in NF4 or under adapters.

transformers keeps the weights of all experts of a layer in two Parameters of three dimensions, gate_up_proj
and down_proj. One that is quantised or has adapters is taken out of there by `hold` into a module of the
same name, which `release` undoes. The names in a state dict stay as the model has them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peft_engine.dispatch import BackendError
from peft_engine.made_classes import stands_for, subclass
from peft_engine.methods.sharded import class_of
from peft_engine.nn import STORED, NF4Weight
from peft_engine.ops.experts import EXPERTS, ExpertsCall, Lora, experts, not_sliced, reference
from peft_engine.ops.nf4 import DTYPES, NF4Tensor, resolve_absmax

LEAVES = ("gate_up_proj", "down_proj")  # in the order in which the models have them
AS_IT_WAS = "peft_engine_class"  # in the __dict__ of experts of which something is held: their class without


# --- weights ------------------------------------------------------------------------------------------------


class ExpertWeights(nn.Module):
    """The frozen weights (E, out_features, in_features) that the model has as one Parameter."""

    weight: torch.Tensor
    weight_shape: tuple[int, ...]

    @property
    def base_weight(self) -> torch.Tensor | NF4Tensor:
        return self.weight

    def adapter(self) -> Lora | None:
        """The adapter that is active; there is none here."""
        return None

    def extra_repr(self) -> str:
        return "experts={}, out_features={}, in_features={}".format(*self.weight_shape)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for end in STORED:
            if (key := f"{prefix}weight{end}") in destination:
                destination[f"{prefix[:-1]}{end}"] = destination.pop(key)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys += [prefix[:-1] if key == f"{prefix}weight" else key for key in missing]


class NF4ExpertWeights(ExpertWeights, NF4Weight):
    """The weights of all experts in NF4, one after the other."""

    @property
    def base_weight(self) -> NF4Tensor:
        return self.nf4


def hold(module: nn.Module, leaf: str) -> ExpertWeights:
    """The module that holds one of the weights of a layer's experts, which then run the fused layer."""
    there = module._modules.get(leaf)
    if there is not None:
        return there  # type: ignore[return-value]
    if AS_IT_WAS not in module.__dict__:
        if why := _refusal(module):
            raise TypeError(f"its {leaf} stays as it is: {why}")
        module.__dict__[AS_IT_WAS] = type(module)
        module.__class__ = _fused(class_of(module))
    held = ExpertWeights()
    held.weight = module._parameters.pop(leaf)  # type: ignore[assignment]
    held.weight_shape = tuple(held.weight.shape)
    held.train(module.training)
    module._modules[leaf] = held
    return held


def release(module: nn.Module, leaf: str) -> None:
    """Puts a dense weight without adapters back where the model has it."""
    held: Any = module._modules[leaf]
    if type(held) is not ExpertWeights:
        return
    del module._modules[leaf]
    module.register_parameter(leaf, held.weight)  # type: ignore[arg-type]
    for name in LEAVES:  # in the model's order, which is that of an optimizer's list
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    if not any(name in module._modules for name in LEAVES):
        module.__class__ = module.__dict__.pop(AS_IT_WAS)


def become_nf4(held: ExpertWeights, q: NF4Tensor) -> None:
    """`held` itself, turned into weights in NF4."""
    held.__class__ = NF4ExpertWeights
    assert isinstance(held, NF4ExpertWeights)
    held.weight_shape = q.shape
    held._hold(apart(q))


def apart(q: NF4Tensor) -> NF4Tensor:
    """The same values with scales of which each expert has its own: in float32 where the bytes are shared."""
    if q.nested_absmax is None or not_sliced(q.shape, q.blocksize, nested=True) is None:
        return q
    return dataclasses.replace(q, absmax=resolve_absmax(q), nested_absmax=None, offset=None)


def owner(model: nn.Module, path: str) -> tuple[nn.Module, str] | None:
    """The experts and the name of the weight at `path`, held or not; None for what is no such weight."""
    parent, _, leaf = path.rpartition(".")
    if leaf not in LEAVES:
        return None
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    return (module, leaf) if is_experts(module) else None


def weights(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """All weights of experts in three dimensions, by path, with their owner and name there."""
    return {
        f"{path}.{leaf}".removeprefix("."): (module, leaf)
        for path, module in model.named_modules()
        if is_experts(module)
        for leaf in LEAVES
        if leaf in module._parameters or leaf in module._modules
    }


_LINEAR = ("peft_engine.nn", "peft_engine.methods.lora")  # where linear layers of ours are


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules beside a layer's experts whose weight (E, in_features) gives each token its own, by path.

    Plain linear layers are not among them: they are treated as such.
    """
    found = {}
    for path, module in model.named_modules():
        kept = module._modules.items()
        counts = {shape_of(part, LEAVES[0])[0] for _, part in kept if part is not None and is_experts(part)}
        for name, part in kept if counts else ():
            where = type(part).__module__
            plain = where in _LINEAR or where.split(".")[0] in ("torch", "bitsandbytes", "peft")
            weight = None if part is None or plain else part._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and weight.shape[0] in counts:
                found[f"{path}.{name}".removeprefix(".")] = part
    return found  # type: ignore[return-value]


def shape_of(module: nn.Module, leaf: str) -> tuple[int, ...]:
    """(E, out_features, in_features) of a weight, held or not."""
    held: Any = module._modules.get(leaf)
    return held.weight_shape if held is not None else tuple(module._parameters[leaf].shape)  # type: ignore[union-attr]


# --- the fused layer ----------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """Each token's experts, one expert after another."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        held: list[Any] = [self._modules.get(leaf) for leaf in LEAVES]
        # A parametrization, or what was set after the layer was fused: with something held there is no other.
        alone = not is_experts(self) or not _activation(self) or (torch.is_grad_enabled() and _learns(self))
        if alone and not any(held):
            return super().forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[misc]
        loras = [None if part is None else part.adapter() for part in held]
        return compute(self, hidden_states, top_k_index, top_k_weights, loras)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for leaf in LEAVES:
            if leaf in self._modules:
                for end in STORED:
                    if (key := f"{prefix}{leaf}{end}") in state_dict:
                        state_dict[f"{prefix}{leaf}.weight{end}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


def compute(
    module: Any, x: torch.Tensor, index: torch.Tensor, shares: torch.Tensor, loras: Sequence[Lora | None]
) -> torch.Tensor:
    """What a layer of experts gives, with the adapters on its two weights."""
    parts = [module._modules.get(leaf) for leaf in LEAVES]
    gate_up, down = (
        module._parameters[leaf] if part is None else part.base_weight
        for leaf, part in zip(LEAVES, parts, strict=True)
    )
    # One of the two may learn beside one that is held.
    run = reference if torch.is_grad_enabled() and _learns(module) else experts
    flat, pairs = x.reshape(-1, x.shape[-1]), index.shape[-1]
    index, shares = index.reshape(-1, pairs), shares.reshape(-1, pairs)
    up_lora, down_lora = loras
    activation = _activation(module)
    if not activation:  # set after the adapters
        mend = "take that off, or the adapters: peft_engine.detach(model)"
        raise ValueError(f"experts: {_refusal(module)}; {mend}")
    y = run(flat, index, shares, gate_up, down, activation, gate_up_lora=up_lora, down_lora=down_lora)
    return y.view(x.shape)


def is_experts(module: nn.Module) -> bool:
    """Whether a module's class says, as transformers' experts do, how its weights lie, and has the two."""
    kept = module._parameters, module._modules
    return hasattr(module, "is_transposed") and all(any(leaf in of for of in kept) for leaf in LEAVES)


def fused_class(module: nn.Module) -> tuple[type | None, str, str]:
    """The fused class for experts (their own, where they have it), the op, and why there is none.

    ("", "") beside None for a module that is none.
    """
    if not is_experts(module):
        return None, "", ""
    why = _refusal(module)
    other = {p.dtype for p in module._parameters.values() if p is not None}.difference(DTYPES)
    if not why and other:
        why = f"no kernel takes {other.pop()}"
    return (None, "experts", why) if why else (_fused(class_of(module)), "experts", "")


def _refusal(module: Any) -> str:
    from transformers.integrations.moe import _default_apply_gate

    from peft_engine.layers import is_watched  # imports transformers, which has made the module

    kind = module.__dict__.get(AS_IT_WAS, class_of(module)).__name__
    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate or not module.has_gate:
        return f"{kind} has a gate of its own; the fused one is act(gate) * up"
    if module.is_transposed or not module.is_concatenated:
        return f"the weights of {kind} lie (in_features, out_features), or gates and ups by turns"
    if module.has_bias or module.has_post_expert_norm:
        return f"{kind} has a bias or a norm for each expert"
    if "forward" in module.__dict__:
        return f"the forward of {kind} was replaced (by a device map?); load the model on one device"
    if is_watched(module.act_fn):
        return "its activation has hooks or another forward, which the fused product would pass by"
    if not _activation(module):
        return f"its activation is {type(module.act_fn).__name__}; the fused ones are SiLU and GELU"
    return ""


def _learns(module: Any) -> bool:
    """Whether one of the model's own weights is not frozen, as it is for the kernels."""
    kept = module._parameters
    return any(kept[leaf].requires_grad for leaf in LEAVES if leaf in kept)


def _activation(module: Any) -> str:
    from peft_engine.layers import activation_of  # imports transformers, which has made the module

    return activation_of(module.act_fn)


@functools.cache
def _fused(kind: type) -> type:
    """The fused class for a class of experts (or itself)."""
    if kind.__module__ == __name__:
        return kind
    return subclass(_Experts, kind, __name__)  # type: ignore[no-any-return]


def __getattr__(name: str) -> type:
    return _fused(stands_for(name, __name__))  # a pickle's


def running(module: Any, dtype: torch.dtype, loras: Sequence[Lora | None] | None = None) -> tuple[str, str]:
    """The backend that runs in a fused layer, for an input of `dtype`, and why none faster ("": its own).

    loras: the adapters, where they are not the layer's own.
    """
    parts = [module._modules.get(leaf) for leaf in LEAVES]
    why = _refusal(module)
    if not why and module.training and _learns(module):
        why = "its weights learn, and for the kernels they are frozen"
    if why:
        return "reference" if any(parts) else "", why
    nf4 = any(isinstance(part, NF4ExpertWeights) for part in parts)
    if loras is None:
        loras = [part.adapter() for part in parts if part is not None]
    rank = max((lora.a.shape[1] for lora in loras if lora is not None), default=0)
    device = next(module.parameters()).device.type
    try:
        choice = EXPERTS.choose(ExpertsCall(device, dtype, "nf4" if nf4 else dtype, rank))
    except BackendError as error:
        return "", str(error)
    return choice.backend, choice.reason

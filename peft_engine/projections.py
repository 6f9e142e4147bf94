"""How a fused layer calls the linear layers inside it.

Dense ones by the library that is the fastest, and with room behind rows for their adapters.
"""

from typing import Any

import torch

from peft_engine import dense
from peft_engine.activations import spare_width
from peft_engine.methods.lora import LoraLinear, LoraNF4Linear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS)


def project(module: Any, x: torch.Tensor) -> torch.Tensor:
    """module(x); a dense layer's product by the library that is the fastest (dense.py)."""
    if not is_dense(module):
        return module(x)
    if type(module) is LoraLinear:
        return module.forward(x, dense.linear)
    return dense.linear(x, module.weight, module.bias)


def library(module: Any) -> str:
    """Whose product runs in a dense linear layer that a fused layer calls, as dense.library says."""
    frozen = is_dense(module) and not any(
        p.requires_grad for p in (module.weight, module.bias) if p is not None
    )
    return dense.library(module.weight) if frozen else "torch"


def is_dense(module: Any) -> bool:
    """Whether a call of the module is its forward alone, and that of a dense linear layer."""
    if type(module) not in (torch.nn.Linear, LoraLinear) or "forward" in module.__dict__:
        return False
    return not any(module.__dict__[hooks] for hooks in _HOOKS) and not any(_GLOBAL_HOOKS)


def spare_of(module: Any, dtype: torch.dtype) -> int:
    """The spare columns that a linear layer's one adapter uses behind rows of a dtype."""
    adapters = module._modules.get("lora_A")
    if adapters is None:
        return 0
    if isinstance(module, (LoraLinear, LoraNF4Linear)):
        name = module.active_adapter
        a = adapters._parameters.get(name) if isinstance(name, str) else None
    else:  # PEFT's, whose adapters are linear layers by name
        names = [name for name in module.active_adapters if name in adapters]
        a = adapters[names[0]].weight if len(names) == 1 else None
    return 0 if a is None else spare_width(a.shape[0], a.dtype, dtype)

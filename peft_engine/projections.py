"""How a fused layer calls the linear layers inside it: with room behind rows for their adapters."""

from typing import Any

import torch

from peft_engine.activations import spare_width
from peft_engine.methods.lora import LoraLinear, LoraNF4Linear


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

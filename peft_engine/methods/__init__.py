"""The PEFT methods: one file each, and how they attach to a model."""

from peft_engine.methods.attach import active, adapters_without_gradient, attach, detach
from peft_engine.methods.lora import LoraConfig

__all__ = ["LoraConfig", "active", "adapters_without_gradient", "attach", "detach"]

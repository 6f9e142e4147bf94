"""The PEFT methods: one file each, and how they attach to a model."""

from peft_engine.methods.attach import active, adapters_without_gradient, attach, detach
from peft_engine.methods.bottleneck_config import BottleneckConfig
from peft_engine.methods.lora_config import LoraConfig
from peft_engine.methods.prefix_tuning import PrefixTuningConfig
from peft_engine.methods.prompt_tuning import PromptTuningConfig

__all__ = [
    "BottleneckConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "active",
    "adapters_without_gradient",
    "attach",
    "detach",
]

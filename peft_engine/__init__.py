"""peft-engine: PEFT methods whose hot paths are hand-written kernels, swapped into models people have."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Each public name and the module it lives in, imported when first asked for: `import peft_engine` is free.
_HOME = {
    "quantize_": "quantize",
    "load_quantized": "quantize",
    "LoraConfig": "methods",
    "PrefixTuningConfig": "methods",
    "PromptTuningConfig": "methods",
    "BottleneckConfig": "methods",
    "attach": "methods",
    "detach": "methods",
    "active": "methods",
    "merge_": "merge",
    "save_adapter": "checkpoint",
    "load_adapter": "checkpoint",
    "optimize": "swap",
    "unoptimize": "swap",
    "explain": "swap",
    "Report": "report",
    "available_backends": "dispatch",
    "force_backend": "dispatch",
    "nn": "nn",
    "ops": "ops",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'peft_engine' has no attribute {name!r}")
    module = importlib.import_module(f"peft_engine.{home}")
    value = module if name == home else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

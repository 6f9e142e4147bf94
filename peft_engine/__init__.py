"""peft-engine: PEFT methods whose hot paths are hand-written kernels, swapped into models you already have."""

__version__ = "0.1.0"

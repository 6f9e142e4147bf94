"""Loads the compiled CPU library, declares the raw ops, and tells the instruction set in use.

The schemas are declared here, in Python, because they must exist where no compiler ran; the library registers
the CPU implementations only. This is the one file that knows the library's path.
"""

import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_native.so"

ISA_LEVELS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")

library = torch.library.Library("peft_engine", "DEF")


@torch.compiler.assume_constant_result  # asked while torch.compile traces, which cannot trace the loading
def load_error() -> str | None:
    """Loads the library once; None when it is usable, else why not and the mend."""
    return _load()


@functools.cache
def _load() -> str | None:
    if not LIBRARY.exists():
        return (
            "the CPU kernels are not compiled (no C++ compiler when peft-engine was installed?); "
            "install g++ and run: pip install --no-build-isolation --force-reinstall --no-deps peft-engine"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}; "
            "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps peft-engine"
        )
    wanted = os.environ.get("PEFT_ENGINE_CPU_ISA")
    if wanted:
        set_isa(wanted)
    return None


def isa() -> str:
    """The instruction set the CPU kernels run with."""
    return ISA_LEVELS[torch.ops.peft_engine.cpu_isa(-1)]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets this machine has, lowest first."""
    best = torch.ops.peft_engine.cpu_isa(-2)
    return ISA_LEVELS[: best + 1]


def set_isa(name: str) -> None:
    """Pins the CPU kernels to an instruction set (PEFT_ENGINE_CPU_ISA does so from the start)."""
    if name not in ISA_LEVELS:
        raise ValueError(f"PEFT_ENGINE_CPU_ISA: expected one of {', '.join(ISA_LEVELS)}, got {name!r}")
    if name not in supported_isas():
        raise ValueError(
            f"PEFT_ENGINE_CPU_ISA: this CPU has {', '.join(supported_isas())}, got {name!r}; choose one"
        )
    torch.ops.peft_engine.cpu_isa(ISA_LEVELS.index(name))


library.define("cpu_isa(int level) -> int", tags=())

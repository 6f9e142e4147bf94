"""Loads the compiled libraries: of the CPU's kernels, which registers ops with torch, and of CUDA's, a C ABI.

The schemas are declared here, in Python, because they must exist where no compiler ran; the CPU library
registers the CPU implementations only. The CUDA library knows nothing of torch, and loads beside a torch
without CUDA. This is the one file that knows their paths.
"""

import contextlib
import ctypes
import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "_native.so"
CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"
CUDA_ABI = 2
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps peft-engine"

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
            f"install g++ and run: {_REBUILD}"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__}: {error}; rebuild it: {_REBUILD}"
    wanted = os.environ.get("PEFT_ENGINE_CPU_ISA")
    if wanted:
        _pin_isa(wanted)
    return None


def _need() -> None:
    why = load_error()
    if why is not None:
        raise RuntimeError(f"the CPU kernels cannot be used: {why}")


def isa() -> str:
    """The instruction set the CPU kernels run with. RuntimeError where there are none, with the reason."""
    _need()
    return ISA_LEVELS[torch.ops.peft_engine.cpu_isa(-1)]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets this machine has, lowest first. RuntimeError as by isa()."""
    _need()
    return _supported()


def set_isa(name: str) -> None:
    """Pins the CPU kernels to an instruction set (PEFT_ENGINE_CPU_ISA does so from the start).

    ValueError names those that this CPU has; RuntimeError as by isa().
    """
    _need()
    _pin_isa(name)


def _supported() -> tuple[str, ...]:
    return ISA_LEVELS[: torch.ops.peft_engine.cpu_isa(-2) + 1]


def _pin_isa(name: str) -> None:
    if name not in ISA_LEVELS:
        raise ValueError(f"PEFT_ENGINE_CPU_ISA: expected one of {', '.join(ISA_LEVELS)}, got {name!r}")
    if name not in _supported():
        raise ValueError(
            f"PEFT_ENGINE_CPU_ISA: this CPU has {', '.join(_supported())}, got {name!r}; choose one"
        )
    torch.ops.peft_engine.cpu_isa(ISA_LEVELS.index(name))


library.define("cpu_isa(int level) -> int", tags=())


# --- CUDA ---------------------------------------------------------------------------------------------------

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_WEIGHT = [_POINTER, _POINTER, _POINTER, _POINTER, _INT]  # packed, absmax, nested_absmax, offset, blocksize
# Function to result and arguments: csrc/cuda/*.cu, PE_API.
_CUDA_FUNCTIONS: dict[str, tuple] = {
    "pe_cuda_abi": (_INT, []),
    "pe_cuda_error": (ctypes.c_char_p, [_INT]),
    "pe_cuda_capture": (ctypes.c_uint64, [_POINTER, _INT]),
    "pe_cuda_probe": (_INT, [_INT]),
    "pe_nf4_dequantize": (_INT, [*_WEIGHT, _POINTER, _INT, _LONG, _LONG, _LONG, _INT, _POINTER]),
    "pe_lora_linear_workspace": (_LONG, [_INT, _LONG, _LONG, _INT, _INT]),
    "pe_lora_linear_nf4": (
        _INT,
        [
            *(_POINTER, _LONG, _INT, _LONG, *_WEIGHT, _LONG),  # x ... n
            *(_POINTER, _POINTER, _INT, _INT, ctypes.c_float),  # lora_a ... scaling
            *(_POINTER, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER),  # bias ... stream
        ],
    ),
    "pe_bottleneck_workspace": (_LONG, []),
    "pe_bottleneck_forward": (
        _INT,
        [
            *(_POINTER, _POINTER, _INT, _LONG, *[_POINTER] * 4, _INT),  # x ... width
            *(_POINTER, _POINTER, ctypes.c_float, _INT, ctypes.c_float),  # norm_weight ... scaling
            *([_INT] * 3),  # dtypes
            *([_POINTER] * 4),  # y ... workspace
            *(_INT, _POINTER),
        ],
    ),
    "pe_prefix_attention_workspace": (_LONG, [_INT] * 9),
    "pe_prefix_attention_decode": (
        _INT,
        [
            *([_POINTER] * 6),  # q, k, v, prefix_k, prefix_v, strides
            *([_INT] * 8),  # batch ... shared_prefix
            *(_POINTER, _POINTER, _INT, ctypes.c_float, _INT, _INT),  # first ... prefix_dtype
            *(_POINTER, _POINTER, _POINTER, _INT, _POINTER),  # out ... stream
        ],
    ),
}


# CUDA's numbers for a driver older than the library's runtime or PTX, and for no code for the device.
_OLD_DRIVER, _NO_CODE = (35, 36, 222, 803, 804), (98, 209)


@torch.compiler.assume_constant_result
def cuda_error(index: int | None = None) -> str | None:
    """None when the CUDA kernels are usable on a device, else why not and the mend.

    index: the device's; None for the current one.
    """
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _cuda_error(index)


@functools.cache
def _cuda_error(index: int | None) -> str | None:
    if index is None or not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (7, 5):
        return f"its kernels need compute capability 7.5 (sm_75), this GPU has {major}.{minor}"
    library = _load_cuda()
    if isinstance(library, str):
        return library
    with on_device(index):
        code = library.pe_cuda_probe(index)
    if code == 0:
        return None
    words = f"CUDA error {code}: {library.pe_cuda_error(code).decode()}"
    if code in _NO_CODE:
        return (
            f"{CUDA_LIBRARY.name} has no code for this GPU, sm_{major}{minor} ({words}); rebuild it: "
            f"PEFT_ENGINE_CUDA_ARCHS={major}{minor} {_REBUILD}"
        )
    if code in _OLD_DRIVER:
        return f"the NVIDIA driver is too old for {CUDA_LIBRARY.name} ({words}); update the driver"
    return f"{CUDA_LIBRARY.name} cannot run on this GPU ({words}); see nvidia-smi"


_ALREADY = contextlib.nullcontext()


def on_device(index: int | None) -> contextlib.AbstractContextManager:
    """Inside, a GPU is torch's current one; None for the CPU, where there is nothing to do.

    For calls of the library, which would make it so itself, and by putting the former back make a context
    there: hundreds of MB of a GPU that the process may not use. torch makes none.
    """
    if index is None or index == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(index)


def cuda() -> ctypes.CDLL:
    """The CUDA library, its functions' types set; RuntimeError says why it cannot be had.

    It loads without a GPU, too; whether it can run is what `cuda_error` tells.
    """
    loaded = _load_cuda()
    if isinstance(loaded, str):
        raise RuntimeError(f"the CUDA kernels cannot be used: {loaded}")
    return loaded


@functools.cache
def _load_cuda() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not CUDA_LIBRARY.exists():
        return (
            "the CUDA kernels are not compiled (no nvcc when peft-engine was installed?); install CUDA or "
            f'pip install "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2", then run: {_REBUILD}'
        )
    try:
        library = ctypes.CDLL(str(CUDA_LIBRARY))
        abi = library.pe_cuda_abi()
        if abi == CUDA_ABI:
            for name, (result, arguments) in _CUDA_FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return f"{CUDA_LIBRARY.name} does not load: {error}; rebuild it: {_REBUILD}"
    if abi != CUDA_ABI:
        return f"{CUDA_LIBRARY.name} has ABI {abi}, expected {CUDA_ABI}; rebuild it: {_REBUILD}"
    return library


def cuda_check(code: int, who: str) -> None:
    """Raises RuntimeError, with CUDA's own words, for what a function of the library returned but 0."""
    if code != 0:
        raise RuntimeError(f"{who}: CUDA error {code}: {cuda().pe_cuda_error(code).decode()}")

"""Which path a product of lora_linear takes on a GPU: by its rows, inside the op, so that no trace depends on
them.

few_rows    CUDA: the packed weight decoded in registers, 1 to 64 rows, bound by the bytes of the weight
single      Triton: the weight decoded on chip, the adapter in the epilogue
workspace   the weight dequantised once beside the adapter, and one library product

`pinned` pins one, for tests and benchmarks.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft_engine.kernels.lora_linear import tiles

from peft_engine import dispatch, native

PATHS = ("few_rows", "single", "workspace")

# The crossovers, in us on an H200 (graph replay, bench/results/nvidia-h200/gpu_few_rows.csv), for the paths
# few_rows / single / workspace:
#     4096x4096, no adapter    16 rows 9 / 88 / 21     32 rows 26 / 87 / 21     64 rows 41 / 49 / 21
#     4096x4096, r=16          16 rows 18 / 94 / 29    32 rows 35 / 93 / 30     64 rows 54 / 62 / 29
#     14336x4096, no adapter   16 rows 24 / 105 / 75   32 rows 36 / 108 / 72    64 rows 62 / 65 / 74
#     14336x4096, r=16         16 rows 31 / 111 / 83   32 rows 44 / 114 / 81    64 rows 81 / 86 / 83
#     4096x14336, no adapter   16 rows 21 / 300 / 73   32 rows 43 / 301 / 74    64 rows 73 / 175 / 76
# The single kernel wins nowhere but for 64 rows of half precision and many result columns (its programs)
# without an adapter, where few_rows cannot run; its backward and float32 were not measured. It is there for
# weights whose workspace does not fit.
FEW_ROWS, FEW_ROWS_OF_LARGE = 16, 64
LARGE = 1 << 25  # weights
SINGLE_ROWS, SINGLE_GIVES = range(33, 65), 8192  # result columns from

_pinned: str | None = None


@contextlib.contextmanager
def pinned(path: str) -> Iterator[None]:
    """Inside, `path` runs; where it cannot, ValueError says why."""
    global _pinned
    if path not in PATHS:
        raise ValueError(f"pinned: expected one of {', '.join(PATHS)}, got {path!r}")
    before, _pinned = _pinned, path
    try:
        yield
    finally:
        _pinned = before


def choose(direction: str, x, base, gives: int, a, dropout_p: float) -> str:
    """The path for x (M, K), or dy (M, N), and a weight that gives `gives` columns."""
    arguments = direction, x, base, gives, a, dropout_p
    if _pinned is not None:
        # there is no backward for few rows: dx by the kernel nearest to it
        path = "single" if _pinned == "few_rows" and direction == "backward" else _pinned
        why = refuse(path, *arguments)
        if why is not None:
            raise ValueError(f"lora_linear: path {path!r} is pinned but cannot run this call: {why}")
        return path
    rows = x.shape[0]
    few = FEW_ROWS_OF_LARGE if gives * x.shape[1] >= LARGE else FEW_ROWS
    if rows <= few and refuse("few_rows", *arguments) is None:
        return "few_rows"
    wins = direction == "forward" and x.dtype != torch.float32 and a is None
    wins = wins and rows in SINGLE_ROWS and gives >= SINGLE_GIVES
    if base[1] is not None and wins and refuse("single", *arguments) is None:
        return "single"
    return "workspace"


def refuse(path: str, direction: str, x, base, gives: int, a, dropout_p: float) -> str | None:
    """Why a path cannot run a call; None when it can."""
    absmax = base[1]
    rank = 0 if a is None else a.shape[0]
    columns = x.shape[1] if direction == "forward" else gives
    if path == "workspace":
        return None
    if path == "single":
        if rank > tiles.MAX_RANK_SINGLE:
            return f"rank {rank} is above {tiles.MAX_RANK_SINGLE}, the most the single kernel's tiles hold"
        if absmax is not None and columns % 64:
            return f"{columns} input columns are no multiple of 64, so a tile's scales would straddle rows"
        if absmax is not None and base[0].data_ptr() % 4:
            return "the packed bytes, which it reads by fours, do not begin at a multiple of 4"
        return None
    if not x.is_cuda:
        return f"the tensors are on {x.device}"
    if direction == "backward":
        return "it has no backward"
    if absmax is None:
        return "the weight is dense: the library's product runs"
    if x.dtype == torch.float32:
        return "it multiplies half precision; x is float32"
    if columns % 64:
        return f"{columns} input columns are no multiple of 64"
    if base[0].data_ptr() % 16:
        return "the packed bytes do not begin at a multiple of 16"
    if x.shape[0] > 64 or x.shape[0] == 0:
        return f"it takes 1 to 64 rows, got {x.shape[0]}"
    if rank > 64:
        return f"rank {rank} is above 64"
    if dropout_p > 0.0 and rank:
        return "it has no dropout"
    if dispatch.forced() == "triton":
        return "backend 'triton' is pinned"
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "bfloat16 products need compute capability 8.0"
    return native.cuda_error(x.device.index)


def out_of_memory(direction: str, x, base, gives: int, a, error: Exception) -> None:
    """Notes that the workspace did not fit; raises what came when no other path can run."""
    why = refuse("single", direction, x, base, gives, a, 0.0)
    size = " x ".join(map(str, (gives, x.shape[1]) if direction == "forward" else (x.shape[1], gives)))
    if why is not None:
        raise torch.OutOfMemoryError(
            f"lora_linear: no memory for the workspace of a {size} weight, and the single kernel cannot run "
            f"instead: {why}; free memory, or take a shorter batch"
        ) from error
    dispatch.note("lora_linear", f"the workspace of a {size} weight did not fit; the single kernel ran")

"""Which path the bottleneck takes on a GPU, and its tiles: tables by architecture and width.

fused   one launch, a program for BLOCK_M rows (fused.py)
split   several launches, whose programs share the columns too (split.py)

Before these, few_rows.py has a forward in CUDA for up to 16 rows.

Nothing tunes at run time. No entry was measured on a GPU yet: they are large ones that compile without spills
for each of their architectures. 80 stands for those with 160 KiB of shared memory and more, 86 for those with
99, as in lora_linear/tiles.py. `pinned` pins a path, for tests and benchmarks.
"""

import contextlib
from collections.abc import Iterator

import torch
from peft_engine.kernels.lora_linear.tiles import padded_rank

from peft_engine.kernels.tiles import MANY, Entry, Table, Tile, entries_for, tile_of

PATHS = ("fused", "split")
# Of the fused path: the middle and what it becomes lie in registers. Float32 weights are multiplied in three
# parts, whose operands spill above 64 (sm_90, width 128: 624 bytes of a thread).
MAX_WIDTH, MAX_WIDTH_SINGLE = 256, 64
# Row blocks from which the fused path runs: four for each of an H200's 132 multiprocessors, which holds two
# or three of width 64 at once. Counted, not measured. Both paths move the same bytes, at 4096 features in
# bfloat16 24 KiB a row: x, the residual (of the rows in work, 69 MB, little is left in the L2) and y; 201 MB
# at 8192 rows, 42 us at 4.8 TB/s. Split adds the middle and its shares, 3 %, and two launches. But a fused
# program waits for memory in each of the 64 turns of its second loop (with a norm also of the statistics'),
# about 60 us a loop where it is alone on its multiprocessor: 128 programs at 8192 rows.
FILLS = 528

# kernel: architecture: (rows up to, width up to, tile with weights in half precision, with float32 or none)
# fused, fused_backward   BLOCK_M, BLOCK_K, BLOCK_N, warps, stages
# contract                BLOCK_M, BLOCK_R, BLOCK_K, warps, stages
# up, dx                  BLOCK_M, BLOCK_R, BLOCK_N, warps, stages
# outer                   BLOCK_M, BLOCK_R, BLOCK_C, warps, stages
TABLE: Table = {
    "fused": {
        80: (
            (MANY, 64, (64, 64, 64, 4, 3), (32, 32, 32, 4, 2)),
            (MANY, 128, (64, 64, 64, 8, 3), ()),
            (MANY, 256, (64, 32, 32, 8, 2), ()),
        ),
    },
    "fused_backward": {
        80: (
            (MANY, 64, (64, 64, 64, 4, 3), (32, 32, 32, 4, 2)),
            (MANY, 128, (64, 64, 64, 8, 3), ()),
            (MANY, 256, (64, 32, 32, 8, 2), ()),
        ),
    },
    "contract": {80: ((MANY, MANY, (64, 64, 64, 4, 3), (32, 64, 32, 8, 2)),)},
    "up": {80: ((MANY, MANY, (64, 64, 64, 4, 2), (32, 32, 64, 4, 2)),)},
    "dx": {80: ((MANY, MANY, (64, 64, 64, 4, 2), (32, 32, 64, 4, 2)),)},
    "outer": {
        80: ((MANY, MANY, (32, 64, 64, 4, 3), (32, 64, 64, 8, 2)),),
        100: ((MANY, MANY, (32, 64, 64, 8, 3), (32, 64, 64, 8, 2)),),  # with 4 warps gelu spills 32 bytes
    },
}

_pinned: str | None = None


def padded_width(width: int) -> int:
    """The width as a tile holds it: a power of two, at least the 16 that a matrix unit takes."""
    return padded_rank(width)


def entries(kernel: str, arch: int) -> tuple[Entry, ...]:
    """The table of a kernel for an architecture (compute capability times ten)."""
    return entries_for(TABLE[kernel], arch)


def tile(kernel: str, rows: int, call, device: torch.device) -> Tile:
    """The tile of a kernel for this call."""
    return tile_of("bottleneck", TABLE, kernel, rows, call.width, call.down_weight.dtype, device)


def choose(rows: int, call, device: torch.device) -> str:
    """The path for this many rows; ValueError where one is pinned that cannot run."""
    most = MAX_WIDTH_SINGLE if call.down_weight.dtype == torch.float32 else MAX_WIDTH
    if call.width > most:
        if _pinned == "fused":
            raise ValueError(
                f"bottleneck: path 'fused' is pinned but cannot run this call: width {call.width} is above "
                f"{most}, the most its tiles hold of {call.down_weight.dtype} weights"
            )
        return "split"
    if _pinned is not None:
        return _pinned
    if call.down_weight.shape[1] % 16:
        return (
            "split"  # the fused path's masked loads, an element each, spill (97 features, sm_90: 312 bytes)
        )
    block_m = tile("fused", rows, call, device)[0]
    return "fused" if rows > (FILLS - 1) * block_m else "split"


def share(columns: int, programs: int, block_k: int) -> int:
    """Columns of a program of `contract`, whole blocks: about two programs for each of an H200's 132
    multiprocessors, two blocks in each.
    """
    shares = max(1, min(264 // programs, columns // (2 * block_k)))
    blocks = (columns + block_k - 1) // block_k
    return block_k * ((blocks + shares - 1) // shares)


def splits(rows: int, programs: int) -> int:
    """Shares of the rows for `outer`: about two programs for each multiprocessor, of 128 rows."""
    return max(1, min(-(-264 // programs), rows // 128))


def pinned_path() -> str | None:
    """The path that is pinned, or None."""
    return _pinned


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

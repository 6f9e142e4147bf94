"""The tiles of lora_linear's kernels: a table for each, by architecture, rows and rank. Nothing tunes at run
time.

bench/tune.py times `candidates` on a GPU and writes bench/results/<device>/tiles.csv, from which the entries
are set. An architecture without entries takes those of the nearest one below that has some: 80 stands for
those with 160 KiB of shared memory and more (80, 90, 100), 86 for those with 99 (86, 89, 120). The tests
compile every entry for every architecture, without spills and within its shared memory.
"""

import itertools

import torch

from peft_engine.kernels.launch import cdiv
from peft_engine.kernels.tiles import MANY, Entry, Table, Tile, entries_for, tile_of

MAX_RANK = 128  # beyond, a rank's sums no longer fit the registers of a tile
MAX_RANK_SINGLE = 64  # the single kernel holds the base's sums as well

# kernel: architecture: (rows up to, rank up to, tile in half precision, tile in float32), the first that
# fits. down             BLOCK_M, BLOCK_K, warps, stages up               BLOCK_M, BLOCK_N, warps, stages
# outer            BLOCK_M, BLOCK_C, warps, stages single           BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
# single_backward  BLOCK_M, BLOCK_K (columns of dx), BLOCK_N, warps, stages
TABLE: Table = {
    "down": {
        80: (
            (MANY, 32, (64, 64, 4, 4), (32, 64, 4, 3)),
            (MANY, 64, (64, 32, 8, 3), (32, 32, 8, 3)),
            (MANY, 128, (32, 32, 8, 3), (32, 16, 8, 3)),
        ),
        86: (
            (MANY, 32, (64, 64, 4, 3), (32, 64, 4, 2)),
            (MANY, 64, (32, 64, 8, 2), (32, 32, 8, 2)),
            (MANY, 128, (32, 32, 8, 2), (32, 16, 8, 2)),
        ),
        100: (  # as 80, but for rank 64, which spills there with BLOCK_K 32
            (MANY, 32, (64, 64, 4, 4), (32, 64, 4, 3)),
            (MANY, 64, (64, 64, 8, 2), (32, 32, 8, 3)),
            (MANY, 128, (32, 32, 8, 3), (32, 16, 8, 3)),
        ),
    },
    "up": {
        80: (
            (MANY, 32, (64, 128, 8, 1), (64, 64, 4, 1)),
            (MANY, 128, (64, 64, 8, 1), (64, 64, 8, 1)),
        ),
    },
    "outer": {
        80: (
            (MANY, 32, (32, 128, 4, 4), (32, 64, 4, 3)),
            (MANY, 64, (32, 64, 4, 3), (32, 64, 8, 2)),
            (MANY, 128, (32, 64, 8, 3), (16, 64, 8, 2)),
        ),
        86: (
            (MANY, 32, (32, 128, 4, 3), (32, 64, 4, 2)),
            (MANY, 64, (32, 64, 4, 2), (32, 64, 8, 2)),
            (MANY, 128, (16, 64, 8, 2), (16, 64, 8, 2)),
        ),
    },
    "single": {
        80: (
            (16, 64, (16, 64, 64, 4, 3), (16, 64, 64, 4, 2)),
            (MANY, 64, (32, 64, 64, 4, 3), (32, 64, 64, 8, 2)),
        ),
        86: (
            (16, 64, (16, 64, 64, 4, 2), (16, 32, 64, 4, 2)),
            (MANY, 64, (32, 64, 64, 8, 2), (32, 64, 64, 8, 2)),
        ),
        90: (
            # 14336x4096 at 64 rows: 65 us; with BLOCK_K 64, 117 (bench/results/nvidia-h200/tiles.csv). The
            # decode takes the time, so fewer rows take the same tile: (32, 64, 64) takes 108 for 32 rows.
            (MANY, 64, (64, 64, 128, 4, 3), (32, 64, 64, 8, 2)),
        ),
    },
    "single_backward": {
        80: (
            (16, 64, (16, 64, 64, 4, 3), (16, 64, 32, 4, 2)),
            (MANY, 64, (32, 64, 64, 8, 3), (32, 64, 32, 8, 2)),
        ),
        86: (
            (16, 64, (16, 64, 64, 4, 2), (16, 64, 32, 4, 2)),
            (MANY, 64, (32, 64, 64, 8, 2), (32, 64, 32, 8, 2)),
        ),
        90: (
            (16, 64, (16, 64, 64, 4, 3), (16, 64, 32, 4, 2)),
            (32, 64, (32, 64, 64, 4, 3), (32, 64, 32, 8, 2)),
            (MANY, 64, (64, 64, 64, 4, 3), (32, 64, 32, 8, 2)),
        ),
    },
}


def padded_rank(rank: int) -> int:
    """The rank as a tile holds it: a power of two, at least the 16 that a matrix unit takes."""
    return max(16, 1 << (rank - 1).bit_length())


def tile(kernel: str, rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a kernel for these rows and this rank."""
    return tile_of("lora_linear", TABLE, kernel, rows, rank, dtype, device)


def entries(kernel: str, arch: int) -> tuple[Entry, ...]:
    """The table of a kernel for an architecture (compute capability times ten)."""
    return entries_for(TABLE[kernel], arch)


def shares(columns: int, programs: int, block_k: int) -> int:
    """Shares of the columns for `down`: four programs for each of an H200's 132 multiprocessors, two tiles in
    each; one program adds them all.
    """
    return max(1, min(528 // programs, columns // (2 * block_k), 32))


def splits(rows: int, programs: int) -> int:
    """Shares of the rows for `outer`: about two programs for each of an H200's 132 multiprocessors, of 128
    rows.
    """
    return max(1, min(-(-264 // programs), rows // 128))


def most_tiles(rows: int, columns: int, out_features: int) -> int:
    """At least as many as the tiles of `down`, and of `outer`, in any table: their counters."""
    return max(cdiv(rows, 16), cdiv(columns, 32) + cdiv(out_features, 32))


def candidates(kernel: str) -> list[Tile]:
    """The tiles that the tuner tries in half precision, rank 16 to 32."""
    choices: dict[str, tuple[tuple[int, ...], ...]] = {
        "down": ((16, 32, 64), (64, 128, 256), (4, 8), (3, 4)),
        "up": ((32, 64, 128), (64, 128), (4, 8), (1,)),
        "outer": ((32, 64, 128), (64, 128), (4, 8), (3, 4)),
        "single": ((16, 32, 64, 128), (64, 128), (64, 128), (4, 8), (2, 3, 4)),
        "single_backward": ((16, 32, 64, 128), (64, 128), (32, 64), (4, 8), (2, 3, 4)),
    }
    return list(itertools.product(*choices[kernel]))

"""Tables of tiles, by kernel and architecture: which entry a launch takes.

An architecture without entries takes those of the nearest one below that has some: 80 stands for those with
160 KiB of shared memory and more (80, 90, 100), 86 for those with 99 (86, 89, 120).
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch

from peft_engine.kernels.launch import cdiv

MANY = 1 << 62
Found = TypeVar("Found")

Tile = tuple[int, ...]
# rows up to, the other size (rank, head_dim) up to, tile in half precision, in float32: the first that fits
Entry = tuple[int, int, Tile, Tile]
Table = Mapping[str, Mapping[int, tuple[Entry, ...]]]

_SMALL = (86, 89, 120)
_set: dict[str, Tile] = {}
_pretended: int | None = None


def tile_of(
    op: str, table: Table, kernel: str, rows: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tile:
    """The tile of one of an op's kernels for these rows and this size."""
    if kernel in _set:
        return _set[kernel]
    for most, largest, half, single in entries_for(table[kernel], architecture(device)):
        if rows <= most and size <= largest:
            return single if dtype == torch.float32 else half
    raise ValueError(f"{op}: no tile of {kernel} holds {size}")


def entries_for(table: Mapping[int, Found], arch: int) -> Found:
    """A kernel's entries for an architecture (compute capability times ten)."""
    kin = [a for a in table if a <= arch and (a in _SMALL) == (arch in _SMALL)] or [min(table)]
    return table[max(kin)]


def row_shares(rows: int, wanted: int, block_m: int) -> tuple[int, int]:
    """Rows in each of about `wanted` shares, whole tiles of block_m, and the shares: without rows one, which
    writes zeros.
    """
    share = max(1, block_m * cdiv(cdiv(rows, wanted), block_m))
    return share, max(1, cdiv(rows, share))


def architecture(device: torch.device) -> int:
    """Compute capability times ten; 90 where there is no GPU (in the interpreter any tile is right)."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return 90
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def setting(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, a kernel has this tile: for the tuner and the tests."""
    _set[kernel] = tile
    try:
        yield
    finally:
        del _set[kernel]


@contextlib.contextmanager
def pretended(arch: int) -> Iterator[None]:
    """Inside, tiles are those of this architecture: for compiling ahead of time."""
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before

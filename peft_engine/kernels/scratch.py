"""Scratch memory that the CUDA library's kernels find at 0 and leave at 0, kept from call to call."""

import contextlib
import threading
from collections.abc import Iterator

import torch

from peft_engine import native

_held: dict[tuple[str, int, int], torch.Tensor] = {}  # by op, device and stream
_captured: dict[
    tuple[str, int, int], torch.Tensor
] = {}  # of the graph that is being captured, by op, its number and the stream
_here = threading.local()


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Inside, every call gets memory of its own.

    For what torch.compile calls: its CUDA graphs have a pool of memory, in which nothing may be kept.
    """
    before, _here.fresh = getattr(_here, "fresh", False), True
    try:
        yield
    finally:
        _here.fresh = before


def zeroed(who: str, size: int, device: torch.device, stream: int) -> torch.Tensor:
    """`size` bytes, 0 at first: a kernel leaves its counters at 0, so that a stream reuses them.

    A graph gets its own, filled once in a replay: it must not share memory with calls made beside its
    replays.
    """
    if getattr(_here, "fresh", False):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    index = device.index or 0
    capture = 0
    if device.type == "cuda":
        with native.on_device(index):
            capture = native.cuda().pe_cuda_capture(stream, index)
    if capture:
        for key in [key for key in _captured if key[1] != capture]:
            del _captured[key]  # an earlier graph's is its own pool's to keep
        return _of_size(_captured, (who, capture, stream), size, device)
    return _of_size(_held, (who, index, stream), size, device)


def _of_size(held: dict, key: tuple, size: int, device: torch.device) -> torch.Tensor:
    if key not in held or held[key].numel() < size:
        held[key] = torch.zeros(size, dtype=torch.uint8, device=device)
    return held[key]

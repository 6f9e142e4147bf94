"""Scratch memory that kernels find at 0 and leave at 0, kept from call to call."""

import torch

from peft_engine import native

UNKNOWN = -1  # a graph whose number nobody can tell

_held: dict[tuple[str, int, int], torch.Tensor] = {}  # by op, device and stream
_captured: dict[
    tuple[str, int, int], torch.Tensor
] = {}  # of the graph that is being captured, by op, its number and the stream


def zeroed(who: str, size: int, device: torch.device, stream: int) -> torch.Tensor:
    """`size` bytes, 0 at first: a kernel leaves its counters at 0, so that a stream reuses them.

    A graph gets its own, filled once in a replay: it must not share memory with calls made beside its
    replays.
    """
    capture = _capture(device, stream) if device.type == "cuda" else 0
    if capture == UNKNOWN:
        return torch.zeros(size, dtype=torch.uint8, device=device)
    if capture:
        for key in [key for key in _captured if key[1] != capture]:
            del _captured[key]  # an earlier graph's is its own pool's to keep
        return _of_size(_captured, (who, capture, stream), size, device)
    return _of_size(_held, (who, device.index or 0, stream), size, device)


def arrivals(who: str, tiles: int, x: torch.Tensor) -> torch.Tensor:
    """A counter for each tile, int32, of the programs that have left their share of it.

    The last one adds the shares and sets the counter to 0 again.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return zeroed(who, 4 * tiles, x.device, stream).view(torch.int32)


def _capture(device: torch.device, stream: int) -> int:
    """The number of the graph that is being captured on a stream, 0 for none."""
    if native.cuda_error() is None:
        return native.cuda().pe_cuda_capture(stream, device.index or 0)
    with torch.cuda.device(device):
        return UNKNOWN if torch.cuda.is_current_stream_capturing() else 0


def _of_size(held: dict, key: tuple, size: int, device: torch.device) -> torch.Tensor:
    if key not in held or held[key].numel() < size:
        size = -(-size // 4096) * 4096  # more tiles than this call's will fit the next
        held[key] = torch.zeros(size, dtype=torch.uint8, device=device)
    return held[key]

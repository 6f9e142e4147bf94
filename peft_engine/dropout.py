"""Dropout by a hash of a seed, the row and the column: no mask is stored, all backends draw the same."""

import torch

_U32 = 0xFFFFFFFF


def draw_seed(p: float, device: torch.device) -> torch.Tensor | None:
    """A seed for a dropout of p, an int64 tensor (1,), None where p is 0.

    From torch's generator: checkpointing restores the generator, so the second forward drops the same.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if p > 0.0 else None


def check_dropout(who: str, name: str, x: torch.Tensor, p: float, seed: torch.Tensor | None) -> None:
    """Raises ValueError unless p is in [0, 1) and there is a seed for it beside x, the argument `name`."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{who}: dropout_p must be in [0, 1), got {p}")
    if p == 0.0:
        return
    if seed is None or seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"{who}: dropout needs seed, an int64 tensor of one element; draw it with torch.randint"
        )
    if seed.device != x.device:
        raise ValueError(
            f"{who}: {name} is on {x.device} and seed on {seed.device}; draw it on {name}'s device"
        )


def _mix(h: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser of MurmurHash3, on uint32 values held in int64."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B & _U32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & _U32
    return h ^ (h >> 16)


def dropout_mask(seed: torch.Tensor, rows: int, columns: int, p: float) -> torch.Tensor:
    """The (rows, columns) bool mask of the elements kept: hash(seed, row, column) >= p * 2^32."""
    seed = seed.reshape(())
    row = torch.arange(rows, device=seed.device)
    key = _mix((seed & _U32) ^ _mix((row & _U32) ^ _mix((seed >> 32 & _U32) ^ (row >> 32))))
    column = torch.arange(columns, device=seed.device) * 0x9E3779B9 & _U32
    return _mix((key[:, None] + column) & _U32) >= round(p * 2**32)

"""The code tables of NF4, once for each device."""

import functools

import torch

from peft_engine.ops.nf4 import ABSMAX_CODE, CODE


@functools.cache
def pair_code(device: torch.device) -> torch.Tensor:
    """(256,) uint64: a packed byte's two float32 codes, the high half's in the low 32 bits."""
    byte = torch.arange(256)
    return torch.stack((CODE[byte >> 4], CODE[byte & 15]), dim=1).view(torch.uint64)[:, 0].to(device)


@functools.cache
def absmax_code(device: torch.device) -> torch.Tensor:
    """(256,) float32: the 8-bit type of double-quantised scales."""
    return ABSMAX_CODE.to(device)


@functools.cache
def midpoints(device: torch.device) -> torch.Tensor:
    """(15,) float32: between the codes; a value above the k-th has at least index k + 1."""
    return ((CODE[1:] + CODE[:-1]) / 2).to(device)

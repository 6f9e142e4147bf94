"""The code tables of NF4, once for each device."""

import functools

import torch

from peft_engine.ops.nf4 import ABSMAX_CODE, CODE


@functools.cache
def code(device: torch.device) -> torch.Tensor:
    """(16,) float32: the NormalFloat codes."""
    return CODE.to(device)


@functools.cache
def absmax_code(device: torch.device) -> torch.Tensor:
    """(256,) float32: the 8-bit type of double-quantised scales."""
    return ABSMAX_CODE.to(device)


def make(device: torch.device) -> None:
    """What a product reads, now: the first product may be one that a CUDA graph captures."""
    code(device)
    absmax_code(device)


@functools.cache
def midpoints(device: torch.device) -> torch.Tensor:
    """(15,) float32: between the codes; a value above the k-th has at least index k + 1."""
    return ((CODE[1:] + CODE[:-1]) / 2).to(device)

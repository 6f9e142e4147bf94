"""Fixtures of the methods' tests: a Llama with the same weights each time, and a saved adapter for it."""

from pathlib import Path

import pytest
import torch
from method_cases import ALL, quantized, shake
from torch import nn

from peft_engine.checkpoint import save_adapter
from peft_engine.methods import attach


@pytest.fixture
def llama(tiny_llama):
    """A factory: the tiny Llama with the weights of a seed."""

    def make(seed: int = 0, nf4: bool = False, **changes) -> nn.Module:
        torch.manual_seed(seed)
        model = tiny_llama(**changes)
        return quantized(model) if nf4 else model

    return make


@pytest.fixture
def saved(llama, tmp_path) -> Path:
    """A folder with an adapter of rank 4 on every linear layer of `llama()`."""
    return save_adapter(shake(attach(llama(), ALL)), tmp_path / "adapter")

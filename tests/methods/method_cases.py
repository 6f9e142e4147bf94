"""What the tests of the methods share."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from peft_engine.checkpoint import CONFIG, WEIGHTS, load_adapter
from peft_engine.methods import LoraConfig
from peft_engine.methods.attach import tensors
from peft_engine.nn import NF4Linear

ALL = LoraConfig(r=4, target_modules="all-linear")
IDS = torch.arange(24).view(4, 6)


def shake(model: nn.Module, name: str = "default", seed: int = 1) -> nn.Module:
    """Moves an adapter off its start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors(model, name).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model


def quantized(model: nn.Module) -> nn.Module:
    """The model with every linear layer but the head in NF4."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, NF4Linear.from_linear(module))
    return model


def edit_config(folder: Path, **changes) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(fields | changes))


def edit_weights(folder: Path, change) -> None:
    """Rewrites the weights file; `change` maps its dict of tensors to another."""
    with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors_ = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(change(tensors_), folder / WEIGHTS, metadata)


def refused(model: nn.Module, folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """The load fails with `message`, and the model is as before."""
    before = {path: (type(m), set(m.__dict__)) for path, m in model.named_modules()}
    flags = {path: (id(p), p.requires_grad) for path, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert {path: (type(m), set(m.__dict__)) for path, m in model.named_modules()} == before
    assert {path: (id(p), p.requires_grad) for path, p in model.named_parameters()} == flags

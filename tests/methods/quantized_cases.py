"""What the tests of NF4 models share."""

import torch

from peft_engine.nn import NF4Linear

IDS = torch.arange(3, 15)[None]


def nf4_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def linear_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def assert_same_model(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(a(IDS).logits, b(IDS).logits)

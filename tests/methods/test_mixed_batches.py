"""A mixed batch as one grouped product, as on a GPU, gives what running each adapter's rows apart gives."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import peft_engine as pe
from peft_engine.methods import lora
from peft_engine.methods.lora import _grouped, _groups


def adapted(nf4: bool) -> nn.Module:
    """A linear layer with two adapters of different ranks and scalings, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("linear", nn.Linear(64, 48))
    if nf4:
        pe.quantize_(model, skip_modules=[])
    for name, r, alpha in (("small", 2, 8), ("large", 5, 5)):
        config = pe.LoraConfig(r=r, lora_alpha=alpha, target_modules=["linear"], init_lora_weights=False)
        pe.attach(model, config, name=name)
    return model.train()


@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
def test_rows_grouped_by_adapter_give_what_rows_apart_give(nf4):
    model = adapted(nf4)
    layer = model.linear
    names = ["large", None, "small", "large"]
    x = torch.randn(4, 3, 64, requires_grad=True)
    dy = torch.randn(4, 3, 48)
    leaves = [x, *layer.lora_A.values(), *layer.lora_B.values()]
    with pe.active(model, names):
        for parameter in leaves:
            parameter.requires_grad_()
        apart = layer(x)
        wanted = torch.autograd.grad(apart, leaves, dy)
        known = {name: [i for i, n in enumerate(names) if n == name] for name in ("large", None, "small")}
        assert _groups(layer, known)
        together = _grouped(layer, x, layer.nf4 if nf4 else layer.weight, known)
    torch.testing.assert_close(together, apart)
    for got, want in zip(torch.autograd.grad(together, leaves, dy), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_without_gradients_the_stacked_adapters_are_kept_until_one_changes(monkeypatch):
    model = adapted(False)
    layer, stacked, known = model.eval().linear, [], {"large": [0], "small": [1], None: [2]}
    monkeypatch.setattr(lora, "_stacked", lambda *a, f=lora._stacked: stacked.append(a) or f(*a))
    x = torch.randn(3, 2, 64)

    def check(times):
        together = _grouped(layer, x, layer.weight, known)
        with pe.active(model, ["large", "small", None]):
            torch.testing.assert_close(together, layer(x))
        assert len(stacked) == times

    with torch.no_grad():
        check(1)
        check(1)
        layer.lora_B["small"].mul_(2.0)
        check(2)
        layer.lora["large"] = dataclasses.replace(layer.lora["large"], scaling=3.0)
        check(3)
        model.eval()  # what was written to .data before is seen
        check(4)
    assert _grouped(layer, x, layer.weight, known).requires_grad and len(stacked) == 5
    with torch.inference_mode():
        check(6)
        check(6)
    with torch.no_grad(), pe.active(model, ["small", "large", None]):  # another order: the same stack
        known = {"small": [0], "large": [1], None: [2]}
        torch.testing.assert_close(_grouped(layer, x, layer.weight, known), layer(x))
        assert len(stacked) == 6


def test_rows_with_dropout_another_bias_or_dora_are_not_grouped():
    model = adapted(False)
    layer = model.linear
    known = {"large": [0], None: [1]}
    assert _groups(layer, known)
    settings = layer.lora["large"]
    layer.lora["large"] = dataclasses.replace(settings, dora=True)
    assert not _groups(layer, known)
    layer.lora["large"] = layer.lora["large"].__class__(5, 1.0, 0.1)
    assert not _groups(layer, known)
    assert _groups(layer.eval(), known)
    assert not _groups(layer, {"somebody else's": [0]})


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("batch", [2, 3, 6])
def test_bottlenecks_give_a_row_the_bits_of_the_whole_batch(tiny_llama, batch, tokens):
    """A few rows go another way through the kernels than many."""
    model = tiny_llama().eval()
    for name in ("a", "b"):
        pe.attach(model, pe.BottleneckConfig(reduction_factor=4, non_linearity="gelu"), name=name)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.3)
    ids, whole = torch.arange(batch * tokens).view(batch, tokens), {}
    with torch.no_grad():
        for name in ("a", "b", None):
            with pe.active(model, name):
                whole[name] = model(ids).logits
        names = ["a", "b", None, "b", "b", "b"][:batch]
        with pe.active(model, names):
            mixed = model(ids).logits
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], whole[name][row])


def test_active_takes_any_iterable_of_names():
    model, names = adapted(False), ["small", None]
    for which in (names, tuple(names), iter(names), dict.fromkeys(names).keys(), np.array(names)):
        pe.active(model, None)
        pe.active(model, which)
        assert model.peft_engine_active == ("small", None)
    for wrong in (5, [5], [["small"]], object()):
        with pytest.raises(TypeError, match="active: expected an adapter's name, None for the base, or"):
            pe.active(model, wrong)

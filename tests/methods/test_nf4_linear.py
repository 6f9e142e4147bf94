"""NF4Linear: the product, casts and copies, and its state dict, which is that of bitsandbytes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from peft_engine.nn import NF4Linear
from peft_engine.ops.nf4 import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_computes_with_the_dequantised_weight(dtype, bias):
    dense = torch.nn.Linear(70, 33, bias=bias).to(dtype)
    layer = NF4Linear.from_linear(dense)
    x = torch.randn(2, 5, 70).to(dtype)
    exact = F.linear(x.double(), layer.dequantize().double(), dense.bias.double() if bias else None)
    plain = F.linear(x, layer.dequantize(), dense.bias)
    error, allowed = (layer(x).double() - exact).abs(), (plain.double() - exact).abs()
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert error.max() <= 2 * allowed.max() + ulp and error.norm() <= 2 * allowed.norm() + ulp


def test_gradient_reaches_the_input_and_the_bias_but_not_the_weight():
    layer = NF4Linear(64, 32)
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, 64))
    assert torch.equal(layer.bias.grad, torch.full((32,), 3.0)) and layer.weight.grad is None


def test_compute_dtype_is_used_for_the_product_and_the_inputs_dtype_returned():
    layer = NF4Linear(64, 32, bias=False)
    x = torch.randn(3, 64)
    layer.compute_dtype = torch.bfloat16
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_a_cast_leaves_the_packed_weight_and_its_scales():
    for double_quant in (True, False):
        layer = NF4Linear(64, 32, double_quant=double_quant)
        before = copy.deepcopy(layer.state_dict())
        layer.to(torch.bfloat16).half()
        assert layer.bias.dtype == torch.float16
        del before["bias"]
        assert all(
            torch.equal(layer.state_dict()[k], v) and layer.state_dict()[k].dtype == v.dtype
            for k, v in before.items()
        )
        assert layer(torch.randn(1, 64).half()).dtype == torch.float16


def test_a_tensor_put_in_place_of_another_is_used():
    layer, other, x = NF4Linear(64, 32, bias=False), NF4Linear(64, 32, bias=False), torch.randn(3, 64)
    layer(x)
    for name in ("weight", "absmax", "nested_absmax", "offset"):
        before = layer(x)
        setattr(layer, name, getattr(other, name))
        assert not torch.equal(layer(x), before), name
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_shares_nothing(duplicate):
    layer, x = NF4Linear(64, 32), torch.randn(3, 64)
    before = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), before) and not torch.equal(other(x), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_goes_from_one_layer_to_another(double_quant, assign):
    layer = NF4Linear(64, 33, dtype=torch.bfloat16, blocksize=128, double_quant=double_quant)
    other = NF4Linear(64, 33, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict(), assign=assign)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(other(x), layer(x)) and other.blocksize == 128
    assert all(torch.equal(other.state_dict()[key], value) for key, value in layer.state_dict().items())


def test_a_layer_on_meta_is_filled_by_assigning_a_state_dict():
    layer = NF4Linear(64, 32)
    empty = NF4Linear(64, 32, device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("weight"), "the quant_state is incomplete"),
        (lambda s: s.pop("weight.absmax"), "weight.absmax"),
        (lambda s: s.update({"weight.extra": torch.zeros(1)}), "weight.extra"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("weight")], "Missing key.*weight"),
        (lambda s: s.update(NF4Linear(32, 64).state_dict()), r"must have shape \(32, 64\), got \(64, 32\)"),
        (
            lambda s: [s.pop(k) for k in list(s)[2:]] and s.update(torch.nn.Linear(64, 32).state_dict()),
            "dense weight",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, says):
    state = NF4Linear(64, 32).state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=says):
        NF4Linear(64, 32).load_state_dict(state)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_is_that_of_bitsandbytes_linear4bit(bnb, double_quant):
    dense = torch.nn.Linear(96, 40).bfloat16()
    theirs = bnb.nn.Linear4bit(96, 40, compute_dtype=torch.bfloat16, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(
        dense.weight.data, False, compress_statistics=double_quant, quant_type="nf4", module=theirs
    )
    theirs.bias = dense.bias
    theirs = theirs.to("cpu")
    expected = theirs.state_dict()
    ours = NF4Linear.from_linear(dense, double_quant=double_quant)
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in ours.state_dict().items())
    fresh = NF4Linear(96, 40, dtype=torch.bfloat16)
    fresh.load_state_dict(expected)
    assert torch.equal(fresh.dequantize(), ours.dequantize())

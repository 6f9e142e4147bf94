"""optimize on bitsandbytes' 4-bit layers without adapters, and on weights its evaluation has repacked."""

import copy
import pickle

import pytest
import torch

import peft_engine as pe

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the peers extra)")

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _each_backend(backend):
    """Every test runs with the reference and with the CPU kernels."""


def _linear(
    kind=None, *, bias=True, nested=True, quant_type="nf4", storage=torch.uint8, dtype=torch.float32, **given
):
    kind = kind or bnb.nn.Linear4bit
    weight = torch.randn(64, 128, dtype=dtype)
    settings = {"compress_statistics": nested, "quant_storage": storage}
    layer = kind(128, 64, bias=bias, compute_dtype=dtype, **settings)
    layer.weight = bnb.nn.Params4bit(weight, quant_type=quant_type, module=layer, **settings, **given)
    return layer.to("cpu").train()


def _classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_layer_gives_bitsandbytes_output_and_gradient(backend, nested, storage, dtype):
    layer = _linear(nested=nested, storage=storage, dtype=dtype)
    x = torch.randn(2, 3, 128, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 3, 64, dtype=dtype)
    y = layer(x)
    theirs = (y, *torch.autograd.grad(y, (x, layer.bias), dy))
    report = pe.optimize(layer)
    assert type(layer).__name__ == "FusedLinear4bit" and isinstance(layer, bnb.nn.Linear4bit)
    assert [line.backend for line in report.layers] == [backend]
    y = layer(x)
    mine = (y, *torch.autograd.grad(y, (x, layer.bias), dy))
    weight = layer.nf4.dequantize().double()
    wide = dy.double()
    exact = (x.double() @ weight.T + layer.bias.double(), wide @ weight, wide.sum((0, 1)))
    for ours, own, truth in zip(mine, theirs, exact, strict=True):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        assert ours.dtype == own.dtype
        assert (ours - truth).abs().max() <= 2 * (own - truth).abs().max() + unit
        assert (ours - truth).norm() <= 2 * (own - truth).norm() + unit


def test_the_bytes_are_shared_and_survive_copy_pickle_and_state_dict():
    layer = _linear()
    keys = layer.state_dict().keys()
    pe.optimize(layer)
    assert layer.nf4.packed.data_ptr() == layer.weight.data_ptr()
    assert layer.nf4 is layer.nf4
    x = torch.randn(3, 128)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert twin.nf4.packed.data_ptr() != layer.nf4.packed.data_ptr()
        assert torch.equal(twin(x), layer(x))
    assert layer.state_dict().keys() == keys


def test_a_new_weight_in_the_layer_is_seen():
    layer, other = _linear(), _linear()
    pe.optimize(layer)
    x = torch.randn(3, 128)
    before = layer(x)
    layer.weight, layer.bias = other.weight, other.bias
    after = layer(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, other(x))


def test_linear_nf4_keeps_its_class_through_unoptimize():
    model = torch.nn.Sequential(_linear(), torch.nn.ReLU())
    model.append(bnb.nn.LinearNF4(64, 32).to("cpu"))
    before = _classes(model)
    pe.optimize(model)
    assert isinstance(model[2], bnb.nn.LinearNF4) and type(model[2]).__module__ == "peft_engine.bnb_layers"
    pe.unoptimize(model)
    assert _classes(model) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_type": "fp4"}, "fp4"),
        ({"blocksize": 32}, "blocksize 32"),
    ],
)
def test_layers_without_a_kernel_keep_running_and_say_why(settings, reason):
    layer = _linear(**settings)
    x = torch.randn(3, 128)
    before = layer(x)
    report = pe.optimize(layer)
    assert type(layer) is bnb.nn.Linear4bit
    assert not report.layers[0].fused and reason in report.layers[0].reason
    assert report.layers[0].backend == "bitsandbytes"
    assert torch.equal(layer(x), before)


def test_a_layer_that_is_not_quantised_yet_says_so():
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4")
    assert "not quantised yet" in pe.optimize(layer).layers[0].reason


def test_a_repacked_model_is_refused_with_the_way_out_and_left_alone():
    model = torch.nn.Sequential(_linear(), torch.nn.ReLU(), _linear(bias=False))
    # what bitsandbytes does at the first evaluation on a CPU with AVX512-BF16, done to one layer by hand
    weight = model[0].weight
    weight.data, weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )
    before = _classes(model)
    with pytest.raises(
        ValueError, match=r"optimize: 0 \(1 of 2 layers\) was repacked .* load the model again"
    ):
        pe.optimize(model)
    assert _classes(model) == before
    assert "repacked" in pe.explain(model).layers[0].reason


def test_a_fused_layer_is_not_repacked_by_evaluation_and_still_passes_gradients():
    layer = _linear()
    pe.optimize(layer)
    x = torch.randn(3, 128)
    held = layer.weight.data.clone()
    with torch.no_grad():
        before = layer.eval()(x)
    assert torch.equal(layer.weight.data, held)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x.requires_grad_()
    torch.testing.assert_close(layer.train()(x), before)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0

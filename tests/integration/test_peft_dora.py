"""optimize on PEFT's DoRA adapters: the same results, through ops.dora_linear, without forming W + s B A."""

import copy

import pytest
import torch
from test_peft_models import IDS, _step
from test_peft_models import _same_step as same_step

import peft_engine as pe

peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the peers extra)")

pytestmark = pytest.mark.peers


@pytest.fixture(autouse=True)
def _each_backend(backend):
    """Every test runs with the reference and with the CPU kernels."""


def _shaken(model):
    """The magnitudes off their start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def _same_step(mine, theirs):
    assert any("magnitude" in name for name in mine[1])
    same_step(mine, theirs)


def _lines(model, op="dora_linear"):
    return [line for line in pe.explain(model).layers if line.op == op]


def _whys(model):
    lines = _lines(model, "lora_linear")
    assert len(lines) == 14 and not any(line.fused for line in lines)
    return {line.reason for line in lines}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("base", ["dense", "bnb"])  # PEFT has no norm of an NF4Linear
def test_dora_layers_are_fused_with_the_same_output_and_gradients(make, base, dropout, backend):
    model = _shaken(make(base, use_dora=True, lora_dropout=dropout))
    before = _step(model)
    pe.optimize(model)
    assert len(_lines(model)) == 14 and {line.backend for line in _lines(model)} == {backend}
    _same_step(_step(model), before)
    if base == "dense":  # bitsandbytes' own evaluation rounds its scales
        mine = model.eval()(input_ids=IDS).logits
        pe.unoptimize(model)
        torch.testing.assert_close(mine, model(input_ids=IDS).logits, rtol=2e-4, atol=2e-5)


def test_half_precision_is_within_twice_peft_own_error(make):
    model = _shaken(make("dense", torch.bfloat16, use_dora=True))
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    inputs = [torch.randn(3, 5, layer.in_features).bfloat16() for layer in layers]
    with torch.no_grad():
        theirs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        pe.optimize(model)
        ours = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for layer, x, own, mine in zip(layers, inputs, theirs, ours, strict=True):
        a, b, m = (
            t["a0"].weight.detach().double()
            for t in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        )
        weight = layer.get_base_layer().weight.detach().double() + layer.scaling["a0"] * b @ a
        truth = x.double() @ (m[:, None] * weight / weight.norm(dim=1, keepdim=True)).t()
        unit = torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert mine.dtype == own.dtype
        assert (mine - truth).abs().max() <= 2 * (own - truth).abs().max() + unit
        assert (mine - truth).norm() <= 2 * (own - truth).norm() + unit


def test_what_is_not_the_plain_case_runs_peft_own_forward_and_the_report_says_why(make):
    model = make("dense", use_dora=True, adapters=2)
    model.base_model.set_adapter(["a0", "a1"])
    before = _step(model)
    pe.optimize(model)
    assert _whys(model) == {"adapter 'a0' is DoRA beside another adapter; PEFT's own forward runs"}
    _same_step(_step(model), before)
    model.set_adapter("a1")
    assert len(_lines(model)) == 14

    model = make("dense", use_dora=True)
    pe.optimize(model)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_magnitude_vector["a0"].register_forward_hook(lambda *args: None)
    assert "whose magnitude is wrapped or has hooks" in _whys(model).pop()


def test_a_dora_adapter_that_peft_trained_loads_and_merges(make, make_base, tmp_path):
    theirs = _shaken(make("dense", use_dora=True)).eval()
    theirs.save_pretrained(tmp_path)
    logits = theirs(input_ids=IDS).logits
    model = make_base("dense").eval()
    pe.load_adapter(model, tmp_path / "a0")
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=2e-4, atol=2e-5)
    pe.merge_(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=2e-4, atol=2e-5)
    merged = copy.deepcopy(theirs).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, logits, rtol=2e-4, atol=2e-5)

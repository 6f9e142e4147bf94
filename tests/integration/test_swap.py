"""optimize, unoptimize and explain on plain models, and on models of ours."""

import copy
import json
import pickle

import pytest
import torch

import peft_engine as pe
from peft_engine import layer_lines, native, report

IDS = torch.arange(24).reshape(2, 12) % 101


def _classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def _fused(reports):
    return {layer.name for layer in reports.layers if layer.fused}


def test_report_has_a_line_per_kind_and_plain_values():
    layers = [report.LayerReport(f"l{i}", "lora_linear", "cpu", True, "", "peft.Linear") for i in range(3)]
    layers.append(report.LayerReport("norm", "rms_norm", "torch", False, "no kernel", "transformers.Norm"))
    made = report.Report(tuple(layers), "avx2")
    assert (made.fused_count, made.total) == (3, 4)
    head, *lines = str(made).splitlines()
    assert "3 of 4" in head and "avx2" in head
    assert len(lines) == 2
    assert lines[0].split() == ["3", "x", "peft.Linear", "lora_linear", "cpu", "fused"]
    assert lines[1].endswith("not fused: no kernel")
    plain = json.loads(json.dumps(made.to_dict()))
    assert plain["kinds"][0]["count"] == 3 and plain["fused_count"] == 3
    assert [layer["name"] for layer in plain["layers"]] == ["l0", "l1", "l2", "norm"]


def test_explain_changes_nothing_and_names_every_linear_layer(tiny_llama):
    model = tiny_llama()
    before = _classes(model)
    made = pe.explain(model)
    assert _classes(model) == before
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linears <= {layer.name for layer in made.layers}
    assert all(layer.reason for layer in made.layers if not layer.fused)


def test_explain_says_the_instruction_set(tiny_llama):
    why = native.load_error()
    expected = native.isa() if why is None else why
    assert pe.explain(tiny_llama()).cpu == expected
    assert expected in str(pe.explain(tiny_llama())).splitlines()[0]


def test_nf4_layers_are_fused_by_the_cpu_backend_and_not_by_the_reference():
    with pe.force_backend("reference"):
        model = torch.nn.Sequential(pe.nn.NF4Linear(64, 32), torch.nn.ReLU(), pe.nn.NF4Linear(32, 64))
    if native.load_error() is None:
        with pe.force_backend("cpu"):
            assert _fused(pe.explain(model)) == {"0", "2"}
    with pe.force_backend("reference"):
        made = pe.explain(model)
    assert [(layer.backend, layer.fused) for layer in made.layers] == [("reference", False)] * 2
    assert all("pinned" in layer.reason for layer in made.layers)


def test_without_the_library_each_layer_says_so(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: "the CPU kernels are not compiled")
    monkeypatch.setattr(layer_lines.LORA_LINEAR, "_cache", {})
    with pe.force_backend("reference"):
        model = torch.nn.Sequential(pe.nn.NF4Linear(64, 32))
    made = pe.explain(model)
    assert made.layers[0].backend == "reference" and not made.layers[0].fused
    assert "cpu: the CPU kernels are not compiled" in made.layers[0].reason


def test_a_module_under_two_names_is_handled_once():
    with pe.force_backend("reference"):
        shared = pe.nn.NF4Linear(64, 64)
    model = torch.nn.ModuleDict({"a": shared, "b": shared})
    assert [layer.name for layer in pe.optimize(model).layers] == ["a"]


def test_optimize_twice_and_unoptimize_leave_the_model_as_it_was(tiny_llama):
    model = tiny_llama()
    before, keys = _classes(model), list(model.state_dict())
    with pe.force_backend("reference"):
        expected = model(input_ids=IDS).logits
    first = pe.optimize(model)
    assert list(model.state_dict()) == keys
    assert pe.optimize(model) == first
    assert pe.unoptimize(model) is model
    assert _classes(model) == before
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_an_optimised_model_keeps_its_class_and_copies(tiny_llama):
    model = tiny_llama()
    pe.optimize(model)
    assert type(model).__name__ == "LlamaForCausalLM"
    with pe.force_backend("reference"):
        expected = model(input_ids=IDS).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert _classes(twin) == _classes(model)
            assert torch.equal(twin(input_ids=IDS).logits, expected)


def _adapted(tiny_llama, *, nf4, dtype=torch.bfloat16):
    model = tiny_llama(dtype)
    with pe.force_backend("reference"):
        if nf4:
            pe.quantize_(model)
    return pe.attach(model, pe.LoraConfig(r=4, target_modules="all-linear"), name="movies")


@pytest.mark.parametrize("nf4", [False, True])
def test_layers_with_our_adapters_are_fused_and_stay_what_they_are(tiny_llama, nf4):
    model = _adapted(tiny_llama, nf4=nf4)
    before = _classes(model)
    made = pe.optimize(model)
    lines = [layer for layer in made.layers if layer.op == "lora_linear"]
    assert len(lines) == 14
    if native.load_error() is None:
        assert all(layer.fused and layer.backend == "cpu" and layer.reason == "" for layer in lines)
    kind = "peft_engine.LoraNF4Linear" if nf4 else "peft_engine.LoraLinear"
    assert {layer.kind for layer in lines} == {kind}
    pe.unoptimize(model)
    assert _classes(model) == before


@pytest.mark.parametrize("which", [None, "movies", ["movies", None]])
def test_explain_follows_the_active_adapter(tiny_llama, which):
    model = _adapted(tiny_llama, nf4=True)
    asked = []
    with pe.active(model, which), pytest.MonkeyPatch.context() as patch:
        choose = layer_lines.LORA_LINEAR.choose
        patch.setattr(layer_lines.LORA_LINEAR, "choose", lambda call: asked.append(call) or choose(call))
        pe.explain(model)
    assert {call.adapter for call in asked} == {None if which is None else torch.float32}
    assert {(call.dtype, call.base) for call in asked} == {(torch.bfloat16, "nf4")}


def test_explain_gives_dense_layers_without_their_adapter_the_line_of_plain_ones(tiny_llama):
    def lines(model):
        layers = [layer for layer in pe.explain(model).layers if layer.name.endswith("_proj")]
        return [(layer.name, layer.op, layer.backend, layer.fused, layer.reason) for layer in layers]

    plain = lines(tiny_llama(torch.bfloat16).requires_grad_(False))
    model = _adapted(tiny_llama, nf4=False)
    with pe.active(model, None):
        assert lines(model) == plain
    assert {op for _, op, *_ in lines(model)} == {"lora_linear"}


def test_training_with_our_adapter_is_the_same_before_and_after_optimize(tiny_llama):
    model = _adapted(tiny_llama, nf4=True, dtype=torch.float32)
    with pe.force_backend("reference"):
        grads = []
        for step in (pe.unoptimize, pe.optimize):
            step(model)
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 28
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_float64_model_keeps_its_own_layers_and_says_why(tiny_llama):
    torch.manual_seed(0)
    model = tiny_llama().double()
    want = model(IDS, labels=IDS)
    report = pe.optimize(model)
    assert not report.fused_count
    assert {layer.reason for layer in report.layers if layer.op == "rms_norm"} == {
        "no kernel takes torch.float64"
    }
    got = model(IDS, labels=IDS)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)


def test_second_derivatives_are_refused_and_not_silently_dropped(tiny_llama):
    model = pe.attach(tiny_llama(), pe.LoraConfig(r=2, target_modules="all-linear"))
    pe.optimize(model)
    learned = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match=r"second derivatives are asked for.*unoptimize"):
        torch.autograd.grad(model(IDS, labels=IDS).loss, learned, create_graph=True)
    torch.autograd.grad(model(IDS, labels=IDS).loss, learned)

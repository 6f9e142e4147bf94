"""optimize on PEFT's models, over dense, NF4 and bitsandbytes' layers: the same results, through our op."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn.utils import prune

import peft_engine as pe

peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the peers extra)")

pytestmark = pytest.mark.peers

IDS = torch.arange(24).reshape(2, 12) % 101
LINEARS = 2 * 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _each_backend(backend):
    """Every test runs with the reference and with the CPU kernels."""


@pytest.fixture(params=["dense", "nf4", "bnb"])
def base(request):
    return request.param


def _step(model, ids=IDS):
    """Logits, and the gradient of every trained parameter by name."""
    torch.manual_seed(5)
    out = model(input_ids=ids, labels=ids)
    model.zero_grad()
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _agree(mine, theirs):
    """Equal up to the order of a few float32 sums."""
    torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


def _same_step(mine, theirs):
    _agree(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys() and mine[1]
    for name, grad in theirs[1].items():
        _agree(mine[1][name], grad)


def _lora_lines(report):
    return [layer for layer in report.layers if layer.op == "lora_linear"]


def test_every_lora_layer_is_fused_with_the_same_output_and_gradients(make, base):
    model = make(base)
    before = _step(model)
    pe.optimize(model)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == {"FusedLoraLinear4bit" if base == "bnb" else "FusedLoraLinear"}
    _same_step(_step(model), before)


def test_report_names_the_backend_that_dispatch_chooses(make, base, backend):
    model = make(base)
    plain = pe.explain(model)
    assert len(_lora_lines(plain)) == LINEARS and plain.fused_count == 0
    assert all("optimize(model)" in line.reason for line in _lora_lines(plain))
    report = pe.optimize(model)
    lines = _lora_lines(report)
    assert len(lines) == LINEARS
    assert {(line.backend, line.fused) for line in lines} == {(backend, backend == "cpu")}
    assert f"{LINEARS} x peft.Linear" in str(report)


def _outputs(model, dtype, autocast=None):
    """What PEFT's layers give for random inputs, what ours give, and the exact products, by layer."""
    layers = list(_peft_layers(model))
    inputs = [torch.randn(3, 5, layer.in_features).to(dtype) for layer in layers]
    with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None):
        theirs = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        pe.optimize(model)
        ours = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    exact = []
    for layer, x in zip(layers, inputs, strict=True):
        base = layer.get_base_layer()
        weight = base.nf4.dequantize() if hasattr(base, "nf4") else base.weight
        a, b = (m["a0"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
        exact.append(x.double() @ (weight.detach().double() + layer.scaling["a0"] * b @ a).T)
    return theirs, ours, exact


def _at_most_twice(theirs, ours, exact):
    for own, mine, truth in zip(theirs, ours, exact, strict=True):
        assert mine.dtype == own.dtype
        unit = torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= 2 * (own - truth).abs().max() + unit
        assert (mine - truth).norm() <= 2 * (own - truth).norm() + unit


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64_is_within_twice_peft_own(make, base, dtype):
    _at_most_twice(*_outputs(make(base, DTYPES[dtype]), DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_autocast_dtype_and_error_are_peft_own(make, base, dtype):
    _at_most_twice(*_outputs(make(base, DTYPES[dtype]), DTYPES[dtype], torch.bfloat16))


def test_adapters_in_bfloat16_work_over_any_base(make, base):
    model = make(base, torch.bfloat16)
    for layer in _peft_layers(model):
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    _at_most_twice(*_outputs(model, torch.bfloat16))


def test_inputs_wider_than_compute_dtype_keep_their_precision_and_the_report_says_how(make):
    model = make("bnb", torch.bfloat16)
    assert not any("inputs are" in line.reason for line in pe.optimize(model).layers)
    pe.unoptimize(model)
    model = peft.prepare_model_for_kbit_training(model)  # embedding and norms in float32
    _at_most_twice(*_outputs(model, torch.float32))
    lines = _lora_lines(pe.explain(model))
    assert all(
        "inputs are torch.float32 and compute_dtype is torch.bfloat16" in line.reason for line in lines
    )


def test_optimize_is_a_no_op_the_second_time_and_unoptimize_restores_peft(make, base):
    model = make(base)
    classes = [type(m) for m in model.modules()]
    before = _step(model)
    first = pe.optimize(model)
    swapped = [type(m) for m in model.modules()]
    assert pe.optimize(model) == first and [type(m) for m in model.modules()] == swapped
    assert pe.unoptimize(model) is model
    assert [type(m) for m in model.modules()] == classes
    _same_step(_step(model), before)


def test_state_dict_copies_and_pickles_survive(make, base):
    model = make(base)
    keys = list(model.state_dict())
    pe.optimize(model)
    before = _step(model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    _same_step(_step(twin), before)
    layer = next(_peft_layers(model))
    x = torch.randn(3, 64)
    stored = pickle.dumps(layer)
    expected = layer(x)
    assert torch.equal(pickle.loads(stored)(x), expected)
    assert len(pickle.dumps(layer)) < len(stored) + 64  # no view of the weight is stored beside it


def _peft_layers(model):
    return (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))


def test_save_pretrained_writes_what_peft_writes_and_loads_into_both(make, make_base, base, tmp_path):
    model = make(base)
    model.save_pretrained(tmp_path / "theirs")
    pe.optimize(model)
    model.save_pretrained(tmp_path / "ours")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        written = [(tmp_path / side / "a0" / name).read_bytes() for side in ("theirs", "ours")]
        assert written[0] == written[1]
    logits = _step(model)[0]
    for fused_first in (False, True):
        fresh = make_base(base)
        if fused_first:
            pe.optimize(fresh)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours" / "a0").train()
        pe.optimize(loaded)
        _agree(loaded(input_ids=IDS).logits, logits)


def test_disable_adapter_gives_the_base_model(make, make_base, base):
    model = make(base)
    plain = make_base(base)
    pe.optimize(model)
    with model.disable_adapter():
        _agree(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert all("disabled" in line.reason or base != "dense" for line in _lora_lines(pe.explain(model)))


def test_set_adapter_switches_and_several_active_adapters_add_up(make, base):
    model = make(base, adapters=2)
    twin = copy.deepcopy(model)
    pe.optimize(model)
    for names in ("a0", "a1", ["a0", "a1"]):
        for m in (model, twin):
            m.base_model.set_adapter(names)
        _same_step(_step(model), _step(twin))


def test_adapters_added_deleted_and_weighted_after_optimize_work(make, base):
    model = make(base)
    twin = copy.deepcopy(model)
    pe.optimize(model)
    for m in (model, twin):
        torch.manual_seed(3)
        m.add_adapter("b", peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        m.add_weighted_adapter(["a0", "b"], [0.5, 0.5], "mix", combination_type="cat")
        m.set_adapter("mix")
        m.delete_adapter("b")
    _agree(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    assert pe.optimize(model).total == pe.explain(model).total


@pytest.mark.parametrize("base", ["dense", "bnb"])  # into NF4Linear, pe.merge_ merges
def test_merge_and_unload_and_unmerge_give_what_peft_gives(make, base):
    model = make(base)
    twin = copy.deepcopy(model)
    pe.optimize(model)
    for m in (model, twin):
        m.merge_adapter()
    _agree(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    for m in (model, twin):
        m.unmerge_adapter()
    _agree(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    merged, expected = model.merge_and_unload(), twin.merge_and_unload()
    _agree(merged(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in merged.modules())


def test_merging_into_an_nf4_layer_is_refused_with_the_way_out(make):
    model = make("nf4")
    pe.optimize(model)
    before = _step(model)
    with pytest.raises(ValueError, match=r"in NF4; .* peft_engine\.merge_"):
        model.merge_adapter()
    _same_step(_step(model), before)


def test_evaluation_between_steps_leaves_gradients_as_they_are(make, base):
    model = make(base)
    pe.optimize(model)
    before = _step(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        with model.disable_adapter():
            model(input_ids=IDS)
    model.train()
    after = _step(model)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


def test_a_forward_replaced_on_the_instance_is_left_alone(make):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make("dense")
    first, second, *_ = _peft_layers(model)
    expected = _step(model)
    hooks.add_hook_to_module(first, hooks.ModelHook())
    report = pe.optimize(model)
    assert type(first) is peft.tuners.lora.Linear
    assert ["replaced" in line.reason for line in _lora_lines(report)[:2]] == [True, False]
    hooks.add_hook_to_module(second, hooks.ModelHook())
    _same_step(_step(model), expected)
    with pytest.raises(ValueError, match=r"unoptimize: the forward of .* was replaced"):
        pe.unoptimize(model)
    hooks.remove_hook_from_module(model, recurse=True)
    pe.unoptimize(model)
    assert type(second) is peft.tuners.lora.Linear


def test_a_model_repacked_by_bitsandbytes_is_refused_with_the_way_out(make):
    model = make("bnb")
    weight = next(_peft_layers(model)).get_base_layer().weight
    repack = bnb.functional._convert_weight_packed_for_cpu  # its evaluation does so where AVX512-BF16 is
    weight.data, weight.quant_state = repack(weight.data, weight.quant_state)
    with pytest.raises(
        ValueError, match=r"q_proj.base_layer \(1 of 14 layers\) was repacked .* load the model"
    ):
        pe.optimize(model)
    assert not any(type(m).__module__.startswith("peft_engine") for m in model.modules())
    assert "repacked" in _lora_lines(pe.explain(model))[0].reason


def test_modules_to_save_are_trained_and_saved(make, base, tmp_path):
    model = make(base, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    twin = copy.deepcopy(model)
    pe.optimize(model)
    mine, theirs = _step(model), _step(twin)
    assert any("modules_to_save" in name for name in mine[1])
    _same_step(mine, theirs)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "a0" / "adapter_model.safetensors").exists()


def test_biases_of_base_and_adapter_get_their_gradients(make):
    model = make("dense", bias="all", lora_bias=False)
    for layer in _peft_layers(model):
        base = layer.get_base_layer()
        base.bias = torch.nn.Parameter(torch.randn(base.out_features))
    twin = copy.deepcopy(model)
    pe.optimize(model)
    mine = _step(model)
    assert any(name.endswith("base_layer.bias") for name in mine[1])
    _same_step(mine, _step(twin))


def test_lora_bias_is_scaled_as_in_peft(make):
    model = make("dense", lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
    twin = copy.deepcopy(model)
    pe.optimize(model)
    mine = _step(model)
    assert any("lora_B" in name and name.endswith("bias") for name in mine[1])
    _same_step(mine, _step(twin))


def test_dropout_keeps_the_expectation_repeats_with_the_seed_and_stops_in_eval(make, base):
    model = make(base, lora_dropout=0.5).train()
    pe.optimize(model)
    layer = next(_peft_layers(model))
    x = torch.randn(8, 64)
    with torch.no_grad():
        plain = layer.eval()(x)
        layer.train()
        torch.manual_seed(7)
        drawn = torch.stack([layer(x) for _ in range(400)])
        torch.manual_seed(7)
        assert torch.equal(layer(x), drawn[0])
        assert not torch.equal(drawn[0], drawn[1])
        assert torch.equal(layer.eval()(x), plain)
    # the mean of 400 draws: within six of its own deviations
    assert ((drawn.mean(0) - plain).abs() <= 6 * drawn.std(0) / math.sqrt(400) + 1e-6).all()


def test_gradient_checkpointing_draws_the_same_dropout_again(make, base):
    model = make(base, lora_dropout=0.3)
    pe.optimize(model)
    expected = _step(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _same_step(_step(model), expected)


def test_mixed_adapters_in_one_batch_run_as_in_peft(make):
    model = make("dense", adapters=2).eval()
    twin = copy.deepcopy(model)
    pe.optimize(model)
    names = ["a1", "__base__"]
    with torch.no_grad():
        mine = model(input_ids=IDS, adapter_names=names).logits
        _agree(mine, twin(input_ids=IDS, adapter_names=names).logits)


def test_hooks_on_a_layer_and_inside_it_still_fire(make, base):
    model = make(base)
    expected = _step(model)
    pe.optimize(model)
    layer = next(_peft_layers(model))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    layer.lora_A["a0"].register_forward_hook(lambda *_: seen.append("A"))
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    _same_step(_step(model), expected)
    assert sorted(seen) == ["A", "base", "layer"]
    assert sum("hooks" in line.reason for line in pe.explain(model).layers) == 1


def test_all_linear_still_finds_fused_layers(make, make_base):
    model = make("bnb")
    pe.optimize(model)
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules="all-linear"))
    assert all("b" in layer.lora_A for layer in _peft_layers(model))
    plain = make_base("bnb")
    pe.optimize(plain)
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert len(list(_peft_layers(adapted))) == LINEARS


def test_layers_of_other_methods_keep_running_and_say_so(make_base):
    model = peft.get_peft_model(
        make_base("dense"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    before = _step(model)
    report = pe.optimize(model)
    assert sum("no fused layer for PEFT's ia3" in line.reason for line in report.layers) == 2
    _same_step(_step(model), before)


def test_a_trained_base_weight_keeps_peft_forward(make):
    model = make("dense")
    model.requires_grad_(True)
    before = _step(model)
    report = pe.optimize(model)
    assert all("trained" in line.reason for line in _lora_lines(report))
    _same_step(_step(model), before)


def test_a_pruned_base_layer_keeps_peft_own_forward(make):
    model = make("dense")
    layer = next(_peft_layers(model))
    prune.l1_unstructured(layer.get_base_layer(), "weight", amount=0.3)
    before = _step(model)
    report = pe.optimize(model)
    assert [line.reason for line in _lora_lines(report) if not line.fused and "no parameter" in line.reason]
    _same_step(_step(model), before)

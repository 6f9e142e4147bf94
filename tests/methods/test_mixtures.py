"""LoRA on mixtures of experts: files of PEFT and of ours, "all-linear", gradients, state dicts, explain."""

import copy
import pickle

import peft
import pytest
import torch
from accuracy import assert_together_twice_as_good
from expert_cases import BOTH, FAMILIES, IDS, MORE, build, layer_of, logits, lora

import peft_engine as pe
from peft_engine.methods import experts
from peft_engine.methods.experts import ExpertWeights


def peft_model(base, **settings):
    given = {"r": 4, "target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False}
    return peft.get_peft_model(base, peft.LoraConfig(**(given | settings)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:], ["gate_up_proj"]], ids=len)
def test_files_go_both_ways_with_peft(family, parameters, tmp_path):
    ours = pe.attach(build(family), lora(target_parameters=parameters))
    pe.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)
    theirs = peft_model(build(family), target_parameters=parameters)
    theirs.save_pretrained(tmp_path / "theirs")
    again = build(family)
    before = logits(again)
    pe.load_adapter(again, tmp_path / "theirs")
    assert torch.allclose(logits(again), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(again), before, atol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
@pytest.mark.parametrize("nf4", [False, True])
def test_all_linear_is_pefts_with_experts_and_routers(family, nf4, tmp_path):
    settings = {"r": 3, "target_modules": "all-linear", "init_lora_weights": False}
    theirs = peft.get_peft_model(build(family), peft.LoraConfig(**settings))
    ours = pe.attach(pe.quantize_(build(family)) if nf4 else build(family), pe.LoraConfig(**settings))
    counts = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert counts[0] == counts[1]
    theirs.save_pretrained(tmp_path / "theirs")
    pe.save_adapter(ours, tmp_path / "ours")
    if nf4:
        return
    for folder, expected in (("theirs", theirs), ("ours", ours)):
        assert torch.allclose(
            logits(peft.PeftModel.from_pretrained(build(family), tmp_path / folder)),
            logits(expected),
            atol=1e-5,
        )
        again = build(family)
        pe.load_adapter(again, tmp_path / folder)
        assert torch.allclose(logits(again), logits(expected), atol=1e-5)
        assert torch.equal(logits(pickle.loads(pickle.dumps(again))), logits(again))
        merged = logits(pe.merge_(copy.deepcopy(again)))
        assert torch.allclose(merged, logits(again), atol=1e-5)
        assert not torch.allclose(merged, logits(build(family)), atol=1e-3)
        kinds = [type(module) for module in build(family).modules()]
        assert [type(module) for module in pe.detach(again).modules()] == kinds


def test_a_seed_gives_pefts_adapter():
    torch.manual_seed(3)
    ours = pe.attach(build(), lora(init_lora_weights=True, target_modules=None))
    torch.manual_seed(3)
    base = build()  # seeds again, as the one above did
    theirs = peft_model(base, init_lora_weights=True, target_modules=[])
    for which, at in (("gate_up_proj", "base_layer."), ("down_proj", "")):
        a = theirs.get_parameter(f"base_model.model.model.layers.1.mlp.experts.{at}lora_A.default.weight")
        mine = getattr(ours.model.layers[1].mlp.experts, which).lora_A["default"]
        assert torch.equal(mine.flatten(0, 1), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_within_twice_the_error_of_peft(dtype):
    def gradients(model, named):
        for p in model.parameters():
            p.grad = None
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        return [loss.detach(), *(named(model)[name].grad for name in sorted(named(model)))]

    def ours_of(model):
        found = {}
        for i, layer in enumerate(model.model.layers):
            for leaf in experts.LEAVES:
                held = getattr(layer.mlp.experts, leaf)
                found[f"{i}.{leaf}.A"], found[f"{i}.{leaf}.B"] = (
                    held.lora_A["default"],
                    held.lora_B["default"],
                )
        return found

    def theirs_of(model):
        found = {}
        for i, layer in enumerate(model.base_model.model.model.layers):
            outer = layer.mlp.experts
            for leaf, held in (("down_proj", outer), ("gate_up_proj", outer.base_layer)):
                found[f"{i}.{leaf}.A"] = held.lora_A["default"].weight
                found[f"{i}.{leaf}.B"] = held.lora_B["default"].weight
        return found

    def as_ours(gradient, like):
        if gradient.shape == like.shape:
            return gradient
        count, n, r = like.shape
        if gradient.shape[0] == count * n:
            return gradient.view(like.shape)
        return gradient.view(n, r, count).permute(2, 0, 1)

    theirs = peft_model(build(dtype=dtype), target_modules=[])
    ours = pe.attach(build(dtype=dtype), lora(target_modules=None))
    values, mine = theirs_of(theirs), ours_of(ours)
    with torch.no_grad():
        for name, parameter in mine.items():
            values[name].data = values[name].data.float()
            parameter.copy_(as_ours(values[name], parameter))
    pe.optimize(ours)
    exact = copy.deepcopy(theirs).double()
    exact.base_model.model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    got, plain, truth = gradients(ours, ours_of), gradients(theirs, theirs_of), gradients(exact, theirs_of)
    assert_together_twice_as_good(
        (a.float(), as_ours(b, a).float(), as_ours(c, a)) for a, b, c in zip(got, plain, truth, strict=True)
    )


@pytest.mark.parametrize("nf4", [False, True])
def test_attach_and_detach_leave_the_model_as_it_was(nf4):
    model = pe.quantize_(build()) if nf4 else build()
    before, keys = logits(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    pe.attach(model, lora())
    pe.attach(model, lora(target_parameters=BOTH[:1], r=2), "b")
    assert set(keys) <= set(model.state_dict()) and not torch.equal(logits(model), before)
    with pe.active(model, None):
        assert torch.allclose(logits(model), before, atol=1e-5)
    pe.detach(model, "default")
    assert isinstance(layer_of(model)._modules["gate_up_proj"], ExpertWeights)
    pe.detach(model)
    assert torch.equal(logits(model), before) and list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == kinds
    assert all(p.requires_grad or p.dtype == torch.uint8 for p in model.parameters())


@pytest.mark.parametrize("nf4", [False, True])
def test_state_dicts_copies_and_pickles(nf4):
    model = pe.attach(pe.quantize_(build()) if nf4 else build(), lora())
    pe.optimize(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected) and str(pe.explain(other)) == str(pe.explain(model))
    torch.manual_seed(7)
    other = pe.attach(pe.quantize_(build()) if nf4 else build(), lora())
    with torch.no_grad():
        for p in other.parameters():
            if p.is_floating_point():
                p.mul_(1.5)
    pe.optimize(other)
    assert not torch.equal(logits(other), expected)
    for assign in (False, True):
        other.load_state_dict(model.state_dict(), assign=assign)
        assert torch.equal(logits(other), expected)
    gone = "model.layers.0.mlp.experts.down_proj"
    ends = ("", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
    state = {k: v for k, v in model.state_dict().items() if k not in [f"{gone}{end}" for end in ends]}
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{gone}"'):
        other.load_state_dict(state)


def test_a_cast_reaches_the_dense_weights_and_not_the_packed_ones():
    dense, packed = pe.attach(build(), lora()), pe.attach(pe.quantize_(build()), lora())
    assert layer_of(dense.to(torch.bfloat16)).gate_up_proj.weight.dtype == torch.bfloat16
    held = layer_of(packed.to(torch.bfloat16)).gate_up_proj
    assert held.weight.dtype == torch.uint8 and held.absmax.dtype in (torch.uint8, torch.float32)
    assert logits(dense).dtype == logits(packed).dtype == torch.bfloat16


def test_the_rank_of_one_weight_by_a_pattern():
    model = pe.attach(build(), lora(rank_pattern={"experts.down_proj": 2}))
    held = layer_of(model)
    assert held.gate_up_proj.lora_A["default"].shape == (6, 4, 64)
    assert held.down_proj.lora_A["default"].shape == (6, 2, 128)


def test_explain_says_what_runs_and_unoptimize_undoes_it():
    model = build()
    kind = type(layer_of(model))
    line = next(line for line in pe.explain(model).layers if line.op == "experts")
    assert not line.fused and "optimize" in line.reason
    before = logits(model)
    line = next(line for line in pe.optimize(model).layers if line.op == "experts")
    assert line.fused and line.name == "model.layers.0.mlp.experts" and line.kind.endswith(kind.__name__)
    assert torch.allclose(logits(model), before, atol=1e-5) and type(layer_of(model)) is not kind
    line = next(line for line in pe.explain(model.train()).layers if line.op == "experts")
    assert not line.fused and "its weights learn" in line.reason
    model(IDS, labels=IDS).loss.backward()  # by the model's own code
    assert layer_of(model).gate_up_proj.grad.any()
    pe.attach(model, lora())
    pe.unoptimize(model)
    assert pe.detach(model) is model and type(layer_of(model)) is kind


def test_a_step_reaches_every_adapter_tensor_under_checkpointing_and_compiles_whole():
    model = pe.attach(build(), lora())
    pe.optimize(model)

    def gradients(run):
        model.zero_grad()
        run(IDS, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients(model)
    assert not pe.methods.adapters_without_gradient(model)
    model.train().gradient_checkpointing_enable()
    again = gradients(model)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))
    torch.manual_seed(0)  # a fresh model: checkpointing left a hook at the embedding
    fresh = pe.attach(build(), lora())
    fresh.load_state_dict(model.state_dict())
    pe.optimize(fresh)
    model = fresh
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, compiled, strict=True))


def test_hooks_of_the_experts_activation_run_or_are_refused():
    family = next(iter(FAMILIES))
    found = []
    for optimised in (False, True):
        model = build(family)
        if optimised:
            pe.optimize(model)
        layer_of(model).act_fn.register_forward_hook(lambda module, args, out: out * 0)
        found.append(logits(model))
    torch.testing.assert_close(*found)
    model = pe.attach(build(family), lora(target_parameters=BOTH))
    layer_of(model).act_fn.register_forward_hook(lambda module, args, out: out * 0)
    with pytest.raises(ValueError, match=r"activation has hooks .*take that off, or the adapters"):
        logits(model)

"""Mixtures of experts: LoRA by target_parameters, NF4, files of PEFT and of ours, merging, state dicts."""

import copy
import json
import pickle

import peft
import pytest
import torch
import transformers
from accuracy import assert_twice_as_good
from safetensors import safe_open

import peft_engine as pe
from peft_engine.methods import experts
from peft_engine.methods.experts import ExpertWeights, NF4ExpertWeights

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(24).reshape(2, 12) * 5 % 120
FAMILIES = {
    "olmoe": (transformers.OlmoeConfig, {"num_experts": 6}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 6}),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 6, "moe_intermediate_size": 128, "head_dim": 16, "norm_topk_prob": True},
    ),
}


def build(family="olmoe", dtype=torch.float32, width=128):
    config, special = FAMILIES[family]
    settings = {
        "hidden_size": 64, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "vocab_size": 128, "eos_token_id": 1,
        "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    made = config(**(settings | special))
    return transformers.AutoModelForCausalLM.from_config(made).to(dtype).eval()


def lora(**settings):
    given = {"r": 4, "target_modules": ["q_proj"], "target_parameters": BOTH, "init_lora_weights": False}
    return pe.LoraConfig(**(given | settings))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def layer_of(model):
    return model.model.layers[0].mlp.experts


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


@pytest.mark.parametrize("family", FAMILIES)
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
        kind = type(build(family).model.layers[0].mlp.gate)
        assert type(pe.detach(again).model.layers[0].mlp.gate) is kind


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
    for a, b, c in zip(got, plain, truth, strict=True):
        assert_twice_as_good(a.float(), as_ours(b, a).float(), as_ours(c, a))


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


# --- NF4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_experts_compute_with_their_dequantised_weights(family):
    model, dense = pe.quantize_(build(family)), build(family)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, (pe.nn.NF4Linear, NF4ExpertWeights)):
                name = path if isinstance(module, NF4ExpertWeights) else f"{path}.weight"
                dense.get_parameter(name).copy_(module.dequantize())
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    assert not pe.explain(model).to_dict()["total"] - pe.optimize(model).fused_count
    assert pe.explain(model).to_dict()["layers"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"blocksize": 128}], ids=str)
def test_checkpoints_of_transformers_and_of_ours_load_in_nf4(family, settings, tmp_path):
    build(family).save_pretrained(tmp_path / "dense")
    keys = safe_open(tmp_path / "dense" / "model.safetensors", "pt").keys()
    assert any(".experts.3." in key for key in keys), "transformers cuts experts one from another"
    model = pe.quantize_(build(family), **settings)
    read = pe.load_quantized(tmp_path / "dense", **settings)
    assert torch.equal(logits(read), logits(model))
    for i, one in enumerate((model, read)):
        one.save_pretrained(tmp_path / str(i))
        again = pe.load_quantized(tmp_path / str(i))
        assert torch.equal(logits(again), logits(model))
        assert isinstance(layer_of(again).down_proj, NF4ExpertWeights)
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def test_experts_or_one_of_their_weights_stay_dense_by_name(tmp_path):
    for names in (["lm_head", "experts"], ["lm_head", "down_proj"]):
        model = pe.quantize_(build(), skip_modules=names)
        held = layer_of(model)._modules
        assert ("gate_up_proj" in held) == (names[1] == "down_proj") and "down_proj" not in held
        skipped = model.config.quantization_config["llm_int8_skip_modules"]
        assert "model.layers.0.mlp.experts.down_proj" in skipped
        model.save_pretrained(tmp_path / names[1])
        assert torch.equal(logits(pe.load_quantized(tmp_path / names[1])), logits(model))
        loss = model(IDS, labels=IDS).loss  # what stays dense learns, as the other dense weights do
        loss.backward()
        assert layer_of(model).down_proj.grad.any()


def test_scales_that_experts_would_share_are_held_in_float32():
    model = build(width=96)  # 64 x 96 values: 96 blocks, of which 256 share a scale
    pe.quantize_(model)
    held = layer_of(model).down_proj
    assert held.absmax.dtype == torch.float32 and held.nested_absmax is None
    nested = pe.ops.nf4_quantize(
        build(width=96).model.layers[0].mlp.experts.down_proj.data, double_quant=True
    )
    assert torch.equal(held.dequantize(), nested.dequantize())


def test_what_has_no_product_in_nf4_is_refused_with_its_name():
    with pytest.raises(ValueError, match=r"experts has experts \(gate_up_proj.*no whole number of the 4096"):
        pe.quantize_(build(width=40), blocksize=4096)
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4}
    oss = transformers.GptOssConfig(**settings, **heads, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(oss)
    with pytest.raises(ValueError, match="GptOssExperts has a gate of its own"):
        pe.quantize_(model)
    with pytest.raises(TypeError, match=r"cannot adapt .*GptOssExperts has a gate of its own"):
        pe.attach(model, pe.LoraConfig(target_parameters=BOTH))
    line = next(line for line in pe.optimize(model).layers if line.op == "experts")
    assert not line.fused and "gate of its own" in line.reason


@pytest.mark.parametrize("how", ["dense", "nf4", "requantize"])
def test_merging_gives_what_the_adapter_gave(how, tmp_path):
    model = build() if how == "dense" else pe.quantize_(build())
    pe.attach(model, lora(target_modules="all-linear"))
    expected = logits(model)
    pe.merge_(model, requantize=how == "requantize")
    if how == "requantize":
        assert isinstance(layer_of(model).down_proj, NF4ExpertWeights)
        assert (logits(model) - expected).abs().max() < 1.0
    else:
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert isinstance(layer_of(model)._parameters["down_proj"], torch.nn.Parameter)
    model.save_pretrained(tmp_path)
    load = pe.load_quantized if how == "requantize" else transformers.AutoModelForCausalLM.from_pretrained
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert ("quantization_config" in json.loads((tmp_path / "config.json").read_text())) == (
        how == "requantize"
    )


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("wanted", [["experts"], ["gate_up_proj"]], ids=str)
def test_linear_targets_that_mean_experts_say_how_to_name_them(nf4, wanted):
    model = pe.quantize_(build()) if nf4 else build()
    with pytest.raises(ValueError, match=r'adapt it by target_parameters=\["experts.gate_up_proj", "experts'):
        pe.attach(model, pe.LoraConfig(target_modules=wanted))
    pe.attach(model, pe.LoraConfig(target_modules="all-linear", target_parameters=[], lora_dropout=0.1))
    assert not any(".mlp." in name for name, p in model.named_parameters() if p.requires_grad)


def test_all_linear_on_experts_without_a_product_is_refused_unless_they_are_left_out():
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4}
    oss = transformers.GptOssConfig(**settings, **heads, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(oss)
    with pytest.raises(ValueError, match=r'target_parameters=\[\] with "all-linear"'):
        pe.attach(model, pe.LoraConfig(target_modules="all-linear"))
    pe.attach(model, pe.LoraConfig(target_modules="all-linear", target_parameters=[]))


def test_targets_that_are_no_experts_are_named():
    there = r"'up' name no weight .*experts\.down_proj, experts\.gate_up_proj, gate\.weight"
    for names, what in ((["up"], there), (["q_proj.weight"], "linear layers are named in target_modules")):
        with pytest.raises(ValueError, match=what):
            pe.attach(build(), pe.LoraConfig(target_parameters=names))
    with pytest.raises(ValueError, match=r"rank 99 is above what .*experts.gate_up_proj \(256 x 64\)"):
        pe.attach(build(), lora(r=99, target_modules=None))
    for wrong, error in (({"lora_dropout": 0.1}, ValueError), ({"use_dora": True}, ValueError)):
        with pytest.raises(error, match="neither dropout nor DoRA"):
            lora(**wrong)
    with pytest.raises(TypeError, match="target_parameters must be a list"):
        lora(target_parameters="experts.down_proj")


@pytest.mark.parametrize("wrong", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_all_linear_has_no_dropout_where_there_are_experts(wrong):
    with pytest.raises(ValueError, match=r"all-linear.*means the experts of this model too"):
        pe.attach(build(), pe.LoraConfig(target_modules="all-linear", **wrong))


def test_a_mixed_batch_is_refused():
    model = pe.attach(pe.attach(build(), lora()), lora(), "b")
    with pytest.raises(ValueError, match=r"gets its rows from a router.*activate one adapter"):
        pe.active(model, ["default", "b"])


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

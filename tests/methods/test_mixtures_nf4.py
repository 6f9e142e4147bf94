"""Mixtures of experts in NF4, merged, and what is refused."""

import json

import pytest
import torch
import transformers
from expert_cases import BOTH, FAMILIES, IDS, MORE, build, layer_of, logits, lora
from safetensors import safe_open

import peft_engine as pe
from peft_engine.methods.experts import NF4ExpertWeights


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


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
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
    nested = pe.ops.nf4_quantize(layer_of(build(width=96)).down_proj.data, double_quant=True)
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
    with pytest.raises(ValueError, match=there):
        pe.attach(build(), pe.LoraConfig(target_parameters=["up"]))
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

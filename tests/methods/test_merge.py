"""Merging: the base's own weights then compute what base and adapter did."""

import pytest
import torch
from method_cases import ALL, IDS, quantized, shake
from torch import nn

from peft_engine.checkpoint import merge_
from peft_engine.methods import LoraConfig, active, attach, detach
from peft_engine.nn import NF4Linear
from peft_engine.quantize import quantize_


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        ALL,
        LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
        LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["lm_head", "norm"]),
        LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    ],
)
def test_a_merged_model_computes_what_base_and_adapter_did(tiny_llama, config, nf4):
    model = tiny_llama(attention_bias=True)
    model = shake(attach(quantized(model) if nf4 else model, config))
    expected = model(IDS).logits
    adapted = [path for path, m in model.named_modules() if hasattr(m, "lora_A")]
    assert merge_(model) is model
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(type(model.get_submodule(path)) is nn.Linear for path in adapted)
    assert not any("lora" in key or "peft_engine" in key for key in model.state_dict())
    assert not hasattr(model, "peft_engine_adapters")
    detach(model)


def test_the_sum_is_rounded_once(tiny_llama):
    model = shake(attach(tiny_llama(torch.bfloat16), ALL))
    layer = model.model.layers[0].self_attn.q_proj
    a, b = (t["default"].detach().double() for t in (layer.lora_A, layer.lora_B))
    exact = layer.weight.detach().double() + layer.lora["default"].scaling * b @ a
    merge_(model)
    rounded = exact.to(torch.bfloat16).double()
    error = (layer.weight.double() - exact).abs()
    # float32 differs from float64 only where the exact value lies next to a midpoint of two bf16 values.
    assert (error <= (rounded - exact).abs() * (1 + 1e-4) + 1e-7).all()


def test_an_nf4_layer_stays_nf4_only_when_asked(tiny_llama):
    model = shake(attach(quantized(tiny_llama(torch.bfloat16)), ALL))
    layer = model.model.layers[0].mlp.up_proj
    merged = layer.dequantize(torch.float32) + layer.lora["default"].scaling * (
        layer.lora_B["default"] @ layer.lora_A["default"]
    )
    merge_(model, requantize=True)
    assert type(layer) is NF4Linear
    assert layer.dequantize().dtype == torch.bfloat16
    expected = NF4Linear.from_linear(_linear(merged.detach()))
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.absmax, expected.absmax)


@pytest.mark.parametrize("some", [False, True])
def test_the_config_of_a_merged_model_tells_what_is_still_in_nf4(tiny_llama, tmp_path, some):
    model = quantize_(tiny_llama())
    config = LoraConfig(r=4, target_modules=["q_proj"]) if some else ALL
    shake(attach(model, config))
    expected = model(IDS).logits
    merge_(model)
    described = getattr(model.config, "quantization_config", None)
    if some:
        assert "model.layers.1.self_attn.q_proj" in described["llm_int8_skip_modules"]
        return
    assert described is None
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


def test_other_adapters_stay_over_the_merged_base(tiny_llama):
    model = attach(quantized(tiny_llama()), ALL, "a")
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "b")
    attach(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]), "c")
    for seed, name in enumerate("abc"):
        shake(model, name, seed)
    with active(model, "b"):
        expected = model(IDS).logits
    active(model, "c")
    merge_(model, "b")
    assert list(model.peft_engine_adapters) == ["a", "c"]
    assert model.peft_engine_active == "c"
    with active(model, None):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    detach(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [dict(target_modules=["lm_head"]), dict(modules_to_save=["lm_head"])])
def test_a_tied_weight_is_refused_or_untied(tiny_llama, settings, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    shake(attach(model, LoraConfig(r=4, **settings)))
    expected = model(IDS).logits
    with pytest.raises(ValueError, match=r"lm_head.weight is tied .*untie=True"):
        merge_(model)
    assert torch.equal(model(IDS).logits, expected)
    merge_(model, untie=True)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_refused_and_nothing_changes(tiny_llama):
    model = shake(attach(tiny_llama(torch.float16), ALL))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no adapter 'movies'"):
        merge_(model, "movies")
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.lora_B["default"].fill_(1e6)
    before["model.layers.1.mlp.down_proj.lora_B.default"] = layer.lora_B["default"].clone()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj overflows torch.float16"):
        merge_(model)
    layer.lora_A["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or inf in model.layers.1.mlp.down_proj.lora_A"):
        merge_(model)
    before["model.layers.1.mlp.down_proj.lora_A.default"] = layer.lora_A["default"].clone()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)

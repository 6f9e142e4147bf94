"""PEFT's LoRA on experts (target_parameters) through the fused op: optimize on a real PeftModel."""

import copy

import peft
import pytest
import torch
import transformers

import peft_engine as pe

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(24).reshape(2, 12) * 5 % 120


def build():
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_experts=6,
        num_key_value_heads=2, num_experts_per_tok=2, vocab_size=128, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def settings(parameters=BOTH, **given):
    given = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | given
    return peft.LoraConfig(target_parameters=parameters, **given)


def adapted(parameters=BOTH):
    return peft.get_peft_model(build(), settings(parameters))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def line(model):
    (line,) = [line for line in pe.explain(model).layers if line.name.endswith("layers.1.mlp.experts")]
    return line


@pytest.mark.parametrize("parameters", [BOTH, BOTH[:1], BOTH[1:]], ids=str)
def test_loss_and_gradients_are_pefts(parameters):
    model = adapted(parameters)
    plain = copy.deepcopy(model)
    pe.optimize(model)
    assert line(model).fused and line(model).op == "experts"
    pairs = []
    for one in (model, plain):
        loss = one(IDS, labels=IDS).loss
        loss.backward()
        pairs.append([loss, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(*pairs, strict=True))


def test_pefts_own_calls_work_on(tmp_path):
    model = adapted()
    expected = logits(model)
    pe.optimize(model)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(build()), atol=1e-6)
        assert not line(model).fused and "disabled" in line(model).reason
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(build(), tmp_path)), expected, atol=1e-6)
    model.add_adapter("b", settings(r=2))
    model.base_model.set_adapter(["default", "b"])
    both = logits(model)
    pe.unoptimize(model)
    assert torch.allclose(logits(model), both, atol=1e-6) and not line(model).fused
    pe.optimize(model)
    assert torch.allclose(logits(model.merge_and_unload()), both, atol=1e-6)


def test_a_call_by_keyword_is_fused_too(monkeypatch):
    layer = adapted().base_model.model.model.layers[1].mlp.experts
    x, index, shares = torch.randn(5, 64), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    plain = layer(x, index, shares)
    pe.optimize(layer)
    monkeypatch.setattr(peft.tuners.lora.layer.ParamWrapper, "forward", None)
    for args, kwargs in (
        ((index, shares), {}),
        ((index,), {"top_k_weights": shares}),
        ((), {"top_k_weights": shares, "top_k_index": index}),
    ):
        assert torch.allclose(layer(x, *args, **kwargs), plain, atol=1e-6)


def test_hooks_and_trained_weights_keep_pefts_forward():
    model = adapted()
    pe.optimize(model)
    inner = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
    seen = []
    handle = inner.register_forward_hook(lambda *a: seen.append(1))
    assert "has hooks" in line(model).reason
    logits(model)
    assert seen == [1]
    handle.remove()
    inner.down_proj.requires_grad_()
    assert "trained too" in line(model).reason
    model(IDS, labels=IDS).loss.backward()
    assert inner.down_proj.grad.any()

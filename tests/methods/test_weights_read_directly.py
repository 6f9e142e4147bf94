"""Layers whose weight another module reads without calling them, and weights that are made, not held."""

import pytest
import torch
import transformers
from method_cases import shake
from quantized_cases import nf4_names
from torch import nn

from peft_engine.methods import LoraConfig, attach
from peft_engine.quantize import quantize_

SPEECH = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
X = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))


def encoder(**changes):
    torch.manual_seed(0)
    settings = {"batch_first": True, **changes}
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 64, **settings), 2, enable_nested_tensor=False
    ).eval()


@pytest.fixture
def no_fast_path():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("targets", ["all-linear", ["linear1"], ["linear2"]])
def test_layers_that_torchs_fast_path_reads_are_refused(targets):
    message = r"read by TransformerEncoderLayer in evaluation.*mha\.set_fastpath_enabled\(False\)"
    with pytest.raises(TypeError, match=r"adapter on layers\.0\.linear[12] would do nothing.*" + message):
        attach(encoder(), LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"cannot quantise layers\.0\.linear1.*" + message):
        quantize_(encoder())


@torch.no_grad()
def test_without_the_fast_path_they_run(no_fast_path):
    model = encoder()
    base = model(X)
    quantize_(model)
    assert nf4_names(model) == {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}
    in_nf4 = model(X)
    torch.testing.assert_close(in_nf4, base, rtol=0, atol=0.5)
    shake(attach(model, LoraConfig(r=2, target_modules="all-linear")))
    assert not torch.allclose(model(X), in_nf4)


@torch.no_grad()
def test_encoder_layers_that_never_take_the_fast_path_are_left_in_peace():
    for changes in ({"batch_first": False}, {"activation": nn.functional.silu}):
        model = encoder(**changes)
        base = model(X)
        shake(attach(model, LoraConfig(r=2, target_modules="all-linear")))
        assert not torch.allclose(model(X), base)


def test_the_attention_of_wavlm_is_refused_and_may_be_left_out():
    model = transformers.WavLMModel(transformers.WavLMConfig(**SPEECH))
    for targets in ("all-linear", ["q_proj"], ["out_proj"]):
        with pytest.raises(TypeError, match=r"attention\.(k|q|out)_proj would do nothing.*read by WavLMAtt"):
            attach(model, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match=r"attention\.k_proj \(its weight is read by WavLM.*skip_modules"):
        quantize_(model)
    quantize_(model, skip_modules=["q_proj", "k_proj", "v_proj", "out_proj", "gru_rel_pos_linear"])
    attach(model, LoraConfig(r=2, target_modules=["intermediate_dense", "output_dense"]))
    assert model.eval()(torch.randn(1, 800)).last_hidden_state.isfinite().all()


def test_all_linear_leaves_out_what_multi_head_attention_reads():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP)).eval()
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted = {path.rpartition(".lora_A")[0] for path, _ in model.named_parameters() if ".lora_A." in path}
    assert len(adapted) == 8 and not any("head.attention" in path for path in adapted)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIGLIP))
    with pytest.raises(TypeError, match=r"head\.attention\.out_proj is NonDynamicallyQuantizableLinear"):
        attach(model, LoraConfig(r=2, target_modules=["out_proj"]))


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert"])
def test_a_convolution_under_weight_norm_holds_no_experts(kind):
    config = getattr(transformers, f"{kind}Config")(**SPEECH)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    attach(quantize_(model), LoraConfig(r=2, target_modules="all-linear"))
    assert "encoder.layers.0.attention.q_proj" in nf4_names(model)
    assert model(torch.randn(1, 800)).last_hidden_state.isfinite().all()

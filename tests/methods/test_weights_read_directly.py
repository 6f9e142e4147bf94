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


def test_the_attention_of_wavlm_is_refused_and_left_out():
    model = transformers.WavLMModel(transformers.WavLMConfig(**SPEECH))
    for targets in (["q_proj"], ["out_proj"]):
        with pytest.raises(TypeError, match=r"attention\.(q|out)_proj would do nothing.*read by WavLMAtt"):
            attach(model, LoraConfig(r=2, target_modules=targets))
    quantize_(model)
    attach(model, LoraConfig(r=2, target_modules="all-linear"))
    attention = model.encoder.layers[0].attention
    assert all(type(getattr(attention, f"{name}_proj")) is nn.Linear for name in ("q", "k", "v", "out"))
    assert model.eval()(torch.randn(1, 800)).last_hidden_state.isfinite().all()


MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99, "state_size": 8}
JAMBA = MAMBA | {
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_experts": 1,
    "mamba_d_state": 8, "attn_layer_offset": 1, "attn_layer_period": 2,
}  # fmt: skip
BOTH = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("kind", "settings", "uncalled"),
    [
        ("Mamba", MAMBA, {"x_proj", "dt_proj", "out_proj"}),
        ("FalconMamba", MAMBA, {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2", MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1}, {"out_proj"}),
        ("Jamba", JAMBA, {"dt_proj"}),
    ],
)
@pytest.mark.parametrize("nf4", (False, True), ids=("dense", "nf4"))
def test_mamba_trains_all_but_what_its_mixer_reads(kind, settings, uncalled, nf4):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings, **BOTH)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    one = min(uncalled)
    with pytest.raises(TypeError, match=f"{one} would do nothing: its weight is read by {kind}"):
        attach(model, LoraConfig(r=2, target_modules=[one]))
    if nf4:
        quantize_(model)
        assert not {name.rpartition(".")[2] for name in nf4_names(model)} & uncalled
        assert any(name.endswith("in_proj") for name in nf4_names(model))
    attach(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(3, 11)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())
    assert not {path.split(".lora_")[0].rpartition(".")[2] for path in trained} & uncalled


def test_the_head_of_mobilebert_is_left_out():
    config = transformers.MobileBertConfig(
        vocab_size=99, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, true_hidden_size=32, intra_bottleneck_size=32,
    )  # fmt: skip
    model = transformers.MobileBertForMaskedLM(config).eval()
    attach(quantize_(model), LoraConfig(r=2, target_modules="all-linear"))
    assert type(model.cls.predictions.dense) is nn.Linear
    assert model(input_ids=torch.arange(5)[None]).logits.isfinite().all()


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

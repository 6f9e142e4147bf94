"""A mixed batch through modules whose first dimension is not the batch's."""

import families
import pytest
import torch
import transformers

import peft_engine as pe

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
LONGFORMER = SMALL | {
    "vocab_size": families.VOCABULARY,
    "attention_window": [4],
    "max_position_embeddings": 64,
}
FSMT = {
    "src_vocab_size": families.VOCABULARY, "tgt_vocab_size": families.VOCABULARY, "langs": ["en", "de"],
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
QWEN = SMALL | {
    "vocab_size": families.VOCABULARY, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("method", ("lora", "bottleneck"))
@pytest.mark.parametrize(
    ("model", "settings", "target"),
    [("Longformer", LONGFORMER, "query"), ("FSMT", FSMT, "q_proj")],
    ids=("longformer", "fsmt"),
)
def test_layers_that_see_tokens_before_rows_are_refused(model, settings, target, method):
    lora, houlsby = pe.LoraConfig(r=2, target_modules=[target]), pe.BottleneckConfig.houlsby(width=4)
    config = lora if method == "lora" else houlsby
    model = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**settings))
    pe.attach(model, config, "a")
    with pytest.raises(ValueError, match=r"sees the tokens of .* in front of the batch's rows.*activate one"):
        pe.active(model, ["a", None])
    assert model.peft_engine_active == "a"


def test_a_tower_that_joins_the_patches_of_all_images_is_refused_and_its_decoder_is_not():
    config = transformers.Qwen2VLConfig(text_config=QWEN, vision_config=VISION)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    pe.attach(model, pe.LoraConfig(r=2, target_modules=["q_proj"]), "text")
    pe.attach(model, pe.LoraConfig(r=2, target_modules=["qkv"]), "vision")
    pe.attach(model, pe.LoraConfig(r=2, target_modules=["merger.mlp.0"]), "merger")
    for name, where in (("vision", r"blocks\.0\.attn\.qkv"), ("merger", r"merger\.mlp\.0")):
        with pytest.raises(ValueError, match=f"{where} sees the patches of all images as the rows of"):
            pe.active(model, [name, "text"])
    pe.active(model, ["text", None])
    assert model(input_ids=torch.arange(8).view(2, 4)).logits.isfinite().all()


def test_a_module_trained_whole_there_is_refused():
    model = transformers.LongformerModel(transformers.LongformerConfig(**LONGFORMER))
    config = pe.BottleneckConfig.pfeiffer(modules_to_save=["value"])
    pe.attach(model, config, "a")
    with pytest.raises(ValueError, match=r"sees the tokens of Longformer"):
        pe.active(model, ["a", None])

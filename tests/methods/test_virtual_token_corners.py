"""Virtual tokens where a forward goes another way than most: inner decoders, one token, old checkpointing."""

import subprocess
import sys
import threading

import families
import pytest
import torch
import transformers
from method_cases import shake

import peft_engine as pe

P = 4
KINDS = {"prefix": pe.PrefixTuningConfig, "prompt": pe.PromptTuningConfig}
BART = {key: value for key, value in families.CONFIGS["bart"][1].items() if key != "decoder_start_token_id"}
OPT = {
    "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "dropout": 0.0,
    "vocab_size": families.VOCABULARY, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
CTRL = {
    "vocab_size": families.VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "dff": 48,
    "n_layer": 2,
    "n_head": 4,
}


def adapted(kind: str, name: str = "default", **settings):
    config = KINDS[kind](num_virtual_tokens=P, **settings)
    return shake(pe.attach(families.build("llama"), config, name), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "config"),
    [("OPTForCausalLM", transformers.OPTConfig(**OPT)), ("BartForCausalLM", transformers.BartConfig(**BART))],
    ids=("opt", "bart"),
)
def test_a_decoder_called_past_what_is_around_it_sees_the_virtual_tokens(kind, model, config):
    torch.manual_seed(0)
    model = getattr(transformers, model)(config).eval()
    batch = families.inputs("llama")
    base = model(**batch).logits
    shake(pe.attach(model, KINDS[kind](num_virtual_tokens=P)))
    model.train()(**batch).loss.backward()
    assert not torch.allclose(model(**batch).logits, base)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}
TEXT = SMALL | {"vocab_size": families.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30}
SPEECH = SMALL | {
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("ViTModel", transformers.ViTConfig(**IMAGE), "get_input_embeddings gives ViTPatchEmbeddings"),
        ("Dinov2Model", transformers.Dinov2Config(**IMAGE), "gives Dinov2PatchEmbeddings"),
        (
            "Wav2Vec2Model",
            transformers.Wav2Vec2Config(**SPEECH),
            "Wav2Vec2Model has no one table.*gives none",
        ),
        ("CLIPModel", transformers.CLIPConfig(text_config=TEXT, vision_config=IMAGE), "gives none"),
        ("WhisperModel", transformers.WhisperConfig(**WHISPER), "WhisperEncoder of .* reads input_features"),
    ],
    ids=("vit", "dinov2", "wav2vec2", "clip", "whisper"),
)
def test_a_model_that_reads_no_tokens_is_refused(kind, model, config, message):
    with pytest.raises(TypeError, match=f"attach: virtual tokens stand in front of tokens.*{message}.*LoRA"):
        pe.attach(getattr(transformers, model)(config), KINDS[kind](num_virtual_tokens=P))


def test_a_text_tower_takes_a_prefix_but_no_prompt():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)
    model = transformers.SiglipModel(config).eval()
    with pytest.raises(TypeError, match=r"SiglipTextModel takes token ids only .* take a prefix"):
        pe.attach(model, pe.PromptTuningConfig(num_virtual_tokens=P))
    ids = torch.tensor([[5, 6, 7]])
    base = model.get_text_features(ids).pooler_output
    shake(pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P)))
    assert not torch.allclose(model.get_text_features(ids).pooler_output, base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_behind_a_vision_tower_takes_both(kind):
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=transformers.CLIPVisionConfig(**IMAGE))
    pe.attach(transformers.LlavaForConditionalGeneration(config), KINDS[kind](num_virtual_tokens=P))


def test_only_the_stacks_own_configs_name_our_attention_and_each_gets_its_own_back():
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(text_config=text, vision_config=transformers.CLIPVisionConfig(**IMAGE))
    model = transformers.LlavaForConditionalGeneration(config)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    names = [config, config.text_config, config.vision_config]
    before = [each._attn_implementation for each in names]
    assert before == ["sdpa", "sdpa", "eager"]
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P))
    assert [each._attn_implementation for each in names] == ["sdpa", "peft_engine_sdpa", "eager"]
    pe.detach(model)
    assert [each._attn_implementation for each in names] == before


HYBRID = TEXT | {"num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "convolution layers.0.conv.conv"),
        ("FalconH1", MAMBA | {"mamba_d_ssm": 64}, r"convolution layers.0.mamba.conv1d"),
        (
            "MiniMax",
            {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "block_size": 4},
            r"model.layers.0, which has no attention,",
        ),
    ],
)
def test_a_decoder_that_mixes_tokens_outside_attention_takes_a_prefix_but_no_prompt(kind, settings, message):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**HYBRID, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with pytest.raises(TypeError, match=f"attach: the {message} of |attach: {message} of .* take a prefix"):
        pe.attach(model, pe.PromptTuningConfig(num_virtual_tokens=P))
    ids = torch.arange(3, 9)[None]
    base = model(ids, use_cache=False).logits
    shake(pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P)))
    assert not torch.equal(model(ids, use_cache=False).logits, base)


GEMMA4 = HYBRID | {
    "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": families.VOCABULARY,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64,
}  # fmt: skip


@torch.no_grad()
def test_the_last_logits_of_gemma_4_are_those_of_all():
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**GEMMA4)).eval()
    with pytest.raises(TypeError, match=r"Gemma4TextModel read embeddings of their own.*take a prefix"):
        pe.attach(model, pe.PromptTuningConfig(num_virtual_tokens=P))
    shake(pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P)))
    ids = torch.arange(3, 15).view(2, 6)
    logits = model(ids).logits
    for last in (1, 2, 3):
        torch.testing.assert_close(model(ids, logits_to_keep=last).logits, logits[:, -last:])


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_picks_keys_by_the_name_of_the_implementation_is_refused(kind):
    indexed = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "n_routed_experts": 2}
    low = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV32Config(
        **(HYBRID | {"num_key_value_heads": 4}), **indexed, **low, num_experts_per_tok=1, n_group=1,
        topk_group=1, moe_intermediate_size=16, n_shared_experts=1,
    )  # fmt: skip
    model = transformers.DeepseekV32ForCausalLM(config)
    with pytest.raises(TypeError, match=r"DeepseekV32Attention chooses the keys.*take LoRA"):
        pe.attach(model, KINDS[kind](num_virtual_tokens=P))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_of_two_widths_are_refused(kind):
    low = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    config = transformers.DeepseekV3Config(
        **(HYBRID | {"num_key_value_heads": 4}), **low, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=1, moe_intermediate_size=16,
    )  # fmt: skip
    message = "DeepseekV3Attention has keys of 16 values a head and values of 8.*take LoRA"
    with pytest.raises(TypeError, match=message):
        pe.attach(transformers.DeepseekV3ForCausalLM(config), KINDS[kind](num_virtual_tokens=P))


def test_a_prefix_is_refused_where_one_half_takes_none():
    t5 = families.CONFIGS["t5"][1]
    model = transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(**t5))
    with pytest.raises(TypeError, match=r"LongT5Stack, one of the two halves of LongT5For.*take LoRA"):
        pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P))


@pytest.mark.parametrize("by", ("argument", "config"))
def test_attention_weights_are_refused_and_come_back_without_the_adapter(by):
    model = families.build("llama")
    model.set_attn_implementation("eager")
    ids, asked = torch.arange(5)[None], {"output_attentions": True}
    if by == "config":
        model.config.output_attentions, asked = True, {}
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=r"output_attentions=True, and behind virtual tokens no attention"):
        model(ids, **asked)
    pe.active(model, None)
    assert len(model(ids, output_attentions=True).attentions) == 2


def test_a_prompt_is_refused_where_a_layer_runs_twice():
    model = families.build("llama")
    model.model.layers[1] = model.model.layers[0]
    pe.attach(model, pe.PromptTuningConfig(num_virtual_tokens=P))
    with pytest.raises(ValueError, match=r"LlamaAttention runs more than once.*take a prefix"):
        model(torch.arange(5)[None])
    pe.detach(model)
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P))
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_attention_that_runs_without_its_stack_says_so():
    model = adapted("prefix")
    layer = model.model.layers[0]
    hidden, position = torch.zeros(1, 3, 32), torch.arange(3)[None]
    rotary = model.model.rotary_emb(hidden, position)
    with pytest.raises(RuntimeError, match="LlamaAttention runs outside of the stack"):
        layer.self_attn(hidden, rotary, None)
    pe.active(model, None)
    layer.self_attn(hidden, rotary, None)


@pytest.mark.parametrize("changed", ("base", "lora"))
def test_a_first_token_alone_sees_what_changed_since_the_last_generation(changed):
    model = adapted("prompt", "p")
    shake(pe.attach(model, pe.LoraConfig(r=4, init_lora_weights=False), "l"), "l")
    pe.active(model, "l+p")
    one = torch.tensor([[7]])

    def first():
        out = model.generate(
            input_ids=one, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, pad_token_id=0
        )
        return out.logits[0]

    before = first()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ("lora_B" if changed == "lora" else "proj.weight") in path:
                parameter.mul_(3)
    now = first()
    assert not torch.allclose(now, before)
    torch.testing.assert_close(now, model(input_ids=one).logits[:, -1])


READER = """
import sys, torch
model, batch, wanted = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits, wanted)
"""


@pytest.mark.parametrize("optimized", (False, True), ids=("plain", "optimized"))
def test_a_pickle_runs_in_a_process_that_has_attached_nothing(optimized, tmp_path):
    model, batch = adapted("prefix"), families.inputs("llama", pad="left")
    if optimized:
        pe.optimize(model)
    with torch.no_grad():
        torch.save((model, batch, model(**batch).logits), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "model.pt"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


OTHERS = {
    "lora": pe.LoraConfig(r=4, init_lora_weights=False),
    "houlsby": pe.BottleneckConfig.houlsby(),
    "pfeiffer": pe.BottleneckConfig.pfeiffer(),
}


@torch.no_grad()
@pytest.mark.parametrize("other", OTHERS)
def test_rows_that_share_a_prompt_and_stack_other_adapters_each_have_their_own(other):
    model = adapted("prompt", "p")
    shake(pe.attach(model, OTHERS[other], "other"), "other")
    ids = families.inputs("llama", rows=3)["input_ids"]
    alone = {}
    for name in ("p", "other+p"):
        pe.active(model, name)
        alone[name] = model(ids).logits
    for names in (["other+p", "p", "other+p"], ["p", "other+p", "p"]):
        pe.active(model, names)
        logits = model(ids).logits
        assert all(torch.equal(logits[row], alone[name][row]) for row, name in enumerate(names))


@pytest.mark.parametrize(("kind", "settings"), [("prompt", {}), ("prefix", {"prefix_projection": True})])
def test_keys_from_a_graph_refuse_the_older_checkpointing(kind, settings):
    model = adapted(kind, **settings).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match=r"'default' come from a graph.*use_reentrant\": False"):
        model(**families.inputs("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**families.inputs("llama")).loss.backward()


def test_a_plain_prefix_takes_the_older_checkpointing():
    grads = []
    for reentrant in (True, False):
        model = adapted("prefix").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**families.inputs("llama")).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 1
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_attached_in_inference_mode_runs(kind):
    model = families.build("llama")
    batch = families.inputs("llama")
    with torch.inference_mode():
        pe.attach(model, KINDS[kind](num_virtual_tokens=P))
        inside = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, inside)


def test_a_model_that_scales_its_embeddings_in_place_leaves_the_prompt_alone():
    torch.manual_seed(0)
    model = transformers.CTRLLMHeadModel(transformers.CTRLConfig(**CTRL)).eval()
    pe.attach(model, pe.PromptTuningConfig(num_virtual_tokens=P))
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    before = prompt.detach().clone()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert torch.equal(prompt, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ("llama", "bert"))
def test_a_forward_of_another_length_in_another_thread_keeps_its_rows(family):
    model = families.build(family)
    shake(pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=P), "a"), "a")
    pe.active(model, ["a", None])
    batches = [families.inputs(family, rows=rows) for rows in (4, 2)]
    want, got = [model(**batch).logits for batch in batches], []
    layer = next(module for path, module in model.named_modules() if path.endswith(("layers.0", "layer.0")))

    def meanwhile(module, args, output):
        hook.remove()
        other = threading.Thread(target=lambda: got.append(model(**batches[1]).logits))
        other.start()
        other.join()

    hook = layer.register_forward_hook(meanwhile)
    got.append(model(**batches[0]).logits)
    assert torch.equal(got[1], want[0]) and torch.equal(got[0], want[1])


def test_mixed_batches_of_two_models_in_two_threads_stay_apart():
    def make():
        model = adapted("prompt", "p")
        shake(pe.attach(model, pe.LoraConfig(r=4, init_lora_weights=False), "l"), "l")
        pe.active(model, ["l+p", "p", None])
        return model

    batch = families.inputs("llama", rows=3)
    models = make(), make()
    with torch.no_grad():
        wanted = [model(**batch).logits for model in models]
    wrong = []

    def run(model, want):
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(model(**batch).logits, want))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

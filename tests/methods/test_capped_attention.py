"""Models that cap their attention's scores (Gemma 2 and its relatives) with fused attention."""

import contextlib
import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from peft_engine.kernels.prefix_attention import forward as prefix_forward

import peft_engine as pe
from peft_engine import native
from peft_engine.methods import fused_attention

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101, "sliding_window": 6,
    "attn_logit_softcapping": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ("Gemma2", "VaultGemma", "T5Gemma")
IDS = torch.arange(51).view(3, 17) * 7 % 98 + 3
MASK = torch.ones_like(IDS)
MASK[1, 12:] = 0


def build(family: str = "Gemma2", dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    if family == "T5Gemma":
        sizes = SIZES | {"dropout_rate": 0.0} | changes
        config = transformers.T5GemmaConfig(encoder=dict(sizes), decoder=dict(sizes), vocab_size=101)
        config.decoder_start_token_id = 1
        kind = transformers.T5GemmaForConditionalGeneration
    else:
        config = getattr(transformers, f"{family}Config")(**(SIZES | changes))
        kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # scores of some size, which the cap changes
            if p.dim() == 2:
                p.mul_(8.0)
    return model.to(dtype).requires_grad_(False)


def logits(model, mask=MASK):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, attention_mask=mask, **more).logits + 0


def loss_of(model):
    return model(input_ids=IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss


def lora(model):
    return pe.attach(model, pe.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))


def gradients(model):
    model.zero_grad()
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype,within", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_the_models_own(family, dtype, within):
    model = build(family, dtype)
    other = copy.deepcopy(model)
    uncapped = build(family, dtype, attn_logit_softcapping=1e6)
    before = logits(model)
    report = pe.optimize(other)
    lines = [line for line in report.layers if line.op == "attention"]
    assert lines and all(line.fused and line.backend == "cpu" and not line.reason for line in lines)
    for mask in (None, MASK):
        want, got = logits(model, mask), logits(other, mask)
        seen = slice(None) if mask is None or model.config.is_encoder_decoder else MASK.bool()
        assert (got - want)[seen].abs().max() < within * want.abs().max()
    assert (logits(uncapped) - before).abs().max() > 0.1 * before.abs().max()  # the cap is felt
    grads = []
    for one in (model, other):
        torch.manual_seed(1)
        grads.append(gradients(lora(one)))
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, want in grads[0].items():
        assert (grads[1][name] - want).abs().max() <= 20 * within * want.abs().max(), name
    pe.unoptimize(other)
    assert torch.equal(logits(other), logits(model))
    assert {c._attn_implementation for c in fused_attention._configs(other)} == {"eager"}


@pytest.mark.parametrize(
    "how", [{}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_models_own(family, how):
    model = build(family)
    left = MASK.flip(1)
    settings = {"max_new_tokens": 12, "do_sample": False, **how}
    want = model.generate(IDS, attention_mask=left, **settings)
    pe.optimize(model)
    assert torch.equal(model.generate(IDS, attention_mask=left, **settings), want)


@pytest.mark.parametrize("adapter", [None, "lora", "prefix"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "padding"])
def test_a_model_on_the_meta_device_runs(adapter, mask):
    model = build()
    if adapter == "lora":
        lora(model)
    elif adapter == "prefix":
        pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3))
    pe.optimize(model)
    out = model.to("meta")(input_ids=IDS.to("meta"), attention_mask=mask if mask is None else mask.to("meta"))
    assert out.logits.shape == (3, 17, 101)


@pytest.mark.parametrize("recorded", [torch.inference_mode, torch.no_grad])
def test_what_is_causal_has_one_row_of_mask_that_nobody_scans(recorded, monkeypatch):
    """A prompt of 8,000 tokens held 12 masks of 64 MB for a moment, and each layer compared two of them."""
    model = build()
    want = logits(model, None)
    pe.optimize(model)
    masks, scanned = [], []
    run = fused_attention.attend_capped

    def see(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return run(module, query, key, value, attention_mask, **kwargs)

    ops = sys.modules["peft_engine.ops.attention"]
    monkeypatch.setattr(ops, "intervals_from_mask", lambda mask: scanned.append(mask))
    transformers.AttentionInterface.register(fused_attention.CAPPED, see)
    try:
        with recorded():
            got = logits(model, None)
    finally:
        transformers.AttentionInterface.register(fused_attention.CAPPED, run)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    full = [mask for mask in masks if mask.shape[0] == 1]
    assert len(masks) == 2 and len(full) == 1 and not full[0].is_inference()  # the other has a window of 6
    assert len(scanned) == 1 and scanned[0] is not full[0]


@pytest.mark.parametrize("method", [pe.PrefixTuningConfig, pe.PromptTuningConfig])
def test_behind_virtual_tokens(method):
    results = []
    for fused in (False, True):
        model = build()
        torch.manual_seed(1)
        pe.attach(model, method(num_virtual_tokens=3))
        report = pe.optimize(model) if fused else pe.explain(model)
        line = next(line for line in report.layers if line.name.endswith("0.self_attn"))
        assert line.op == "prefix_attention" and line.backend == "cpu"
        results.append((logits(model)[MASK.bool()], gradients(model)))
        with pe.active(model, None):
            assert not torch.equal(logits(model)[MASK.bool()], results[-1][0])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for name, want in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], want, rtol=1e-3, atol=1e-6)


def test_a_prefix_is_what_stands_in_the_cache():
    """As PEFT has it: the cap is on the prefix's scores too."""
    model = build()
    pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3))
    got = logits(model, None)
    live = model.model.layers[0].self_attn.__dict__["peft_engine_site"].parts
    with pe.force_backend("reference"):
        torch.testing.assert_close(logits(model, None), got, rtol=1e-4, atol=1e-4)
    assert live


def test_where_no_kernel_takes_a_call_the_models_own_attention_runs(monkeypatch):
    model, eager = build(), []
    own = transformers.models.gemma2.modeling_gemma2.eager_attention_forward
    want, maps = logits(model), model(IDS, attention_mask=MASK, output_attentions=True).attentions
    pe.optimize(model)

    def counted(*args, **kwargs):
        eager.append(args[4])
        return own(*args, **kwargs)

    monkeypatch.setattr(transformers.models.gemma2.modeling_gemma2, "eager_attention_forward", counted)
    logits(model)
    assert not eager
    found = model(IDS, attention_mask=MASK, output_attentions=True).attentions
    assert len(eager) == 2 and len(found) == len(maps)
    seen = MASK.bool()[:, None].expand(3, 4, 17)
    for got, wanted in zip(found, maps, strict=True):
        torch.testing.assert_close(got[seen], wanted[seen])
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled)[MASK.bool()], want[MASK.bool()], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(fused_attention, "_by_torch", lambda *args, **kwargs: True)  # as in a captured graph
    eager.clear()
    for mask in (MASK, None):
        torch.testing.assert_close(logits(model, mask)[MASK.bool()], logits(build(), mask)[MASK.bool()])
    assert len(eager) == 8  # four by the model that is not optimised


def test_attention_dropout_is_drawn_and_checkpoints_draw_it_again():
    model = build(attention_dropout=0.5)
    pe.optimize(lora(model))
    model.train()
    torch.manual_seed(2)
    one = gradients(model)
    torch.manual_seed(2)
    model.gradient_checkpointing_enable()
    two = gradients(model)
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.manual_seed(3)
    assert not all(torch.equal(gradients(model)[name], one[name]) for name in one)


def test_on_a_gpu_the_kernels_run_with_and_without_a_prefix(as_on_a_gpu, monkeypatch):
    """Gemma 2's windows and padding are intervals."""
    ran, run = [], prefix_forward.forward
    monkeypatch.setattr(prefix_forward, "forward", lambda *given: (ran.append(given[-1]), run(*given))[1])
    for method in (lora, lambda model: pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3))):
        found = []
        for fused in (False, True):
            torch.manual_seed(1)
            model = method(build())
            if fused:
                pe.optimize(model)
            ran.clear()
            with contextlib.nullcontext() if fused else pe.force_backend("reference"):
                found.append((logits(model)[MASK.bool()], gradients(model)))
            assert ran == [0.2] * 4 * fused
        (want, slopes), (got, ours) = found
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for name, slope in slopes.items():
            torch.testing.assert_close(ours[name], slope, rtol=1e-3, atol=1e-5)


def test_copies_and_pickles_are_fused():
    model = build()
    pe.optimize(model)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config._attn_implementation == "fused_capped"
        assert torch.equal(logits(other), want)


def test_without_a_cap_eager_stays_eager():
    model = build(attn_logit_softcapping=None)
    model.set_attn_implementation("eager")
    report = pe.optimize(model)
    assert model.config._attn_implementation == "eager"
    line = next(line for line in report.layers if line.op == "attention")
    assert "attention is set to eager" in line.reason


@pytest.mark.parametrize("how", ["asked", "config", "compiled"])
def test_the_models_own_attention_of_a_static_cache_before_its_first_token(how):
    """Its later slots are empty: the mask is None, and a query sees those up to its own place."""
    model = build()
    if how == "config":
        for config in fused_attention._configs(model):
            config.output_attentions = True
    results = []
    for _ in range(2):
        run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        more = {"output_attentions": True} if how == "asked" else {}
        results.append(run(IDS, past_key_values=cache, **more))
        pe.optimize(model)
    torch.testing.assert_close(results[1].logits, results[0].logits, rtol=1e-4, atol=1e-4)
    if how != "compiled":
        for got, want in zip(results[1].attentions, results[0].attentions, strict=True):
            torch.testing.assert_close(got, want)


def test_a_pickle_of_a_part_is_read_where_nothing_was_optimised(tmp_path):
    model = build()
    pe.optimize(model)
    torch.save(model.model.layers[0], tmp_path / "layer.pt")
    code = (
        "import sys, torch; layer = torch.load(sys.argv[1], weights_only=False)\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
        "print(layer.self_attn.config._attn_implementation in ALL_ATTENTION_FUNCTIONS)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "layer.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["True"]
    pe.optimize(model.model)
    pe.unoptimize(model)
    assert not any(fused_attention.MARK in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("method", [None, pe.PrefixTuningConfig])
def test_a_mask_says_who_sees_what_whatever_the_layer_says_of_itself(method):
    """Eager's mask is causal where the layer is not, and there is none where the config is not."""
    for changes in ({"use_bidirectional_attention": True}, {"is_causal": False}):
        results = []
        for fused in (False, True):
            model = build(**changes)
            if method is not None:
                torch.manual_seed(1)
                pe.attach(model, method(num_virtual_tokens=3))
            if fused:
                pe.optimize(model)
            results.append(logits(model, None))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_images_of_paligemma_2_are_seen_from_both_sides():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**sizes, image_size=16, patch_size=8)
    config = transformers.PaliGemmaConfig(
        vision_config=vision.to_dict(), text_config=transformers.Gemma2Config(**SIZES).to_dict(),
        image_token_index=100, projection_dim=64, hidden_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    ids, kinds = IDS[:2].clone(), torch.zeros(2, 17, dtype=torch.long)
    ids[:, :4], kinds[:, 10:] = 100, 1
    given = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    for more in ({}, {"token_type_ids": kinds, "labels": ids.masked_fill(kinds == 0, -100)}):
        want = model(**given, attention_mask=torch.ones_like(ids), **more).logits
        pe.optimize(model)
        assert model.config.text_config._attn_implementation == "fused_capped"
        got = model(**given, attention_mask=torch.ones_like(ids), **more).logits
        torch.testing.assert_close(got + 0, want + 0, rtol=1e-4, atol=1e-4)
        pe.unoptimize(model)


@pytest.mark.parametrize("family", ["Gemma2", "VaultGemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sees_what_the_models_own_attention_shows_it(family, side):
    """The last of left padding predicts a row's first token, which Trainer's collators label."""
    mask = MASK.clone()
    mask[1] = MASK[1].flip(0) if side == "left" else MASK[1]
    ids = IDS.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    found = []
    for fused in (False, True):
        model = build(family).requires_grad_()
        if fused:
            pe.optimize(model)
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        found.append([out.logits + 0, out.loss, *(p.grad for p in model.parameters())])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("optimised", [False, True])
def test_attention_weights_behind_virtual_tokens_are_refused(optimised):
    model = pe.attach(build(), pe.PrefixTuningConfig(num_virtual_tokens=3))
    if optimised:
        pe.optimize(model)
    with pytest.raises(ValueError, match="behind virtual tokens no attention weights are formed"):
        model(IDS, output_attentions=True)

"""Attention that optimize fuses through transformers' interface, and what explain says of attention."""

import copy
import json
import pickle
import subprocess
import sys

import families
import pytest
import torch
import transformers
from accuracy import assert_twice_as_good
from method_cases import shake

import peft_engine as pe
from peft_engine.methods import fused_attention
from peft_engine.methods.attach import tensors

FAMILIES = ("gpt2", "bert", "roberta", "t5", "bart")
# Others whose layers no fused class stands for: partial rotary, one key head, norms of q and k, images.
OTHERS = {
    "GPTNeoX": {"rotary_pct": 0.25, "intermediate_size": 48},
    "Olmo2": {"num_key_value_heads": 2, "intermediate_size": 48},
    "StableLm": {"num_key_value_heads": 2, "intermediate_size": 48},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
    "Starcoder2": {"num_key_value_heads": 1, "intermediate_size": 48, "sliding_window": 4},
}
DROPOUT = {
    "gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "roberta": "attention_probs_dropout_prob",
    "t5": "dropout_rate", "bart": "attention_dropout",
}  # fmt: skip


def implementations(model):
    return {m.config._attn_implementation for m in model.modules() if fused_attention._through(m)}


def adapted(family, **changes):
    return shake(pe.attach(families.build(family, **changes), pe.LoraConfig(r=4), "default"))


def gradients(model, batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), out.logits.detach(), {k: t.grad for k, t in tensors(model, "default").items()}


@pytest.fixture
def ran(monkeypatch):
    """How many attention calls ran by kernels, and how many by torch."""
    count = {False: 0, True: 0}
    decide = fused_attention._by_torch

    def counting(*args, **kwargs):
        found = decide(*args, **kwargs)
        count[found] += 1
        return found

    monkeypatch.setattr(fused_attention, "_by_torch", counting)
    return count


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_the_models_own_attention(family, pad, ran):
    model, batch = adapted(family).train(), families.inputs(family, pad=pad)
    loss, logits, grads = gradients(model, batch)
    wanted = copy.deepcopy(grads)
    pe.optimize(model)
    assert implementations(model) == {"fused_sdpa"}
    again, fused, grads = gradients(model, batch)
    assert ran[False] and not ran[True]
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(fused, logits)
    torch.testing.assert_close(grads, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_are_as_exact_as_before(kind, dtype, ran):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **OTHERS[kind], pad_token_id=0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    ids, mask = torch.randint(1, 61, (3, 19)), torch.ones(3, 19, dtype=torch.long)
    mask[1, :6] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    exact = copy.deepcopy(model).double()(**batch).logits
    plain = model.to(dtype)(**batch).logits
    pe.optimize(model)
    assert implementations(model) == {"fused_sdpa"}
    seen = mask.bool()
    fused = model(**batch).logits
    assert ran[False] == 2 and not ran[True]
    assert_twice_as_good(fused[seen], plain[seen], exact[seen], exact[seen].abs() + 0.1, kind)


def test_images_and_what_has_no_labels_go_through_it_too(ran):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model, pixels = transformers.ViTModel(config).eval(), torch.randn(2, 3, 16, 16)
    wanted = model(pixel_values=pixels).last_hidden_state
    pe.optimize(model)
    torch.testing.assert_close(model(pixel_values=pixels).last_hidden_state, wanted)
    assert ran == {False: 2, True: 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_of_the_weights_is_the_ops_and_drawn_again_for_a_checkpoint(family, ran):
    model, batch = adapted(family, **{DROPOUT[family]: 0.3}).train(), families.inputs(family)
    pe.optimize(model)
    still = model.eval()(**batch).loss.detach()

    def step():
        torch.manual_seed(7)
        return gradients(model.train(), batch)

    loss, _, grads = step()
    grads = copy.deepcopy(grads)
    assert not torch.allclose(loss, still) and not ran[True]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, _, repeated = step()
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(repeated, grads)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_the_older_checkpoint_goes_the_forwards_way_again(trained, prefix, monkeypatch):
    """It hands T5's bias on without its graph; on another way other weights would be dropped."""
    model, batch = adapted("t5").train(), families.inputs("t5")
    if prefix:
        pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3), "prefix")
        pe.active(model, "default+prefix")
    for path, parameter in model.named_parameters():
        if "relative_attention_bias" in path:
            parameter.requires_grad_(trained)

    def step():
        model.zero_grad()
        model(**batch).loss.backward()
        return {path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}

    wanted = step()
    pe.optimize(model)
    ways, decide = [], fused_attention._by_torch

    def noting(module, *args, **kwargs):
        ways.append((module, decide(module, *args, **kwargs)))
        return ways[-1][1]

    monkeypatch.setattr(fused_attention, "_by_torch", noting)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    torch.testing.assert_close(step(), wanted, rtol=1e-4, atol=1e-5)
    half = len(ways) // 2
    assert dict(ways[:half]) == dict(ways[half:]) and (prefix or half == 6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bart"])
def test_generate_writes_the_same(family, beams):
    model, batch = adapted(family).eval(), families.inputs(family, pad="left")
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    wanted = model.generate(**batch, **how)
    pe.optimize(model)
    assert torch.equal(model.generate(**batch, **how), wanted)
    if family == "gpt2":
        assert torch.equal(model.generate(**batch, **how, cache_implementation="static"), wanted)


def test_torch_compile_traces_torchs_attention():
    model, batch = adapted("gpt2").eval(), families.inputs("gpt2")
    batch.pop("labels")
    wanted = model(**batch, use_cache=False).logits
    pe.optimize(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch, use_cache=False).logits, wanted)


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda m: m.double(), {}),
        (lambda m: m, {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]] * 4)}),  # no interval
        (lambda m: m.requires_grad_(True), {}),  # T5's bias learns
    ],
)
def test_what_no_kernel_takes_is_torchs(change, batch, ran):
    model = change(families.build("t5"))
    given = families.inputs("t5") | batch
    wanted = model(**given).logits
    pe.optimize(model)
    torch.testing.assert_close(model(**given).logits, wanted)
    assert ran[True]


# --- the name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_unoptimize_leaves_no_trace(family):
    model, batch = families.build(family), families.inputs(family)
    wanted, attributes = model(**batch).logits, set(vars(model))
    pe.optimize(model)
    pe.unoptimize(model)
    assert implementations(model) == {"sdpa"} and set(vars(model)) == attributes
    assert torch.equal(model(**batch).logits, wanted)


def test_files_and_copies_and_another_process(tmp_path):
    model, batch = adapted("gpt2"), families.inputs("gpt2")
    pe.optimize(model)
    wanted = model(**batch).logits
    assert torch.equal(copy.deepcopy(model)(**batch).logits, wanted)
    model.config.save_pretrained(tmp_path)
    assert "fused_sdpa" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "model").write_bytes(pickle.dumps((model, batch)))
    code = (
        "import pickle, sys, torch; m, b = pickle.load(open(sys.argv[1], 'rb')); print(m(**b).logits.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_attention_set_anew_is_heeded_and_another_model_may_have_the_config(ran):
    model, batch = adapted("gpt2"), families.inputs("gpt2")
    pe.optimize(model)
    twin = transformers.GPT2LMHeadModel(model.config)
    twin(**batch)
    ran.update({False: 0, True: 0})
    model.set_attn_implementation("eager")
    out = model(**batch, output_attentions=True)
    assert out.attentions[0] is not None and ran == {False: 0, True: 0}
    line = next(line for line in pe.explain(model).layers if line.op == "attention")
    assert not line.fused and "attention is set to eager" in line.reason


@pytest.mark.parametrize("first", ["optimize", "attach"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_virtual_tokens_stand_in_front_of_it(family, first):
    model, batch = families.build(family), families.inputs(family)
    plain = model(**batch).logits
    config = pe.PrefixTuningConfig(num_virtual_tokens=3, task_type=families.task_type(family))
    if first == "optimize":
        pe.optimize(model)
    shake(pe.attach(model, config))
    wanted = model(**batch).logits
    if first == "attach":
        pe.optimize(model)
    assert implementations(model) == {"peft_engine_fused_sdpa"}
    torch.testing.assert_close(model(**batch).logits, wanted)
    with pe.active(model, ["default", None] * 2):
        mixed = model(**batch).logits
    torch.testing.assert_close(mixed[0::2], wanted[0::2])
    with pe.active(model, None):
        assert implementations(model) == {"fused_sdpa"}
        torch.testing.assert_close(model(**batch).logits, plain)
    torch.testing.assert_close(mixed[1::2], plain[1::2])
    pe.unoptimize(model)
    assert implementations(model) == {"peft_engine_sdpa"}
    torch.testing.assert_close(model(**batch).logits, wanted)
    pe.detach(model)
    assert implementations(model) == {"sdpa"}
    assert torch.equal(model(**batch).logits, plain)


def test_a_model_that_asks_for_the_name_keeps_it(monkeypatch):
    model = families.build("bert")
    monkeypatch.setattr(fused_attention, "names_sdpa", lambda kind: kind.__name__ == "BertModel")
    report = pe.optimize(model)
    assert implementations(model) == {"sdpa"}
    lines = [line for line in report.layers if line.op == "attention"]
    assert lines and all('where attention is named "sdpa"' in line.reason for line in lines)


# --- what explain says --------------------------------------------------------------------------------------

ATTENTIONS = {"t5": "T5Attention", "bart": "BartAttention", "bert": "BertSelfAttention"}


def behind_prefix(family):
    config = pe.PrefixTuningConfig(num_virtual_tokens=3, task_type=families.task_type(family))
    return pe.attach(families.build(family), config)


@pytest.mark.parametrize("behind", [False, True], ids=["plain", "behind a prefix"])
@pytest.mark.parametrize("family", [*ATTENTIONS, "llama"])
def test_an_attention_layer_has_one_line_and_what_holds_it_has_none(family, behind):
    model = behind_prefix(family) if behind else families.build(family)
    kind = ATTENTIONS.get(family, "LlamaAttention")
    wanted = sorted(name for name, m in model.named_modules() if type(m).__name__ == kind)
    for made, fused in ((pe.explain(model), behind), (pe.optimize(model), True)):
        lines = [line for line in made.layers if line.kind.endswith("Attention")]
        assert sorted(line.name for line in lines) == wanted
        assert {line.kind for line in lines} == {f"transformers.{kind}"}
        assert {line.op for line in lines} == {"prefix_attention" if behind else "attention"}
        assert {line.fused for line in lines} == {fused}
        if not fused:
            assert all("peft_engine.optimize(model) fuses it" in line.reason for line in lines)


def test_a_layer_behind_a_prefix_says_what_optimize_would_fuse_around_it():
    model = behind_prefix("llama")
    before, after = (
        [line for line in made.layers if line.op == "prefix_attention"]
        for made in (pe.explain(model), pe.optimize(model))
    )
    assert len(before) == len(after) == 2
    assert all("peft_engine.optimize(model)" in line.reason for line in before)
    assert not any("peft_engine.optimize(model)" in line.reason for line in after)


@pytest.mark.parametrize("kind", [pe.PrefixTuningConfig, pe.PromptTuningConfig])
def test_explain_says_what_runs_in_front_of_the_keys(kind):
    model = shake(pe.attach(families.build("llama"), kind(num_virtual_tokens=3, task_type="CAUSAL_LM")))

    def lines():
        return [line for line in pe.explain(model).layers if line.op == "prefix_attention"]

    assert len(lines()) == 2 and all(line.name.endswith("self_attn") for line in lines())
    pe.active(model, None)
    assert not lines()
    model.train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    pe.active(model, "default")
    assert all(line.fused and line.backend == "cpu" for line in lines())
    model.double()
    assert all(not line.fused and "attention dropout, and" in line.reason for line in lines())

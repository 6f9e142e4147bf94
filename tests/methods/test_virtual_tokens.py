"""What prefix and prompt tuning have in common: keys and values in front of a model's own."""

import copy
import hashlib
import pickle

import families
import pytest
import torch
from method_cases import shake

import peft_engine as pe
from peft_engine.methods import virtual_attention
from peft_engine.methods.attach import tensors

P = 5
KINDS = {"prefix": pe.PrefixTuningConfig, "prompt": pe.PromptTuningConfig}
# What runs prefix_attention: a prefix everywhere, a prompt where its hidden states do not look ahead.
BEHIND_KEYS = [("prefix", f) for f in families.FAMILIES] + [("prompt", f) for f in families.DECODERS]
EVERYWHERE = [(kind, f) for kind in KINDS for f in families.FAMILIES]


def config(kind: str, family: str, length: int = P):
    return KINDS[kind](num_virtual_tokens=length, task_type=families.task_type(family))


def adapted(kind: str, family: str, name: str = "default", **settings):
    return shake(pe.attach(families.build(family, **settings), config(kind, family), name), name)


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for path, tensor in sorted(model.state_dict().items()):
        if "peft_engine" not in path and ".lora_" not in path:
            digest.update(path.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(model, batch, name: str = "default"):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {path: t.grad.clone() for path, t in tensors(model, name).items()}


@pytest.mark.parametrize("pad", ("right", "left"))
@pytest.mark.parametrize(("kind", "family"), BEHIND_KEYS)
def test_the_op_gives_what_the_models_own_attention_gives_over_joined_keys(kind, family, pad, monkeypatch):
    model = adapted(kind, family).train()
    batch = families.inputs(family, pad=pad)
    loss, grads = gradients(model, batch)
    monkeypatch.setattr(virtual_attention, "why_by_cat", lambda *a: "joined")
    joined, wanted = gradients(model, batch)
    torch.testing.assert_close(loss, joined)
    for path, grad in grads.items():
        torch.testing.assert_close(grad, wanted[path], msg=path)


@pytest.mark.parametrize(("kind", "family"), EVERYWHERE)
def test_every_tensor_trains_and_the_base_stays_the_same_to_the_bit(kind, family):
    model = families.build(family)
    before = fingerprint(model)
    pe.attach(model, config(kind, family))
    mine = list(tensors(model, "default").values())
    assert [p for p in model.parameters() if p.requires_grad] != []
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(t) for t in mine}
    optimizer = torch.optim.AdamW(mine, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(**families.inputs(family)).loss
        loss.backward()
        assert all(t.grad is not None and t.grad.any() for t in mine)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    pe.active(model, None)
    assert fingerprint(model) == before


@pytest.mark.parametrize(("kind", "family"), EVERYWHERE)
def test_without_an_adapter_the_model_is_the_base_to_the_bit_and_detached_it_is_what_it_was(kind, family):
    base = families.build(family).requires_grad_(False)
    batch = families.inputs(family)
    wanted = base(**batch).logits
    keys = set(base.state_dict())
    model = adapted(kind, family)
    pe.attach(model, config(kind, family, 3), "other")
    pe.active(model, None)
    assert torch.equal(model(**batch).logits, wanted)
    pe.active(model, "default")
    assert not torch.equal(model(**batch).logits[:, -wanted.shape[1] :], wanted)
    pe.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model.requires_grad_(False)(**batch).logits, wanted)
    assert set(model.state_dict()) == keys
    assert model.config._attn_implementation == base.config._attn_implementation
    for module in model.modules():
        assert not module._forward_pre_hooks and not any(k.startswith("peft_engine") for k in module.__dict__)


@pytest.mark.parametrize("way", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))))
@pytest.mark.parametrize(("kind", "family"), [("prefix", "bert"), ("prompt", "llama"), ("prefix", "t5")])
def test_a_copy_works_and_shares_nothing(kind, family, way):
    model = adapted(kind, family)
    batch = families.inputs(family)
    wanted = model(**batch).logits.detach()
    model.zero_grad()
    twin = way(model)
    assert torch.equal(twin(**batch).logits, wanted)
    shake(twin, seed=2)
    assert not torch.equal(twin(**batch).logits, wanted)
    assert torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize(("kind", "family"), [*BEHIND_KEYS, ("prompt", "bert"), ("prompt", "t5")])
def test_gradient_checkpointing_gives_the_same_gradients(kind, family):
    model = adapted(kind, family).train()
    batch = families.inputs(family)
    loss, grads = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, checkpointed = gradients(model, batch)
    torch.testing.assert_close(loss, again)
    for path, grad in grads.items():
        torch.testing.assert_close(grad, checkpointed[path], msg=path)


NOT_QUANTISED = {"bert": ["classifier"], "roberta": ["classifier"]}  # they are trained whole


@pytest.mark.parametrize(("kind", "family"), EVERYWHERE)
def test_an_nf4_base_trains(kind, family):
    model = pe.quantize_(families.build(family), skip_modules=NOT_QUANTISED.get(family))
    pe.attach(model, config(kind, family))
    _, grads = gradients(model, families.inputs(family))
    assert grads and all(torch.isfinite(g).all() and g.any() for g in grads.values())


@pytest.mark.parametrize("family", families.DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_packed_in_a_row_each_see_the_virtual_tokens_and_not_each_other(kind, family):
    model = adapted(kind, family)
    lengths, vocabulary = (4, 50, 1, 20), families.VOCABULARY  # in all more than the 64 positions of GPT-2
    documents = [torch.randint(3, vocabulary, (1, n)) for n in lengths]
    apart = torch.cat([model(input_ids=d).logits for d in documents], dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(
        input_ids=torch.cat(documents, 1), position_ids=positions, attention_mask=None, use_cache=False
    ).logits
    torch.testing.assert_close(packed, apart)


# --- generation ---------------------------------------------------------------------------------------------


def answers(model, batch, **settings):
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}
    return model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **given)


@pytest.mark.parametrize("family", (*families.DECODERS, *families.ENCODER_DECODERS))
@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache_gives_what_it_gives_without_and_row_by_row(kind, family):
    model = adapted(kind, family)
    batch = families.inputs(family, pad="left" if family in families.DECODERS else "right")
    start = batch["input_ids"].shape[1] if family in families.DECODERS else 1
    together = answers(model, batch)[:, start:]
    assert torch.equal(answers(model, batch, use_cache=False)[:, start:], together)
    for row in range(batch["input_ids"].shape[0]):
        seen = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row : row + 1, seen]
        alone = answers(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        first = ids.shape[1] if family in families.DECODERS else 1
        assert torch.equal(alone[0, first:], together[row])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_real_tokens_only_and_beams_work(kind):
    model = adapted(kind, "llama")
    batch = families.inputs("llama", pad="left")
    with torch.no_grad():
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=True)
    assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    beams = answers(model, batch, num_beams=3)
    assert beams.shape == (4, batch["input_ids"].shape[1] + 6)


# --- one model, many tasks ----------------------------------------------------------------------------------

ROWS = ["prefix", None, "prompt", "lora", "longer", "bottleneck", None, "prompt"]


def many(family: str, dtype: torch.dtype = torch.float32, nf4: bool = False):
    """A model with adapters of every kind that this family can mix, and 8 names, one for each row."""
    model = families.build(family, dtype=dtype)
    if nf4:
        pe.quantize_(model, skip_modules=NOT_QUANTISED.get(family))
    pe.attach(model, config("prefix", family), "prefix")
    pe.attach(model, config("prefix", family, 9), "longer")
    names = list(ROWS)
    if family in families.DECODERS:
        pe.attach(model, config("prompt", family, 3), "prompt")
    else:
        names = ["prefix" if name == "prompt" else name for name in names]
    if family == "gpt2":
        names = ["longer" if name == "lora" else name for name in names]
    else:
        linear = [p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p.count(".") > 2]
        pe.attach(model, pe.LoraConfig(r=3, target_modules=linear), "lora")
    pe.attach(model, pe.BottleneckConfig.houlsby(width=6), "bottleneck")
    for name in set(names) - {None}:
        shake(model, name, seed=len(name))
    return model, names


MIXED = [(f, d, False) for f in families.FAMILIES for d in (torch.float32, torch.bfloat16)]
MIXED += [(f, torch.bfloat16, True) for f in ("llama", "mistral", "bert", "t5")]


@pytest.mark.parametrize(("family", "dtype", "nf4"), MIXED, ids=str)
def test_each_row_of_a_mixed_batch_has_the_bits_of_the_batch_under_its_adapter_alone(family, dtype, nf4):
    model, names = many(family, dtype, nf4)
    batch = families.inputs(family, rows=8)
    del batch["labels"]
    if family in families.ENCODER_DECODERS:
        batch["decoder_input_ids"] = batch["input_ids"][:, :4].contiguous()
    with torch.no_grad():
        alone = {}
        for name in set(names):
            pe.active(model, name)
            alone[name] = model(**batch).logits
        with pe.active(model, names):
            mixed = model(**batch).logits
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[name][row]), (row, name)


@pytest.mark.parametrize("family", ("llama", "mistral", "gpt2", "t5", "bart"))
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(family):
    model, names = many(family)
    batch = families.inputs(family, rows=8, pad="left" if family in families.DECODERS else "right")
    with pe.active(model, names):
        mixed = answers(model, batch)
    for name in set(names):
        with pe.active(model, name):
            alone = answers(model, batch)
        for row in [row for row, own in enumerate(names) if own == name]:
            assert torch.equal(mixed[row], alone[row]), (row, name)


def test_each_adapter_of_a_mixed_batch_gets_the_gradient_of_its_own_rows():
    model, names = many("llama")
    batch = families.inputs("llama", rows=8)
    with pe.active(model, names):
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits.square().sum().backward()
        mixed = {n: {p: t.grad.clone() for p, t in tensors(model, n).items()} for n in set(names) - {None}}
    for name, wanted in mixed.items():
        own = [row for row, n in enumerate(names) if n == name]
        with pe.active(model, name):
            model.zero_grad()
            part = {k: batch[k][own] for k in ("input_ids", "attention_mask")}
            model(**part).logits.square().sum().backward()
            for path, tensor in tensors(model, name).items():
                torch.testing.assert_close(wanted[path], tensor.grad, rtol=1e-4, atol=1e-4, msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_stack_on_lora(kind):
    model = families.build("llama")
    pe.attach(model, pe.LoraConfig(r=3, target_modules="all-linear"), "lora")
    pe.attach(model, config(kind, "llama"), "front")
    shake(shake(model, "lora"), "front")
    batch = families.inputs("llama")
    with pe.active(model, "lora+front"):
        both = model(**batch).logits
        gradients(model, batch, "lora")
        assert all(t.grad.any() for n in ("lora", "front") for t in tensors(model, n).values())
    pe.merge_(model, "lora")
    pe.active(model, "front")
    torch.testing.assert_close(model(**batch).logits, both)


def test_a_switch_walks_over_no_module(monkeypatch):
    """Fast whatever the size of the model; after another adapter came it finds that one too."""
    model, names = many("llama")
    for name in names:
        pe.active(model, name)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "named_modules", lambda self, *a, **k: pytest.fail("a walk"))
        for name in names:
            pe.active(model, name)
    pe.attach(model, config("prefix", "llama", 4), "late")
    batch = {k: v for k, v in families.inputs("llama", rows=8).items() if k != "labels"}
    late = model(**batch).logits
    with pe.active(model, None):
        assert not torch.equal(model(**batch).logits, late)
    assert torch.equal(model(**batch).logits, late)


def test_adapters_that_cannot_stack_are_refused_with_the_reason():
    model, _ = many("llama")
    with pytest.raises(ValueError, match="both stand in front of the first token"):
        pe.active(model, "prefix+prompt")
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        pe.active(model, ["prefix", "nobody"])
    with pytest.raises(ValueError, match="3 adapter names are active"), pe.active(model, ["prefix"] * 3):
        model(**families.inputs("llama", rows=8))


def test_a_prompt_on_an_encoder_is_refused_in_a_mixed_batch():
    for family in (*families.ENCODERS, *families.ENCODER_DECODERS):
        model = adapted("prompt", family, "front")
        with pytest.raises(ValueError, match="prompt at the input of an encoder"):
            pe.active(model, ["front", None])


# --- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_more_virtual_tokens_than_positions_are_refused_before_anything_is_changed(kind):
    model = families.build("llama")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="leaves no room for tokens: the model has 64 positions"):
        pe.attach(model, config(kind, "llama", 64))
    assert set(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("kind", "family"), [("prefix", "gpt2"), ("prompt", "gpt2"), ("prefix", "bert")])
def test_an_input_that_leaves_no_room_behind_the_virtual_tokens_is_refused(kind, family):
    model = adapted(kind, family)
    fits = {k: v for k, v in families.inputs(family, tokens=64 - P).items() if k != "labels"}
    model(**fits)
    long = {k: v for k, v in families.inputs(family, tokens=65 - P).items() if k != "labels"}
    with pytest.raises(ValueError, match="5 of them and 60 tokens exceed the 64 positions"):
        model(**long)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_that_takes_nothing_in_front_is_refused(kind):
    model = families.build("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"set to 'flash_attention_2'.*set_attn_implementation"):
        pe.attach(model, config(kind, "llama"))


# Names of the attention's own dropout.
DROPOUT = {
    "gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "roberta": "attention_probs_dropout_prob",
    "t5": "dropout_rate",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "family"), BEHIND_KEYS)
def test_attention_dropout_runs_in_the_op_and_is_drawn_again_for_a_checkpoint(kind, family, monkeypatch):
    model = adapted(kind, family, **{DROPOUT.get(family, "attention_dropout"): 0.3})
    batch = families.inputs(family)
    still = model(**batch).loss.detach()
    monkeypatch.setattr(virtual_attention, "_by_cat", None)

    def step():
        torch.manual_seed(7)
        return gradients(model.train(), batch)

    loss, grads = step()
    assert not torch.allclose(loss, still)
    with pe.force_backend("reference"):
        want, wanted = step()
    torch.testing.assert_close(loss, want)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, repeated = step()
    torch.testing.assert_close(again, loss)
    for path, grad in grads.items():
        torch.testing.assert_close(grad, wanted[path], msg=path)
        torch.testing.assert_close(grad, repeated[path], msg=path)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_attention_dropout_that_no_kernel_takes_is_torchs_over_joined_keys(family):
    model = adapted("prefix", family, **{DROPOUT[family]: 0.3}).double().train()
    batch = families.inputs(family)
    torch.manual_seed(7)
    loss, grads = gradients(model, batch)
    assert not torch.allclose(loss, model.eval()(**batch).loss) and all(g.any() for g in grads.values())

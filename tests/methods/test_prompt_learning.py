"""Prefix and prompt tuning beside PEFT, their files, and what they start from."""

import copy
import json
import threading

import families
import pytest
import safetensors.torch
import torch
from method_cases import edit_config, edit_weights, refused, shake
from tokenizers import Tokenizer, models, pre_tokenizers

import peft_engine as pe
from peft_engine.checkpoint import CONFIG, WEIGHTS
from peft_engine.methods.attach import tensors

P = 5
KINDS = {"prefix": pe.PrefixTuningConfig, "prompt": pe.PromptTuningConfig}
# PEFT's prefix is not seen as a whole behind a sliding window, and is wrong on encoder-decoders.
ONE_STACK = [(k, f) for k in KINDS for f in ("llama", "qwen2", "gpt2", "bert", "roberta")]
WITH_PEFT = [*ONE_STACK, ("prompt", "t5"), ("prompt", "bart")]


def config(kind: str, family: str, **settings):
    return KINDS[kind](num_virtual_tokens=P, task_type=families.task_type(family), **settings)


def peft_model(peft, kind: str, base, family: str):
    theirs = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    return peft.get_peft_model(base, theirs(task_type=families.task_type(family), num_virtual_tokens=P))


def adapted(kind: str, family: str, **settings):
    return shake(pe.attach(families.build(family), config(kind, family, **settings)))


def logits(model, family: str, tokens: int | None = None) -> torch.Tensor:
    """Without those of a prompt, which PEFT adds in front."""
    with torch.no_grad():
        out = model(**families.inputs(family)).logits
    return out if tokens is None else out[:, -tokens:]


def losses(model, family: str, steps: int = 20) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    out = []
    model.train()
    for step in range(steps):
        loss = model(**families.inputs(family, seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (the `peers` extra)")


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "family"), WITH_PEFT)
def test_twenty_steps_have_pefts_losses(peft, kind, family):
    base = families.build(family)
    theirs = peft_model(peft, kind, copy.deepcopy(base), family)
    ours = pe.attach(base, config(kind, family))
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        mine = next(iter(tensors(ours, "default").values()))
        mine.copy_(table[: mine.shape[0]])
    wanted, got = losses(theirs, family), losses(ours, family)
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 1e-4
    assert got[-1] != got[0]


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "family"), WITH_PEFT)
def test_peft_reads_what_we_save_and_we_read_what_peft_saves(peft, kind, family, tmp_path):
    base = families.build(family)
    ours = adapted(kind, family)
    pe.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    wanted = logits(ours, family)
    tokens = wanted.shape[1] if wanted.dim() == 3 else None
    torch.testing.assert_close(logits(theirs, family, tokens), wanted)

    theirs = peft_model(peft, kind, copy.deepcopy(base), family).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    pe.load_adapter(base, tmp_path / "theirs")
    torch.testing.assert_close(logits(base, family), logits(theirs, family, tokens))


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "family"), [("prefix", "llama"), ("prompt", "gpt2"), ("prompt", "t5")])
def test_a_config_without_a_task_is_saved_with_the_models(peft, kind, family, tmp_path):
    """Without one PEFT leaves the virtual tokens out."""
    base = families.build(family)
    ours = shake(pe.attach(copy.deepcopy(base), KINDS[kind](num_virtual_tokens=P)))
    pe.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == families.task_type(
        family
    )
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    wanted = logits(ours, family)
    torch.testing.assert_close(logits(theirs, family, wanted.shape[1]), wanted)
    assert (logits(base, family) - wanted).abs().max() > 1e-3


@pytest.mark.peers
def test_pefts_prefix_of_an_encoder_decoder_is_refused_with_the_reason(peft, tmp_path):
    model = peft_model(peft, "prefix", families.build("t5"), "t5")
    model.save_pretrained(tmp_path)
    refused(families.build("t5"), tmp_path, "in front of the decoder's self-attention alone")


@pytest.mark.parametrize(("kind", "family"), [(k, f) for k in KINDS for f in families.FAMILIES])
def test_a_saved_adapter_comes_back_to_the_bit(kind, family, tmp_path):
    model = adapted(kind, family)
    pe.save_adapter(model, tmp_path / "out")
    again = families.build(family)
    assert pe.load_adapter(again, tmp_path / "out", "again") == "again"
    assert torch.equal(logits(again, family), logits(model, family))
    pe.save_adapter(
        again, tmp_path / "twice", "again"
    )  # one that was loaded is no adapter untouched by training


def test_a_projected_prefix_is_folded_when_it_is_saved(tmp_path):
    model = adapted("prefix", "llama", prefix_projection=True, encoder_hidden_size=12)
    assert len(tensors(model, "default")) == 5
    losses(model, "llama", 2)
    model.eval()
    pe.save_adapter(model, tmp_path)
    again = families.build("llama")
    pe.load_adapter(again, tmp_path)
    assert len(tensors(again, "default")) == 1
    torch.testing.assert_close(logits(again, "llama"), logits(model, "llama"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_right_is_not_saved_and_not_loaded(kind, tmp_path):
    model = pe.attach(families.build("llama"), config(kind, "llama"))
    with pytest.raises(
        ValueError, match="untouched by training: its virtual tokens are those that it started"
    ):
        pe.save_adapter(model, tmp_path / "fresh")
    pe.save_adapter(shake(model), tmp_path / "out")
    refused(families.build("llama", hidden_size=64), tmp_path / "out", "of another shape: prompt_embeddings")
    refused(
        families.build("t5"), tmp_path / "out", "prefix for an encoder-decoder" if kind == "prefix" else ""
    )
    edit_weights(tmp_path / "out", lambda held: {k: v * float("nan") for k, v in held.items()})
    refused(families.build("llama"), tmp_path / "out", "NaN or inf in prompt_embeddings")
    edit_config(tmp_path / "out", surprise=1)
    refused(families.build("llama"), tmp_path / "out", "unknown key 'surprise'")
    edit_config(tmp_path / "out", surprise=1, peft_version="9.1.0")
    refused(families.build("llama"), tmp_path / "out", "PEFT 9.1.0, newer than this version knows")


def test_the_file_is_one_table_of_the_prefix_length(tmp_path):
    pe.save_adapter(adapted("prefix", "llama"), tmp_path)
    (key,) = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert key == "prompt_embeddings"
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "PREFIX_TUNING" and fields["num_layers"] == 2 and fields["token_dim"] == 16


# --- what they start from -----------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path) -> str:
    """A folder with a tokenizer that makes token i of the word wi."""
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", families.DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_from_text_is_that_text_in_front_of_the_input(kind, family, tokenizer):
    """On a decoder keys and values of real tokens, or their embeddings, do what the tokens do."""
    changes = {"sliding_window": 64} if family == "mistral" else {}  # a prefix is seen behind any window
    model = families.build(family, **changes)
    text = torch.tensor([[7, 9, 4, 7, 9]])
    start = {
        "num_virtual_tokens": 5,
        f"{'prefix_init' if kind == 'prefix' else 'prompt_tuning_init'}": "TEXT",
        f"{'prefix_init' if kind == 'prefix' else 'prompt_tuning_init'}_text": "w7 w9 w4",
        "tokenizer_name_or_path": tokenizer,
    }
    batch = {k: v for k, v in families.inputs(family).items() if k != "labels"}
    ids = torch.cat([text.expand(4, -1), batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(4, 5, dtype=torch.long), batch["attention_mask"]], dim=1)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits[:, 5:]
        pe.attach(model, KINDS[kind](**start))
        got = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(got[real], wanted[real])


@pytest.mark.parametrize("family", ("bert", "t5", "bart"))
def test_other_models_start_a_prefix_from_vocabulary(family):
    model = pe.attach(families.build(family), config("prefix", family, prefix_init="SAMPLE_VOCAB"))
    tables = [t for path, t in tensors(model, "default").items() if path.endswith("embedding.weight")]
    assert tables and all(torch.isfinite(t).all() and t.any(dim=1).all() for t in tables)


def test_a_text_that_cannot_be_a_start_is_refused(tokenizer):
    def attach(text: str, **changes):
        start = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": tokenizer}
        pe.attach(families.build("llama"), pe.PromptTuningConfig(prompt_tuning_init_text=text, **start))

    with pytest.raises(ValueError, match="gives no token with"):
        attach("  ")
    with pytest.raises(ValueError, match=r"makes token 150, and the model has only 101.*own tokenizer"):
        attach("w150")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", (False, True), ids=("alone", "beside"))
def test_an_attach_that_fails_midway_leaves_the_model_as_it_was(kind, before, monkeypatch):
    model = families.build("llama").train()
    model.model.layers[0].eval()
    if before:
        shake(
            pe.attach(model, pe.PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=["norm"]), "a"), "a"
        )

    def state():
        flags = {path: (id(p), p.requires_grad) for path, p in model.named_parameters()}
        modules = {path: (type(m), m.training, set(m.__dict__)) for path, m in model.named_modules()}
        return flags, modules, model.config._attn_implementation

    then = state()
    init = f"{'prefix_init' if kind == 'prefix' else 'prompt_tuning_init'}"
    with pytest.raises(OSError, match="nowhere"):
        text = {init: "TEXT", f"{init}_text": "w1", "tokenizer_name_or_path": "./nowhere"}
        pe.attach(model, KINDS[kind](num_virtual_tokens=P, **text), "b")
    assert state() == then
    if kind == "prefix":
        monkeypatch.setattr(model.model.norm, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pe.attach(model, KINDS[kind](num_virtual_tokens=P, **{init: "SAMPLE_VOCAB"}), "b")
        monkeypatch.undo()
        assert state() == then


def test_a_start_from_vocabulary_leaves_the_modes_of_the_layers():
    model = families.build("llama").train()
    model.model.layers[0].eval()
    pe.attach(model, config("prefix", "llama", prefix_init="SAMPLE_VOCAB"))
    assert model.training and model.model.layers[1].mlp.training and not model.model.layers[0].mlp.training


BAD = [
    ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer of at least 1, got 0"),
    ("prompt", {"num_virtual_tokens": 2.5}, "num_virtual_tokens must be an integer of at least 1, got 2.5"),
    ("prompt", {"prompt_tuning_init": "WORDS"}, "must be one of RANDOM, TEXT, SAMPLE_VOCAB, got 'WORDS'"),
    ("prompt", {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text, a string, got None"),
    ("prefix", {"init_weights": "ones"}, "init_weights must be None or 'zero', got 'ones'"),
    ("prefix", {"encoder_hidden_size": 0}, "encoder_hidden_size must be an integer of at least 1, got 0"),
    ("prefix", {"prefix_init": "SAMPLE_VOCAB", "prefix_projection": True}, "sets the prefix itself"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), BAD)
def test_a_field_that_cannot_be_is_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind](**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_whose_attention_takes_nothing_in_front_is_refused(kind):
    with pytest.raises(TypeError, match=r"Falcon.* does not go through transformers' attention interface"):
        pe.attach(families.build("falcon"), KINDS[kind](num_virtual_tokens=P))


@pytest.mark.peers
def test_labels_of_tokens_are_as_long_as_an_encoder_behind_a_prompt(peft):
    import transformers

    torch.manual_seed(0)
    config_ = transformers.BertConfig(**families.BERT, num_labels=3)
    base = transformers.BertForTokenClassification(config_).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P)
    ).eval()
    ours = pe.attach(base, pe.PromptTuningConfig(num_virtual_tokens=P, task_type="TOKEN_CLS"))
    with torch.no_grad():
        next(iter(tensors(ours, "default").values())).copy_(theirs.prompt_encoder["default"].embedding.weight)
    batch = families.inputs("bert")
    batch["labels"] = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    labels = batch["labels"]
    logits = theirs(**{k: v for k, v in batch.items() if k != "labels"}).logits[
        :, P:
    ]  # PEFT takes no labels here
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours(**batch).loss, wanted)
    pe.detach(ours)
    assert not ours._forward_pre_hooks


def test_a_model_of_no_transformer_and_a_module_that_is_not_there_are_refused():
    with pytest.raises(TypeError, match="Linear is no transformers model; virtual tokens need one"):
        pe.attach(torch.nn.Linear(3, 3), pe.PrefixTuningConfig())
    with pytest.raises(ValueError, match="modules_to_save names 'nothing', which no module has"):
        pe.attach(families.build("llama"), config("prompt", "llama", modules_to_save=["nothing"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_in_the_middle_of_another_thread_s_sees_the_same_tokens(kind):
    """A prompt's own pass runs without what stands in front; other threads go on with it."""
    model = adapted(kind, "llama").eval()
    want, found = logits(model, "llama"), []
    layer = model.model.layers[0]

    def meanwhile(module, args, output):
        hook.remove()
        other = threading.Thread(target=lambda: found.append(logits(model, "llama")))
        other.start()
        other.join()

    hook = layer.register_forward_hook(meanwhile)
    found.append(logits(model, "llama"))
    assert len(found) == 2 and all(torch.equal(got, want) for got in found)

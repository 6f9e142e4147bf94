"""Documents packed into a row, and labels into a tree, only where the model keeps them apart: results do not
depend on the batch size."""

import math
import random

import pytest
import torch
import transformers
from texts import reviews, tiny_tokenizer, write_jsonl

import peft_engine as pe
from peft_engine.train.data import IGNORE, Document, pack, pad, read_rows, tokenize
from peft_engine.train.evaluate import evaluate, label_scores, perplexity_loss
from peft_engine.train.labels import why_not_tree
from peft_engine.train.packing import collator, probe_tokens, why_not_packed
from peft_engine.train.settings import LoopSettings
from peft_engine.train.trainer import evaluation_loss, train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
FAMILIES = {
    "opt": (transformers.OPTConfig, SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "bloom": (transformers.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neo": (
        transformers.GPTNeoConfig,
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6,
            "max_position_embeddings": 128, "attention_types": [[["global", "local"], 1]],
        },
    ),
    "mistral": (
        transformers.MistralConfig,
        SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 6},
    ),
    "mamba": (transformers.MambaConfig, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "llama": (transformers.LlamaConfig, SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}),
}  # fmt: skip
PACKED = {"mistral", "gpt2", "llama"}
TREES = {"gpt2", "llama"}
LABELS = {"one token": [[11], [12], [13]], "several": [[11, 13], [12, 15, 17], [19]]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def make(tokenizer):
    """A factory of a tiny model of a family, with weights whose effects are seen."""

    def build(family: str, dtype: torch.dtype = torch.float32):
        config, settings = FAMILIES[family]
        made = transformers.AutoModelForCausalLM.from_config(
            config(**settings, vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=1, eos_token_id=2)
        )
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        return made.to(dtype).eval()

    return build


@pytest.fixture
def rows(tmp_path):
    data = [row | {"completion": row["completion"] + " end" * i} for i, row in enumerate(reviews())]
    return read_rows(write_jsonl(tmp_path / "rows.jsonl", data))


def _nothing(line: str) -> None:
    raise AssertionError(f"said: {line}")


# --- what a model can do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_packed_where_the_model_keeps_them_apart_and_else_padded_with_one_line(
    make, family, dtype
):
    said: list[str] = []
    collate = collator(make(family, dtype), said.append)
    assert (collate is pack) == (family in PACKED)
    if family in PACKED:
        assert not said
    else:
        assert collate is pad and len(said) == 1 and "\n" not in said[0]
        assert said[0].startswith("Packing: off") and make(family).__class__.__name__ in said[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_of_several_tokens_stand_in_a_tree_where_the_model_can(make, family):
    assert (why_not_tree(make(family), several=True) is None) == (family in TREES)
    assert (why_not_tree(make(family), several=False) is None) == (family in PACKED)


def test_the_reason_says_what_was_found(make):
    assert "see each other" in str(why_not_packed(make("opt")))
    assert "a mask of 128 tokens" in str(why_not_packed(make("gpt_neo")))
    assert "sliding_window 6" in str(why_not_tree(make("mistral"), several=True))

    broken = make("llama")
    broken.model.register_forward_pre_hook(_refuse_positions, with_kwargs=True)
    assert "fails: no positions, please" in str(why_not_packed(broken))


def _refuse_positions(module, args, kwargs):
    if kwargs.get("position_ids") is not None:
        raise TypeError("no positions, please\nof any kind")


def test_positions_that_mean_something_else_are_found(make):
    made = make("llama")

    def shift(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] * 2
        return args, kwargs

    made.model.register_forward_pre_hook(shift, with_kwargs=True)
    assert "differ" in str(why_not_packed(made))


def test_a_model_that_gives_all_logits_when_asked_for_some_scores_labels_in_rows(make):
    made = make("llama")

    def all_of_them(module, args, kwargs):
        kwargs.pop("logits_to_keep", None)
        return args, kwargs

    made.register_forward_pre_hook(all_of_them, with_kwargs=True)
    for several in (False, True):
        assert why_not_tree(made, several=several)


@pytest.mark.parametrize("size", [10, 100, 50_000])
def test_what_is_tried_differs_in_each_token(make, size):
    made = make("llama")
    made.resize_token_embeddings(size)
    one, other = (probe_tokens(made, start, 6).input_ids for start in (0, 1))
    assert all(a != b and 0 <= a < size and 0 <= b < size for a, b in zip(one, other, strict=True))


def test_a_model_that_gives_nan_is_left_to_the_loop_that_names_the_layer(make):
    made = make("llama")
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    assert collator(made, _nothing) is pack


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_trying_leaves_modes_generators_and_the_active_adapter_as_they_were(make, family):
    made = make(family)
    pe.attach(made, pe.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"), name="one")
    pe.attach(made, pe.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"), name="two")
    pe.active(made, "one")
    made.train()
    made.get_input_embeddings().eval()
    modes = [module.training for module in made.modules()]
    ids = torch.tensor([[5, 6, 7]])
    before = made(input_ids=ids).logits
    state, numbers = torch.get_rng_state(), random.getstate()
    collator(made, lambda line: None)
    why_not_tree(made, several=True)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == numbers
    assert [module.training for module in made.modules()] == modes
    assert torch.equal(made(input_ids=ids).logits, before)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_padded_documents_stand_one_a_row():
    batch = pad([Document([5, 6, 7], [IGNORE, IGNORE, 7]), Document([8], [IGNORE])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7], [IGNORE] * 3]
    assert "position_ids" not in batch


# --- results do not depend on the batch size ----------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_evaluation_loss_is_that_of_each_document_alone(make, tokenizer, rows, family, fused):
    made = make(family)
    if fused:
        pe.optimize(made)
    documents = tokenize(rows, tokenizer, 128)
    alone = sum(_alone(made, document) for document in documents) / sum(d.labelled for d in documents)
    for size in (1, 3, 8):
        assert evaluation_loss(made, documents, size) == pytest.approx(alone, rel=1e-5)
    short = tokenize(rows, tokenizer, 128, learn_end=False)
    alone = sum(_alone(made, document) for document in short) / sum(d.labelled for d in short)
    with torch.no_grad():
        for size in (1, 8):
            loss, tokens = perplexity_loss(made, short, size, collator(made))
            assert loss == pytest.approx(alone, rel=1e-5)
            assert tokens == sum(len(d.input_ids) for d in short)


def _alone(model, document: Document) -> float:
    """The summed loss of one document, from the logits of an ordinary forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([document.input_ids])).logits[0]
    labels = torch.tensor(document.labels)[1:]
    return float(torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum"))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_label_scores_are_those_of_each_label_alone(make, family, labels):
    made, candidates = make(family), LABELS[labels]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 90, (n,), generator=generator).tolist() for n in (5, 9, 7)]
    wanted = torch.empty(len(prompts), len(candidates))
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            for j, label in enumerate(candidates):
                logits = made(input_ids=torch.tensor([prompt + label])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(label) - 1)
                wanted[i, j] = torch.stack([logits[p, t] for p, t in zip(places, label, strict=True)]).mean()
        together, _ = label_scores(made, prompts, candidates)
        apart = torch.cat([label_scores(made, [prompt], candidates)[0] for prompt in prompts])
    torch.testing.assert_close(together, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt_neo", "llama"])
def test_what_eval_finds_does_not_depend_on_the_batch_size(make, tokenizer, rows, family):
    made, said = make(family), list[str]()
    for task in ("classify", "generate"):
        found = []
        for size in (1, 2, 8):
            out = evaluate(made, tokenizer, rows, task=task, batch_size=size, limit=128, say=said.append)
            loss = math.log(out.pop("perplexity") or 1.0)
            found.append((loss, {k: v for k, v in out.items() if k not in ("seconds", "tokens_per_second")}))
        for loss, other in found[1:]:
            assert loss == pytest.approx(found[0][0], rel=1e-5) and other == found[0][1]
    assert len(said) == (0 if family == "llama" else 6)  # one line an evaluation


@pytest.mark.parametrize("family", ["opt", "bloom", "gpt_neo", "llama"])
def test_a_training_does_not_depend_on_the_split_into_micro_batches(
    make, tokenizer, rows, family, tmp_path, capsys
):
    documents = tokenize(rows, tokenizer, 128)
    found = []
    for size, accumulation in ((8, 1), (1, 8)):
        torch.manual_seed(1)
        made = make(family)
        pe.attach(made, pe.LoraConfig(r=2, target_modules="all-linear"))
        settings = LoopSettings(
            batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3, learning_rate=1e-2
        )
        outcome = train(made, documents, tmp_path / str(size), settings, eval_documents=documents)
        found.append([*outcome.losses, *outcome.eval_losses.values()])
        assert outcome.tokens == 3 * sum(len(d.input_ids) for d in documents)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Packing: off")]
        assert len(lines) == (0 if family == "llama" else 1)
    assert found[0] == pytest.approx(found[1], rel=1e-4)

"""The command on models with an encoder and a decoder: what each side reads, the loss, scores and answers."""

import functools
import itertools
import json

import pytest
import torch
import transformers
from texts import reviews, tiny_encoder_decoder_folder, write_jsonl

import peft_engine as pe
from peft_engine.train import encoder_decoder
from peft_engine.train.data import IGNORE, DataError, Row, tokens_in
from peft_engine.train.evaluate import evaluate, perplexity_loss
from peft_engine.train.generate import Sampling, generate, stream
from peft_engine.train.labels import label_scores
from peft_engine.train.packing import collator
from peft_engine.train.settings import LoopSettings

KINDS = ("t5", "bart")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: tiny_encoder_decoder_folder(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture
def loaded(folder):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def rows_of(rows):
    return [Row("completion", row, f"line {i}") for i, row in enumerate(rows, 1)]


def ragged():
    """Prompts and completions of lengths that do not rise together."""
    words = ["a fine", "warm film with dull acting and a cold end", "i", "like this", "hate", "acting" * 4]
    return [
        {"prompt": f"Review: {a}", "completion": f" {b}"} for a, b in zip(words, words[::-1], strict=True)
    ]


# --- tokens -------------------------------------------------------------------------------------------------


def test_each_side_is_a_text_of_its_own(loaded):
    model, tokenizer = loaded
    document, *_ = encoder_decoder.documents(rows_of(reviews()[:1]), tokenizer, 64)
    row = reviews()[0]
    assert document.input_ids == tokenizer(row["prompt"])["input_ids"]
    assert document.labels == tokenizer(text_target=row["completion"])["input_ids"]
    assert document.labels[-1] == tokenizer.eos_token_id
    assert document.tokens == len(document.input_ids) + document.labelled
    target = encoder_decoder.target(tokenizer, row["completion"])
    assert tokenizer.decode(target.own) == row["completion"]
    assert len(target.ids) - len(target.own) == (1 if model.config.model_type == "t5" else 2)


def test_a_tokenizer_that_ends_no_text_gets_the_end_of_sequence(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["t5"])
    tokenizer.backend_tokenizer.post_processor = None
    target = encoder_decoder.target(tokenizer, " positive")
    assert target.ids == [*target.own, tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encoder_decoder.target(tokenizer, " positive")


@pytest.mark.parametrize(
    "kind, fields, says",
    [
        ("text", {"text": "a film"}, "line 1: holds text, .*learns from a prompt and a completion"),
        (
            "completion",
            {"prompt": "a " * 70, "completion": "b"},
            "line 1: the prompt has 7[0-9]+ tokens, at ",
        ),
        ("completion", {"prompt": "a", "completion": "b " * 70}, "line 1: the completion has .* at most 64"),
    ],
)
def test_rows_that_do_not_fit_are_told(folders, kind, fields, says):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bart"])
    with pytest.raises(DataError, match=says):
        encoder_decoder.documents([Row(kind, fields, "line 1")], tokenizer, 64)


def test_padding_changes_no_loss(loaded):
    model, tokenizer = loaded
    documents = encoder_decoder.documents(rows_of(ragged()), tokenizer, 64)
    said = []
    collate = collator(model, said.append)
    assert collate is encoder_decoder.collate and "has an encoder and a decoder" in said[0]
    batch = collate(documents)
    assert tokens_in(batch) == sum(d.tokens for d in documents)
    assert int((batch["labels"] != IGNORE).sum()) == sum(d.labelled for d in documents)
    alone, _ = perplexity_loss(model, documents, 1, collate)
    together, tokens = perplexity_loss(model, documents, len(documents), collate)
    assert together == pytest.approx(alone, rel=1e-5) and tokens == tokens_in(batch)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimised"])
def test_a_step_is_the_same_however_it_is_split(loaded, tmp_path, optimized):
    """T5's loss is a mean whatever num_items_in_batch says: uneven micro-batches would weigh alike."""
    from peft_engine.train.trainer import train

    model, tokenizer = loaded
    documents = encoder_decoder.documents(rows_of(ragged()), tokenizer, 64)
    outcomes, tensors = [], []
    for size in (6, 2, 1):
        torch.manual_seed(0)
        pe.attach(model, pe.LoraConfig(r=4, target_modules="all-linear"))
        if optimized:  # the fused loss on the head, where the library is compiled
            pe.optimize(model)
        loop = LoopSettings(
            batch_size=size, gradient_accumulation_steps=6 // size, max_steps=2, learning_rate=0.01,
            warmup_ratio=0.0,
        )  # fmt: skip
        outcomes.append(train(model, documents, tmp_path / str(size), loop, say=lambda line: None))
        tensors.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        pe.detach(pe.unoptimize(model))
    assert outcomes[0].tokens == 2 * sum(d.tokens for d in documents)
    for other, outcome in zip(tensors[1:], outcomes[1:], strict=True):
        assert outcome.losses == pytest.approx(outcomes[0].losses, rel=1e-4)
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, tensors[0][name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "prompt", "bottleneck"])
def test_every_method_trains_is_measured_and_answers(command, folder, tmp_path, method):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews(2))
    out = tmp_path / "out"
    code, _, err = command(
        "train", "--model", folder, "--data", data, "--method", method, "--output", out, "--epochs", 3,
        "--batch-size", 8, "--learning-rate", 0.02, "--warmup-ratio", 0,
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((out / "run.json").read_text())
    assert record["losses"][-1] < record["losses"][0] - 0.02
    assert record["without_gradient"] == []
    config = json.loads((out / "adapter_config.json").read_text())
    assert method == "bottleneck" or config["task_type"] == "SEQ_2_SEQ_LM"
    code, told, err = command("eval", "--model", folder, "--adapter", out, "--data", data, "--json")
    found = json.loads(told)["adapters"][str(out)] if "adapters" in told else json.loads(told)
    assert code == 0 and "accuracy" in str(found), err
    code, told, err = command(
        "generate", "--model", folder, "--adapter", out, "--prompt", "a", "--max-new-tokens", 3
    )
    assert code == 0, err


def test_lora_learns_the_reviews(command, folder, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews(2))
    code, _, err = command(
        "train", "--model", folder, "--data", data, "--method", "lora", "--output", tmp_path / "out",
        "--epochs", 40, "--batch-size", 8, "--learning-rate", 0.01,
    )  # fmt: skip
    assert code == 0, err
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pe.load_adapter(model, tmp_path / "out")
    rows = rows_of(reviews())
    assert evaluate(model, tokenizer, rows)["accuracy"] == 1.0
    found = evaluate(model, tokenizer, rows, task="generate")
    assert found["exact_match"] == 1.0 and found["perplexity"] < 1.5


@pytest.mark.peers
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_peft_reads_what_the_command_trained(command, loaded, folder, tmp_path, method):
    peft = pytest.importorskip("peft", reason="PEFT is not installed (the peers extra)")
    model, tokenizer = loaded
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    code, _, err = command(
        "train", "--model", folder, "--data", data, "--method", method, "--output", tmp_path / "out",
        "--max-steps", 3, "--learning-rate", 0.05,
    )  # fmt: skip
    assert code == 0, err
    batch = encoder_decoder.collate(encoder_decoder.documents(rows_of(reviews()), tokenizer, 64))
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    pe.load_adapter(model, tmp_path / "out")
    with torch.no_grad():
        ours, wanted = model(**batch).loss, theirs(**batch).loss
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


# --- scores and answers -------------------------------------------------------------------------------------


def test_scores_are_those_of_each_prompt_and_label_alone(loaded):
    model, tokenizer = loaded
    labels = [" positive", " negative", " a dull end"]
    targets = [encoder_decoder.target(tokenizer, label) for label in labels]
    prompts = [encoder_decoder.source(tokenizer, row["prompt"]) for row in ragged()]
    candidates = [target.own for target in targets]
    way = functools.partial(encoder_decoder.in_decoder, targets)
    with torch.no_grad():
        scores, tokens = label_scores(model, prompts, candidates, way)
        for (i, prompt), (j, target) in itertools.product(enumerate(prompts), enumerate(targets)):
            logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target.ids])).logits[0]
            span = slice(target.start, target.start + target.length)
            wanted = logits[span].log_softmax(-1).gather(1, torch.tensor(target.own)[:, None]).mean()
            torch.testing.assert_close(scores[i, j], wanted, atol=1e-4, rtol=1e-4)
    written = len(prompts) * sum(len(target.ids) for target in targets)
    assert tokens == sum(map(len, prompts)) + written


def test_an_answer_in_a_batch_is_the_one_alone(loaded):
    model, tokenizer = loaded
    prompts = [row["prompt"] for row in ragged()]
    sampling = Sampling(max_new_tokens=6)
    together = [a.text for part in generate(model, tokenizer, prompts, sampling, batch_size=6) for a in part]
    alone = [a.text for part in generate(model, tokenizer, prompts, sampling, batch_size=1) for a in part]
    streamed = ["".join(stream(model, tokenizer, prompt, sampling)) for prompt in prompts]
    assert together == alone == streamed and any(together)
    with torch.no_grad():
        for prompt, text in zip(prompts, together, strict=True):
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            wanted = model.generate(ids, max_new_tokens=6, do_sample=False, forced_eos_token_id=None)[0, 1:]
            assert tokenizer.decode(wanted, skip_special_tokens=True) == text


def test_the_rooms_of_the_two_sides_are_their_own(folders):
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folders["bart"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bart"])
    long = "a " * 30  # about 60 of 64 positions
    assert list(generate(model, tokenizer, [long], Sampling(max_new_tokens=40)))
    with pytest.raises(DataError, match="exceed the model's 64"):
        list(generate(model, tokenizer, ["a"], Sampling(max_new_tokens=64)))
    with pytest.raises(DataError, match="exceed the model's 64"):
        list(generate(model, tokenizer, ["a " * 70], Sampling(max_new_tokens=4)))


def test_merged_it_is_what_it_was_with_the_adapter(command, folder, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    code, _, err = command(
        "train", "--model", folder, "--data", data, "--method", "lora", "--output", tmp_path / "out",
        "--max-steps", 4, "--learning-rate", 0.02,
    )  # fmt: skip
    assert code == 0, err
    line = ("merge", "--model", folder, "--adapter", tmp_path / "out", "--data", data, "--json")
    code, told, err = command(*line, "--output", tmp_path / "merged")
    assert code == 0, err
    drift = json.loads(told)["drift"]
    assert drift["tokens"] > 100 and drift["largest"] < 1e-3 and drift["same"] == 1.0
    code, *_ = command("eval", "--model", tmp_path / "merged", "--data", data)
    assert code == 0

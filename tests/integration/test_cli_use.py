"""`peft-engine eval`, `generate`, `explain`, `doctor` and `bench` as a user types them."""

import io
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
import typer
from texts import reviews, write_jsonl
from tokenizers.processors import TemplateProcessing

from peft_engine import LoraConfig, attach, save_adapter
from peft_engine.cli import main
from peft_engine.train import console
from peft_engine.train.data import encode_completion, encode_prompt, pack, read_rows, tokenize
from peft_engine.train.evaluate import evaluate, label_scores, task_of, token_f1
from peft_engine.train.generate import Sampling, chat_prompt, generate, prompts_from, stream

MEASURES = {
    "task", "rows", "accuracy", "exact_match", "token_f1", "perplexity", "labels", "confusion",
    "tokens_per_second", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """An adapter that tells the two kinds of reviews apart, trained by the command on the 4-bit base."""
    folder = tmp_path_factory.mktemp("adapter")
    data = write_jsonl(folder / "rows.jsonl", reviews(2))
    arguments = ["train", "--model", model, "--data", data, "--output", folder / "out", "--epochs", 10]
    arguments += ["--learning-rate", 0.01, "--batch-size", 4, "--rank", 4]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["peft-engine", *map(str, arguments)])
        main()
    assert not end.value.code
    return folder / "out"


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "test.jsonl", reviews())


@pytest.fixture
def loaded(model):
    made = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    return made, transformers.AutoTokenizer.from_pretrained(model)


# --- eval ---------------------------------------------------------------------------------------------------


def test_eval_of_a_few_labels_gives_accuracy_and_confusion_as_one_json_object(command, model, adapter, data):
    code, out, err = command("eval", "--model", model, "--adapter", adapter, "--data", data, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == MEASURES
    assert found["task"] == "classify" and found["rows"] == 8
    assert found["labels"] == [" negative", " positive"]
    assert found["accuracy"] == 1.0 and found["confusion"] == [[4, 0], [0, 4]]
    assert found["exact_match"] is found["token_f1"] is found["perplexity"] is None
    assert found["tokens_per_second"] > 0 and found["seconds"] > 0


def test_eval_takes_the_base_the_adapter_was_trained_on_unless_told_otherwise(command, model, adapter, data):
    line = ("eval", "--model", model, "--adapter", adapter, "--data", data)
    assert "in NF4" in command(*line)[2]
    assert "dense" in command(*line, "--quantize", "none")[2]
    assert "as stored" in command("eval", "--model", model, "--data", data)[2]


def test_eval_without_an_adapter_and_with_two(command, model, adapter, data, tmp_path, loaded):
    made, _ = loaded
    attach(made, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    save_adapter(made, tmp_path / "random")
    alone = json.loads(command("eval", "--model", model, "--data", data, "--quantize", "nf4", "--json")[1])
    folders = ("--adapter", adapter, "--adapter", tmp_path / "random")
    code, out, err = command("eval", "--model", model, *folders, "--data", data, "--json")
    assert code == 0, err
    first, second = json.loads(out)["results"]
    assert first["adapter"] == str(adapter) and first["accuracy"] == 1.0
    assert second["adapter"] == str(tmp_path / "random")
    assert alone["accuracy"] < 1.0 > second["accuracy"]


def test_eval_prints_a_table_for_people(command, model, adapter, data):
    _, out, err = command("eval", "--model", model, "--adapter", adapter, "--data", data)
    assert "accuracy     1.0000" in out and '" positive"' in out and "tokens/s" in out
    assert err.strip().splitlines()[-1].startswith("Next: peft-engine generate")


def test_eval_of_other_completions_gives_exact_match_f1_and_perplexity(command, model, adapter, data):
    line = ("eval", "--model", model, "--adapter", adapter, "--data", data, "--task", "generate", "--json")
    code, out, err = command(*line)
    assert code == 0, err
    found = json.loads(out)
    assert set(found) == MEASURES and found["task"] == "generate"
    assert found["exact_match"] == found["token_f1"] == 1.0
    assert 1.0 < found["perplexity"] < 1.5
    assert found["accuracy"] is found["labels"] is found["confusion"] is None


def test_eval_of_text_gives_perplexity_alone(command, model, tmp_path, loaded):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "a fine warm film"}, {"text": "dull"}])
    found = json.loads(command("eval", "--model", model, "--data", data, "--json")[1])
    assert found["exact_match"] is None
    made, tokenizer = loaded
    total = count = 0.0
    for document in tokenize(read_rows(data), tokenizer, 128, learn_end=False):
        if document.labelled:
            with torch.no_grad():
                total += float(made(**pack([document]), use_cache=False).loss) * document.labelled
            count += document.labelled
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_eval_of_text_that_is_longer_than_the_model_cuts_it_when_told_to(command, model, tmp_path):
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "fine " * 200}])
    line = ("eval", "--model", model, "--data", data, "--json")
    code, out, err = command(*line)
    assert code == 1 and out == "" and "line 1: " in err and "--max-length 128 cuts it in pieces" in err
    found = [json.loads(command(*line, "--max-length", length)[1])["perplexity"] for length in (128, 20)]
    assert all(found) and found[0] != found[1]


@pytest.mark.parametrize(
    "labels", [(" positive", " negative"), (" fine warm", " dull", " cold and dull end")]
)
def test_label_scores_are_the_mean_log_probability_of_each_label_alone(loaded, labels):
    made, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in reviews()[:3]]
    candidates = [encode_completion(tokenizer, label) for label in labels]
    with torch.no_grad():
        scores, _ = label_scores(made, prompts, candidates)
        for i, prompt in enumerate(prompts):
            for j, candidate in enumerate(candidates):
                logits = made(torch.tensor([prompt + candidate])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(candidate) - 1)
                alone = sum(logits[p, t] for p, t in zip(places, candidate, strict=True)) / len(candidate)
                assert scores[i, j] == pytest.approx(float(alone), abs=1e-4)


def test_labels_of_one_token_cost_one_forward_of_the_prompts(loaded):
    made, tokenizer = loaded
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in reviews()]
    with torch.no_grad():
        _, tokens = label_scores(made, prompts, [[7], [9], [11]])
    assert tokens == sum(map(len, prompts))


def test_up_to_fifty_distinct_completions_that_come_again_are_labels(tmp_path):
    cases = ((50, 2, "classify"), (51, 2, "generate"), (40, 1, "generate"), (1, 1, "generate"))
    for count, times, task in cases:
        rows = [{"prompt": "a", "completion": f"b{i}"} for i in range(count)] * times
        assert task_of(read_rows(write_jsonl(tmp_path / "rows.jsonl", rows))) == task


def test_token_f1_counts_shared_words_with_their_number():
    assert token_f1("a b b", "b b c") == pytest.approx(2 * 2 / 6)
    assert token_f1("a", "b") == 0.0
    assert token_f1("", "") == 1.0
    assert token_f1("", "a") == 0.0


# --- generate -----------------------------------------------------------------------------------------------


def test_generate_streams_what_the_batch_gives(command, model, adapter, tmp_path, data):
    prompts = [row["prompt"] for row in reviews()]
    line = ("generate", "--model", model, "--adapter", adapter, "--max-new-tokens", 4)
    code, out, err = command(*line, "--prompt", prompts[0])
    assert code == 0, err
    assert out == " positive\n"
    code, out, err = command(*line, "--prompt-file", data, "--batch-size", 3, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [r["prompt"] for r in found["results"]] == prompts
    assert [r["text"] for r in found["results"]] == [row["completion"] for row in reviews()]
    assert found["tokens"] == 2 * len(prompts)  # the label and the end


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_generate_ends_with_the_command_to_type_next(command, model, adapter, more):
    line = ("generate", "--model", model, "--adapter", adapter, "--prompt", "a", "--max-new-tokens", 1)
    last = command(*line, *more)[2].splitlines()[-1]
    assert last == f"Next: peft-engine explain --model {model} --adapter {adapter}"


def test_left_padding_does_not_change_an_answer(command, model, tmp_path):
    prompts = ["a fine warm film", "Review: dull acting and a cold end and a cold film\nSentiment:", "i"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:1] + prompts[2:]))
    rows = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p} for p in prompts])
    line = ("generate", "--model", model, "--max-new-tokens", 8, "--json")
    together = json.loads(command(*line, "--prompt-file", rows)[1])["results"]
    alone = [json.loads(command(*line, "--prompt", p)[1])["results"][0] for p in prompts]
    assert [r["text"] for r in together] == [r["text"] for r in alone]
    lines = json.loads(command(*line, "--prompt-file", tmp_path / "prompts.txt")[1])["results"]
    assert [r["text"] for r in lines] == [alone[0]["text"], alone[2]["text"]]


def test_a_text_file_of_prompts_is_cut_at_line_ends_alone(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffReview: a\r\nb\x0cc\n\n d\x85e \nx\u2028y\rz\x1c\n".encode())
    found = prompts_from(path)
    assert found.texts == ["Review: a", "b\x0cc", " d\x85e ", "x\u2028y\rz\x1c"]
    assert found.where[3] == f"{path}, text 4"


def test_several_adapters_answer_each_prompt_in_one_batch(command, model, adapter, tmp_path, loaded):
    made, _ = loaded
    attach(made, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"))
    save_adapter(made, tmp_path / "random")
    prompt = reviews()[0]["prompt"]
    line = (
        "generate",
        "--model",
        model,
        "--quantize",
        "nf4",
        "--max-new-tokens",
        4,
        "--prompt",
        prompt,
        "--json",
    )
    folders = [adapter, tmp_path / "random"]
    both = json.loads(command(*line, "--adapter", folders[0], "--adapter", folders[1])[1])["results"]
    apart = [json.loads(command(*line, "--adapter", folder)[1])["results"][0] for folder in folders]
    assert [(r["adapter"], r["text"]) for r in both] == [
        (str(f), r["text"]) for f, r in zip(folders, apart, strict=True)
    ]
    assert both[0]["text"] != both[1]["text"]


def test_a_seed_decides_what_is_sampled(command, model):
    line = ("generate", "--model", model, "--prompt", "a fine", "--max-new-tokens", 12, "--temperature", 1.5)
    texts = [command(*line, "--top-p", 0.95, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_puts_the_prompt_into_the_template(command, model):
    line = ("generate", "--model", model, "--prompt", "warm?", "--chat", "--max-new-tokens", 1, "--json")
    assert json.loads(command(*line)[1])["results"][0]["prompt"] == "<|user|>\nwarm?</s>\n<|assistant|>\n"


def test_a_template_that_writes_the_first_token_gives_it_once_as_in_training(loaded, tmp_path, monkeypatch):
    made, tokenizer = loaded
    first = (tokenizer.bos_token, tokenizer.bos_token_id)
    add = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    tokenizer.backend_tokenizer.post_processor = add  # as Llama 3 and Gemma have it
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    user = {"role": "user", "content": "warm?"}
    messages = [user, {"role": "assistant", "content": "fine"}]
    wanted = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    rows = read_rows(write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}]))
    assert tokenizer("a")["input_ids"][0] == first[1] == wanted[0] != wanted[1]
    assert tokenize(rows, tokenizer, 128)[0].input_ids[: len(wanted)] == wanted
    seen, answer = [], made.generate

    def watched(input_ids, **more):
        seen.append(input_ids.tolist())
        return answer(input_ids, **more)

    monkeypatch.setattr(made, "generate", watched)
    prompt, sampling = chat_prompt(tokenizer, "warm?"), Sampling(max_new_tokens=1)
    list(generate(made, tokenizer, [prompt], sampling))
    list(stream(made, tokenizer, prompt, sampling))
    evaluate(made, tokenizer, rows)
    assert seen == [[wanted]] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "--prompt or --prompt-file"),
        (("--prompt", "a", "--top-p", 0), 2, "--top-p"),
        (("--prompt", "a", "--temperature", 1e-300), 2, "a number from 0.0001, got 1e-300"),
        (("--prompt", "a", "--temperature", "nan"), 2, "--temperature"),
        (("--prompt", "a", "--temperature", "inf"), 2, "--temperature"),
        (("--prompt", "a", "--seed", -1), 2, "--seed: expected a number from 0 up to 2^32, got -1"),
        (("--prompt", "a", "--seed", 2**64), 2, "--seed: expected"),
        (("--prompt", ""), 1, "has no tokens"),
        (("--prompt", "a\udce9"), 1, "--prompt: the text holds '\\udce9'"),  # a byte that is no UTF-8
        (("--prompt", "a", "--max-new-tokens", 500), 1, "exceed the model's 128"),
        (("--prompt", "a", "--adapter", "none"), 1, "none"),
        (("--prompt-file", "none.txt"), 1, "none.txt"),
    ],
)
def test_generate_refuses_in_one_line(command, model, arguments, code, says):
    got, out, err = command("generate", "--model", model, *arguments)
    assert (got, out) == (code, "") and says in err.strip().splitlines()[-1] and "Traceback" not in err


@pytest.mark.parametrize(
    ("prompt", "says"), [("", "the prompt '' has no tokens"), ("fine " * 130, "tokens and 2 new ones exceed")]
)
def test_every_prompt_of_a_file_is_checked_before_the_first_is_answered(
    command, model, adapter, tmp_path, prompt, says
):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": prompt}])
    line = ("generate", "--model", model, "--prompt-file", rows, "--max-new-tokens", 2, "--batch-size", 1)
    for adapters in ((), ("--adapter", adapter), ("--adapter", adapter) * 2):
        code, out, err = command(*line, *adapters)
        assert code == 1 and out == "" and f"{rows}, line 3: " in err and says in err
    alone = write_jsonl(tmp_path / "alone.jsonl", [{"prompt": prompt}])  # streamed
    code, out, err = command("generate", "--model", model, "--prompt-file", alone, "--max-new-tokens", 2)
    assert code == 1 and out == "" and f"{alone}, line 1: " in err and says in err


# --- what the command says of a model and of the machine ----------------------------------------------------


def test_explain_reports_every_layer_with_its_backend(command, model, adapter):
    code, out, err = command("explain", "--model", model, "--adapter", adapter, "--json")
    assert code == 0, err
    found = json.loads(out)
    linears = [layer for layer in found["layers"] if layer["op"] == "lora_linear"]
    assert len(linears) == 14 and all(layer["backend"] for layer in linears)
    code, out, _ = command("explain", "--model", model, "--quantize", "nf4")
    assert code == 0 and "layers fused" in out


def test_doctor_lists_the_backends_and_how_to_mend_them(command):
    code, out, err = command("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and err.strip().splitlines()[-1].startswith("Next: ")
    assert {"backends", "versions", "cpu", "gpu", "problems"} <= set(found)
    code, out, _ = command("doctor")
    assert code == 0
    for name in found["backends"]:
        assert f"backend {name}" in out


def test_bench_runs_the_checkout_s_runner_or_says_that_there_is_none(command, monkeypatch, tmp_path):
    code, out, _ = command("bench", "--help")
    assert code == 0 and "peft-engine bench" in out
    import peft_engine

    monkeypatch.setattr(
        peft_engine, "__file__", str(tmp_path / "site-packages" / "peft_engine" / "__init__.py")
    )
    code, out, err = command("bench")
    assert code == 1 and out == "" and "bench/runner.py" in err and "checkout" in err


def test_every_command_has_help_with_an_example(command):
    for name in ("train", "eval", "generate", "explain", "doctor"):
        code, out, _ = command(name, "--help")
        assert code == 0 and f"Example:\n    peft-engine {name}" in out


def test_an_unknown_key_in_an_adapter_s_config_is_one_line(command, model, adapter, data, tmp_path):
    import shutil

    broken = shutil.copytree(adapter, tmp_path / "broken")
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"surprise": 1}))
    code, out, err = command("eval", "--model", model, "--adapter", broken, "--data", data)
    assert code == 1 and out == "" and "surprise" in err.strip().splitlines()[-1]


def test_a_broken_record_is_named(command, model, adapter, data, tmp_path):
    import shutil

    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "run.json").write_text("{")
    code, _, err = command("eval", "--model", model, "--adapter", broken, "--data", data)
    assert code == 1 and "run.json" in err.strip().splitlines()[-1]


def test_the_next_command_is_what_a_shell_reads(capsys):
    console.next_command("eval", "--model", Path("my model"), "--prompt", "...")
    assert capsys.readouterr().err == "Next: peft-engine eval --model 'my model' --prompt ...\n"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_that_the_locale_cannot_decode_is_printed_as_it_was_given(monkeypatch, encoding):
    path = "out/ü n".encode() if encoding == "ascii" else b"out/\xfc n"  # the second is no UTF-8
    given = path.decode(encoding, "surrogateescape")
    for name, errors in (("stderr", "backslashreplace"), ("stdout", "strict")):
        file = io.TextIOWrapper(io.BytesIO(), encoding, errors, newline="\n", line_buffering=True)
        monkeypatch.setattr(sys, name, file)
    console.next_command("eval", "--adapter", given, "--prompt", "é")
    with console.command(False) as show:
        show(f"Saved to {given}")
    last = b"\\xe9" if encoding == "ascii" else "é".encode()
    assert sys.stderr.buffer.getvalue() == (
        b"Next: peft-engine eval --adapter '" + path + b"' --prompt '" + last + b"'\n"
    )
    assert sys.stdout.buffer.getvalue() == b"Saved to " + path + b"\n"


def test_a_character_that_the_locale_cannot_print_is_written_by_its_number(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), "latin-1", "strict", newline="\n")
    monkeypatch.setattr(sys, "stdout", file)
    with console.command(False) as show:
        show("café ", end="")
        show("☕")
    assert file.buffer.getvalue() == b"caf\xe9 \\u2615\n"


def test_a_reader_that_has_enough_is_no_error(monkeypatch, capfd):
    """As `peft-engine generate ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(typer.Exit) as end, console.command(False) as show:
            show("a line")
    assert end.value.exit_code == 1 and capfd.readouterr().err == ""

"""`peft-engine compare`: what it runs, what it makes of the results, what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from texts import reviews, write_jsonl

from peft_engine.cli import main
from peft_engine.train.compare import ChildError, Comparison, arguments, methods_of, rates_of, run_command
from peft_engine.train.compare_report import table
from peft_engine.train.method_options import METHODS, MethodOptions
from peft_engine.train.settings import LoopSettings


@pytest.fixture
def data(tmp_path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", reviews(2))


@pytest.fixture
def compare(command, model, data, tmp_path):
    def run(*more, methods="lora,prefix"):
        return command(
            "compare", "--model", model, "--data", data, "--eval-data", data, "--output", tmp_path / "all",
            "--methods", methods, "--batch-size", 4, *more,
        )  # fmt: skip

    return run


def test_compare_measures_each_method_and_writes_table_csv_and_picture(compare, tmp_path, data):
    line = ("--epochs", 4, "--rank", 4, "--virtual-tokens", 6, "--learning-rate", "lora=0.01")
    code, out, err = compare(*line, "--learning-rate", "prefix=0.1")
    assert code == 0, err
    folder = tmp_path / "all"
    found = json.loads((folder / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["base", "lora", "prefix"]
    base, *rows = found["rows"]
    assert base["trainable_parameters"] is None and found["eval_data"] == str(data)
    for row in rows:
        record = json.loads((folder / row["method"] / "run.json").read_text())
        for key in ("trainable_parameters", "train_seconds", "peak_rss_bytes", "steps", "settings"):
            assert row[key] == record[key]
        files = [
            folder / row["method"] / name for name in ("adapter_config.json", "adapter_model.safetensors")
        ]
        assert row["file_bytes"] == sum(file.stat().st_size for file in files)
        assert row["steps"] == 16 and row["accuracy"] is not None and row["error"] is None
    assert rows[0]["accuracy"] > base["accuracy"]
    assert rows[0]["settings"]["rank"] == 4 and rows[0]["settings"]["learning_rate"] == 0.01
    assert rows[1]["settings"]["virtual_tokens"] == 6 and rows[1]["settings"]["learning_rate"] == 0.1
    for word in ("base", "lora", "prefix", "accuracy", "trainable parameters", "file size", "peak memory"):
        assert word in out
    assert f"{rows[0]['trainable_parameters']:,}" in out
    with open(folder / "compare.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in written] == ["base", "lora", "prefix"]
    assert float(written[2]["accuracy"]) == rows[1]["accuracy"]
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "Comparing 1/2" in err and "ETA" in err and "  prefix: Training 16/16" in err
    code, out, err = compare()
    assert code == 1 and out == "" and "holds a comparison already" in err


def test_compare_tells_of_a_method_that_fails_and_goes_on(compare, tmp_path, monkeypatch):
    record = {
        "trainable_parameters": 10, "train_seconds": 1.5, "peak_rss_bytes": 2**30,
        "peak_gpu_bytes": None, "steps": 2, "tokens": 9, "losses": [2.0, 1.0], "settings": {},
    }  # fmt: skip

    def child(line, label, say):
        if line[0] == "train" and label == "lora":
            raise ChildError("attach: rank 500 is above the layer's")
        return record if line[0] == "train" else {"accuracy": 0.75, "perplexity": None}

    monkeypatch.setattr("peft_engine.train.compare.run_command", child)
    code, out, err = compare("--max-steps", 2, "--rank", 500, "--json")
    assert code == 1 and "Traceback" not in err
    assert "compare: failed: lora" in err.strip().splitlines()[-1]
    base, lora, prefix = json.loads(out)["rows"]
    assert "rank 500" in lora["error"] and lora["accuracy"] is None and lora["settings"]["rank"] == 500
    assert prefix["error"] is None and prefix["accuracy"] == base["accuracy"] == 0.75
    assert (tmp_path / "all" / "compare.png").exists()
    drawn = table(json.loads(out), 110)
    assert f"lora failed: {lora['error']}" in drawn and "failed" in drawn.splitlines()[4]


@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_a_row_that_cannot_be_used_ends_it_before_anything_is_measured(
    compare, tmp_path, monkeypatch, option
):
    monkeypatch.setattr("peft_engine.train.compare.run_command", lambda *_: pytest.fail("a process was run"))
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    code, out, err = compare(option, bad)
    assert code == 1 and out == "" and err.startswith(f"peft-engine: error: {bad}, line 1: expected"), err
    assert not (tmp_path / "all").exists()


def test_the_measuring_cuts_texts_where_the_training_does(compare, monkeypatch):
    lines = []
    monkeypatch.setattr("peft_engine.train.compare.run_command", lambda line, *_: lines.append(line) or 1 / 0)
    assert compare("--max-length", 20)[0] == 1
    assert lines[0][0] == "eval" and "--max-length=20" in lines[0]


def test_the_error_of_a_process_is_its_own_line_and_its_progress_goes_on(tmp_path):
    told: list[str] = []
    with pytest.raises(ChildError) as error:
        run_command(["eval", "--model", "m", "--data", str(tmp_path / "none.jsonl")], "base", told.append)
    assert str(error.value).startswith(f"{tmp_path / 'none.jsonl'}: does not exist")
    with pytest.raises(ChildError, match="exit code 2"):
        run_command(["eval"], "base", told.append)
    assert any("--model" in line and line.startswith("  base: ") for line in told)


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Puts a script of sh in the place of Python for the processes that are started."""

    def put(text: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return put


@pytest.mark.parametrize("trap", ["'echo gone >\"$TMPDIR/gone\"; exit 1'", "''"])
def test_a_process_is_given_time_to_end_and_killed_when_it_does_not(script, monkeypatch, tmp_path, trap):
    script(f"trap {trap} TERM\necho $$ >&2\nwhile :; do sleep 0.1; done")
    monkeypatch.setattr("peft_engine.train.compare.GRACE", 0.5)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_command(["train"], "lora", say, tmp_path)
    assert not Path(f"/proc/{told[0].split()[-1]}").exists()
    assert (tmp_path / "gone").exists() is (trap != "''")


def test_a_path_that_is_no_text_is_told_as_it_is(script):
    script("printf 'to out/\\374\\n' >&2\necho '{}'")
    told: list[str] = []
    assert run_command(["train"], "lora", told.append) == {}
    assert told == ["  lora: to out/\udcfc"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "lora,lra"), "--methods: expected all, or some of lora, qlora"),
        (("--methods", ","), "got nothing"),
        (("--learning-rate", "prompt=1"), "'prompt' is not compared"),
        (("--learning-rate", "fast"), "METHOD=RATE or a number"),
        (("--width", 8), "--width: is an option of bottleneck, and --methods has none of them"),
        (("--virtual-tokens", 0), "--virtual-tokens: expected at least 1"),
        (("--batch-size", 0), "--batch-size"),
    ],
)
def test_wrong_usage_of_compare_is_found_before_anything_runs(compare, tmp_path, arguments, says):
    code, out, err = compare(*arguments)
    assert code == 2 and out == "" and says in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "all").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the child in /proc")
def test_what_compare_has_started_ends_with_it(model, data, tmp_path):
    rows = [f"--data={data}", f"--eval-data={data}", "--methods=lora", "--epochs=100000"]
    line = [
        sys.executable,
        "-m",
        "peft_engine",
        "compare",
        f"--model={model}",
        f"--output={tmp_path / 'all'}",
    ]
    with subprocess.Popen([*line, *rows], stderr=subprocess.PIPE, text=True) as process:
        told = []
        for text in process.stderr:
            told.append(text)
            if "lora: Training" in text:
                break
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == 1 and rest.endswith("peft-engine: interrupted\n"), "".join(told) + rest
    assert not Path(f"/proc/{child}").exists()


def test_the_command_line_that_compare_gives_to_train_means_the_settings(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("peft_engine.train.run.run", lambda settings, say: seen.append(settings) or 1 / 0)
    for method in METHODS:
        settings = Comparison(
            methods=METHODS, model="m", data=tmp_path / "d", eval_data=tmp_path / "e", output=tmp_path / "o",
            quantize="nf4", max_length=50, overwrite=True, rates=rates_of(["0.5", "prefix=2e-3"], METHODS),
            options=MethodOptions(
                rank=3, target_modules=["q_proj", "v_proj"], virtual_tokens=5, prefix_projection=True, width=7
            ),
            loop=LoopSettings(max_steps=3, gradient_checkpointing=True),
        ).run(method)  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["peft-engine", *arguments(settings)])
        with pytest.raises(SystemExit):
            main()
        assert seen[-1].to_dict() == settings.to_dict()
        assert settings.loop.learning_rate == (2e-3 if method == "prefix" else 0.5)
        assert settings.base == "nf4"
    assert methods_of("all") == METHODS

"""`peft-engine train --resume`: after a signal, with other options, of a run that was at its end."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from texts import reviews, write_jsonl

from peft_engine.train import progress


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", reviews(2))


@pytest.fixture
def train(command, model, data, tmp_path):
    """Runs train and gives its record, or its last line when it fails."""

    def run(*more, output=tmp_path / "out", steps=6):
        options = ("--learning-rate", 0.01, "--batch-size", 4, "--rank", 4, "--max-steps", steps)
        code, _, err = command("train", "--model", model, "--data", data, "--output", output, *options, *more)
        assert "Traceback" not in err
        return json.loads((output / "run.json").read_text()) if code == 0 else err.strip().splitlines()[-1]

    return run


@contextlib.contextmanager
def signals(number, *, at, times=1):
    """Sends this process a signal when a step is done."""
    real = progress.Bar.update

    def update(bar, done, told=""):
        real(bar, done, told)
        if done == at:
            for _ in range(times):
                os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress.Bar, "update", update)
        yield


def same(one, other):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_and_it_resumes_bit_for_bit(train, tmp_path, number):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    losses = train(output=whole)["losses"]
    with signals(number, at=3):
        said = train(output=cut)
    assert f"ended by {number.name} after step 3 of 6; {cut}/checkpoint-3 is saved: run again with" in said
    assert not (cut / "adapter_model.safetensors").exists() and not (cut / ".saving").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train("--resume", output=cut)["losses"] == losses and same(whole, cut)


def test_a_signal_before_anything_was_learnt_says_that_nothing_is_saved(train, tmp_path):
    with signals(signal.SIGINT, at=1):  # the rate rises from 0
        assert train("--warmup-ratio", 0.5).endswith(
            "ended by SIGINT after step 1 of 6; nothing is saved yet"
        )


def test_a_signal_in_the_last_step_changes_nothing(train):
    with signals(signal.SIGINT, at=6):
        assert train()["steps"] == 6


def test_a_second_signal_ends_it_at_once(train, tmp_path):
    with signals(signal.SIGINT, at=3, times=2):
        assert train() == "peft-engine: interrupted"
    assert not list((tmp_path / "out").glob("checkpoint-3"))


def test_resuming_a_run_that_was_at_its_end_trains_no_further(train, tmp_path):
    out = tmp_path / "out"
    done = train(steps=5)  # in the middle of an epoch of 4
    shutil.copytree(out, tmp_path / "before")
    (out / "adapter_model.safetensors").unlink()  # ended between the last checkpoint and this
    again = train("--resume", steps=5)
    assert again["steps"] == again["resumed_from_step"] == 5 and again["losses"] == done["losses"]
    assert same(out, tmp_path / "before")


def test_a_run_that_cannot_be_resumed_is_not_told_to_be(command, model, data, tmp_path):
    line = ("train", "--model", model, "--data", data, "--output", tmp_path / "out", "--max-steps", 4)
    with signals(signal.SIGINT, at=2):
        code, _, err = command(*line, "--method", "prefix", "--prefix-projection")
    assert code == 1 and "run again from the beginning" in err and "--resume" not in err, err


def test_save_steps_may_change_at_a_resume(train, tmp_path):
    train("--save-steps", 2, steps=4)
    train("--resume", "--save-steps", 1, steps=7)
    kept = sorted(folder.name for folder in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-7"]


def test_steps_and_tokens_are_told_of_the_same_part_of_a_run(command, train, model, data, tmp_path):
    train("--save-steps", 4, steps=4)
    line = ("train", "--model", model, "--data", data, "--output", tmp_path / "out", "--rank", 4)
    more = ("--learning-rate", 0.01, "--batch-size", 4, "--max-steps", 6, "--resume")
    assert command(*line, *more)[1].startswith("Trained 2 steps after the first 4, ")


def test_the_best_state_before_a_resume_counts_while_it_is_there_and_of_the_same_data(train, tmp_path, data):
    out, other = tmp_path / "out", write_jsonl(tmp_path / "other.jsonl", reviews())
    of = ("--scheduler", "constant", "--learning-rate", 0.02, "--eval-steps", 1)
    first = train(*of, "--eval-data", data, steps=4)
    worse = ("--resume", "--scheduler", "constant", "--learning-rate", 0.02)
    for folder in ("without", "changed", "moved"):
        shutil.copytree(out, tmp_path / folder)
    without = train(*worse, output=tmp_path / "without", steps=5)
    assert without["saved"] == "last" and without["saved_step"] == 5
    assert same(tmp_path / "without", tmp_path / "without" / "checkpoint-5")
    changed = train(*worse, "--eval-steps", 5, "--eval-data", other, output=tmp_path / "changed", steps=5)
    assert changed["saved"] == "best" and changed["saved_step"] == 5
    (tmp_path / "moved" / "adapter_model.safetensors").unlink()
    moved = train(*worse, "--eval-steps", 5, "--eval-data", data, output=tmp_path / "moved", steps=5)
    assert moved["saved_step"] == 5 and same(tmp_path / "moved", tmp_path / "moved" / "checkpoint-5")
    assert first["saved_step"] <= 4

"""The folder of --output: one run at a time, and what stands in its place."""

import errno
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from texts import reviews, write_jsonl

from peft_engine.train.compare import command_line
from peft_engine.train.output import LOCK, OutputError, check_output, make_output, sole_run
from peft_engine.train.record import write_json
from peft_engine.train.settings import RunSettings
from peft_engine.train.trainer import _is_full


@pytest.fixture
def train(command, model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())

    def run(*more, output):
        options = ("--rank", 2, "--max-steps", 1, *more)
        return command("train", "--model", model, "--data", data, "--output", output, *options)

    return run


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_a_second_run_into_one_folder_is_refused_at_once(train, tmp_path, more):
    output = tmp_path / "out"
    output.mkdir()
    with sole_run(output):
        code, out, err = train(*more, output=output)
        assert code == 1 and out == "" and err.count("\n") == 1
        assert f"--output {output}: another run is writing to it now (process {os.getpid()} on " in err
        assert [file.name for file in output.iterdir()] == [LOCK]
    assert not list(output.iterdir())
    assert more == ("--resume",) or train(*more, output=output)[0] == 0
    assert not (output / LOCK).exists()


def test_a_run_that_came_first_while_the_data_were_read_is_not_written_over(train, tmp_path, monkeypatch):
    from peft_engine.train import run

    output, real = tmp_path / "new" / "out", run.tokenized

    def meanwhile(*of):
        output.mkdir(parents=True)
        (output / "run.json").write_text("{}")
        return real(*of)

    monkeypatch.setattr(run, "tokenized", meanwhile)
    code, _, err = train(output=output)
    assert code == 1 and "holds a run already (run.json)" in err
    assert [file.name for file in output.iterdir()] == ["run.json"]


def _hold(output, ready):
    with sole_run(output):
        ready.set()
        signal.pause()


def test_a_killed_run_leaves_no_lock(tmp_path):
    spawn = multiprocessing.get_context("fork")
    ready = spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(10)
    with pytest.raises(OutputError, match=f"process {other.pid} on"), sole_run(tmp_path):
        pass
    other.kill()
    other.join()
    assert (tmp_path / LOCK).exists()
    with sole_run(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / LOCK).mkdir()
    says = r"cannot be written to: .*; give another folder"
    with pytest.raises(OutputError, match=says), sole_run(tmp_path):
        pass


@pytest.mark.parametrize("which", ["train", "merge", "compare", "profile"])
def test_a_link_to_nowhere_is_said_to_be_one(command, model, tmp_path, which):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    data = write_jsonl(tmp_path / "rows.jsonl", reviews())
    of = {"merge": ("--adapter", "a"), "compare": ("--data", data, "--eval-data", data)}
    line = (which, "--model", model, *of.get(which, ("--data", data)), "--output")
    code, _, err = command(*line, link)
    assert code == 1 and f"--output {link}: is a symbolic link to {tmp_path / 'gone'}, which does not" in err
    code, _, err = command(*line, link / "out")
    assert code == 1 and f"{link} is a symbolic link to" in err and "make that folder" in err


NEEDED = {
    "train": ("--model", "--data", "--output", "--eval-data"), "eval": ("--model", "--data", "--adapter"),
    "generate": ("--model", "--prompt-file", "--adapter"), "explain": ("--model", "--adapter"),
    "estimate": ("--model", "--data"), "profile": ("--model", "--data", "--output"),
    "merge": ("--model", "--adapter", "--output", "--data"),
    "compare": ("--model", "--data", "--eval-data", "--output"),
}  # fmt: skip


@pytest.mark.parametrize(("which", "empty"), [(name, option) for name in NEEDED for option in NEEDED[name]])
def test_an_empty_path_is_not_the_current_folder(command, which, empty):
    line = [word for option in NEEDED[which] for word in (option, "" if option == empty else "none")]
    code, out, err = command(which, *line)
    assert code == 2 and out == "" and "Traceback" not in err
    assert f"Invalid value for '{empty}': expected a path, got an empty text" in " ".join(err.split())


def test_a_file_in_the_place_of_the_folder_or_of_one_above_it_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file: is a file; give a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(OutputError, match=rf"out: {tmp_path / 'file'} is a file"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match=r"cannot be made \(Not a directory\); give another folder"):
        make_output(tmp_path / "file" / "out")


def test_a_folder_whose_rights_do_not_allow_it_is_named_before_anything_is_read(train, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    says = f"--output {tmp_path}/a/b: {tmp_path} cannot be written to"
    code, _, err = train(output=tmp_path / "a" / "b")
    assert code == 1 and says in err and err.count("\n") == 1


def test_only_a_full_disk_is_to_be_freed():
    assert _is_full(OSError(errno.ENOSPC, "No space left on device"))
    assert _is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert _is_full(RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"))
    assert not _is_full(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert not _is_full(RuntimeError("Parent directory out/.saving does not exist."))


def test_numbers_that_are_not_finite_are_null_in_the_record(tmp_path):
    write_json(tmp_path / "run.json", {"eval_losses": {"1": math.nan, "2": 1.5}, "losses": [math.inf]})
    assert json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail) == {
        "eval_losses": {"1": None, "2": 1.5}, "losses": [None],
    }  # fmt: skip


def test_the_command_that_a_run_names_has_the_folders_that_are_the_current_one():
    settings = RunSettings(model="m", data=Path(), output=Path())
    assert {"--data=.", "--output=."} < set(command_line(settings, "estimate"))


def test_a_record_that_the_disk_refuses_is_named(tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"compare\.json: No space left on device"):
        write_json(tmp_path / "compare.json", {})

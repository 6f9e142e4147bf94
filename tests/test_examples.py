"""The demo's data and its report; `make demo` itself is too long for a test."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load_file(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_file


def test_split_is_balanced_disjoint_and_the_same_each_time(load):
    prepare = load("prepare")
    rows = [((i % 41 - 20) / 5, f"sentence {i // 2}") for i in range(9000)]
    train, test = prepare.split_movies(rows)
    assert (len(train), len(test)) == (1500, 500)
    for part in (train, test):
        assert sum(row["completion"] == " positive" for row in part) * 2 == len(part)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert (train, test) == prepare.split_movies(rows)
    assert train[0]["prompt"].startswith("Review: ") and train[0]["prompt"].endswith("\nSentiment:")


def test_split_leaves_out_unclear_ratings(load):
    prepare = load("prepare")
    rows = [(0.9, "unclear"), (-0.9, "also unclear"), (1.0, "good"), (-1.0, "bad")]
    train, test = prepare.split_movies(rows)
    assert {row["prompt"].split()[1] for row in train + test} == {"good", "bad"}


EVAL = {
    "accuracy": 0.9,
    "rows": 500,
    "labels": [" negative", " positive"],
    "confusion": [[225, 25], [25, 225]],
}
RUN = {
    "losses": [1.0 - i / 100 for i in range(100)],
    "train_seconds": 100.0,
    "tokens_per_second": 500.0,
    "peak_rss_bytes": 1 << 30,
    "trainable_parameters": 12345,
    "versions": {"torch": "2.13"},
}


def test_report_is_one_page_with_the_figures_and_both_pictures(load, tmp_path: Path):
    demo = load("demo")
    before, run, after = ({**stage, "wall_seconds": 60.0} for stage in (EVAL, RUN, EVAL | {"accuracy": 0.95}))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(1 << 20))
    rows = demo.summary(before, run, after, tmp_path)
    demo.write_report(tmp_path / "report.html", rows, [["train", "--a <b>"]], 1500, before, run, after)
    page = (tmp_path / "report.html").read_text()
    for wanted in ("90.0%", "95.0%", "1,500", "1024 MiB", "1.0 MiB", "3.0 min", "--a &lt;b&gt;"):
        assert wanted in page, wanted
    assert page.count('<img src="data:image/png;base64,') == 2


def test_every_stage_is_another_when_the_data_or_a_command_changed(load, tmp_path: Path):
    demo = load("demo")
    (tmp_path / "train.jsonl").write_text("one")
    model = tmp_path / "model"
    model.mkdir()
    first = demo.fingerprint_of(model, tmp_path, {"train": ["--rank=16"]})
    assert first == demo.fingerprint_of(model, tmp_path, {"train": ["--rank=16"]})
    assert first != demo.fingerprint_of(model, tmp_path, {"train": ["--rank=8"]})
    (model / "model.safetensors").touch()
    assert first != (first := demo.fingerprint_of(model, tmp_path, {"train": ["--rank=16"]}))
    (tmp_path / "train.jsonl").write_text("two")
    assert first != demo.fingerprint_of(model, tmp_path, {"train": ["--rank=16"]})


def test_a_stage_of_another_run_is_run_again(load, tmp_path: Path, monkeypatch):
    demo = load("demo")
    calls = []

    class Done:
        returncode, stdout = 0, b'{"rows": 1}'

    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: calls.append(a) or Done)
    for fingerprint in ("1", "1", "2", "1"):
        assert demo.run_stage("before", ["eval"], tmp_path, fingerprint)["rows"] == 1
    assert len(calls) == 3


def test_a_failed_stage_ends_the_demo_with_exit_code_1(load, tmp_path: Path, monkeypatch, capsys):
    demo = load("demo")

    class Failed:
        returncode, stdout = 2, b""

    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: Failed)
    with pytest.raises(SystemExit) as stopped:
        demo.run_stage("train", ["train"], tmp_path, "1")
    assert stopped.value.code == 1
    assert "'train' failed with exit code 2" in capsys.readouterr().err

"""The runner's arithmetic and files; the suites themselves run in .ci/run at tiny sizes."""

from pathlib import Path

import pytest

from bench import measure, runner


def test_percentile_interpolates_between_samples():
    assert measure.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert measure.percentile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert measure.percentile([7.0], 0.9) == 7.0


def test_contenders_take_turns_in_an_order_that_moves_on():
    order: list[str] = []

    def contender(name: str):
        def call() -> None:
            order.append(name)
            end = measure.time.perf_counter() + 0.06  # long enough to be called once a turn
            while measure.time.perf_counter() < end:
                pass

        return call

    samples = measure.interleave({name: contender(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "aaabbbccc" + "abc" + "bca"
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2, "c": 2}


def test_advantage_is_above_one_where_ours_is_better_in_times_and_in_rates():
    rows = [
        measure.row("case", "peft-engine", "time", "ms", [1.0]),
        measure.row("case", "dense", "time", "ms", [4.0]),
        measure.row("case", "peft-engine", "rate", "tokens/s", [400.0]),
        measure.row("case", "dense", "rate", "tokens/s", [100.0]),
    ]
    assert [measure.advantage(rows, entry) for entry in rows] == [None, 4.0, None, 4.0]


def test_csv_reads_back_as_it_was_written_and_says_where_it_was_measured(tmp_path: Path):
    rows = [measure.row("4x4, 1 row", "peft-engine", "time", "ms", [1.0, 2.0, 4.0], "a note")]
    measure.write_csv(tmp_path / "suite.csv", "suite", rows)
    assert measure.read_csv(tmp_path / "suite.csv") == rows
    header = (tmp_path / "suite.csv").read_text().splitlines()[0].split(",")
    for column in ("cpu", "isa", "backend", "threads", "commit", "torch", "peft", "bitsandbytes"):
        assert column in header


def test_a_suite_that_fails_leaves_the_others_and_ends_with_exit_code_1(tmp_path: Path, monkeypatch, capsys):
    def fails(settings):
        raise ValueError("no such thing")

    def works(settings):
        return [measure.row("case", "peft-engine", "time", "ms", [1.0, 2.0])]

    monkeypatch.setattr(runner, "SUITES", {"fails": fails, "works": works})
    assert runner.main(["--quick", "--out", str(tmp_path), "--device-name", "here"]) == 1
    assert "fails failed: ValueError: no such thing" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "here").iterdir()) == ["works.csv", "works.png"]


def test_an_unknown_suite_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        runner.main(["nf5"])
    assert stopped.value.code == 2
    assert "no suite nf5" in capsys.readouterr().err


def test_pictures_of_no_results_are_an_error_that_names_the_folder(tmp_path: Path, capsys):
    assert runner.main(["--draw", "--out", str(tmp_path), "--device-name", "nowhere"]) == 1
    assert f"{tmp_path / 'nowhere'} holds no CSV" in capsys.readouterr().err


def test_quick_is_refused_for_the_suite_that_has_no_tiny_sizes(capsys):
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--quick", "--suite", "gpu"])
    assert stopped.value.code == 2 and "no tiny sizes" in capsys.readouterr().err

"""What is printed for a person: tables and bars in the width there is."""

import io
import sys

from rich.console import Console

from peft_engine.train import console, progress
from peft_engine.train.compare_report import table as compared
from peft_engine.train.estimate_command import SAYS


def found(labels: list[str]) -> dict:
    counts = [[int(i == j) for j in range(len(labels))] for i in range(len(labels))]
    scores = dict.fromkeys(("accuracy", "exact_match", "token_f1", "perplexity"))
    return {
        "rows": 9,
        "seconds": 1.0,
        "tokens_per_second": 1.0,
        "labels": labels,
        "confusion": counts,
    } | scores


def test_labels_that_begin_alike_are_told_apart_in_the_confusion_table():
    labels = [f" the very same beginning {n}" for n in ("one", "two")] + ["a", "\n"]
    header, *lines = console.table(found(labels), "m").splitlines()[2:]
    assert header.endswith('" the v…ing one"  " the v…ing two"  "a"  "\\n"')
    titles = [line[:20].strip() for line in lines]
    assert titles == ['" the v…ing one"', '" the v…ing two"', '"a"', '"\\n"']
    assert lines[0].split()[-4:] == ["1", "0", "0", "0"]
    middle = [f" begins alike {n} ends alike" for n in "ab"]
    lines = console.table(found(middle), "m").splitlines()[3:]
    assert all(label in line for label, line in zip(middle, lines, strict=True))


def test_a_confusion_table_that_does_not_fit_is_left_to_json(monkeypatch):
    shown = console.table(found([f"label {i}" for i in range(50)]), "m")
    assert "confusion of 50 labels: too wide for 110 columns; --json has it" in shown
    assert max(map(len, shown.splitlines())) <= 110
    few = found(["positive", "negative"])
    monkeypatch.setattr(console, "width", lambda: 30)
    assert "too wide for 30 columns" in console.table(few, "m")
    monkeypatch.setattr(console, "width", lambda: 40)
    assert '"positive"  "negative"' in console.table(few, "m")


def test_a_table_is_as_wide_as_the_terminal_and_loses_nothing(monkeypatch):
    row = {
        "method": "bottleneck", "accuracy": 0.9, "trainable_parameters": 12_345_678, "file_bytes": 2**25,
        "train_seconds": 1234.5, "peak_rss_bytes": 2**31, "peak_gpu_bytes": None, "error": None,
    }  # fmt: skip
    for columns in (50, 80, 110):
        monkeypatch.setattr(console, "width", lambda columns=columns: columns)
        words = console.drawn(("step", "MiB", ""), [(kind, "1,234.5", says) for kind, says in SAYS.items()])
        numbers = compared({"rows": [row]})
        for shown in (words, numbers):
            assert max(map(len, shown.splitlines())) <= columns and "…" not in shown
    assert "12,345,678" in numbers and "2,048 MiB" in numbers


def test_the_bar_leaves_room_for_the_loss_and_the_time(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.Bar("Training", 100_000)
    told = "loss 10.1234  12,345 tokens/s"
    bar.update(12_345, told)
    for width in (80, 110):
        line = io.StringIO()
        Console(file=line, width=width, force_terminal=False).print(bar.progress.get_renderable())
        shown = line.getvalue().rstrip("\n")
        assert len(shown) <= width and "12345/100000" in shown and told in shown
        assert "ETA -:--:--" in shown and "…" not in shown


def test_the_width_is_the_terminal_s_and_110_without_one(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "77")
    assert console.width() == 110
    monkeypatch.setattr(console.sys, "__stdout__", Terminal())
    assert console.width() == 77

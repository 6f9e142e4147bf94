"""What a comparison looks like: the table, the CSV file and the picture."""

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_engine.train.console import drawn

# Of the data's task the first that was measured is shown; of perplexity less is better.
SCORES = (("accuracy", "accuracy"), ("exact_match", "exact match"), ("perplexity", "perplexity"))
NUMBERS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("trainable_parameters", "trainable parameters", lambda n: f"{n:,}"),
    ("file_bytes", "file size", lambda n: f"{n / 2**20:,.2f} MiB"),
    ("train_seconds", "seconds", lambda s: f"{s:,.1f}"),
    ("peak_rss_bytes", "peak memory", lambda n: f"{n / 2**20:,.0f} MiB"),
    ("peak_gpu_bytes", "peak GPU memory", lambda n: f"{n / 2**20:,.0f} MiB"),
)
COLOURS = {
    "lora": "#1f4e8c", "qlora": "#5b8fd6", "prefix": "#c8553d", "prompt": "#e2a13b", "bottleneck": "#3f8f6b",
}  # fmt: skip


def score_of(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The key of the score that the rows have, and its name."""
    return next((s for s in SCORES if any(row[s[0]] is not None for row in rows)), SCORES[0])


def costs_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, Callable[[Any], str]]]:
    """The columns of NUMBERS that some row has a value in: without a GPU there is no memory of one."""
    return [number for number in NUMBERS if any(row[number[0]] is not None for row in rows)]


def table(found: dict[str, Any], columns: int | None = None) -> str:
    """The comparison as a table (`console.drawn`); errors of methods that failed stand below it."""
    key, name = score_of(found["rows"])
    costs = costs_of(found["rows"])
    lines = []
    for row in found["rows"]:
        score = "failed" if row["error"] else "" if row[key] is None else f"{row[key]:.4f}"
        cells = ("" if row[column] is None else shown(row[column]) for column, _, shown in costs)
        lines.append((row["method"], score, *cells))
    header = ("method", name, *(title for _, title, _ in costs))
    failed = [f"{row['method']} failed: {row['error']}" for row in found["rows"] if row["error"]]
    return "\n".join([drawn(header, lines, columns), *failed])


def write_csv(path: Path, found: dict[str, Any]) -> None:
    """A line for each method; a value that there is none for is empty."""
    columns = [column for column in found["rows"][0] if column != "settings"]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(found["rows"])


def draw(path: Path, found: dict[str, Any]) -> None:
    """A panel of bars for the score and for each cost, the methods in the same order in all of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, rows = found["rows"][0], found["rows"][1:]
    key, name = score_of(found["rows"])
    figure = Figure(figsize=(13, 1.5 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    costs = costs_of(rows)
    ratios = [1.4, *[1] * len(costs)]
    panels = figure.subplots(1, len(ratios), sharey=True, width_ratios=ratios, squeeze=False)[0]
    _bars(panels[0], rows, key, f"{name} on held-out rows", lambda v: f"{v:.3f}")
    if base[key] is not None:
        panels[0].axvline(base[key], color="0.35", linestyle="--", linewidth=1)
        panels[0].annotate(
            f"base {base[key]:.3f}", (base[key], 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8, color="0.35",
        )  # fmt: skip
    for axes, (column, title, shown) in zip(panels[1:], costs, strict=True):
        spread = [row[column] for row in rows if row[column]]
        log = bool(spread) and max(spread) > 20 * min(spread)
        _bars(axes, rows, column, title + (" (log scale)" if log else ""), shown, log=log)
    panels[0].invert_yaxis()
    steps = next((row["steps"] for row in rows if row["steps"]), None)
    same = f", {steps} optimiser steps each" if steps else ""
    figure.suptitle(
        f"{Path(found['model']).name or found['model']}: {len(rows)} methods on the same rows{same}"
    )
    figure.savefig(path, dpi=130)


def _bars(
    axes: Any, rows: list[dict], column: str, title: str, shown: Callable, *, log: bool = False
) -> None:
    values = [row[column] for row in rows]
    lengths = [0.0 if value is None else value for value in values]
    places = range(len(rows))
    axes.barh(places, lengths, color=[COLOURS[row["method"]] for row in rows], height=0.68)
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.set_title(title, fontsize=10, pad=16, loc="left")
    most = max(lengths, default=0.0) or 1.0
    low = 0.0
    if log:
        low = 10 ** math.floor(math.log10(min(v for v in lengths if v)) - 0.3)
        axes.set_xscale("log")
        axes.set_xlim(low, most * (most / low) ** 0.75)  # room for the numbers at the bars' ends
    else:
        axes.set_xlim(0, most * 1.5)
    for place, row, value in zip(places, rows, values, strict=True):
        text = "failed" if row["error"] else "" if value is None else shown(value)
        axes.annotate(
            text, (value or low, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.tick_params(axis="y", length=0)
    axes.set_xticks([])
    axes.minorticks_off()
    axes.spines[["top", "right", "bottom"]].set_visible(False)

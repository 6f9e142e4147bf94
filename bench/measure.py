"""Timing, and what becomes of it: rows, a table, a CSV, a picture.

Contenders take turns in one process, round after round, so that a slow spell of the machine falls on all of
them; a figure is the median of the samples, its spread the 10th to 90th percentile.
"""

import csv
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What every suite is given."""

    quick: bool = False  # tiny sizes: shows that a suite runs, its figures mean nothing
    rounds: int = 15
    model: Path = ROOT / ".cache" / "smollm2"
    data: Path = ROOT / ".cache" / "movies" / "train.jsonl"


@dataclass(frozen=True)
class Row:
    """One figure: `metric` of `contender` in `case`; lower is better where the unit is a time or a size."""

    case: str
    contender: str
    metric: str
    unit: str
    median: float
    p10: float
    p90: float
    samples: int
    note: str = ""


def percentile(samples: list[float], q: float) -> float:
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def row(case: str, contender: str, metric: str, unit: str, samples: Iterable[float], note: str = "") -> Row:
    """The figure of these samples; NaN when there is none (the note says why)."""
    values = list(samples)
    if not values:
        nan = float("nan")
        return Row(case, contender, metric, unit, nan, nan, nan, 0, note)
    low, high = percentile(values, 0.1), percentile(values, 0.9)
    return Row(case, contender, metric, unit, statistics.median(values), low, high, len(values), note)


def interleave(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of single calls, by contender.

    Each is warmed up first. In a round each has a turn, in an order that moves on by one: a call that is not
    timed, to bring its data back into the caches, then as many timed ones as fit 50 ms (1 to 30).
    """
    calls = {}
    for name, call in contenders.items():
        call()
        call()
        started = time.perf_counter()
        call()
        once = time.perf_counter() - started
        calls[name] = max(1, min(30, int(0.05 / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call = contenders[name]
            if calls[name] > 1:
                call()
            for _ in range(calls[name]):
                started = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - started)
    return samples


# --- where it was measured -------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor as /proc/cpuinfo names it, with family and model where the name alone says little."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = {
        key: re.search(rf"^{key}\s*:\s*(.+)$", text, re.M) for key in ("model name", "cpu family", "model")
    }
    values = {key: match.group(1).strip() if match else "" for key, match in found.items()}
    return f"{values['model name'] or platform.machine()} {values['cpu family']}/{values['model']}".strip(
        " /"
    )


def isa_name() -> str:
    from peft_engine import native

    return "no-library" if native.load_error() else native.isa()


def device_name(device: str = "cpu") -> str:
    """The folder under bench/results/: cpu-intel-xeon-6-143-amx (its instruction set last), nvidia-h200."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    name = re.sub(r"\(r\)|\(tm\)|cpu|@.*?ghz|\d+-core", "", cpu_name().lower())
    return "cpu-" + re.sub(r"[^a-z0-9]+", "-", f"{name} {isa_name().replace('_', '-')}").strip("-")


def commit() -> str:
    """The commit measured, with '+' when the tree differs from it; 'unknown' outside a checkout.

    PEFT_ENGINE_COMMIT names it where the tree was copied without its history.
    """
    if os.environ.get("PEFT_ENGINE_COMMIT"):
        return os.environ["PEFT_ENGINE_COMMIT"]
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = ["status", "--porcelain", "--", "peft_engine", "csrc", "kernels"]
        dirty = subprocess.run([*git, *changed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def backend_name() -> str:
    """What the rows named peft-engine ran on: the CPU kernels, or why not."""
    from peft_engine import native

    pinned = os.environ.get("PEFT_ENGINE_BACKEND")
    return f"{pinned} (pinned)" if pinned else "reference" if native.load_error() else "cpu"


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each; '-' for one that is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def gpu_uuid() -> str:
    """The current GPU's name to NVML, whose numbers are not torch's where CUDA_VISIBLE_DEVICES is set."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def gpu_state() -> dict[str, str]:
    """Driver, and the clocks of this moment in MHz, as nvidia-smi reads them; '-' where it does not."""
    queries = {"driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem"}
    command = ["nvidia-smi", f"--query-gpu={','.join(queries.values())}", "--format=csv,noheader,nounits"]
    command += [f"--id={gpu_uuid()}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(queries, "-")
    return dict(zip(queries, (value.strip() for value in answer.split(",")), strict=True))


def environment(device: str = "cpu") -> dict[str, str]:
    """The columns that every row of a CSV ends with."""
    if device == "cuda":
        return {
            "gpu": torch.cuda.get_device_name(),
            **gpu_state(),
            "cuda": str(torch.version.cuda),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "commit": commit(),
            **versions(
                "torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth", "liger_kernel"
            ),
        }  # fmt: skip
    return {
        "cpu": cpu_name(),
        "isa": isa_name(),
        "backend": backend_name(),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        **versions("torch", "transformers", "peft", "bitsandbytes"),
    }


# --- what becomes of it ----------------------------------------------------------------------------------


def write_csv(path: Path, suite: str, rows: list[Row], where: dict[str, str] | None = None) -> None:
    """`where`: the columns that each row ends with (None: the CPU's)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    where = environment() if where is None else where
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["suite", *(f.name for f in fields(Row)), *where], lineterminator="\n")
        writer.writeheader()
        for entry in rows:
            figures = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(entry).items()}
            writer.writerow({"suite": suite, **figures, **where})


def read_csv(path: Path) -> list[Row]:
    kinds = {"median": float, "p10": float, "p90": float, "samples": int}
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{f.name: kinds.get(f.name, str)(line[f.name]) for f in fields(Row)})
            for line in csv.DictReader(file)
        ]


def ours_of(rows: list[Row], entry: Row) -> Row | None:
    """Our figure of the same case and metric."""
    same = (r for r in rows if (r.case, r.metric, r.contender) == (entry.case, entry.metric, "peft-engine"))
    return next(same, None)


def higher_is_better(unit: str) -> bool:
    return unit.endswith("/s")


def advantage(rows: list[Row], entry: Row) -> float | None:
    """How many times better ours is than this contender; None for ours itself and where it makes no sense."""
    ours = ours_of(rows, entry)
    if entry.unit == "nats" or ours is None or ours is entry or not entry.median or not ours.median:
        return None
    return ours.median / entry.median if higher_is_better(entry.unit) else entry.median / ours.median


def print_table(suite: str, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    cases = [entry.case for entry in rows]
    rows = sorted(rows, key=lambda entry: cases.index(entry.case))
    table = Table(
        "case", "contender", "metric", "median", "p10 - p90", "ours is", title=suite, title_justify="left"
    )
    for index, entry in enumerate(rows):
        times = advantage(rows, entry)
        last = index + 1 == len(rows) or rows[index + 1].case != entry.case
        table.add_row(
            entry.case,
            entry.contender,
            entry.metric,
            f"{entry.median:.4g} {entry.unit}" if entry.samples else entry.note,
            f"{entry.p10:.4g} - {entry.p90:.4g}" if entry.samples > 1 else "",
            "" if times is None else f"{times:.2f}x",
            end_section=last,
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a log keeps each row on its line
    console.print(table)


def draw(path: Path, suite: str, rows: list[Row], where: str) -> None:
    """Bars of the medians, with their spread, grouped by case; one panel for each metric."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r.samples]
    metrics = list(dict.fromkeys((r.metric, r.unit) for r in rows))
    if not metrics:
        return
    upright = len({r.case for r in rows}) > 16  # labels, where there is no room to fold them
    figure = Figure(figsize=(9, (6 if upright else 3.6) * len(metrics)), layout="constrained")
    contenders = list(dict.fromkeys(r.contender for r in rows))
    colours = {contender: f"C{i}" for i, contender in enumerate(contenders)}
    for axes, (metric, unit) in zip(figure.subplots(len(metrics), squeeze=False)[:, 0], metrics, strict=True):
        shown = [r for r in rows if (r.metric, r.unit) == (metric, unit)]
        cases = list(dict.fromkeys(r.case for r in shown))
        here = [contender for contender in contenders if any(r.contender == contender for r in shown)]
        width = 0.8 / len(here)
        for i, contender in enumerate(here):
            mine = [r for r in shown if r.contender == contender]
            places = [cases.index(r.case) + (i - (len(here) - 1) / 2) * width for r in mine]
            spread = [[r.median - r.p10 for r in mine], [r.p90 - r.median for r in mine]]
            heights = [r.median for r in mine]
            axes.bar(
                places, heights, width, yerr=spread, label=contender, color=colours[contender],
                error_kw={"lw": 0.8},
            )  # fmt: skip
        # What all cases begin with is said once, below; the rest is folded to fit.
        parts = [case.split(", ") for case in cases]
        common = 0
        while len(cases) > 1 and len({tuple(p[: common + 1]) for p in parts}) == 1:
            common += 1
        labels = [", ".join(p[common:]) for p in parts]
        if not upright:
            labels = [textwrap.fill(l, max(4, 80 // len(cases)), break_long_words=False) for l in labels]
        axes.set_xticks(range(len(cases)), labels, rotation=90 if upright else 0)
        axes.set_xlabel(", ".join(parts[0][:common]))
        middle, half = (len(cases) - 1) / 2, max(len(cases), 3) / 2  # one case is as wide as one of three
        axes.set_xlim(middle - half, middle + half)
        axes.set_ylabel(f"{metric}, {unit}")
        positive = [r.median for r in shown if r.median > 0]
        if positive and max(positive) > 30 * min(positive):
            axes.set_yscale("log")
    figure.suptitle(f"{suite}: {where}", fontsize="medium")
    legend = {}
    for axes in figure.axes:
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [contender for contender in contenders if contender in legend]
    handles = [legend[name] for name in names]
    figure.legend(handles, names, fontsize="small", loc="outside lower center", ncols=min(len(names), 5))
    figure.savefig(path, dpi=110)

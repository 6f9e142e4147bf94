"""QLoRA on a real model and real data: quantise, evaluate, train one pass, evaluate, report.

    python examples/prepare.py && python examples/demo.py        (or: make demo)

Everything goes through the command, as a user types it: `peft-engine eval`, `train`, `eval`. What each stage
said is kept in out/demo/, so a second run shows the finished ones at once; --again starts over. The report is
out/demo/report.html.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prepare import MODEL, MOVIES

ROOT = Path(__file__).resolve().parents[1]
# As a fine-tune of this kind is usually set; alpha is twice the rank.
TRAIN_SETTINGS = (
    "--epochs 1 --batch-size 8 --learning-rate 5e-4 --scheduler cosine --rank 16 --alpha 32 "
    "--target-modules all-linear --seed 0"
)


def stages(model: Path, data: Path, out: Path, extra: list[str]) -> dict[str, list[str]]:
    """The three commands, by the name under which the answer of each is kept."""
    model_, test, adapter = f"--model={model}", f"--data={data / 'test.jsonl'}", str(out / "adapter")
    train = ["train", model_, f"--data={data / 'train.jsonl'}", "--method=qlora", f"--output={adapter}"]
    return {
        "before": ["eval", model_, test, "--quantize=nf4", "--json"],
        "train": [*train, *shlex.split(TRAIN_SETTINGS), *extra, "--json"],
        "after": ["eval", model_, test, f"--adapter={adapter}", "--json"],
    }


def fingerprint_of(model: Path, data: Path, commands: dict[str, list[str]]) -> str:
    """Changes with the engine, its settings, the model, the data, the commands: no stage comes from another
    run.
    """
    code = [file for part in ("peft_engine", "kernels", "csrc") for file in ROOT.glob(f"{part}/**/*.*")]
    sources = [file for file in code if file.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")]
    sources += data.glob("*.jsonl")
    digest = hashlib.sha256(repr(commands).encode())
    for file in sorted([*sources, Path(__file__)]):
        digest.update(file.read_bytes())
    for file in sorted(model.iterdir()):  # by size and time: its bytes take a second to read
        digest.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    pinned = sorted((key, value) for key, value in os.environ.items() if key.startswith("PEFT_ENGINE_"))
    digest.update(repr(pinned).encode())
    return digest.hexdigest()


def run_stage(name: str, command: list[str], out: Path, fingerprint: str) -> dict[str, Any]:
    """The JSON the command answers with; its progress goes to the terminal. Exits with 1 when it fails."""
    kept = out / f"{name}.json"
    shown = "peft-engine " + shlex.join(command)
    if kept.exists():
        before = json.loads(kept.read_text())
        if before["fingerprint"] == fingerprint:
            print(f"==> {name}: done before, kept in {kept} (--again runs it anew)", flush=True)
            return before["answer"]
    print(f"==> {name}: {shown}", flush=True)
    if name == "train":
        shutil.rmtree(out / "adapter", ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "peft_engine", *command], stdout=subprocess.PIPE, cwd=ROOT)
    if done.returncode:
        sys.stderr.write(
            f"demo: the stage '{name}' failed with exit code {done.returncode}; its reason is above\n"
        )
        sys.exit(1)
    answer = json.loads(done.stdout)
    answer["wall_seconds"] = time.perf_counter() - started
    kept.write_text(json.dumps({"fingerprint": fingerprint, "answer": answer}, indent=1))
    return answer


def summary(before: dict, run: dict, after: dict, adapter: Path) -> list[tuple[str, str, str]]:
    """(what, before, after) for the table; what exists only after training has an empty middle."""
    size = sum(file.stat().st_size for file in adapter.glob("adapter_*"))
    wall = sum(stage["wall_seconds"] for stage in (before, run, after))
    first, last = first_and_last(run["losses"])
    return [
        ("accuracy, held-out rows", f"{before['accuracy']:.1%}", f"{after['accuracy']:.1%}"),
        ("training loss, first and last tenth", f"{first:.3f}", f"{last:.3f}"),
        ("training time", "", f"{run['train_seconds']:.0f} s"),
        ("tokens per second in training", "", f"{run['tokens_per_second']:.0f}"),
        ("peak memory of training", "", f"{run['peak_rss_bytes'] / 2**20:.0f} MiB"),
        ("trainable parameters", "", f"{run['trainable_parameters']:,}"),
        ("adapter on disk", "", f"{size / 2**20:.1f} MiB"),
        ("all three stages", "", f"{wall / 60:.1f} min"),
    ]


def first_and_last(losses: list[float]) -> tuple[float, float]:
    tenth = max(1, len(losses) // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def print_table(rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", "after")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def picture(figure) -> str:
    """The figure as an <img> that needs no file beside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def loss_curve(losses: list[float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2))
    axes = figure.subplots()
    axes.plot(losses, color="0.75", linewidth=1, label="each step")
    window = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
    axes.plot(smooth, color="tab:blue", label=f"mean of {window}")
    axes.set(xlabel="optimiser step", ylabel="loss of a labelled token", title="Training loss")
    axes.legend()
    return figure


def confusion_tables(before: dict, after: dict):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.0))
    for axes, title, result in zip(figure.subplots(1, 2), ("before", "after"), (before, after), strict=True):
        labels, counts = [label.strip() for label in result["labels"]], result["confusion"]
        axes.imshow(counts, cmap="Blues", vmin=0)
        highest = max(max(row) for row in counts)
        for i, row in enumerate(counts):
            for j, count in enumerate(row):
                axes.text(
                    j, i, count, ha="center", va="center", color="white" if count > highest / 2 else "black"
                )
        axes.set(
            xticks=range(len(labels)), yticks=range(len(labels)), title=f"{title}: {result['accuracy']:.1%}"
        )
        axes.set_xticklabels(labels)
        axes.set_yticklabels(labels)
        axes.set(xlabel="predicted", ylabel="rated by people")
    figure.tight_layout()
    return figure


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse}td,th{padding:.25rem .9rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:.7rem;overflow:auto}"""


def write_report(path: Path, rows, commands, trained_on: int, before, run, after) -> None:
    """One self-contained page: the table, the pictures, the commands and versions that give it again."""
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows)
    typed = "\n\n".join("peft-engine " + shlex.join(command) for command in commands)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>peft-engine demo</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>QLoRA on a CPU: what one pass taught</h1>
<p>SmolLM2-135M-Instruct, its linear layers held in 4 bits, learned in one pass over {trained_on:,}
sentences of movie reviews to tell positive from negative. It was tested on {after["rows"]} others, before and
after.</p>
<table><tr><th><th>before<th>after{cells}</table>
<h2>Loss</h2>{picture(loss_curve(run["losses"]))}
<h2>Answers</h2>{picture(confusion_tables(before, after))}
<h2>The same again</h2><pre>{html.escape(typed)}</pre>
<pre>{html.escape(json.dumps(run["versions"], indent=1))}</pre>
<p>Sentences and ratings: C.J. Hutto and E. Gilbert, VADER, ICWSM 2014. Model: SmolLM2 (Apache-2.0).</p>
"""
    path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", type=Path, default=MOVIES, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--again", action="store_true", help="run every stage anew")
    parser.add_argument("--max-steps", type=int, help="stop training early, to try things out")
    arguments = parser.parse_args(argv)
    out = arguments.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        for stage in stages(arguments.model, arguments.data, out, []):
            (out / f"{stage}.json").unlink(missing_ok=True)
    extra = [] if arguments.max_steps is None else [f"--max-steps={arguments.max_steps}"]
    model = arguments.model.resolve()
    data = arguments.data.resolve()
    commands = stages(model, data, out, extra)
    fingerprint = fingerprint_of(model, data, commands)
    print("QLoRA demo: evaluate, train one pass, evaluate; about 12 minutes on 2 cores", flush=True)
    answers = {name: run_stage(name, command, out, fingerprint) for name, command in commands.items()}
    before, run, after = answers["before"], answers["train"], answers["after"]
    rows = summary(before, run, after, out / "adapter")
    print_table(rows)
    report = out / "report.html"
    trained_on = sum(1 for _ in (data / "train.jsonl").open(encoding="utf-8"))
    write_report(report, rows, commands.values(), trained_on, before, run, after)
    print(f"==> report: {report}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("demo: interrupted; the stages that are done are kept, and the next run goes on after them")

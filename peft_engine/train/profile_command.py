"""`peft-engine profile`: where the time of a training step goes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import command, drawn, next_command, quiet, say
from peft_engine.train.output import check_output, holds_already, make_output
from peft_engine.train.train_command import as_train, settings_of

SHOWN = 24  # rows of a table; the file has all
COLOURS = {
    "forward": "#1f4e8c", "backward": "#5b8fd6", "optimiser": "#e2a13b", "between": "#3f8f6b",
    "host": "#9a9a9a",
}  # fmt: skip
LABELS = {"between": "clipping, checks", "host": "no op: Python, the Trainer"}
FILES = ("profile.json", "trace.json", "profile.png")


@as_train(without=("eval_data", "eval_steps", "save_steps", "resume", "max_steps", "epochs"))
def profile(
    given: dict[str, Any],
    output: Annotated[Path, o.path_option(f"Folder for {', '.join(FILES)}.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to profile, after as many to warm up.")] = 3,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the profile that --output holds.")
    ] = False,
    json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say where the time of a training step goes: by op, by kind of layer, forward and backward.

    The options are train's. The steps are train's own, under torch's profiler; nothing is saved of what they
    learn.

    \b
    Example:
      peft-engine profile --model ./SmolLM2-135M --data train.jsonl --output out/profile
    """
    with command(debug) as show:
        check_output(output)
        there = [name for name in FILES if (output / name).exists()]
        if there and not overwrite:
            raise holds_already(output, "profile", there[0])
        settings = settings_of(
            given | {"output": output, "overwrite": overwrite, "resume": False, "epochs": 1.0}
        )
        quiet()
        from peft_engine.train.profile import profile as measure
        from peft_engine.train.record import write_json

        make_output(output)
        found = measure(settings, steps, say, output / "trace.json")
        write_json(output / "profile.json", found)
        draw(output / "profile.png", found)
        show(found if json_ else table(found))
        say(f"Wrote {', '.join(FILES)} to {output}; open trace.json at ui.perfetto.dev or chrome://tracing")
        for line in advice(found):
            say(line)
        base = ("--quantize", settings.base) if settings.base == "nf4" else ()
        next_command("explain", "--model", settings.model, *base)


def table(found: dict[str, Any]) -> str:
    """A step by op and by kind of layer, and what the profiler itself costs."""
    lines = [f"A step of {found['tokens']:,} tokens, {found['method']}:"]
    for key in ("op", "layer"):
        rows = by_name(found[f"{key}s"], key)
        body = [_cells(name, row) for name, row in shortened(rows)]
        lines.append(drawn((key, "forward ms", "backward ms", "sum ms", "share", "calls"), body))
    plain, seen = found["step_ms"], found["profiled_step_ms"]
    lines.append(
        f"The profiler's own cost: a step took {seen:,.1f} ms with it and {plain:,.1f} ms without "
        f"({seen / plain - 1:+.1%})"
    )
    return "\n".join(lines)


def by_name(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """The phases of an op, or of a kind of layer, in one row; the largest first, Python last."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        of_name = found.setdefault(
            row[key], dict.fromkeys(("forward", "backward", "ms", "share", "calls"), 0.0)
        )
        for column, value in ((row["phase"], row["ms"]), ("ms", row["ms"]), ("share", row["share"])):
            of_name[column] = of_name.get(column, 0.0) + value
        of_name["calls"] = max(of_name["calls"], row.get("calls") or 0.0)
    return dict(sorted(found.items(), key=lambda item: ("host" in item[1], -item[1]["ms"])))


def shortened(rows: dict[str, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    """The largest rows, one that holds the small ones, Python's, and their sum."""

    def together(some: list[dict[str, float]]) -> dict[str, float]:
        columns = ("forward", "backward", "ms", "share")
        return {column: sum(row[column] for row in some) for column in columns} | {"calls": 0.0}

    kept, small = list(rows.items()), []
    if len(kept) > SHOWN:
        kept, small = [*kept[: SHOWN - 2], kept[-1]], kept[SHOWN - 2 : -1]
        kept.insert(-1, (f"{len(small)} others", together([row for _, row in small])))
    return [*kept, ("sum", together(list(rows.values())))]


def _cells(name: str, row: dict[str, float]) -> tuple[str, ...]:
    times = (_ms(row[column]) for column in ("forward", "backward", "ms"))
    return name, *times, f"{row['share']:.1%}", f"{row['calls']:,.0f}" if row["calls"] else ""


def _ms(value: float) -> str:
    return f"{value:,.2f}" if value else ""


def advice(found: dict[str, Any]) -> list[str]:
    """What could be faster: the layers that are not fused, with the time of their kind."""
    of_kind: dict[str, float] = {}
    for row in found["layers"]:
        of_kind[row["layer"]] = of_kind.get(row["layer"], 0.0) + row["share"]
    kinds: dict[str, dict[str, Any]] = {}
    for line in found["not_fused"]:
        kinds.setdefault(line["name"].rpartition(".")[2], line)
    if not kinds:
        return ["All layers that have a fused twin are fused"]
    return [
        f"Not fused: {kind}, {of_kind.get(kind, 0.0):.1%} of the step: {line['reason']}"
        for kind, line in kinds.items()
    ]


def draw(path: Path, found: dict[str, Any]) -> None:
    """Bars of a step's ops, the phases of an op side by side, the largest first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sums: dict[str, dict[str, float]] = {}
    for row in found["ops"]:
        name = row["op"] if row["share"] >= 0.005 else "others, each below 0.5 %"
        phases = sums.setdefault(name, {})
        phases[row["phase"]] = phases.get(row["phase"], 0.0) + row["ms"]
    names = sorted(sums, key=lambda name: -sum(sums[name].values()))
    figure = Figure(figsize=(9, 1.6 + 0.36 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for phase, colour in COLOURS.items():
        values = [sums[name].get(phase, 0.0) for name in names]
        left = [
            sum(sums[name].get(before, 0.0) for before in list(COLOURS)[: list(COLOURS).index(phase)])
            for name in names
        ]
        if any(values):
            axes.barh(
                range(len(names)), values, left=left, color=colour, height=0.7, label=LABELS.get(phase, phase)
            )
    for place, name in enumerate(names):
        whole = sum(sums[name].values())
        text = f"{whole:,.1f} ms, {whole / found['profiled_step_ms']:.1%}"
        axes.annotate(
            text, (whole, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(sum(phases.values()) for phases in sums.values()))
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(
        f"{Path(found['model']).name or found['model']}, {found['method']}: a step of {found['tokens']:,} "
        f"tokens, {found['profiled_step_ms']:,.0f} ms ({found['step_ms']:,.0f} without the profiler)",
        fontsize=11, loc="left",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)

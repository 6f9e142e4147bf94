"""The GPU suite's results read back: compact tables for a terminal, and pictures.

A table has a line for each case and a column for each contender, so that a whole run fits a log's last page.
"""

from pathlib import Path

from bench import measure, peers
from bench.measure import Row

# The metrics printed of each section, by what they begin with; the CSVs hold all.
PRINTED = {
    "few_rows": ("time", "of the copy"),
    "linear_cross_entropy": ("peak over inputs", "forward and backward"),
    "row_ops": ("forward and backward", "of the copy"),
    "train_step": ("peak over model", "step", "rate"),
    "dequantise": ("bytes moved", "of the copy"),
    "qlora_layer": ("peak", "forward and backward", "over "),
    "bottleneck": ("forward",),
    "ceilings": ("bandwidth", "rate"),
    "prefix_attention": ("peak over inputs", "forward and backward"),
    "prefix_decode": ("time", "of the copy"),
}


def table(title: str, rows: list[Row]) -> str:
    """The medians of rows that share one metric: cases down, contenders (numbered) across."""
    contenders = list(dict.fromkeys(r.contender for r in rows))
    cases = list(dict.fromkeys(r.case for r in rows))
    figures = {(r.case, r.contender): f"{r.median:.4g}" for r in rows}
    wide = max(map(len, cases))
    legend = "; ".join(f"[{i}] {name}" for i, name in enumerate(contenders, 1))
    lines = [
        f"{title}: {legend}",
        " " * wide + "".join(f"{f'[{i + 1}]':>10}" for i in range(len(contenders))),
    ]
    for case in cases:
        lines.append(f"{case:<{wide}}" + "".join(f"{figures.get((case, c), '-'):>10}" for c in contenders))
    return "\n".join(lines)


def tables(section: str, rows: list[Row]) -> str:
    """Those of a section, and what has no figure, each reason once."""
    out = []
    metrics = dict.fromkeys((r.metric, r.unit) for r in rows if r.samples)
    for metric, unit in metrics:
        if not metric.startswith(PRINTED[section]):
            continue
        shown = [r for r in rows if (r.metric, r.unit) == (metric, unit)]
        if section == "few_rows" and metric == "of the copy":  # the others are in the CSV
            shown = [r for r in shown if r.contender == peers.OURS]
        out.append(table(f"{section}, {metric}, {unit}", shown))
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if not r.samples:
            reasons.setdefault((r.contender, r.note), []).append(r.case)
    for (contender, note), cases in reasons.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases, first {cases[0]}"
        out.append(f"{section}, {contender}: {note} ({where})")
    return "\n".join(out)


def print_all(folder: Path, sections: list[str]) -> None:
    """The tables of what these sections have written, the most important last."""
    for name in (name for name in PRINTED if name in sections):
        path = folder / f"gpu_{name}.csv"
        if path.exists():
            print(tables(name, measure.read_csv(path)) + "\n", flush=True)


# --- pictures --------------------------------------------------------------------------------------------


def draw(csv: Path) -> None:
    """The picture beside a CSV of this suite, when it has figures."""
    rows = [r for r in measure.read_csv(csv) if r.samples]
    if csv.stem == "gpu_few_rows":
        draw_few_rows(csv.with_suffix(".png"), [r for r in rows if r.metric == "time"], csv.parent.name)
    elif csv.stem == "gpu_qlora_layer":
        draw_layers(csv.with_suffix(".png"), rows, csv.parent.name)
    elif rows:
        measure.draw(csv.with_suffix(".png"), csv.stem, rows, csv.parent.name)


def draw_few_rows(path: Path, rows: list[Row], where: str) -> None:
    """Time over rows, a panel for each weight and adapter: "NxK, r=R, M rows" is how a case is named."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(r.case.rsplit(", ", 1)[0] for r in rows))
    if not panels:
        return
    contenders = list(dict.fromkeys(r.contender for r in rows))
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.4 * lines), layout="constrained")
    for axes, panel in zip(figure.subplots(lines, 2, squeeze=False).flat, panels, strict=False):
        for i, contender in enumerate(contenders):
            mine = [r for r in rows if r.contender == contender and r.case.startswith(f"{panel}, ")]
            points = sorted((int(r.case.rsplit(", ", 1)[1].split()[0]), r.median) for r in mine)
            rows_of, micros = zip(*points, strict=True) if points else ((), ())
            axes.plot(rows_of, micros, "o-", label=contender, color=f"C{i}")
        axes.set(title=panel, yscale="log", xlabel="rows", ylabel="us")
        axes.set_xscale("log", base=2)
    figure.suptitle(f"gpu_few_rows: {where}", fontsize="medium")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize="small", loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw_layers(path: Path, rows: list[Row], where: str) -> None:
    """Times of each layer by graph replay, as multiples of ours with padded input; not the single kernel's.

    Eager times tell of the host's processor, and memory differs by what a contender keeps between calls.
    """
    from matplotlib.figure import Figure

    ours, metric = "peft-engine, padded input", "forward and backward, graph"
    shown = [r for r in rows if r.metric == metric and "single kernel" not in r.contender]
    contenders = list(dict.fromkeys(r.contender for r in shown))
    base = {r.case: r.median for r in shown if r.contender == ours}
    cases = [case for case in dict.fromkeys(r.case for r in shown) if case in base]
    if not cases:
        return
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(contenders)
    for i, contender in enumerate(contenders):
        mine = [r for r in shown if r.contender == contender and r.case in base]
        at = [cases.index(r.case) + (i - (len(contenders) - 1) / 2) * width for r in mine]
        axes.bar(at, [r.median / base[r.case] for r in mine], width, label=contender, color=f"C{i}")
    axes.axhline(1.0, color="grey", lw=0.8)
    names = [case.replace(", r=16, ", "\n") for case in cases]
    axes.set_xticks(range(len(cases)), names, fontsize="small")
    axes.set_ylabel(f"time of {metric},\nover {ours} (higher is slower)")
    figure.suptitle(f"gpu_qlora_layer: {where}", fontsize="medium")
    figure.legend(fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)

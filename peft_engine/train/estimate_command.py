"""`peft-engine estimate`: the memory of a training, before it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import command, drawn, next_command, quiet, say
from peft_engine.train.train_command import ONLY_TRAIN, as_train, settings_of

SAYS = {
    "imports": "Python, torch, the data's rows",
    "weights": "the base",
    "files": "pages of the base's files that stay mapped; the system takes them back when memory is short",
    "adapter": "what is trained, float32",
    "gradients": "one for each trained number",
    "optimiser": "two for each, AdamW",
    "activations": "kept by the forward for the backward",
    "workspace": "what passes: products, the loss, the allocator's gaps; below 0 where the largest of the "
    "above are not there at once",
}


@as_train(without=ONLY_TRAIN)
def estimate(
    given: dict[str, Any],
    data: Annotated[
        Path | None, o.path_option("The rows to train on, as train takes them; or give --tokens.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of every row, where there is no --data.")
    ] = None,
    levers: Annotated[bool, typer.Option(help="Measure what other settings would save.")] = True,
    json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say how much memory a training will take, of what, and what would take less.

    The options are train's. What stays is counted from the model's config; what passes is measured on a few
    of its layers with random weights, so the model itself is not loaded.

    \b
    Example:
      peft-engine estimate --model ./SmolLM2-135M --data train.jsonl --batch-size 8
      peft-engine estimate --model ./Llama-8B --tokens 512 --batch-size 4 --method qlora
    """
    with command(debug) as show:
        if (data is None) == (tokens is None):
            raise typer.BadParameter("give --data or --tokens, one of them")
        settings = settings_of(
            given | {"data": data or Path("train.jsonl"), "output": Path("out/adapter"), "resume": False}
            | {"overwrite": False}
        )  # fmt: skip
        quiet()
        from peft_engine.train import estimate as work
        from peft_engine.train.compare import command_line

        found = work.estimate(settings, tokens, say, levers=levers)
        show(found if json_ else table(found))
        next_command(*command_line(settings, "train"))


def probe(spec: Annotated[Path, typer.Argument(help="What to measure, as estimate wrote it.")]) -> None:
    """Measure the memory of a small model's training; started by estimate.

    \b
    Example:
      peft-engine estimate --model ./SmolLM2-135M --data train.jsonl
    """
    with command(False) as show:
        quiet()
        from peft_engine.train.probe import measure, read

        what = json.loads(spec.read_text())
        show(measure(read(what, what["folder"], what["deepest"])))


def _sum(sizes: dict[str, int | None]) -> str:
    """Their sum in MiB; "-" where one of them is not known."""
    return "-" if None in sizes.values() else mib(sum(filter(None, sizes.values())))


def table(found: dict[str, Any]) -> str:
    """Bytes by kind and by part, the total, whether it fits, and the levers."""
    batch = found["batch"]
    lines = [
        f"Largest micro-batch: {batch['rows']} rows, {batch['tokens']:,} tokens, "
        f"{'packed' if batch['packed'] else 'padded'}"
        + ("" if found["share"] == 1 else f"; {found['share']:.0%} of them were run, the rest is their line"),
        drawn(
            ("in a training step", "MiB", ""),
            [(kind, mib(size), SAYS[kind]) for kind, size in found["kinds"].items()]
            + [("", "", ""), ("training", mib(found["training"]), "the sum, the peak of a step")]
            + [("loading", mib(found["loading"]), "the peak while the base is read")]
            + [("total", mib(found["total"]), "the larger of the two")],
        ),
    ]
    parts = {f"a layer, of {found['layers']}" if k == "a layer" else k: v for k, v in found["parts"].items()}
    columns = list(next(iter(parts.values())))
    lines.append(
        drawn(
            ("by part, MiB", *columns, "sum"),
            [
                (p, *("-" if (size := v.get(c, 0)) is None else mib(size) for c in columns), _sum(v))
                for p, v in parts.items()
                if any(v.values())
            ],
        )
    )
    who, free, needed = found["free_says"], mib(found["free"]), mib(found["needed"])
    fits = "It fits" if found["fits"] else "It does not fit"
    lines.append(f"{fits}: {needed} MiB are needed, and {who} {free} MiB")
    if found["levers"]:
        lines.append("Levers, the largest first:")
        lines += [f"  {mib(lever['saves']):>8} MiB less  {lever['option']}" for lever in found["levers"]]
    return "\n".join(lines)


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"

"""`peft-engine compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import command, next_command, say, usage
from peft_engine.train.method_options import METHODS
from peft_engine.train.train_command import as_train, of


@as_train(without=("method", "eval_steps", "save_steps", "resume"))
def compare(
    given: dict[str, Any],
    eval_data: Annotated[Path, o.path_option("Held-out rows that every method is measured on.")],
    output: Annotated[
        Path,
        o.path_option("Folder for an adapter of each method, compare.json, compare.csv, compare.png."),
    ],
    methods: Annotated[
        str, typer.Option(help="all, or names with commas: " + ",".join(METHODS), metavar="all|NAMES")
    ] = "all",
    quantize: Annotated[
        str | None,
        typer.Option(help="The base of all but qlora, whose is nf4. Default: none.", metavar="nf4|none"),
    ] = None,
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Of one method, prompt=0.1, or of all; may be repeated. Default: train's own.",
            metavar="METHOD=RATE",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the comparison that --output holds.")
    ] = False,
    json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train several methods on the same rows with the same budget, and compare them.

    Each is trained and measured in a process of its own, so that its peak memory is its own. An option of a
    method goes to those that have it.

    \b
    Example:
      peft-engine compare --model ./SmolLM2-135M --data train.jsonl --eval-data test.jsonl --output out/all
      peft-engine compare --methods lora,prefix --quantize nf4 --rank 8 --learning-rate prefix=0.02 \\
        --model ./SmolLM2-135M --data train.jsonl --eval-data test.jsonl --output out/two
    """
    with command(debug) as show:
        from peft_engine.train import compare as work
        from peft_engine.train.compare_report import draw, table, write_csv
        from peft_engine.train.settings import LoopSettings

        with usage():
            names = work.methods_of(methods)
            loop = of(LoopSettings, given) | {"learning_rate": 1.0}  # each method has its own
            settings = work.Comparison(
                methods=names,
                options=o.method_options(**of(o.MethodOptions, given)),
                rates=work.rates_of(learning_rate or [], names),
                loop=LoopSettings(**loop),
                **of(work.Comparison, given),
            )
        found = work.compare(settings, say)
        write_csv(output / "compare.csv", found)
        draw(output / "compare.png", found)
        show(found if json_ else table(found))
        say(f"Wrote compare.json, compare.csv and compare.png to {output}")
        failed = [row["method"] for row in found["rows"] if row["error"]]
        if failed:
            say(f"peft-engine: error: compare: failed: {', '.join(failed)}; the reasons stand in the table")
            raise typer.Exit(1)
        next_command("generate", "--model", settings.model, "--adapter", output / names[0], "--prompt", "...")

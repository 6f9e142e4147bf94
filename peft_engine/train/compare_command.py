"""`peft-engine compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import command, next_command, say, usage
from peft_engine.train.method_options import METHODS


def compare(
    model: o.Model,
    data: o.Data,
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
    epochs: o.Epochs = 1.0,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = 8,
    gradient_accumulation_steps: o.Accumulation = 1,
    learning_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Of one method, prompt=0.1, or of all; may be repeated. Default: train's own.",
            metavar="METHOD=RATE",
        ),
    ] = None,
    warmup_ratio: o.WarmupRatio = 0.03,
    scheduler: o.Scheduler = "cosine",
    weight_decay: o.WeightDecay = 0.0,
    max_grad_norm: o.MaxGradNorm = 1.0,
    rank: o.Rank = None,
    alpha: o.Alpha = None,
    dropout: o.Dropout = None,
    target_modules: o.TargetModules = None,
    target_parameters: o.TargetParameters = None,
    dora: o.Dora = False,
    virtual_tokens: o.VirtualTokens = None,
    prefix_projection: o.PrefixProjection = False,
    init: o.Init = None,
    init_text: o.InitText = None,
    width: o.Width = None,
    reduction_factor: o.ReductionFactor = None,
    placement: o.Placement = None,
    activation: o.Activation = None,
    dtype: o.TrainDtype = "auto",
    seed: o.Seed = 0,
    max_length: o.MaxLength = None,
    gradient_checkpointing: o.Checkpointing = False,
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

        loop: dict[str, Any] = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps, "warmup_ratio": warmup_ratio,
            "scheduler": scheduler, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
            "seed": seed, "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        with usage():
            names = work.methods_of(methods)
            settings = work.Comparison(
                methods=names, model=model, data=data, eval_data=eval_data, output=output, quantize=quantize,
                dtype=dtype, max_length=max_length, overwrite=overwrite, loop=LoopSettings(**loop),
                rates=work.rates_of(learning_rate or [], names),
                options=o.method_options(
                    rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules,
                    target_parameters=target_parameters, dora=dora,
                    virtual_tokens=virtual_tokens, prefix_projection=prefix_projection, init=init,
                    init_text=init_text, width=width, reduction_factor=reduction_factor,
                    placement=placement, activation=activation,
                ),
            )  # fmt: skip
        found = work.compare(settings, say)
        write_csv(output / "compare.csv", found)
        draw(output / "compare.png", found)
        show(found if json_ else table(found))
        say(f"Wrote compare.json, compare.csv and compare.png to {output}")
        failed = [row["method"] for row in found["rows"] if row["error"]]
        if failed:
            say(f"peft-engine: error: compare: failed: {', '.join(failed)}; the reasons stand in the table")
            raise typer.Exit(1)
        next_command("generate", "--model", model, "--adapter", output / names[0], "--prompt", "...")

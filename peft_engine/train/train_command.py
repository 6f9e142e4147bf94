"""`peft-engine train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import choice, command, next_command, quiet, say, usage
from peft_engine.train.method_options import METHODS
from peft_engine.train.method_options import learning_rate as default_rate


def train(
    model: o.Model,
    data: o.Data,
    output: Annotated[Path, typer.Option(help="Folder for the adapter, run.json, loss.png and checkpoints.")],
    eval_data: Annotated[
        Path | None, typer.Option(help="Rows to evaluate on; the best state is then what is kept.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="qlora is lora over a base in 4 bit.", metavar="|".join(METHODS))
    ] = "qlora",
    quantize: Annotated[
        str | None,
        typer.Option(help="The base; default nf4 for qlora, none for the others.", metavar="nf4|none"),
    ] = None,
    epochs: o.Epochs = 1.0,
    max_steps: o.MaxSteps = None,
    batch_size: o.BatchSize = 8,
    gradient_accumulation_steps: o.Accumulation = 1,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Default: " + ", ".join(f"{name} {default_rate(name):g}" for name in METHODS) + "."
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
    eval_steps: Annotated[
        int | None, typer.Option(help="Evaluate every so many steps. Default: each epoch.")
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Checkpoint every so many steps. Default: each epoch.")
    ] = None,
    gradient_checkpointing: o.Checkpointing = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that --output holds.")
    ] = False,
    json_: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train an adapter: LoRA, QLoRA, a prefix, a prompt or bottleneck adapters.

    Every method trains over a dense base or one in 4 bit (--quantize nf4). An option that belongs to another
    method is refused.

    \b
    Example:
      peft-engine train --model ./SmolLM2-135M --data train.jsonl --output out/movies --batch-size 8
      peft-engine train --model ./SmolLM2-135M --data train.jsonl --output out/prefix \\
        --method prefix --virtual-tokens 16 --quantize nf4
      peft-engine train --model ./SmolLM2-135M --data train.jsonl --output out/prompt \\
        --method prompt --init-text "Is the review positive or negative?"
      peft-engine train --model ./SmolLM2-135M --data train.jsonl --output out/bottleneck \\
        --method bottleneck --placement houlsby --width 64
    """
    with command(debug) as show:
        choice("--method", method, METHODS)
        from peft_engine.train.run import run
        from peft_engine.train.settings import LoopSettings, RunSettings

        loop: dict[str, Any] = {
            "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "learning_rate": default_rate(method) if learning_rate is None else learning_rate,
            "warmup_ratio": warmup_ratio, "scheduler": scheduler, "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm, "seed": seed, "eval_steps": eval_steps, "save_steps": save_steps,
            "gradient_checkpointing": gradient_checkpointing,
        }  # fmt: skip
        given = o.method_options(
            rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, dora=dora,
            virtual_tokens=virtual_tokens, prefix_projection=prefix_projection, init=init,
            init_text=init_text, width=width, reduction_factor=reduction_factor, placement=placement,
            activation=activation,
        )  # fmt: skip
        with usage():
            settings = RunSettings(
                model=model, data=data, output=output, eval_data=eval_data, method=method, quantize=quantize,
                dtype=dtype, max_length=max_length, resume=resume, overwrite=overwrite, options=given,
                loop=LoopSettings(**loop),
            )  # fmt: skip
        quiet()
        record = run(settings, say)
        if json_:
            show(record)
        else:
            show(
                f"Trained {record['steps']} steps, {record['tokens']:,} tokens in "
                f"{record['train_seconds']:.1f} s "
                f"({record['tokens_per_second']:,.0f} tokens/s); loss {record['losses'][0]:.4f} -> "
                f"{record['losses'][-1]:.4f}; peak memory {record['peak_rss_bytes'] / 2**20:,.0f} MiB"
            )
            show(
                f"Saved the {record['saved']} state (step {record['saved_step']}) to {output}, "
                "its losses to loss.png"
            )
        test = eval_data or "test.jsonl"
        next_command("eval", "--model", model, "--adapter", output, "--data", test)

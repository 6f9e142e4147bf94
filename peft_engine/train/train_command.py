"""`peft-engine train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import choice, command, quiet, say, usage
from peft_engine.train.method_options import METHODS, MethodOptions
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
    rank: Annotated[int | None, typer.Option(help="(lora, qlora) Rank of the adapter. Default: 16.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="(lora, qlora) Its scaling is alpha / rank. Default: 2 x rank.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="(lora, qlora, bottleneck) Dropout in the adapter. Default: 0.")
    ] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(help="(lora, qlora) all-linear, the default, or names with commas: q_proj,v_proj"),
    ] = None,
    virtual_tokens: Annotated[
        int | None, typer.Option(help="(prefix, prompt) Their length. Default: prefix 16, prompt 32.")
    ] = None,
    prefix_projection: Annotated[
        bool, typer.Option("--prefix-projection", help="(prefix) An MLP makes the prefix in training.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(
            help="(prefix, prompt) What they start from. Default: vocab, tokens drawn from the vocabulary; "
            "random with --prefix-projection.",
            metavar="random|vocab|text",
        ),
    ] = None,
    init_text: Annotated[
        str | None,
        typer.Option(help="(prefix, prompt) The text of --init text, over and over to their length."),
    ] = None,
    width: Annotated[int | None, typer.Option(help="(bottleneck) Width of its middle.")] = None,
    reduction_factor: Annotated[
        float | None, typer.Option(help="(bottleneck) Or the model's width over that one. Default: 16.")
    ] = None,
    placement: Annotated[
        str | None,
        typer.Option(
            help="(bottleneck) After attention and feed-forward, after the feed-forward, or beside it. "
            "Default: pfeiffer.",
            metavar="houlsby|pfeiffer|parallel",
        ),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="(bottleneck) Default: relu.", metavar="relu|gelu|silu|tanh")
    ] = None,
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
        given = MethodOptions(
            rank=rank, alpha=alpha, dropout=dropout, target_modules=_targets(target_modules),
            virtual_tokens=virtual_tokens, prefix_projection=prefix_projection or None, init=init,
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
        say(f"Next: peft-engine eval --model {model} --adapter {output} --data {test}")


def _targets(option: str | None) -> list[str] | str | None:
    if option is None:
        return None
    names = [name.strip() for name in option.split(",") if name.strip()]
    return "all-linear" if names == ["all-linear"] else names

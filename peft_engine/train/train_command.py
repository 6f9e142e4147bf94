"""`peft-engine train`."""

import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train import options as o
from peft_engine.train.console import choice, command, next_command, quiet, say, usage
from peft_engine.train.method_options import METHODS
from peft_engine.train.method_options import learning_rate as default_rate

ONLY_TRAIN = ("output", "eval_data", "eval_steps", "save_steps", "resume", "overwrite")  # not estimate's


def train(
    model: o.Model,
    data: o.Data,
    output: Annotated[Path, o.path_option("Folder for the adapter, run.json, loss.png and checkpoints.")],
    eval_data: Annotated[
        Path | None, o.path_option("Rows to evaluate on; the best state is then what is kept.")
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
    given = dict(locals())
    with command(debug) as show:
        settings = settings_of(given)
        from peft_engine.train.compare import command_line
        from peft_engine.train.memory import ran_out
        from peft_engine.train.run import run

        quiet()
        try:
            record = run(settings, say)
        except Exception as error:
            if ran_out(error):
                line = shlex.join(["peft-engine", *command_line(settings, "estimate", *ONLY_TRAIN)])
                error.add_note(f"What takes the memory, and what would take less: {line}")
            raise
        if json_:
            show(record)
        else:
            before = record["resumed_from_step"]  # tokens and seconds are of the steps after them
            show(
                f"Trained {record['steps'] - before} steps{f' after the first {before}' if before else ''}, "
                f"{record['tokens']:,} tokens in "
                f"{record['train_seconds']:.1f} s "
                f"({record['tokens_per_second']:,.0f} tokens/s); loss {record['losses'][0]:.4f} -> "
                f"{record['losses'][-1]:.4f}; peak memory {record['peak_rss_bytes'] / 2**20:,.0f} MiB"
            )
            show(
                f"Saved the {record['saved']} state (step {record['saved_step']}) to {output}, "
                "its losses to loss.png"
            )
        how = ("eval", "--data", eval_data) if eval_data else ("generate", "--prompt", "...")
        next_command(how[0], "--model", model, "--adapter", output, *how[1:])


def of(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a kind of settings among options."""
    return {name: given[name] for name in kind.__dataclass_fields__ if name in given}


def settings_of(given: dict[str, Any]) -> Any:
    """The settings that the options of `train` mean, by their names; what cannot be is wrong usage."""
    choice("--method", given["method"], METHODS)
    from peft_engine.train.settings import LoopSettings, RunSettings

    loop = of(LoopSettings, given)
    if loop["learning_rate"] is None:
        loop["learning_rate"] = default_rate(given["method"])
    with usage():
        return RunSettings(
            **of(RunSettings, given),
            options=o.method_options(**of(o.MethodOptions, given)),
            loop=LoopSettings(**loop),
        )


def as_train(*, without: tuple[str, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose options are train's, but for those in `without`, and its own.

    The command takes those of train as one dict, `given`; an own one takes the place of train's of its name.
    """

    def decorate(own: Callable[..., None]) -> Callable[..., None]:
        mine = {name: p for name, p in inspect.signature(own).parameters.items() if name != "given"}
        theirs = {n: p for n, p in inspect.signature(train).parameters.items() if n not in without}

        def run(**values: Any) -> None:
            given = {name: values.get(name) for name in inspect.signature(train).parameters}
            own(given, **{name: values[name] for name in mine})

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in (theirs | mine).values()]
        run.__name__, run.__doc__ = own.__name__, own.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate

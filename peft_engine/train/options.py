"""The options that several commands have, as typer reads them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train.method_options import ACTIVATIONS, DEFAULTS, INITS, PLACEMENTS, MethodOptions


def given(text: str) -> str:
    """A path, as it was typed. An empty one (a variable of the shell that was not set) would be the current
    folder to Python.
    """
    if not text:
        raise typer.BadParameter("expected a path, got an empty text (. is the current folder)")
    return text


def path_option(help: str, *names: str) -> Any:
    """An option that takes a path."""
    return typer.Option(*names, help=help, metavar="PATH", parser=lambda text: Path(given(text)))


Model = Annotated[
    str,
    typer.Option(
        help="Folder written by save_pretrained, or a name on the hub.", metavar="DIR_OR_NAME", parser=given
    ),
]
Data = Annotated[
    Path, path_option("JSONL or CSV (or .gz of one): prompt and completion, or messages, or text.")
]
Adapters = Annotated[
    list[Path] | None, path_option("Folder of an adapter; may be repeated, or left out.", "--adapter")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="nf4: the base in 4 bit; none: as stored. Default: what the adapter was trained on.",
        metavar="nf4|none",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="auto (as stored), bfloat16, float16 or float32. Default: what the adapter was trained on."
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Count = Annotated[int, typer.Option(min=1)]

# --- of the loop: train and compare -------------------------------------------------------------------------

Epochs = Annotated[float, typer.Option(help="Passes over the data.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after this many optimiser steps instead.")]
BatchSize = Annotated[int, typer.Option(help="Rows in a micro-batch, packed without padding.")]
Accumulation = Annotated[int, typer.Option(help="Micro-batches in an optimiser step.")]
WarmupRatio = Annotated[float, typer.Option(help="Share of the steps in which the rate rises from 0.")]
Scheduler = Annotated[str, typer.Option(help="cosine, linear, constant, ... (transformers' names).")]
WeightDecay = Annotated[float, typer.Option()]
MaxGradNorm = Annotated[float, typer.Option(help="Gradients are clipped to this norm.")]
TrainDtype = Annotated[str, typer.Option(help="auto (as stored), bfloat16, float16 or float32.")]
Seed = Annotated[int, typer.Option()]
MaxLength = Annotated[
    int | None, typer.Option(min=2, help="Most tokens of a row; longer texts are cut in pieces.")
]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]

# --- of a method: train and compare -------------------------------------------------------------------------

Rank = Annotated[
    int | None,
    typer.Option(help=f"(lora, qlora) Rank of the adapter. Default: {DEFAULTS['lora']['rank']}."),
]
Alpha = Annotated[
    float | None, typer.Option(help="(lora, qlora) Its scaling is alpha / rank. Default: 2 x rank.")
]
Dropout = Annotated[
    float | None, typer.Option(help="(lora, qlora, bottleneck) Dropout in the adapter. Default: 0.")
]
TargetModules = Annotated[
    str | None,
    typer.Option(help="(lora, qlora) all-linear, the default, or names with commas: q_proj,v_proj"),
]
TargetParameters = Annotated[
    str | None,
    typer.Option(
        help="(lora, qlora) Weights of a mixture's experts and routers, with commas: "
        "experts.gate_up_proj,gate.weight. Default: under all-linear all of them; none: none of them."
    ),
]
Dora = Annotated[
    bool, typer.Option("--dora", help="(lora, qlora) DoRA: a trained magnitude for each output besides.")
]
VirtualTokens = Annotated[
    int | None,
    typer.Option(
        help="(prefix, prompt) Their length. Default: "
        + ", ".join(f"{m} {DEFAULTS[m]['virtual_tokens']}" for m in ("prefix", "prompt"))
        + "."
    ),
]
PrefixProjection = Annotated[
    bool, typer.Option("--prefix-projection", help="(prefix) An MLP makes the prefix in training.")
]
Init = Annotated[
    str | None,
    typer.Option(
        help="(prefix, prompt) What they start from. Default: vocab, tokens drawn from the vocabulary; "
        "random with --prefix-projection.",
        metavar="|".join(INITS),
    ),
]
InitText = Annotated[
    str | None, typer.Option(help="(prefix, prompt) The text of --init text, over and over to their length.")
]
Width = Annotated[int | None, typer.Option(help="(bottleneck) Width of its middle.")]
ReductionFactor = Annotated[
    float | None, typer.Option(help="(bottleneck) The model's width over that one. Default: 16; parallel 2.")
]
Placement = Annotated[
    str | None,
    typer.Option(
        help="(bottleneck) After attention and feed-forward, after the feed-forward, or beside it. "
        f"Default: {DEFAULTS['bottleneck']['placement']}.",
        metavar="|".join(PLACEMENTS),
    ),
]
Activation = Annotated[
    str | None, typer.Option(help="(bottleneck) Default: relu; houlsby silu.", metavar="|".join(ACTIVATIONS))
]


def method_options(
    *,
    target_modules: str | None,
    target_parameters: str | None,
    dora: bool,
    prefix_projection: bool,
    **given: Any,
) -> MethodOptions:
    """What was typed, as options: names with commas become a list, a switch that is off was not given."""
    targets = None if target_modules is None else _names(target_modules)
    experts = None if target_parameters is None else _names(target_parameters)
    return MethodOptions(
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        target_parameters=[] if experts == ["none"] else experts,
        dora=dora or None,
        prefix_projection=prefix_projection or None,
        **given,
    )


def _names(typed: str) -> list[str]:
    return [name.strip() for name in typed.split(",") if name.strip()]

"""The options that several commands have, as typer reads them."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option(help="Folder written by save_pretrained, or a name on the hub.", metavar="DIR_OR_NAME")
]
Data = Annotated[
    Path, typer.Option(help="JSONL or CSV (or .gz of one): prompt and completion, or messages, or text.")
]
Adapters = Annotated[
    list[Path] | None, typer.Option("--adapter", help="Folder of an adapter; may be repeated, or left out.")
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
MaxLength = Annotated[int | None, typer.Option(help="Most tokens of a row; longer texts are cut in pieces.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")]

"""`peft-engine merge`: folds a LoRA adapter into its base, and writes a model that needs neither."""

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from peft_engine.train.console import check_base, command, next_command, quiet, say
from peft_engine.train.options import Debug, Dtype, Json, Model, Quantize, path_option
from peft_engine.train.output import check_output

# What the drift is measured on where no rows are given.
SAMPLE = (
    "The house at the end of the street had been empty for years. Nobody in the village could say who owned "
    "it, but on the first cold evening of October there was a light in the kitchen window.",
    "To measure a small change, compare the whole distribution of the next token and not the likeliest "
    "alone: for x in range(10): print(x * x)",
    "Question: What is the capital of France? Answer: Paris. Question: How many days has a week? Answer: 7.",
)
ROWS, TOKENS = 16, 512  # of --data, and of a row, at the most
HELD = 1 << 30  # bytes of logits that wait for the merge; 4,096 tokens of a vocabulary of 128 Ki in bfloat16
PLACES = 64  # that are compared at a time


def merge(
    model: Model,
    adapter: Annotated[Path, path_option("Folder of a LoRA or DoRA adapter.")],
    output: Annotated[Path, path_option("New folder for the merged model and its tokenizer.")],
    data: Annotated[
        Path | None,
        path_option("Rows to measure the drift on, as train takes them. Default: a few sentences."),
    ] = None,
    quantize: Quantize = None,
    dtype: Dtype = None,
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Keep a 4-bit base in 4 bit: the merged weight is rounded to it."),
    ] = False,
    untie: Annotated[
        bool,
        typer.Option(
            "--untie", help="Give a weight that the adapter changes and the embedding shares its own."
        ),
    ] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Fold a LoRA or DoRA adapter into its base, and write the whole model.

    The base is checked against the one that the adapter was trained on. W + s B A is summed in float32 and
    rounded once. Over a base in 4 bit the adapter corrects the 4-bit weights, so these are what it is added
    to, and the result is dense unless --requantize. How far the merged model is from base and adapter is
    measured and printed. The folder appears when it is whole.

    \b
    Example:
      peft-engine merge --model ./SmolLM2-135M --adapter out/movies --output out/movies-merged
    """
    with command(debug) as show:
        check_base(quantize, dtype)
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"--output {output}: there is something already; give a new folder")
        check_output(output)
        quiet()
        found = _merge(model, adapter, output, data, quantize, dtype, requantize, untie)
        if json_:
            show(found)
        next_command("generate", "--model", output, "--prompt", "...")


def _merge(
    name: str,
    adapter: Path,
    output: Path,
    data: Path | None,
    quantize: str | None,
    dtype: str | None,
    requantize: bool,
    untie: bool,
) -> dict[str, Any]:
    """Loads, merges, measures and writes; what `--json` shows."""
    from peft_engine.merge import merge_
    from peft_engine.methods import lora_layers
    from peft_engine.methods.registry import METHODS
    from peft_engine.train import models, progress
    from peft_engine.train.data import read_rows

    start = time.perf_counter()
    rows = None if data is None else read_rows(data)[:ROWS]  # what is wrong with them is told at once
    fields, tokenizer = models.adapter_fields(adapter), models.load_tokenizer(name)
    for method in METHODS:
        if method is not lora_layers and method.owns(fields):
            raise ValueError(
                f"--adapter {adapter}: is a {method.NAME} adapter, and what it computes is no change of a "
                "weight: keep it beside the base"
            )
    model, (adapter_name,) = models.load(name, [adapter], quantize, dtype)
    documents = _documents(tokenizer, rows, model)
    before = list(_predictions(model, documents))
    layers = [layer for _, layer in lora_layers.layers(model) if adapter_name in layer.lora]
    if layers:
        again = ", into 4 bit again" if requantize else ""
        say(f"Merging {len(layers)} layers{again}: each is checked, then each is merged")
    with progress.bar("Merging", 2 * len(layers)) as bar:
        try:
            merge_(model, adapter_name, requantize=requantize, untie=untie, watch=bar.update)
        except ValueError as error:
            raise ValueError(str(error).replace("untie=True", "--untie")) from error
    merged = getattr(model.config, models.MERGED, None) or []
    setattr(model.config, models.MERGED, [*merged, models.merged_as(adapter)])
    drift = _drift(before, _predictions(model, documents))
    say(
        f"Drift on {drift['tokens']} tokens: KL {drift['kl']:.2g} on average, the largest change of a "
        f"log-probability of the likeliest {drift['largest']:.2g}, the likeliest token is the same for "
        f"{100 * drift['same']:.1f} %"
    )
    size = _write(model, tokenizer, output)
    say(f"Wrote {size / 2**20:,.1f} MiB to {output}")
    return {
        "output": output,
        "base": name,
        "adapter": adapter,
        "layers": len(layers),
        "bytes": size,
        "drift": drift,
        "seconds": time.perf_counter() - start,
    }


def _documents(tokenizer: Any, rows: list[Any] | None, model: Any) -> list[list[int]]:
    """Tokens to predict: of the rows, the first TOKENS of each, or of the sample; as many as HELD allows."""
    from peft_engine.train import encoder_decoder
    from peft_engine.train.data import length_limit, tokenize
    from peft_engine.train.models import check_vocabulary

    limit = min(TOKENS, length_limit(model.config, None, 0))
    if rows is None:
        found = [tokenizer(text)["input_ids"] for text in SAMPLE]
    elif encoder_decoder.is_one(model.config):
        found = [[*d.input_ids, *d.labels] for d in encoder_decoder.documents(rows, tokenizer, 2**31)]
    else:
        found = [document.input_ids for document in tokenize(rows, tokenizer, 2**31, learn_end=False)]
    check_vocabulary(model.config, tokenizer, found)
    room = HELD // (model.config.get_text_config().vocab_size * model.dtype.itemsize)
    documents = []
    for ids in found:
        documents.append(ids[: min(limit, room)])
        room -= len(documents[-1])
    return [ids for ids in documents if ids]


def _predictions(model: Any, documents: list[list[int]]) -> Iterator[Any]:
    """The logits of the next token at each place, as the model gives them, of one document after another.

    A decoder behind an encoder is given the document, too.
    """
    import torch

    from peft_engine.train import encoder_decoder

    device = next(model.parameters()).device
    sides = ("input_ids", "labels") if encoder_decoder.is_one(model.config) else ("input_ids",)
    for ids in documents:
        with torch.inference_mode():
            given = dict.fromkeys(sides, torch.tensor([ids], device=device))
            yield model(**given, use_cache=False).logits[0].cpu()


def _drift(before: Iterable[Any], after: Iterable[Any]) -> dict[str, Any]:
    """How far `after` is from `before`: the mean KL divergence, the largest change of the log-probability of
    a likeliest token, the share of places with the same one.
    """
    import torch

    tokens, kl, same, changes = 0, 0.0, 0, []
    for documents in zip(before, after, strict=True):
        for part in zip(*(logits.split(PLACES) for logits in documents), strict=True):
            p, q = (logits.float().log_softmax(-1) for logits in part)
            likeliest = p.argmax(-1)
            tokens += len(p)
            kl += (p.exp() * (p - q)).sum().item()
            changes.append((p - q).gather(1, likeliest[:, None]).abs().max())
            same += int((q.argmax(-1) == likeliest).sum())
    return {
        "tokens": tokens,
        "kl": 0.0 if kl < 0 else kl / tokens,  # below 0 by rounding; NaN stays
        "largest": torch.stack(changes).max().item(),
        "same": same / tokens,
    }


def _write(model: Any, tokenizer: Any, output: Path) -> int:
    """The model and its tokenizer, in a folder that appears when it is whole; the bytes written."""
    from safetensors import SafetensorError

    from peft_engine.adapter_files import staging

    output = output.resolve()
    new = staging(output)
    try:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        files = sorted(new.iterdir(), key=lambda file: file.name == "config.json")  # what makes it a model
        for file in files:
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        size = sum(file.stat().st_size for file in files)
        if new.parent == output:
            for file in files:
                os.rename(file, output / file.name)
        else:
            os.rename(new, output)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        raise OSError(
            f"merge: --output {output}: writing failed: {error}; nothing of it is kept; free some space, or "
            "give another folder"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return size

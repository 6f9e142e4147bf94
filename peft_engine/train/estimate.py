"""What a training will take of memory, before it runs.

The tensors that stay are counted (`memory.py`). What passes is measured: train itself runs on models of the
same width with a few layers of random weights, each in a process of its own (`probe.py`), and every layer
more adds the same. A run's peak is the larger of two: while the model is loaded, and in a training step.
"""

import contextlib
import copy
import dataclasses
import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_engine.train import encoder_decoder, memory, progress
from peft_engine.train import method_options as of_method
from peft_engine.train.compare import run_command
from peft_engine.train.data import length_limit
from peft_engine.train.models import load_config
from peft_engine.train.settings import RunSettings

LONGEST_PERIOD = 8  # layers after which the kinds of layers come again
SMALL = 64 << 20  # bytes of a layer; of smaller ones more are run, as some 20 MiB lie free after the imports
FILL = 1 << 20  # random values that the small models' weights repeat


class EstimateError(ValueError):
    """What cannot be estimated; the message says why, and what can be done."""


@dataclasses.dataclass(frozen=True)
class Lever:
    """A setting that may save memory: what is typed, and what it changes."""

    option: str
    settings: RunSettings
    tokens: int | None

    @property
    def reloads(self) -> bool:
        """Whether it changes the model, not the steps alone."""
        return "--quantize" in self.option or "--dtype" in self.option


def estimate(
    settings: RunSettings, tokens: int | None, say: Callable[[str], None], *, levers: bool = True
) -> dict[str, Any]:
    """Bytes by kind and by part of the model, the total, what is free, and what each lever would save.

    tokens: of a row, where there is no data. Raises EstimateError for a model whose layers differ without a
    pattern, and for an encoder and a decoder that differ in depth, or without data.
    """
    config = load_config(settings.model)
    limit = length_limit(config, settings.max_length, of_method.virtual_tokens(settings.method_options))
    if tokens is not None and tokens > limit:
        raise EstimateError(
            f"--tokens: {tokens} in a row, at most {limit} are allowed (the model's length beside virtual "
            "tokens, or --max-length), so train would refuse it; give fewer"
        )
    if getattr(config, "quantization_config", None) is not None:
        say("The base is stored in 4 bit; loading is estimated as if it were quantised on the way")
        settings = dataclasses.replace(settings, quantize="nf4")
        del config.quantization_config
    if encoder_decoder.is_one(config):
        _check_two_sides(settings.model, config, tokens)
    exact = memory.exact(settings, config)
    depths = depths_of(exact, config)
    wanted = list(_levers(settings, config, tokens)) if levers else []
    with tempfile.TemporaryDirectory(prefix="peft-engine-estimate-") as work:
        say(f"Measuring {' and '.join(map(str, depths))} of {len(exact.layers)} layers, with random weights")
        with _disk_explained(work):
            write_small(config, depths, memory.stored_dtype(settings.model, config), Path(work))
        runs = 1 + sum(lever.reloads for lever in wanted)
        with progress.bar("Measuring", runs * len(depths)) as bar:

            def measured(of: RunSettings, changes: list[Lever]) -> list[dict[str, Any]]:
                found = []
                for depth in depths:
                    found.append(_probe(of, tokens, Path(work), depth, depths[-1], changes))
                    bar.update(bar.done + 1, f"{depth} layers")
                return found

            found = _sum(exact, depths, measured(settings, [v for v in wanted if not v.reloads]))
            saved = list(zip([v for v in wanted if not v.reloads], found.pop("saved"), strict=True))
            for lever in (v for v in wanted if v.reloads):
                of = _sum(memory.exact(lever.settings, config), depths, measured(lever.settings, []))
                saved.append((lever, found["needed"] - of["needed"]))
    less = sorted(((size, lever.option) for lever, size in saved if size > 0), reverse=True)
    free, who = memory.free_bytes()
    return found | {
        "levers": [{"option": option, "saves": size} for size, option in less],
        "free": free, "free_says": who, "fits": found["needed"] <= free,
    }  # fmt: skip


def _check_two_sides(name: str, config: Any, tokens: int | None) -> None:
    if tokens is not None:
        raise EstimateError(
            f"--tokens: {name} has an encoder and a decoder, so a row has tokens on two sides; give --data"
        )
    depths = {"encoder": memory.depth_of(config), "decoder": encoder_decoder.decoder_depth(config)}
    if depths["encoder"] != depths["decoder"]:
        raise EstimateError(
            f"estimate: {name} has {depths['encoder']} layers in its encoder and {depths['decoder']} in its "
            "decoder; a few layers tell of all only where the two are as many"
        )


@contextlib.contextmanager
def _disk_explained(work: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        raise EstimateError(
            f"estimate: {Path(work).parent} has no space for the small models that are measured; set TMPDIR "
            "to a folder on a disk that has"
        ) from error


# --- the small models ---------------------------------------------------------------------------------------


def depths_of(exact: memory.Exact, config: Any) -> tuple[int, ...]:
    """How many layers to run: two numbers, or all where there are few. EstimateError for no pattern."""
    text, depth = config.get_text_config(), len(exact.layers)
    sizes = list(exact.layers)
    if depth > 1 and encoder_decoder.is_one(config):
        sizes[0] = sizes[1]  # T5's first layers hold the position bias of all
    kinds = list(zip(sizes, getattr(text, "layer_types", None) or [""] * depth, strict=True))
    for period in range(1, LONGEST_PERIOD + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, depth)):
            break
    else:
        raise EstimateError(
            f"estimate: the {depth} layers of {type(config).__name__} differ, and do not come again within "
            f"{LONGEST_PERIOD}; a few of them do not tell of all"
        )
    few, many = (4, 12) if max(exact.layers) < SMALL else (1, 2)
    return (depth,) if depth <= many * period else (few * period, many * period)


def write_small(config: Any, depths: tuple[int, ...], dtype: Any, work: Path) -> None:
    """A folder for each depth, as save_pretrained writes one: a single file; large layers have their own.

    A file's pages count as the process's until it is let go of, so a small model has one, as it is stored.
    """
    import torch
    from safetensors.torch import save_file

    fill = (torch.randn(FILL, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for depth in sorted(depths, reverse=True):
        small = shortened(config, depth)
        folder = work / str(depth)
        small.save_pretrained(folder)
        model = memory.skeleton(small, dtype)
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        file_of = _files(model, tensors, depth)
        for file in set(file_of.values()):
            path = work / file if len(set(file_of.values())) > 1 else folder / file
            if not path.exists():
                mine = [name for name in tensors if file_of[name] == file]
                values = {name: _like(tensors[name], fill, name) for name in mine}
                save_file(values, path, metadata={"format": "pt"})
            if not (folder / file).exists():
                (folder / file).symlink_to(path)  # the layers are the same at every depth
        if len(set(file_of.values())) > 1:
            index = {"metadata": {}, "weight_map": file_of}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _files(model: Any, tensors: dict[str, Any], depth: int) -> dict[str, str]:
    """The file of each tensor."""
    place = memory.places(model, depth)
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if place(name) == 0)
    if layer < SMALL:
        return dict.fromkeys(tensors, "model.safetensors")
    return {n: f"{place(n) if isinstance(place(n), int) else 'rest'}.safetensors" for n in tensors}


def shortened(config: Any, depth: int) -> Any:
    """The config with the first `depth` layers."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    encoder_decoder.set_decoder_depth(small, depth)
    return small


def _like(tensor: Any, fill: Any, name: str) -> Any:
    import torch

    if tensor.dim() < 2 and name.endswith("weight"):  # a norm's
        return torch.ones(tensor.shape, dtype=fill.dtype)
    return fill.repeat(math.ceil(tensor.numel() / FILL))[: tensor.numel()].reshape(tensor.shape).clone()


# --- measuring and adding up --------------------------------------------------------------------------------


def _levers(settings: RunSettings, config: Any, tokens: int | None) -> Iterator[Lever]:
    """What may be tried for this run."""
    loop = settings.loop

    def lever(option: str, tokens: int | None = tokens, **changes: Any) -> Lever:
        in_loop = {k: v for k, v in changes.items() if k in ("gradient_checkpointing", "batch_size")}
        rest = {k: v for k, v in changes.items() if k not in in_loop}
        new = dataclasses.replace(settings, loop=dataclasses.replace(loop, **in_loop), **rest)
        return Lever(option, new, tokens)

    if settings.base != "nf4":
        yield lever("--quantize nf4", quantize="nf4")
    if memory.dtype_of(settings, config).itemsize == 4:
        yield lever("--dtype bfloat16", dtype="bfloat16")
    if not loop.gradient_checkpointing:
        yield lever("--gradient-checkpointing", gradient_checkpointing=True)
    if loop.batch_size > 1:
        half, steps = loop.batch_size // 2, 2 * loop.gradient_accumulation_steps
        yield lever(f"--batch-size {half} --gradient-accumulation-steps {steps}", batch_size=half)
    if tokens is not None and tokens > 3:
        yield lever(f"--tokens {tokens // 2}", tokens // 2)
    elif tokens is None:
        longest = _longest_text(settings)
        if longest is not None and longest > 3:
            yield lever(f"--max-length {longest // 2}", max_length=longest // 2)


def _longest_text(settings: RunSettings) -> int | None:
    """Tokens of the longest row; None where rows are not texts, which --max-length would cut."""
    from peft_engine.train.data import read_rows, tokenize
    from peft_engine.train.models import load_tokenizer

    rows = read_rows(settings.data)
    if rows[0].kind != "text":
        return None
    documents = tokenize(rows, load_tokenizer(settings.model), settings.max_length or 2**31, split_text=True)
    return max(len(document.input_ids) for document in documents)


def _probe(
    settings: RunSettings, tokens: int | None, work: Path, depth: int, deepest: int, changes: list[Lever]
) -> dict[str, Any]:
    def plain(run: RunSettings, tokens: int | None) -> dict[str, Any]:
        return {"settings": dataclasses.asdict(run), "tokens": tokens}

    spec = plain(settings, tokens) | {"folder": str(work / str(depth)), "deepest": deepest}
    spec["changes"] = [plain(lever.settings, lever.tokens) for lever in changes]
    file = work / "probe.json"
    file.write_text(json.dumps(spec, default=str))
    return run_command(["probe", str(file)], "estimate", lambda line: None, work)


def _sum(exact: memory.Exact, depths: tuple[int, ...], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole model's bytes, from those of the small ones."""
    depth = len(exact.layers)

    def whole(of: Callable[[dict[str, Any]], int]) -> int:
        return round(at(depths, [of(one) for one in found], depth))

    def layer(of: Callable[[dict[str, Any]], int]) -> int | None:
        """None where one depth was run, the model's own: what it takes is not told apart by layers."""
        return None if len(depths) == 1 else round(at(depths, [of(one) for one in found], 1, slope=True))

    training, loading = whole(lambda f: f["training"]), whole(lambda f: f["loading"])
    trained = whole(lambda f: f["trainable"])
    weights = sum(exact.weights.values())
    kinds = {
        "imports": found[-1]["before"], "weights": weights,
        "files": max(0, whole(lambda f: f["loaded"] - f["before"]) - weights - trained),
        "adapter": trained, "gradients": trained, "optimiser": memory.ADAM * trained,
        "activations": whole(lambda f: f["kept"]),
    }  # fmt: skip
    kinds["workspace"] = training - sum(kinds.values())
    own = layer(lambda f: f["trainable"])
    if own is None and exact.adapter is not None:
        own = exact.adapter["layers"] // depth
    parts = {
        "a layer": {
            "weights": max(exact.layers), "adapter": own, "gradients": own,
            "optimiser": own and memory.ADAM * own, "activations": layer(lambda f: f["kept"]),
        },
        "embedding": {"weights": exact.weights["embedding"]},
        "head": {"weights": exact.weights["head"]},
    }  # fmt: skip
    return {
        "total": max(training, loading), "training": training, "loading": loading,
        "needed": training - kinds["files"], "kinds": kinds,
        "layers": depth, "parts": parts, "batch": found[-1]["batch"], "share": found[-1]["share"],
        "saved": [round(at(depths, of, depth)) for of in zip(*(f["saved"] for f in found), strict=True)],
    }  # fmt: skip


def at(depths: tuple[int, ...], values: Sequence[int], depth: int, *, slope: bool = False) -> float:
    """The line through the values at the depths, at another depth; or its slope."""
    if len(depths) == 1:
        return values[0]
    rise = (values[-1] - values[0]) / (depths[-1] - depths[0])
    return rise if slope else values[0] + rise * (depth - depths[0])

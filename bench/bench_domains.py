"""Four tasks over one base: suite `domains`.

    python -m bench.runner domains

Sentiment of movie reviews, tweets, product reviews and editorials (Hutto and Gilbert, ICWSM 2014), each
with an adapter of another method on one SmolLM2 in NF4. Beside it every adapter is trained and evaluated on
a model of its own. A switch is `active(model, name)`; a mixed batch has rows of all four.
"""

import json
import random
import tarfile
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.bench_train import small_model
from bench.peers import OURS

DOMAINS = {
    "movies": ("movieReviewSnippets", "lora"),
    "tweets": ("tweets", "prefix"),
    "products": ("amazonReviewSnippets", "bottleneck"),
    "editorials": ("nytEditorialSnippets", "prompt"),
}
RATES = {"lora": 5e-4, "prefix": 1e-2, "bottleneck": 1e-3, "prompt": 1e-1}
EPOCHS = {"prompt": 4.0}  # it has the fewest parameters, and learns slowest
TRAIN, TEST = 240, 200
APART = "a model of its own"


def domains(settings: measure.Settings) -> Iterator[measure.Row]:
    """Accuracy of each adapter on the shared base and alone, of the base, and the time of a switch."""
    import peft_engine as pe
    from peft_engine.train.models import load_base

    if settings.quick:
        yield from _switching(settings, _small(pe), list(DOMAINS))
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    shared = load_base(str(settings.model), quantize="nf4")
    data = {name: _rows(settings.data.parents[1] / "downloads", name) for name in DOMAINS}
    for name, (train, _) in data.items():
        _train(shared, tokenizer, name, train)
    for name, (train, test) in data.items():
        alone = load_base(str(settings.model), quantize="nf4")
        base = _accuracy(alone, tokenizer, test)
        _train(alone, tokenizer, name, train)
        method = DOMAINS[name][1]
        with pe.active(shared, name):
            yield measure.row(
                f"{name}, {method}", OURS, "accuracy", "%", [_accuracy(shared, tokenizer, test)]
            )
        yield measure.row(f"{name}, {method}", APART, "accuracy", "%", [_accuracy(alone, tokenizer, test)])
        yield measure.row(f"{name}, {method}", "the base", "accuracy", "%", [base])
    yield from _switching(settings, shared, list(DOMAINS))


def _switching(settings: measure.Settings, model: Any, names: list[str]) -> Iterator[measure.Row]:
    import peft_engine as pe

    seconds = []
    for turn in range(20 * settings.rounds):
        started = time.perf_counter()
        pe.active(model, names[turn % len(names)])
        seconds.append(time.perf_counter() - started)
    yield measure.row("four adapters on one model", OURS, "switch", "us", (s * 1e6 for s in seconds))


def _small(pe) -> Any:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(small_model(Path(folder)))
    for name, (_, method) in DOMAINS.items():
        pe.attach(model, _config(method), name)
    return model


def _config(method: str) -> Any:
    import peft_engine as pe

    return {
        "lora": lambda: pe.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        "prefix": lambda: pe.PrefixTuningConfig(num_virtual_tokens=16, prefix_init="SAMPLE_VOCAB"),
        "prompt": lambda: pe.PromptTuningConfig(num_virtual_tokens=32, prompt_tuning_init="SAMPLE_VOCAB"),
        "bottleneck": lambda: pe.BottleneckConfig.pfeiffer(),
    }[method]()


def _train(model: Any, tokenizer: Any, name: str, rows: list[Any]) -> None:
    """Attaches the domain's adapter and trains it; the same for a shared model and for one of its own."""
    import peft_engine as pe
    from peft_engine.train import trainer
    from peft_engine.train.data import tokenize
    from peft_engine.train.settings import LoopSettings

    method = DOMAINS[name][1]
    torch.manual_seed(0)
    pe.attach(model, _config(method), name)
    pe.optimize(model)
    loop = LoopSettings(learning_rate=RATES[method], epochs=EPOCHS.get(method, 1.0), seed=0)
    documents = tokenize(rows, tokenizer, 512)
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(model, documents, Path(folder), loop, name=name)


def _accuracy(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    from peft_engine.train.evaluate import evaluate

    return 100 * evaluate(model, tokenizer, rows, task="classify", batch_size=16)["accuracy"]


def _rows(downloads: Path, name: str) -> tuple[list[Any], list[Any]]:
    """Rows to train and to test on: clear ratings (at least 1 from zero), half positive."""
    from peft_engine.train.data import read_rows

    texts: dict[str, list[str]] = {" positive": [], " negative": []}
    for rating, text in _corpus(downloads, DOMAINS[name][0]):
        if abs(rating) >= 1:
            texts[" positive" if rating > 0 else " negative"].append(text)
    rows: tuple[list, list] = ([], [])
    half = (TRAIN // 2, TEST // 2)
    for label, found in texts.items():
        found = sorted(set(found))
        random.Random(0).shuffle(found)
        for into, part in zip(rows, (found[: half[0]], found[half[0] : sum(half)]), strict=True):
            into += [{"prompt": f"Review: {text}\nSentiment:", "completion": label} for text in part]
    out = []
    for part in rows:
        random.Random(0).shuffle(part)
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))
            file.flush()
            out.append(read_rows(file.name))
    return out[0], out[1]


def _corpus(downloads: Path, stem: str) -> list[tuple[float, str]]:
    """(rating, text) of one of the corpus's files."""
    (sdist,) = downloads.glob("*3.3.2.tar.gz")
    with tarfile.open(sdist) as outer:
        inside = outer.extractfile(next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz")))
        assert inside is not None
        with tarfile.open(fileobj=BytesIO(inside.read())) as inner:
            file = inner.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert file is not None
            lines = file.read().decode("latin-1").splitlines()
    fields = (line.split("\t") for line in lines if line.strip())
    return [(float(rating), " ".join(text.split())) for _, rating, text in fields]

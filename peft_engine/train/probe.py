"""Measures the memory of a training's phases in this process, which `estimate` starts for nothing else.

The run is train's own (data, `run.prepare`, the Trainer) on a model of fewer layers with random weights, and
on the micro-batch that will be the largest. What the system counts (VmHWM, which Linux lets a process reset)
is what run.json's peak_rss_bytes is; on a GPU it is the allocator's count, as in peak_gpu_bytes.
"""

import contextlib
import itertools
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_engine.train import method_options as of_method
from peft_engine.train.data import IGNORE, Document, pack, read_rows
from peft_engine.train.models import ModelError, load_config, load_tokenizer
from peft_engine.train.run import NAME, prepare, tokenized
from peft_engine.train.settings import LoopSettings, RunSettings

FIRST = 8  # tokens of a row in the step that makes gradients and the optimiser's states
STEPS = 23  # besides the one of the largest micro-batch; after as many SmolLM2's peak stays where it is
OPERATIONS = 4  # of a token and a weight: two forward, two backward
WORK = 4e12  # operations of all steps, at least one is taken
MOST_WORK = 6e11  # of one step; the rows of a longer one are cut


@dataclass(frozen=True)
class Probe:
    """What to measure: a run, tokens of a row where there is no data, and the folder of the small model.

    deepest: the layers of the deepest of the small models. changes: runs that differ in the data or the loop
    alone.
    """

    settings: RunSettings
    tokens: int | None
    folder: str
    deepest: int
    changes: tuple["Probe", ...] = ()


def read(spec: dict[str, Any], folder: str, deepest: int) -> Probe:
    """A Probe from its JSON."""
    run = dict(spec["settings"])
    loop, options = LoopSettings(**run.pop("loop")), of_method.MethodOptions(**run.pop("options"))
    paths = {name: Path(run[name]) if run[name] else None for name in ("data", "output", "eval_data")}
    settings = RunSettings(**(run | paths), loop=loop, options=options)
    changes = tuple(read(change, folder, deepest) for change in spec.get("changes", ()))
    return Probe(settings, spec["tokens"], folder, deepest, changes)


class InTurn(list[Document]):
    """Documents that are given one after another, whichever index is asked for: no shuffling."""

    def __init__(self, documents: list[Document]):
        super().__init__(documents)
        self.turn = itertools.cycle(documents)

    def __getitem__(self, index: Any) -> Any:
        return next(self.turn)


# --- measuring ----------------------------------------------------------------------------------------------


def measure(what: Probe) -> dict[str, Any]:
    """Bytes of each phase of the run, and how many fewer its training takes with each change."""
    settings = what.settings
    documents = _documents(what)
    from peft_engine.train import trainer

    before = _held()
    _restart()
    model, _ = prepare(settings, None, what.folder)
    found: dict[str, Any] = {"before": before, "loading": _peak(), "loaded": _held()}
    found["trainable"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    collate = trainer.collator(model, lambda line: None)
    batches = _batches(model, documents, settings, packed=collate is pack)
    batch = batches[0]
    found["batch"] = {
        "rows": len(batch),
        "tokens": _run(collate(batch)),
        "labelled": sum(document.labelled for document in batch),
        "packed": collate is pack,
    }
    work = OPERATIONS * found["batch"]["tokens"] * _parameters(model, what.deepest)
    share = found["share"] = min(1.0, MOST_WORK / work)
    if share == 1.0:
        found["training"] = _training(model, batches[: max(1, int(WORK / work))], settings)
        found["kept"] = _kept(model, collate(batch), settings)
    else:  # too long a step: what all of its tokens allocate is told by two parts of them, without noise
        cut, shorter = _cut(batch, share), _cut(batch, share / 2)
        _warm_up(model, batch, settings)
        whole, half = (_allocated(model, rows, settings) for rows in (cut, shorter))
        found["training"] = found["loaded"] + whole + round((whole - half) * (1 - share) / (share / 2))
        found["kept"] = round(_kept(model, collate(cut), settings) / share)
    found["saved"] = []
    if what.changes:
        _warm_up(model, batch, settings)
        allocated = _allocated(model, _cut(batch, share), settings)
    for change in what.changes:
        changed = _batches(model, _documents(change), change.settings, packed=collate is pack)
        less = allocated - _allocated(model, _cut(changed[0], share), change.settings)
        found["saved"].append(round(less / share))
    return found


def _documents(what: Probe) -> list[Document]:
    """The rows of the data as tokens, as `run` makes them; without data, rows of so many tokens."""
    settings = what.settings
    if what.tokens is None:
        return tokenized(settings, read_rows(settings.data))[0]
    with contextlib.suppress(ModelError):  # a config alone will do; where there is a tokenizer, train has it
        load_tokenizer(settings.model)
    size = load_config(what.folder).get_text_config().vocab_size
    ids = [2 + (17 * i) % (size - 2) for i in range(what.tokens)]
    rows = settings.loop.batch_size * settings.loop.gradient_accumulation_steps
    return [Document(ids, [IGNORE, *ids[1:]])] * rows


def _batches(
    model: Any, documents: list[Document], settings: RunSettings, *, packed: bool
) -> list[list[Document]]:
    """Of the micro-batches that train will take, the one with the most tokens, and STEPS others in turn.

    Those of other lengths belong to it: what the allocator leaves between them is a part of the peak.
    """
    from peft_engine.train.trainer import order

    found = [[documents[i] for i in rows] for rows in order(model, documents, settings.loop)]
    found = [batch for batch in found if len(batch) == len(found[0])]
    largest = max(range(len(found)), key=lambda i: _tokens(found[i]) if packed else _padded(found[i]))
    return [found[largest], *(found[:largest] + found[largest + 1 :])[:STEPS]]


def _tokens(batch: list[Document]) -> int:
    return sum(document.tokens for document in batch)


def _padded(batch: list[Document]) -> int:
    return len(batch) * max(document.tokens for document in batch)


def _run(inputs: dict[str, Any]) -> int:
    """The tokens that run, padding and a decoder's included."""
    return sum(t.numel() for name, t in inputs.items() if name in ("input_ids", "decoder_attention_mask"))


def _training(model: Any, batches: list[list[Document]], settings: RunSettings) -> int:
    """The peak of a training on the micro-batches, after a small one that makes the optimiser's states."""
    from peft_engine.train import trainer

    accumulation = min(2, settings.loop.gradient_accumulation_steps)
    first = _cut(batches[0], 0.0)
    turns = [batch for batch in (first, *batches) for _ in range(accumulation)]
    loop = replace(
        settings.loop, max_steps=1 + len(batches), batch_size=len(first), eval_steps=None, save_steps=None,
        gradient_accumulation_steps=accumulation, warmup_ratio=0.0,
    )  # fmt: skip
    documents = InTurn([document for batch in turns for document in batch])
    _restart()
    with tempfile.TemporaryDirectory() as output:
        trainer.train(model, documents, Path(output), loop, name=NAME, say=lambda line: None)
        return _peak()


def _cut(batch: list[Document], share: float) -> list[Document]:
    """The start of each document; of a share of 0, a few tokens."""
    return [_start(document, share) for document in batch]


def _start(document: Document, share: float) -> Document:
    ids, labels = (
        part[: max(FIRST, round(share * len(part)))] for part in (document.input_ids, document.labels)
    )
    if len(ids) == len(document.input_ids):
        return document
    return Document(ids, labels, apart=True) if document.apart else Document(ids, [IGNORE, *ids[1:]])


def _parameters(model: Any, depth: int) -> int:
    """How many numbers the linear layers' weights are in such a model of `depth` layers.

    Of the deepest that is measured, so that all run the same part of their tokens.
    """
    from peft_engine.conv1d import features, is_linear

    linears = [module for module in model.modules() if is_linear(module)]
    head = model.get_output_embeddings()
    inside = sum(math.prod(features(m)) for m in linears if m is not head)
    own = model.config.get_text_config().num_hidden_layers
    return inside * depth // own + sum(math.prod(features(m)) for m in linears if m is head)


def _allocated(model: Any, batch: list[Document], settings: RunSettings) -> int:
    """The most that tensors held in the same training, over what they held before.

    Two trainings of one process differ in this by what they need; in the system's count by what the first
    has left behind, too.
    """
    import torch

    if torch.cuda.is_available():
        return _training(model, [batch], settings) - torch.cuda.memory_allocated()
    with _memory_seen() as seen:
        _training(model, [batch], settings)
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def _warm_up(model: Any, batch: list[Document], settings: RunSettings) -> None:
    """One profile for nothing: of what was there before the first, it does not see the end; the next does."""
    _allocated(model, _cut(batch, 0.0), settings)


def _memory_seen() -> Any:
    """torch's profiler, which sees each tensor's memory come and go."""
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _kept(model: Any, inputs: dict[str, Any], settings: RunSettings) -> int:
    """What a forward leaves for its backward."""
    import torch

    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    model.train()
    if settings.loop.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = None
    try:
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            loss = model(**inputs, use_cache=False).loss
            return torch.cuda.memory_allocated() - before
        with _memory_seen() as seen:
            loss = model(**inputs, use_cache=False).loss
        return sum(event.self_cpu_memory_usage for event in seen.events())
    finally:
        del loss
        if settings.loop.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


# --- what the system says -----------------------------------------------------------------------------------


def _restart() -> None:
    """From here on the peak is counted anew."""
    if _on_cpu():
        Path("/proc/self/clear_refs").write_text("5")
    else:
        _cuda().reset_peak_memory_stats()


def _peak() -> int:
    """The most that was held since `_restart`."""
    return _status("VmHWM") if _on_cpu() else _cuda().max_memory_allocated()


def _held() -> int:
    return _status("VmRSS") if _on_cpu() else _cuda().memory_allocated()


def _on_cpu() -> bool:
    return not _cuda().is_available()


def _cuda() -> Any:
    import torch

    return torch.cuda


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"estimate: /proc/self/status has no {name}; it is measured on Linux only")

"""Training a whole model: suites `train_step`, `finetune`, `memory` and `loss_parity`.

    python -m bench.runner train_step finetune memory loss_parity

PEFT + bitsandbytes is never evaluated here. Memory is measured in fresh processes, each of them this file run
as a module.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.peers import OURS, PEFT_BNB


def small_model(folder: Path) -> Path:
    """A tiny Llama with SmolLM2's kind of layers, saved to `folder`: for quick runs without downloads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Random:
    """Stands in for tokenised rows in quick runs."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(10, 40, (), generator=generator))
        self.input_ids = torch.randint(1, 512, (length,), generator=generator).tolist()
        self.labels = [-100] * (length - 2) + self.input_ids[-2:]


def model_and_rows(settings: measure.Settings, folder: str, count: int) -> tuple[Path, list]:
    """The model's folder and `count` documents."""
    if settings.quick:
        return small_model(Path(folder) / "model"), [Random(i) for i in range(count)]
    return settings.model, peers.documents(settings.model, settings.data, count)


# --- one step --------------------------------------------------------------------------------------------


def train_step(settings: measure.Settings) -> Iterator[measure.Row]:
    """Forward, backward, AdamW on 4x128 tokens, all labelled; r=16 on every linear, adapters fp32."""
    case, tokens, samples = step_seconds(settings, peers.MODELS)
    for name, seconds in samples.items():
        yield measure.row(case, name, "step", "s", seconds)
        yield measure.row(case, name, "rate", "tokens/s", (tokens / s for s in seconds))


def step_seconds(
    settings: measure.Settings, makers: Mapping[str, Callable[..., Any]]
) -> tuple[str, int, dict[str, list[float]]]:
    """What is done in a step, its tokens, and the seconds it took each maker's model."""
    rows, length = (2, 16) if settings.quick else (4, 128)
    with tempfile.TemporaryDirectory() as folder:
        path = small_model(Path(folder)) if settings.quick else settings.model
        contenders = {}
        for name, make in makers.items():
            model = make(path)
            batch = peers.tokens_batch(rows, length, model.config.vocab_size)
            adam = peers.optimizer(model)
            contenders[name] = lambda model=model, adam=adam, batch=batch: peers.step(model, adam, batch)
        samples = measure.interleave(contenders, settings.rounds)
    return f"{rows}x{length} tokens, all labelled", rows * length, samples


# --- the demo's data -------------------------------------------------------------------------------------


def finetune(settings: measure.Settings) -> Iterator[measure.Row]:
    """The same batches of 8 rows to each, ours packed, the peers' padded; padding is not counted."""
    steps = 2 if settings.quick else settings.rounds
    size = 8
    with tempfile.TemporaryDirectory() as folder:
        path, rows = model_and_rows(settings, folder, (steps + 1) * size)
        models = {name: make(path) for name, make in peers.MODELS.items()}
        adams = {name: peers.optimizer(model) for name, model in models.items()}
        samples: dict[str, list[float]] = {name: [] for name in models}
        done: dict[str, list[float]] = {name: [0.0, 0.0] for name in models}
        for turn in range(steps + 1):
            group = rows[turn * size : (turn + 1) * size]
            tokens = sum(len(d.input_ids) for d in group)
            for name in sorted(models, key=lambda name: (list(models).index(name) + turn) % len(models)):
                batch = peers.packed(group) if name == OURS else peers.padded(group)
                started = time.perf_counter()
                peers.step(models[name], adams[name], batch)
                seconds = time.perf_counter() - started
                if turn:  # the first warms up
                    samples[name].append(tokens / seconds)
                    done[name] = [done[name][0] + tokens, done[name][1] + seconds]
        for name, rates in samples.items():
            note = "packed" if name == OURS else "padded"
            case = f"batches of {size} rows"
            yield measure.row(case, name, "each batch", "tokens/s", rates, note)
            yield measure.row(case, name, "all together", "tokens/s", [done[name][0] / done[name][1]], note)


# --- memory ----------------------------------------------------------------------------------------------


def memory(settings: measure.Settings) -> Iterator[measure.Row]:
    """Peak anonymous memory from model load to the last of 5 steps, less the process after its imports."""
    repeats = 1 if settings.quick else 3
    for kind in ("step", "finetune"):
        case = {"step": "4x128 tokens, all labelled", "finetune": "batches of 8 rows of the demo"}[kind]
        peaks: dict[str, list[float]] = {name: [] for name in peers.MODELS}
        for _ in range(repeats):
            for name in peers.MODELS:
                peaks[name].append(fresh_process(name, kind, settings) / 2**20)
        for name, values in peaks.items():
            yield measure.row(case, name, "peak over imports", "MiB", values)


def fresh_process(contender: str, kind: str, settings: measure.Settings) -> int:
    """The peak in bytes that `child` reports from a process of its own."""
    return peak_of("bench_train", contender, kind, int(settings.quick), settings.model, settings.data)


def peak_of(module: str, contender: str, *arguments: Any) -> int:
    """The peak in bytes that a module of bench, run with torch's threads and these, prints as JSON."""
    given = [str(torch.get_num_threads()), contender, *map(str, arguments)]
    command = [sys.executable, "-m", f"bench.{module}", *given]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {contender}: the process failed: ...{done.stderr[-250:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    match = re.search(r"^RssAnon:\s+(\d+) kB", text, re.M)
    assert match is not None
    return int(match.group(1)) * 1024


class Peak:
    """Samples RssAnon every 2 ms while the block runs."""

    def __enter__(self) -> "Peak":
        self.bytes = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, anonymous())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous())


def child(threads: str, contender: str, kind: str, quick: str, model_path: str, data: str) -> None:
    """One contender in this process: prints {"peak": bytes over the process after its imports}."""
    torch.set_num_threads(int(threads))
    settings = measure.Settings(quick=quick == "1", model=Path(model_path), data=Path(data))
    with tempfile.TemporaryDirectory() as folder:
        path, rows = model_and_rows(settings, folder, 40)
        import_for(contender)
        before = anonymous()
        with Peak() as peak:
            model = peers.MODELS[contender](path)
            adam = peers.optimizer(model)
            for turn in range(5):
                if kind == "step":
                    shape = (2, 16) if settings.quick else (4, 128)
                    batch = peers.tokens_batch(*shape, model.config.vocab_size)
                else:
                    group = rows[turn * 8 : (turn + 1) * 8]
                    batch = peers.packed(group) if contender == OURS else peers.padded(group)
                peers.step(model, adam, batch)
    print(json.dumps({"peak": peak.bytes - before}))


def import_for(contender: str) -> None:
    """All that the contender imports to load and train: what it is not charged for."""
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401

    if contender == OURS:
        import peft_engine.loading
        import peft_engine.ops
        import peft_engine.swap
        import peft_engine.train.data  # noqa: F401
    else:
        import peft  # noqa: F401
    if contender == PEFT_BNB:
        import bitsandbytes  # noqa: F401


# --- the same losses -------------------------------------------------------------------------------------


def loss_parity(settings: measure.Settings) -> Iterator[measure.Row]:
    """The first 20 losses in fp32 from the same weights, adapter and data; how far ours are from PEFT's."""
    steps, size = (3, 4) if settings.quick else (20, 8)
    with tempfile.TemporaryDirectory() as folder:
        path, rows = model_and_rows(settings, folder, steps * size)
        groups = [rows[i * size : (i + 1) * size] for i in range(steps)]
        torch.manual_seed(0)
        theirs = peers.peft_bnb_model(path, torch.float32)
        ours = {how: peers.our_model(path, torch.float32) for how in ("packed", "padded")}
        for model in ours.values():
            peers.copy_adapter(theirs, model)
        losses = {PEFT_BNB: losses_of(theirs, [peers.padded(g) for g in groups])}
        losses[OURS] = losses_of(ours["packed"], [peers.packed(g) for g in groups])
        losses[f"{OURS}, padded"] = losses_of(ours["padded"], [peers.padded(g) for g in groups])
    for name, values in losses.items():
        for index, value in enumerate(values):
            yield measure.row(f"step {index + 1}", name, "loss", "nats", [value])
    for name in list(losses)[1:]:
        far = max(abs(a - b) for a, b in zip(losses[name], losses[PEFT_BNB], strict=True))
        yield measure.row(f"all {steps}", name, f"largest distance from {PEFT_BNB}", "nats", [far])


def losses_of(model, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    adam = peers.optimizer(model)
    return [peers.step(model, adam, batch) for batch in batches]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    child(*sys.argv[1:])

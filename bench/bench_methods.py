"""A training step of prefix and prompt tuning on SmolLM2, beside PEFT: suite `methods_step`.

    python -m bench.runner methods_step

Forward, backward, AdamW on 4x128 tokens, 32 virtual tokens, the base frozen and dense: PEFT has the same
base in the same dtype, float32, and bfloat16 where the processor has products in it. Memory is the peak of
anonymous memory of a fresh process from model load to the last of 5 steps, less the same process after its
imports.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.bench_train import Peak, anonymous, import_for, peak_of, small_model
from bench.peers import OURS

PEFT = "PEFT"
METHODS = ("prefix", "prompt")
LENGTH = 32


def dtypes() -> list[torch.dtype]:
    """Those in which this processor is at its best."""
    return [torch.float32, *([torch.bfloat16] if torch.cpu._is_avx512_bf16_supported() else [])]


def model_of(contender: str, method: str, path: Path, dtype: torch.dtype) -> Any:
    """The model with the method's virtual tokens, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    if contender == OURS:
        import peft_engine as pe

        kinds = {"prefix": pe.PrefixTuningConfig, "prompt": pe.PromptTuningConfig}
        pe.attach(model, kinds[method](num_virtual_tokens=LENGTH))
        pe.optimize(model)
        return model.train()
    import peft

    theirs = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[method]
    return peft.get_peft_model(model, theirs(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH)).train()


def methods_step(settings: measure.Settings) -> Iterator[measure.Row]:
    """Seconds of a step, and the peak of memory, for each method and contender."""
    rows, length = (2, 16) if settings.quick else (4, 128)
    with tempfile.TemporaryDirectory() as folder:
        path = small_model(Path(folder)) if settings.quick else settings.model
        for method, dtype in product(METHODS, dtypes()):
            name_of_dtype = str(dtype).removeprefix("torch.")
            contenders = {}
            for name in (OURS, PEFT):
                model = model_of(name, method, path, dtype)
                batch = peers.tokens_batch(rows, length, model.config.vocab_size)
                adam = peers.optimizer(model)
                contenders[name] = lambda model=model, adam=adam, batch=batch: peers.step(model, adam, batch)
            case = f"{method}, {name_of_dtype}, {LENGTH} virtual tokens, {rows}x{length} tokens"
            for name, seconds in measure.interleave(contenders, settings.rounds).items():
                yield measure.row(case, name, "step", "s", seconds)
            del contenders, model, adam
            for name in (OURS, PEFT):
                arguments = (name, method, path, name_of_dtype, rows, length)
                peaks = [peak_of("bench_methods", *arguments) / 2**20 for _ in range(2)]
                yield measure.row(case, name, "peak over imports", "MiB", peaks)


def _child(threads: str, contender: str, method: str, path: str, dtype: str, rows: str, length: str) -> None:
    torch.set_num_threads(int(threads))
    import_for(contender)
    before = anonymous()
    with Peak() as peak:
        model = model_of(contender, method, Path(path), getattr(torch, dtype))
        adam = peers.optimizer(model)
        for _ in range(5):
            peers.step(model, adam, peers.tokens_batch(int(rows), int(length), model.config.vocab_size))
    print(json.dumps({"peak": peak.bytes - before}))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _child(*sys.argv[1:])

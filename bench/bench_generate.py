"""Generation: suite `generate`, greedy, batch 1, with a QLoRA adapter; tokens per second.

    python -m bench.runner generate

Here and in suite `dora` models evaluate: bitsandbytes repacks its weights, which is its fastest mode.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers
from bench.bench_train import small_model


def generate(settings: measure.Settings) -> Iterator[measure.Row]:
    """`model.generate` of transformers on each in bf16, its cache on; the prompt's pass is counted."""
    makers = {name: partial(make, dtype=torch.bfloat16) for name, make in peers.MODELS.items()}
    makers["PEFT bf16"] = makers.pop(peers.PEFT_DENSE)  # of one row torch's product is fast everywhere
    yield from greedy(settings, makers)


def greedy(settings: measure.Settings, makers: Mapping[str, Callable[..., Any]]) -> Iterator[measure.Row]:
    """The suite for any makers of models."""
    new, prompt = (4, 8) if settings.quick else (64, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = small_model(Path(folder)) if settings.quick else settings.model
        models = {name: make(path).eval() for name, make in makers.items()}
        samples: dict[str, list[float]] = {name: [] for name in models}
        ids = peers.tokens_batch(1, prompt, 512)["input_ids"]
        for turn in range(1 + max(2, settings.rounds // 3)):
            for name, model in models.items():
                seconds = timed(model, ids, new)
                if turn:  # the first warms up, and repacks
                    samples[name].append(new / seconds)
        for name, rates in samples.items():
            yield measure.row(f"batch 1, {prompt} + {new} tokens", name, "greedy", "tokens/s", rates)


def timed(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds to generate exactly `new` tokens after `ids`."""
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == ids.shape[1] + new
    return time.perf_counter() - started

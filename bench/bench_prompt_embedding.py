"""prompt_embedding against cat, and a copy of its result: the floor.

python -m bench.runner prompt_embedding
python -m pytest bench/bench_prompt_embedding.py --benchmark-only
"""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure
from peft_engine.ops import prompt_embedding


def by_cat(ids: torch.Tensor, embedding: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """As PEFT has it: the tokens embedded, then copied behind the prompt."""
    first = prompt.to(embedding.dtype).expand(ids.shape[0], *prompt.shape)
    return torch.cat([first, F.embedding(ids, embedding)], dim=1)


def inputs(batch: int, tokens: int, features: int, vocabulary: int = 49152) -> tuple[torch.Tensor, ...]:
    """ids, a bf16 table, and a prompt of 20 in float32."""
    ids = torch.randint(0, vocabulary, (batch, tokens))
    return ids, torch.randn(vocabulary, features).bfloat16(), torch.randn(20, features)


def embedding(settings: measure.Settings) -> Iterator[measure.Row]:
    """The forward, bf16, no gradient: a prompt of 20 before the tokens."""
    shapes = ((2, 8, 64),) if settings.quick else ((4, 128, 576), (64, 128, 576), (8, 512, 2048))
    for batch, tokens, features in shapes:
        arguments = inputs(batch, tokens, features, 512 if settings.quick else 49152)
        y = by_cat(*arguments)
        contenders = {
            "peft-engine": lambda a=arguments: prompt_embedding(*a),
            "cat": lambda a=arguments: by_cat(*a),
            "copy of the result": y.clone,
        }
        for name, seconds in measure.interleave(contenders, settings.rounds).items():
            case = f"{batch} x (20 + {tokens}) x {features}"
            yield measure.row(case, name, "time", "us", (s * 1e6 for s in seconds))


@pytest.mark.parametrize("side", ["peft-engine", "cat", "copy"])
def test_prompt_embedding(benchmark, side):
    arguments = inputs(4, 128, 576)
    y = by_cat(*arguments)
    calls = {"peft-engine": prompt_embedding, "cat": by_cat, "copy": lambda *_: y.clone()}
    benchmark(calls[side], *arguments)

"""The loss head: suite `linear_cross_entropy`, forward and backward, against torch's own product and loss.

python -m bench.runner linear_cross_entropy
python -m pytest bench/bench_linear_cross_entropy.py --benchmark-only
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure


def ours(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from peft_engine.ops import linear_cross_entropy

    return linear_cross_entropy(x, weight, labels)


def torch_logits(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: all logits, cast to float32."""
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def inputs(rows: int, hidden: int, vocabulary: int, labelled: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, hidden, dtype=torch.bfloat16, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, generator=generator) / hidden**0.5
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= labelled] = -100
    labels[0] = 0
    return x, weight, labels


def forward_backward(loss: Callable[..., torch.Tensor], x, weight, labels) -> Callable[[], None]:
    def call() -> None:
        x.grad = None
        loss(x, weight, labels).backward()

    return call


def loss(settings: measure.Settings) -> Iterator[measure.Row]:
    """SmolLM2's head: 512 rows of 576, vocabulary 49,152; all rows labelled, and one in 30 as in the demo."""
    rows, hidden, vocabulary = (32, 64, 512) if settings.quick else (512, 576, 49152)
    for labelled in (1.0, 1 / 30):
        tensors = inputs(rows, hidden, vocabulary, labelled)
        contenders = {
            "peft-engine": forward_backward(ours, *tensors),
            "torch, logits in fp32": forward_backward(torch_logits, *tensors),
        }
        case = f"{rows} rows, {'all' if labelled == 1 else 'one in 30'} labelled"
        for name, seconds in measure.interleave(contenders, settings.rounds).items():
            yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))


@pytest.mark.parametrize("labelled", [1.0, 1 / 30], ids=["all", "one_in_30"])
@pytest.mark.parametrize("loss_of", [ours, torch_logits], ids=["peft_engine", "torch"])
def test_forward_backward(benchmark, loss_of: Callable[..., torch.Tensor], labelled: float):
    benchmark(forward_backward(loss_of, *inputs(128, 576, 8192, labelled)))

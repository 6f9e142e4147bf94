"""linear_cross_entropy on SmolLM2's head (49152 x 576), 512 rows: suite `linear_cross_entropy`, and cases.

    python -m bench.runner linear_cross_entropy
    python -m pytest bench/bench_linear_cross_entropy.py --benchmark-group-by=group

"labelled" is the share of rows with a label: 1 in language modelling, 0.1 where only completions count.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure
from peft_engine import dispatch, native
from peft_engine.ops import linear_cross_entropy

ROWS, VOCABULARY, HIDDEN = 512, 49152, 576


def inputs(
    rows: int, vocabulary: int, hidden: int, labelled: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (rows, hidden) and weight (vocabulary, hidden), bf16; labels (rows,), of which a share counts."""
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16) / hidden**0.5
    labels = torch.randint(0, vocabulary, (rows,))
    labels[torch.randperm(rows)[round(labelled * rows) :]] = -100
    return x, weight, labels


def dense_loss(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: the logits of every row, in float32 for the loss."""
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def on_reference(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with dispatch.force_backend("reference"):
        return linear_cross_entropy(x, weight, labels)


LossOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def loss(settings: measure.Settings) -> Iterator[measure.Row]:
    """Loss and the gradient of x, the head frozen as in QLoRA; then that of the head as well. bf16."""
    rows, vocabulary, hidden = (32, 512, 64) if settings.quick else (ROWS, VOCABULARY, HIDDEN)
    ops: dict[str, LossOp] = {
        "peft-engine": linear_cross_entropy,
        "torch, dense logits": dense_loss,
        "reference": on_reference,
    }
    for trained in ("x", "x and weight"):
        for labelled in (1.0, 0.1):
            x, weight, labels = inputs(rows, vocabulary, hidden, labelled)
            x.requires_grad_()
            weight.requires_grad_(trained == "x and weight")

            def step(op: LossOp, x=x, weight=weight, labels=labels) -> None:
                x.grad = weight.grad = None
                op(x, weight, labels).backward()

            contenders = {name: (lambda op=op, step=step: step(op)) for name, op in ops.items()}
            for name, seconds in measure.interleave(contenders, settings.rounds).items():
                case = f"{rows} rows, {labelled:.0%} labelled, gradient of {trained}"
                yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))


@pytest.mark.parametrize("labelled", [1.0, 0.1])
@pytest.mark.parametrize("gradient", ["none", "x", "x and weight"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_linear_cross_entropy(benchmark, backend, gradient, labelled):
    if backend == "cpu" and native.load_error() is not None:
        pytest.skip(native.load_error())
    x, weight, labels = inputs(ROWS, VOCABULARY, HIDDEN, labelled)
    x.requires_grad_(gradient != "none")
    weight.requires_grad_(gradient == "x and weight")
    benchmark.group = f"gradient of {gradient}, {labelled:.0%} labelled"

    def step():
        x.grad = weight.grad = None
        value = linear_cross_entropy(x, weight, labels)
        if gradient != "none":
            value.backward()

    with dispatch.force_backend(backend):
        benchmark.pedantic(step, rounds=7, warmup_rounds=2)

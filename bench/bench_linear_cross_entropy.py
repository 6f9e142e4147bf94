"""linear_cross_entropy against the reference: SmolLM2's head (49152 x 576), 512 rows, forward and backward.

    python -m pytest bench/bench_linear_cross_entropy.py --benchmark-group-by=group

"labelled" is the share of rows with a label: 1 in language modelling, 0.1 where only completions count.
"""

import pytest
import torch

from peft_engine import dispatch, native
from peft_engine.ops import linear_cross_entropy

pytest.importorskip("pytest_benchmark")

ROWS, VOCABULARY, HIDDEN = 512, 49152, 576


@pytest.mark.parametrize("labelled", [1.0, 0.1])
@pytest.mark.parametrize("gradient", ["none", "x", "x and weight"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_linear_cross_entropy(benchmark, backend, gradient, labelled):
    if backend == "cpu" and native.load_error() is not None:
        pytest.skip(native.load_error())
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=gradient != "none")
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16) / HIDDEN**0.5
    weight.requires_grad_(gradient == "x and weight")
    labels = torch.randint(0, VOCABULARY, (ROWS,)).masked_fill(torch.rand(ROWS) > labelled, -100)
    benchmark.group = f"gradient of {gradient}, {labelled:.0%} labelled"

    def step():
        x.grad = weight.grad = None
        loss = linear_cross_entropy(x, weight, labels)
        if gradient != "none":
            loss.backward()

    with dispatch.force_backend(backend):
        benchmark.pedantic(step, rounds=7, warmup_rounds=2)

"""Many adapters in one batch: pytest-benchmark cases (on a GPU, the suite `gpu` has them too).

python -m pytest bench/bench_lora_groups.py --benchmark-only
"""

import pytest
import torch

from peft_engine.ops.lora_groups import lora_groups, sort_rows
from peft_engine.ops.nf4 import nf4_quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("adapters", [1, 4], ids=["one adapter", "four adapters"])
def test_forward_backward(benchmark, adapters: int):
    q = nf4_quantize(torch.randn(1536, 576, dtype=torch.bfloat16), double_quant=True).to(DEVICE)
    x = torch.randn(8, 64, 576, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    a = torch.randn(adapters, 16, 576, device=DEVICE, requires_grad=True)
    b = torch.randn(adapters, 1536, 16, device=DEVICE, requires_grad=True)
    rows = sort_rows(tuple(i % adapters for i in range(8)), 64, adapters, DEVICE)
    dy = torch.randn(8, 64, 1536, dtype=torch.bfloat16, device=DEVICE)

    def call() -> None:
        x.grad = a.grad = b.grad = None
        lora_groups(x, q, a, b, rows).backward(dy)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)

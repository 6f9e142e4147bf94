"""Many adapters in one batch, in plain torch: each row under its own, and gradients that are the maths' own.

The kernels are tested in tests/kernels/test_lora_groups_triton.py.
"""

import pytest
import torch

from peft_engine.ops.lora_groups import lora_groups, reference, sort_rows
from peft_engine.ops.lora_linear import lora_linear
from peft_engine.ops.nf4 import nf4_quantize

CPU = torch.device("cpu")


@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
def test_each_row_gets_what_its_adapter_alone_gives(nf4):
    weight, bias = torch.randn(24, 64), torch.randn(24)
    weight = nf4_quantize(weight) if nf4 else weight
    a, b = torch.randn(2, 4, 64), torch.randn(2, 24, 4)
    x = torch.randn(4, 3, 64)
    y = lora_groups(x, weight, a, b, sort_rows((1, -1, 0, 1), 3, 2, CPU), bias=bias)
    for entry, adapter in enumerate((1, None, 0, 1)):
        pair = (None, None) if adapter is None else (a[adapter], b[adapter])
        want = lora_linear(x[entry], weight, *pair, 1.0, bias=bias)
        torch.testing.assert_close(y[entry], want)


def test_gradcheck_of_the_reference():
    x, a, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (3, 2, 5), (3, 4, 2))
    )
    weight, rows = torch.randn(4, 5, dtype=torch.float64), sort_rows((2, -1, 0), 2, 3, CPU)
    assert torch.autograd.gradcheck(lambda *args: reference(args[0], weight, *args[1:], rows), (x, a, b))


def test_rows_are_sorted_by_adapter_and_keep_their_order():
    rows = sort_rows((1, -1, 0, 1), 2, 3, CPU)
    assert rows.order.tolist() == [4, 5, 0, 1, 6, 7]
    assert rows.bounds.tolist() == [0, 2, 6, 6]
    with torch.device("meta"):  # the caller's default is not where they go
        assert sort_rows((1, -1, 0, 1), 3, 3, CPU).order.tolist() == [6, 7, 8, 0, 1, 2, 9, 10, 11]
    with pytest.raises(ValueError, match="there are 2 adapters, got number 2 for entry 1"):
        sort_rows((0, 2), 1, 2, CPU)


def test_an_empty_batch_and_one_without_adapters():
    a, b, weight = torch.randn(2, 4, 8), torch.randn(2, 6, 4), torch.randn(6, 8)
    assert lora_groups(torch.randn(0, 8), weight, a, b, sort_rows((), 1, 2, CPU)).shape == (0, 6)
    x = torch.randn(3, 8)
    torch.testing.assert_close(lora_groups(x, weight, a, b, sort_rows((-1,) * 3, 1, 2, CPU)), x @ weight.t())


def test_wrong_shapes_are_named_at_the_door():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    rows = sort_rows((0, 1), 2, 2, CPU)
    with pytest.raises(ValueError, match=r"A must be \(adapters, r, in_features\)=\(G, R, 8\)"):
        lora_groups(x, weight, torch.randn(2, 3, 9), torch.randn(2, 6, 3), rows)
    with pytest.raises(ValueError, match="rows are sorted for 2 adapters, but A and B hold 3"):
        lora_groups(x, weight, torch.randn(3, 3, 8), torch.randn(3, 6, 3), rows)
    with pytest.raises(ValueError, match="4 rows are sorted, but x has 2"):
        lora_groups(x[:2], weight, torch.randn(2, 3, 8), torch.randn(2, 6, 3), rows)


def test_rows_sorted_in_inference_mode_serve_training_afterwards():
    with torch.inference_mode():
        sort_rows((0, 1, 0), 7, 2, CPU)
    rows = sort_rows((0, 1, 0), 7, 2, CPU)
    assert not rows.order.is_inference() and not rows.bounds.is_inference()


def test_autocast_runs_in_its_dtype():
    x, weight = torch.randn(4, 64, requires_grad=True), torch.randn(24, 64)
    a, b = torch.randn(2, 4, 64, requires_grad=True), torch.randn(2, 24, 4, requires_grad=True)
    rows = sort_rows((1, -1, 0, 1), 1, 2, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_groups(x, weight, a, b, rows)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    want = lora_groups(x.bfloat16(), weight.bfloat16(), a, b, rows)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.3)  # the adapters' products are bfloat16's, too
    assert x.grad.dtype == a.grad.dtype == torch.float32

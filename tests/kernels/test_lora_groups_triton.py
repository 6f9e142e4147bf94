"""Many adapters in one batch, in Triton: each row under its own, forward and backward, by the rule of
accuracy.
"""

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.lora_groups.groups import backward, forward
from peft_engine.kernels.lora_linear.adapter import split

from peft_engine.ops.lora_groups import reference, sort_rows
from peft_engine.ops.nf4 import DTYPES, nf4_quantize, reference_dequantize

# adapters of the batch's entries (-1: none), rows of each entry
BATCHES = [
    ((0, 1, 2, 0), 9),
    ((2, -1, 0, -1, 0), 17),
    ((-1, -1), 5),
    ((1,), 70),  # adapters 0 and 2 have no row
    ((0, 0, 1, 1, 2, 2, -1, 0), 1),
]


def make(device, adapters, each, dtype, adapter, nf4, k=128, n=72, rank=12, groups=3):
    generator = torch.Generator().manual_seed(len(adapters) * 31 + each)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    rows = len(adapters) * each
    x, weight, dy = randn(rows, k).to(dtype), randn(n, k).to(dtype), randn(rows, n).to(dtype)
    a, b = (randn(groups, rank, k) / k**0.5).to(adapter), randn(groups, n, rank).to(adapter)
    device = torch.device(device)
    weight = nf4_quantize(weight).to(device) if nf4 else weight.to(device)
    return *(t.to(device) for t in (x, dy, a, b)), weight, sort_rows(adapters, each, groups, device)


def plain(x, dense, a, b, rows, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b)]
    y = reference(leaves[0], dense, *leaves[1:], rows)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("adapters,each", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_own_adapter_forward_and_backward(device, dtype, adapters, each):
    for adapter in {torch.float32, dtype}:
        for nf4 in (True, False):
            x, dy, a, b, weight, rows = make(device, adapters, each, dtype, adapter, nf4)
            base = (
                (weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.blocksize)
                if nf4
                else (weight, None, None, None, 0)
            )
            y, h = forward(x, *base, 72, a, b, *rows, None)
            got = [y, *backward(dy, x, *base, a, b, h, *rows, True)]
            dense = reference_dequantize(weight, torch.float64) if nf4 else weight.double()
            same = plain(x, dense.to(dtype), a, b, rows, dy)
            exact = plain(x.double(), dense, a.double(), b.double(), rows, dy.double())
            sizes = (t.double().abs() for t in (x, dense, a, b))
            terms = plain(*sizes, rows, dy.double().abs())
            for name, *results in zip(("y", "dx", "da", "db"), got, same, exact, terms, strict=True):
                results = [r.cpu() for r in results]
                assert_twice_as_good(*results, f"{name}, adapters {adapters} x {each}, {dtype}, {adapter}")


def test_many_adapters_are_split_in_tiles_of_their_ranks(device):
    """9 x 12 ranks: a tile and a part of one."""
    x, dy, a, b, weight, rows = make(device, (8, 0, 5), 3, torch.bfloat16, torch.float32, False, groups=9)
    base = weight, None, None, None, 0
    y, h = forward(x, *base, 72, a, b, *rows, None)
    got = [y, *backward(dy, x, *base, a, b, h, *rows, True)]
    same = plain(x, weight, a, b, rows, dy)
    exact = plain(x.double(), weight.double(), a.double(), b.double(), rows, dy.double())
    sizes = (t.double().abs() for t in (x, weight, a, b))
    terms = plain(*sizes, rows, dy.double().abs())
    for name, *results in zip(("y", "dx", "da", "db"), got, same, exact, terms, strict=True):
        assert_twice_as_good(*(r.cpu() for r in results), name)


def test_the_terms_of_many_adapters_are_read_where_they_lie(device):
    b = torch.randn(3, 72, 12, device=device)
    there = split(b.transpose(1, 2), torch.bfloat16)
    assert torch.equal(there, split(b.transpose(1, 2).reshape(36, 72), torch.bfloat16))
    assert there.shape == (3, 36, 72)


def test_rows_without_an_adapter_are_the_bases_to_the_bit(device):
    x, _, a, b, weight, rows = make(device, (0, -1, 1), 20, torch.bfloat16, torch.float32, True)
    base = weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.blocksize
    y, _ = forward(x, *base, 72, a, b, *rows, None)
    nothing = sort_rows((-1, -1, -1), 20, 3, torch.device(device))
    alone, _ = forward(x, *base, 72, a, b, *nothing, None)
    assert torch.equal(y[20:40], alone[20:40])
    assert not torch.equal(y[:20], alone[:20])


def test_an_adapter_without_rows_gets_a_gradient_of_zeros(device):
    x, dy, a, b, weight, rows = make(device, (2, -1), 8, torch.float32, torch.float32, False)
    _, h = forward(x, weight, None, None, None, 0, 72, a, b, *rows, None)
    _, da, db = backward(dy, x, weight, None, None, None, 0, a, b, h, *rows, True)
    assert not da[:2].any() and not db[:2].any() and da[2].any() and db[2].any()

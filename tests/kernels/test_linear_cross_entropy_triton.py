"""linear_cross_entropy in Triton: its kernels against the definition, and the whole op as a GPU runs it."""

import importlib
import math

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.linear_cross_entropy.columns import cross_entropy_columns
from peft_engine.kernels.linear_cross_entropy.rows import cross_entropy_rows
from torch.nn import functional as F

from peft_engine.activations import empty_with_spare, with_spare
from peft_engine.ops.nf4 import DTYPES

# The interpreter's; a GPU's are without a word.
pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value encountered"),
]

op = importlib.import_module("peft_engine.ops.linear_cross_entropy")  # the package's name is the function's


def ours(logits, labels, scale, device):
    """The losses, the gradient of rows_kernel and that of columns_kernel, in two ranges."""
    logits, labels, scale = (t.to(device) for t in (logits, labels, scale))
    loss, stats = scale.new_empty(len(labels)), scale.new_empty(len(labels), 2)
    by_columns, alone = logits.clone(), logits.clone()
    cross_entropy_rows(alone, labels, scale, loss, stats, False)
    torch.testing.assert_close(alone, by_columns, rtol=0, atol=0, equal_nan=True)
    cross_entropy_rows(logits, labels, scale, (again := torch.empty_like(loss)), stats, True)
    torch.testing.assert_close(loss, again, rtol=0, atol=0, equal_nan=True)
    middle = logits.shape[1] // 3
    for first, part in ((0, by_columns[:, :middle]), (middle, by_columns[:, middle:])):
        cross_entropy_columns(part, labels, scale, stats, first)
    return [t.cpu() for t in (loss, logits, by_columns)]


def plain(logits, labels, scale, dtype):
    leaf = logits.to(dtype).requires_grad_()
    wide = leaf if dtype == torch.float64 else leaf.float()
    loss = F.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad(loss, leaf, scale.to(loss.dtype))
    return loss.detach(), gradient, gradient


# fewer logits than a turn of the loop takes, several turns, tails
@pytest.mark.parametrize("rows,vocabulary", [(3, 1), (5, 37), (2, 4096), (3, 9001)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_and_gradients_are_within_twice_the_reference_error(device, dtype, rows, vocabulary):
    for magnitude in (1e-3, 1.0, 30.0):
        logits = (magnitude * torch.randn(rows, vocabulary)).to(dtype)
        labels, scale = torch.randint(0, vocabulary, (rows,)), torch.rand(rows)
        got = ours(logits.clone(), labels, scale, device)
        same, exact = plain(logits, labels, scale, dtype), plain(logits, labels, scale, torch.float64)
        sizes = logits.double().abs().amax(1) + math.log(vocabulary), scale[:, None], scale[:, None]
        for name, *results, size in zip(("loss", "rows", "columns"), got, same, exact, sizes, strict=True):
            assert_twice_as_good(*results, size, what=f"{name} {rows}x{vocabulary} {dtype} {magnitude}")


def test_rows_that_lie_apart_are_read_in_place(device):
    logits, labels, scale = torch.randn(3, 90), torch.tensor([0, 5, 59]), torch.ones(3)
    apart = logits.clone().to(device)
    loss, stats = scale.new_empty(3).to(device), scale.new_empty(3, 2).to(device)
    cross_entropy_rows(apart[:, 20:80], labels.to(device), scale.to(device), loss, stats, True)
    want, _, gradient = ours(logits[:, 20:80].contiguous(), labels, scale, device)
    assert torch.equal(loss.cpu(), want) and torch.equal(apart[:, 80:].cpu(), logits[:, 80:])
    assert torch.equal(apart[:, :20].cpu(), logits[:, :20])
    torch.testing.assert_close(apart[:, 20:80].cpu(), gradient)


@pytest.mark.parametrize("rows,vocabulary", [(2, 1), (3, 37), (2, 4101), (2, 9001)])
def test_what_lies_behind_a_row_changes_nothing_and_is_written_where_it_is_nobodys(device, rows, vocabulary):
    logits, labels, scale = (
        torch.randn(rows, vocabulary),
        torch.zeros(rows, dtype=torch.int64),
        torch.ones(rows),
    )
    want, gradient, _ = ours(logits.clone(), labels, scale, device)
    padded = empty_with_spare(rows, vocabulary, -vocabulary % 8, torch.float32, device).copy_(logits)
    whole = padded.as_strided((rows, padded.stride(0)), padded.stride())
    whole[:, vocabulary:] = math.nan
    loss, stats = scale.new_empty(rows).to(device), scale.new_empty(rows, 2).to(device)
    cross_entropy_rows(padded, labels.to(device), scale.to(device), loss, stats, True)
    torch.testing.assert_close(loss.cpu(), want, rtol=0, atol=0)
    torch.testing.assert_close(padded.cpu(), gradient, rtol=0, atol=0)


def test_the_logits_of_every_chunk_lie_in_one_memory_with_rows_at_16_bytes(as_on_a_gpu, monkeypatch):
    monkeypatch.setitem(op.CHUNKS, "cpu", op.Chunks(1 << 20, 4, 8))
    found, rows = [], op._rows_on_gpu
    monkeypatch.setattr(op, "_rows_on_gpu", lambda part, *rest: (found.append(part), rows(part, *rest)))
    x, weight = torch.randn(11, 16).bfloat16().requires_grad_(), torch.randn(37, 16).bfloat16()
    for bias, softcap in ((None, None), (torch.randn(37).bfloat16(), None), (None, 2.0)):
        found.clear()
        labels = torch.arange(11)
        loss = op.linear_cross_entropy(x, weight, labels, bias=bias, softcap=softcap)
        (got,) = torch.autograd.grad(loss, x)
        exact = x.detach().double().requires_grad_()
        wide = None if bias is None else bias.double()
        logits = F.linear(exact, weight.double(), wide)
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        want = F.cross_entropy(logits, labels)
        torch.testing.assert_close(loss.double(), want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got.double(), torch.autograd.grad(want, exact)[0], rtol=3e-2, atol=3e-3)
        assert [len(part) for part in found] == [4, 4, 3]
        assert len({part.data_ptr() for part in found}) == 1
        assert all(part.stride(0) * 2 % 16 == 0 and with_spare(part, 3) is not None for part in found)


def test_logits_of_minus_infinity_have_no_probability_and_nan_stays_nan(device):
    logits = torch.zeros(4, 5000)
    logits[0, 3:4500] = -math.inf
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    loss, gradient, _ = ours(logits, torch.tensor([1, 2, 1, 1]), torch.ones(4), device)
    assert loss[0].item() == pytest.approx(math.log(503), rel=1e-6)
    assert not gradient[0, 3:4500].any() and gradient[0].isfinite().all()
    assert loss[1].isnan() and gradient[1].isnan().all()
    assert loss[2].isnan() and loss[3].item() == pytest.approx(math.log(5000), rel=1e-6)


def test_a_label_outside_of_the_vocabulary_gives_nan_and_reads_nothing(device):
    for wrong in (-1, 40, 1 << 40):
        loss, _, _ = ours(torch.randn(2, 40), torch.tensor([3, wrong]), torch.ones(2), device)
        assert loss[0].isfinite() and loss[1].isnan()

"""rms_norm in Triton against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.rms_norm import forward as module
from peft_engine.kernels.rms_norm.backward import backward
from peft_engine.kernels.rms_norm.forward import forward

from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.rms_norm import reference

EPS = 1e-6
# rows, columns: a row of one, rows that share a program, tails, shares of rows for dw
SHAPES = ((1, 1), (7, 17), (70, 64), (3, 300), (2, 4096), (600, 65))
pytestmark = pytest.mark.usefixtures("nan_filled")


def plain(x, weight, dy, offset):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = reference(x, weight, EPS, offset)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def check(device, rows, columns, dtype, weight_dtype, scale=1.0, offset=0.0):
    generator = torch.Generator().manual_seed(rows * 131 + columns)
    x = (scale * torch.randn(rows, columns, generator=generator)).to(dtype)
    weight = torch.randn(columns, generator=generator).to(weight_dtype)
    dy = torch.randn(rows, columns, generator=generator).to(dtype)
    y, rstd = forward(x.to(device), weight.to(device), EPS, offset)
    got = y, *backward(dy.to(device), x.to(device), weight.to(device), rstd, offset, True, True)
    same, exact = plain(x, weight, dy, offset), plain(x.double(), weight.double(), dy.double(), offset)
    normed = reference(x.double(), torch.ones(columns).double(), EPS, 0.0).abs()
    g = (dy * (weight.double() + offset)).abs()
    inverse = (x.double().pow(2).mean(-1, keepdim=True) + EPS).rsqrt()
    # of a row of one large number next to nothing is left of dx
    terms = (
        exact[0].abs(),
        (g + normed * (g * normed).mean(-1, keepdim=True)) * inverse,
        (dy.abs() * normed).sum(0),
    )
    for name, a, b, c, t in zip(("y", "dx", "dw"), got, same, exact, terms, strict=True):
        assert_twice_as_good(a.cpu(), b, c, t, f"{name} {rows}x{columns} {dtype} {weight_dtype} {scale}")


@pytest.mark.parametrize("rows,columns", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, rows, columns):
    for scale, offset in ((1e-3, 1.0), (1.0, 0.0), (1e2, 0.0)):
        check(device, rows, columns, dtype, dtype, scale, offset)
    check(device, rows, columns, dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_longer_than_a_tile_is_read_twice(device, dtype, monkeypatch):
    monkeypatch.setattr(module, "MOST_COLUMNS", 64)
    for columns in (64, 65, 200):
        check(device, 35, columns, dtype, dtype)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(1, 150), st.sampled_from(DTYPES), st.sampled_from((1e-6, 1e3)))
def test_any_shape_and_magnitude(rows, columns, dtype, scale):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device, rows, columns, dtype, dtype, scale)


def test_rows_do_not_see_each_other(device):
    x, weight = torch.randn(20, 33, device=device), torch.randn(33, device=device)
    x[2] = float("nan")
    y, _ = forward(x, weight, EPS, 0.0)
    assert y[2].isnan().all()
    assert torch.equal(y[3:], forward(x[3:], weight, EPS, 0.0)[0])


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_row_whose_squares_overflow_is_zero_and_not_nan(device):
    x, weight = torch.full((2, 33), 1e30, device=device), torch.ones(33, device=device)
    x[1] = 1.0
    y, rstd = forward(x, weight, EPS, 0.0)
    torch.testing.assert_close(y, reference(x, weight, EPS, 0.0))
    assert rstd[0] == 0.0 and not y[0].any()


def test_without_elements_nothing_is_launched_and_only_what_is_asked_is_computed(device):
    x, weight = torch.empty(0, 5, device=device), torch.ones(5, device=device)
    y, rstd = forward(x, weight, EPS, 0.0)
    dx, dw = backward(x, x, weight, rstd, 0.0, True, True)
    assert y.shape == dx.shape == (0, 5) and not dw.any()
    x = torch.randn(3, 5, device=device)
    y, rstd = forward(x, weight, EPS, 0.0)
    assert [t.numel() for t in backward(y, x, weight, rstd, 0.0, True, False)] == [15, 0]
    assert [t.numel() for t in backward(y, x, weight, rstd, 0.0, False, True)] == [0, 5]

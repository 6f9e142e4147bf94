"""The step from y0 to y of dora_linear in Triton against float64, by the rule of twice."""

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.dora_linear.backward import backward
from peft_engine.kernels.dora_linear.forward import forward

from peft_engine.ops.dora_linear import _scaled
from peft_engine.ops.nf4 import DTYPES

pytestmark = pytest.mark.usefixtures("nan_filled")


def plain(y, magnitude, norm, bias, dy):
    y, magnitude = y.clone().requires_grad_(), magnitude.clone().requires_grad_()
    out = _scaled(y, magnitude, norm, bias)
    return out.detach(), *torch.autograd.grad(out, (y, magnitude), dy)


def check(device, rows, columns, dtype, bias=True, scale=1.0):
    y, dy = (torch.randn(rows, columns).to(dtype) * s for s in (scale, 1.0))
    vectors = torch.randn(columns), torch.rand(columns) + 0.5, torch.randn(columns) if bias else None
    given = [None if t is None else t.to(device) for t in (y, *vectors, dy)]
    got = forward(*given[:4]), *backward(given[4], *given[:3], True)
    same = plain(y, *vectors, dy)
    exact = plain(*(None if t is None else t.double() for t in (y, *vectors, dy)))
    sizes = [None, None, (y.double() * dy.double()).abs().sum(0) / vectors[1]]
    what = f"of {rows}x{columns}, {dtype}, bias={bias}"
    for name, *results in zip(("y", "dy0", "dm"), got, same, exact, sizes, strict=True):
        assert_twice_as_good(results[0].cpu(), *results[1:], f"{name} {what}")


# several row blocks, shares and column blocks, tails of each, nothing
@pytest.mark.parametrize("rows,columns", [(1, 300), (70, 17), (330, 70), (0, 4), (2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, rows, columns):
    for bias, scale in ((True, 1e-6), (False, 1.0)):
        check(device, rows, columns, dtype, bias, scale)


def test_a_norm_of_zero_gives_zero(device):
    y, zero = torch.zeros(3, 5, device=device), torch.zeros(5, device=device)
    assert not forward(y, zero, zero, None).any()
    dy0, dm = backward(torch.ones_like(y), y, zero, zero, True)
    assert not dy0.any() and not dm.any()


def test_a_frozen_magnitude_has_no_gradient(device):
    y, m = torch.randn(40, 70, device=device), torch.rand(70, device=device) + 0.5
    dy0, dm = backward(y, y, m, m, False)
    torch.testing.assert_close(dy0, y)
    assert dm.numel() == 0

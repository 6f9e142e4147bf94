"""bottleneck in Triton: both paths against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.bottleneck import outer, tiles
from peft_engine.kernels.bottleneck.backward import backward
from peft_engine.kernels.bottleneck.forward import forward

from peft_engine.ops.bottleneck import ACTIVATIONS, Norm, reference
from peft_engine.ops.nf4 import DTYPES

EPS = 1e-5
NAMES = ("y", "dx", "ddown", "ddown_bias", "dup", "dup_bias", "dnorm", "dnorm_bias", "dresidual")
ALL = [True] * 7


def ours(x, residual, parameters, dy, activation, scaling):
    """y and the gradients of the kernels, in the order of NAMES; None for what is not there."""
    y, middle, stats = forward(x, residual, *parameters, activation, scaling, EPS)
    wanted = [True, *(t is not None for t in parameters)]
    grads = backward(dy, x, middle, stats, *parameters, activation, scaling, residual is None, wanted)
    return [y, *(g if want else None for g, want in zip(grads, wanted, strict=True))]


def plain(x, residual, parameters, dy, activation, scaling):
    """The same of the reference, by autograd."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, *parameters)]
    x, down, down_bias, up, up_bias, norm_weight, norm_bias = leaves
    norm = None if norm_weight is None else Norm(norm_weight, norm_bias, EPS)
    y = reference(x, residual, down, down_bias, up, up_bias, norm, activation, scaling)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def wide(t):
    return None if t is None else t.double()


def tensors(device, rows, features, width, dtype, *, weight=None, norm=False, biases=True, residual=False,
            scale=1.0, norm_bias=True):  # fmt: skip
    """x, residual, the parameters in the raw ops' order, and dy."""
    generator = torch.Generator().manual_seed(rows * 7 + features * 3 + width)
    weight = dtype if weight is None else weight

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, dy, other = (randn(rows, features) for _ in range(3))
    parameters = (
        (randn(width, features) / features**0.5).to(weight),
        randn(width).to(weight) if biases else None,
        (randn(features, width) / width**0.5).to(weight),
        randn(features).to(weight) if biases else None,
        (1 + 0.3 * randn(features)).to(weight) if norm else None,
        randn(features).to(weight) if norm and norm_bias else None,
    )
    x, other, dy = ((scale * t).to(dtype).to(device) for t in (x, other, dy))
    return x, other if residual else None, [t if t is None else t.to(device) for t in parameters], dy


def check(x, residual, parameters, dy, activation, scaling, what=""):
    got = ours(x, residual, parameters, dy, activation, scaling)
    same = plain(x, residual, parameters, dy, activation, scaling)
    exact = plain(wide(x), wide(residual), [wide(t) for t in parameters], wide(dy), activation, scaling)
    for name, *results in zip(NAMES, got, same, exact, strict=False):
        if results[0] is not None:
            assert_twice_as_good(*(r.cpu() for r in results), what=f"{name}, {what}")


def case(device, rows, features, width, dtype, activation="relu", scaling=1.7, **changes):
    given = tensors(device, rows, features, width, dtype, **changes)
    check(*given, activation, scaling, f"{rows} x {features} x {width}, {dtype}, {activation}, {changes}")


# rows, features, width: tails of every tile, several of each, widths that are no power of two
SHAPES = [(1, 64, 16), (5, 200, 3), (67, 136, 24), (130, 97, 40), (33, 320, 129)]


@pytest.mark.parametrize("path", tiles.PATHS)
@pytest.mark.parametrize("weight", ("own", "float32"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, weight, path):
    if dtype == torch.float32 and weight == "float32":
        pytest.skip("float32 is its own")
    names = list(ACTIVATIONS)
    with tiles.pinned(path):
        for i, (rows, features, width) in enumerate(SHAPES):
            case(
                device, rows, features, width, dtype, names[i % 4], weight=dtype if weight == "own" else torch.float32,
                norm=i % 2 == 1, norm_bias=i != 1, biases=i % 3 != 2, residual=i > 2,
            )  # fmt: skip

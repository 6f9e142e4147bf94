"""bottleneck in Triton: both paths against float64, by the rule of twice the reference's own error."""

import importlib

import pytest
import torch
import triton
import triton.language as tl
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.bottleneck import parts, tiles
from peft_engine.kernels.bottleneck.backward import backward
from peft_engine.kernels.bottleneck.call import Call
from peft_engine.kernels.bottleneck.forward import forward

from peft_engine import dispatch
from peft_engine.ops.bottleneck import ACTIVATIONS, Norm, reference
from peft_engine.ops.nf4 import DTYPES

op = importlib.import_module("peft_engine.ops.bottleneck")  # the package's name is the function's
EPS = 1e-5
NAMES = ("y", "dx", "ddown", "ddown_bias", "dup", "dup_bias", "dnorm", "dnorm_bias", "dresidual")
pytestmark = pytest.mark.usefixtures("nan_filled")


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
    tensors_ = tensors(device, rows, features, width, dtype, **changes)
    check(*tensors_, activation, scaling, f"{rows} x {features} x {width}, {dtype}, {activation}, {changes}")


# rows, features, width: tails of every tile, several of each, widths that are no power of two
SHAPES = [(1, 64, 16), (5, 200, 3), (67, 136, 24), (35, 97, 64)]


@pytest.mark.parametrize("path", tiles.PATHS)
@pytest.mark.parametrize(
    "dtype,weight",
    [*((dtype, dtype) for dtype in DTYPES), *((dtype, torch.float32) for dtype in DTYPES[1:])],
)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, weight, path):
    names = list(ACTIVATIONS)
    with tiles.pinned(path):
        for i, (rows, features, width) in enumerate(SHAPES):
            case(
                device, rows, features, width, dtype, names[(i + DTYPES.index(dtype)) % 4], weight=weight,
                norm=i % 2 == 1, norm_bias=i != 1, biases=i != 2, residual=i > 2,
            )  # fmt: skip


def test_a_middle_too_wide_for_registers_is_split(device):
    """Several blocks of the width; the fused path says why it cannot run."""
    for dtype, weight, width in ((torch.bfloat16,) * 2 + (290,), (torch.bfloat16, torch.float32, 70)):
        case(device, 9, 80, width, dtype, weight=weight, norm=weight == dtype)
        with tiles.pinned("fused"), pytest.raises(ValueError, match=f"width {width} is above"):
            case(device, 9, 80, width, dtype, weight=weight)
    with tiles.pinned("fused"):
        case(device, 5, 40, 256, torch.float16, norm=True)


def test_many_rows_are_fused_and_few_are_split():
    def path(rows, width=64, features=4096, weight=torch.bfloat16):
        _, _, parameters, _ = tensors("cpu", 1, features, width, weight)
        return tiles.choose(rows, Call(*parameters, "relu", 1.0), torch.device("cpu"))

    assert [path(rows) for rows in (1, 8192, 527 * 64, 527 * 64 + 1)] == ["split"] * 3 + ["fused"]
    assert path(65536, width=256) == path(65536, weight=torch.float32) == "fused"
    assert path(65536, width=257) == path(65536, width=65, weight=torch.float32) == "split"
    assert path(65536, features=97) == "split"


def test_shares_of_columns_and_of_rows_are_added(device):
    """Few rows of many columns; more than 128 rows."""
    with tiles.pinned("split"):
        case(device, 3, 1100, 20, torch.bfloat16, "silu", norm=True)
    case(device, 300, 40, 20, torch.bfloat16, "tanh", norm=True)


def test_without_rows_there_is_no_output_and_the_gradients_are_zero(device):
    for path in tiles.PATHS:
        with tiles.pinned(path):
            x, _, parameters, dy = tensors(device, 0, 40, 8, torch.float32, norm=True)
            y, dx, *grads = ours(x, None, parameters, dy, "gelu", 1.0)
            assert y.shape == dx.shape == (0, 40)
            for parameter, grad in zip(parameters, grads, strict=True):
                assert grad.shape == parameter.shape and not grad.any()


def test_a_row_s_result_does_not_depend_on_the_others(device):
    for path in tiles.PATHS:
        with tiles.pinned(path):
            x, _, parameters, dy = tensors(device, 40, 72, 8, torch.bfloat16, norm=True)
            before = ours(x, None, parameters, dy, "silu", 1.0)
            again = ours(x, None, parameters, dy, "silu", 1.0)
            x[:7], x[8:] = x[1:8].clone(), float("inf")
            after = ours(x, None, parameters, dy, "silu", 1.0)
            assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
            assert torch.equal(before[0][7], after[0][7]) and torch.equal(before[1][7], after[1][7])


@pytest.mark.parametrize("path", tiles.PATHS)
def test_only_what_is_wanted_is_given_and_it_is_the_same(device, path):
    x, _, parameters, dy = tensors(device, 20, 48, 8, torch.bfloat16, norm=True)
    with tiles.pinned(path):
        _, middle, stats = forward(x, None, *parameters, "gelu", 0.5, EPS)
        rest = middle, stats, *parameters, "gelu", 0.5, True
        whole = backward(dy, x, *rest, [True] * 7)
        for i in range(7):
            wanted = [n == i for n in range(7)]
            strided = torch.stack((dy, dy), 2)[:, :, 0]
            for n, (got, all_of_it) in enumerate(
                zip(backward(strided, x, *rest, wanted), whole, strict=True)
            ):
                assert torch.equal(got, all_of_it) if n == i else got.numel() == 0, NAMES[1 + n]


def test_a_frozen_adapter_s_gradient_of_x_flows_through_the_door(device, monkeypatch):
    """The op's own autograd over these kernels, where x was not kept."""
    monkeypatch.setattr(dispatch, "direct", lambda x: True)
    x, _, parameters, dy = tensors(device, 6, 48, 8, torch.float32)
    leaves = [x.view(2, 3, 48), *(t for t in parameters if t is not None)]
    for needed in range(5):
        given = [t.clone().requires_grad_(n == needed) for n, t in enumerate(leaves)]
        arguments = given[0], None, *given[1:], None, "tanh", 0.7
        got, same = op._kernels(*arguments), reference(*arguments)
        grads = (torch.autograd.grad(y, given[needed], dy.view(2, 3, 48))[0] for y in (got, same))
        torch.testing.assert_close(*grads)  # the same function: its accuracy is tested above


@triton.jit
def activation_kernel(m, act, derivative, N: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(m + i)
    tl.store(act + i, parts.activated(value, ACTIVATION))
    tl.store(derivative + i, parts.slope(value, ACTIVATION))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_slopes_are_within_twice_torch_s_error(device, name):
    for scale in (1e-6, 1e-3, 0.3, 1.0, 5.0, 30.0, 1e4):
        m = scale * torch.randn(1024, device=device)
        m[:2] = torch.tensor([0.0, scale])
        got = torch.full((2, 1024), float("nan"), device=device)
        activation_kernel[(1,)](m, got[0], got[1], 1024, name)
        results = []
        for dtype in (torch.float32, torch.float64):
            leaf = m.to(dtype).requires_grad_()
            y = ACTIVATIONS[name](leaf)
            results.append((y.detach().cpu(), torch.autograd.grad(y.sum(), leaf)[0].cpu()))
        for ours_, plain_, exact in zip(got.cpu(), *results, strict=True):
            assert_twice_as_good(ours_, plain_, exact, exact.abs(), f"{name} at {scale}")
    nan = torch.full((16,), float("nan"), device=device)
    out = torch.zeros(2, 16, device=device)
    activation_kernel[(1,)](nan, out[0], out[1], 16, name)
    assert out[0].isnan().all()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 70), st.integers(1, 150), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(),
    st.sampled_from(list(ACTIVATIONS)), st.sampled_from((1e-6, 1e-2, 1.0, 1e4)), st.booleans(), st.booleans(),
    st.sampled_from(tiles.PATHS),
)  # fmt: skip
def test_any_shape_and_magnitude(rows, features, width, dtype, own, activation, scale, norm, biases, path):
    if dtype == torch.float16:
        scale = min(max(scale, 1e-2), 1.0)  # beyond, the middle overflows, and products are subnormal
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = dtype if own else torch.float32
    with tiles.pinned("split" if width > 64 and not own else path):
        case(
            device, rows, features, width, dtype, activation, weight=weight, scale=scale, norm=norm,
            biases=biases,
        )  # fmt: skip

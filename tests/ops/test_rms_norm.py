"""rms_norm on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_engine.ops import rms_norm as module
from peft_engine.ops.rms_norm import reference, rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(function, x, weight, dy, *args):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = function(x, weight, *args)
    return (y.detach(), *torch.autograd.grad(y, (x, weight), dy))


def check(rows, n, dtype, weight_dtype, scale, offset):
    generator = torch.Generator().manual_seed(rows * 131 + n)
    x = (torch.randn(rows, n, generator=generator) * scale).to(dtype)
    weight = torch.randn(n, generator=generator).to(weight_dtype)
    dy = torch.randn(rows, n, generator=generator).to(dtype)
    got = run(lambda x, w: rms_norm(x, w, 1e-6, offset=offset), x, weight, dy)
    plain = run(lambda x, w: reference(x, w, 1e-6, offset), x, weight, dy)
    exact = run(lambda x, w: reference(x, w, 1e-6, offset), x.double(), weight.double(), dy.double())
    normed = reference(x.double(), torch.ones(n).double(), 1e-6, 0.0).abs()
    g = (dy * (weight.double() + offset)).abs()
    rstd = (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    # of a row of one large number next to nothing is left of dx
    terms = (
        exact[0].abs(),
        (g + normed * (g * normed).mean(-1, keepdim=True)) * rstd,
        (dy.abs() * normed).sum(0),
    )
    for name, a, b, c, t in zip(("y", "dx", "dw"), got, plain, exact, terms, strict=True):
        assert_twice_as_good(a, b, c, t, f"{name} {rows}x{n} {dtype} scale {scale}")


@pytest.mark.parametrize("offset", (0.0, 1.0))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,n", [(1, 576), (3, 1), (7, 17), (130, 64), (5, 1031)])
def test_output_and_gradients_are_within_twice_the_reference_error(isa, rows, n, dtype, offset):
    for scale in (1e-3, 1.0, 1e2):
        check(rows, n, dtype, dtype, scale, offset)


def test_weight_may_be_float32_beside_a_half_precision_input(isa):
    check(9, 100, torch.bfloat16, torch.float32, 1.0, 0.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 70), st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from((1e-6, 1e4)))
def test_any_shape_and_magnitude(rows, n, dtype, scale):
    if dtype == torch.float16:
        scale = min(scale, 1e3)  # 65504 is the largest float16
    check(rows, n, dtype, dtype, scale, 0.0)


def test_rows_do_not_see_each_other(isa):
    x = torch.randn(4, 33)
    weight = torch.randn(33)
    x[2] = float("nan")
    y = rms_norm(x, weight)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], rms_norm(x[[0, 1, 3]], weight))


def test_strides_do_not_change_the_answer(isa):
    x, weight = torch.randn(6, 5, 40), torch.randn(80)[::2]
    strided = x.transpose(0, 1)
    assert torch.equal(rms_norm(strided, weight), rms_norm(strided.contiguous(), weight.contiguous()))


def test_gradient_of_the_reference_is_exact():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(lambda x, w: reference(x, w, 1e-6, offset), (x, weight))  # noqa: B023


def test_only_the_asked_gradient_is_computed(isa):
    x, weight = torch.randn(3, 20), torch.randn(20, requires_grad=True)
    (dw,) = torch.autograd.grad(rms_norm(x, weight).sum(), (weight,))
    assert dw.shape == weight.shape
    x, weight = torch.randn(3, 20, requires_grad=True), torch.randn(20)
    (dx,) = torch.autograd.grad(rms_norm(x, weight).sum(), (x,))
    assert dx.shape == x.shape


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(module._RmsNorm, "apply", None)
    weight = torch.randn(8, requires_grad=True)
    with torch.no_grad():
        assert rms_norm(torch.randn(1, 8), weight).shape == (1, 8)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \(features,\)=\(8,\).*got \(7,\)"):
        rms_norm(torch.randn(2, 8), torch.randn(7))
    with pytest.raises(TypeError, match=r"rms_norm: x must be float32.*int64"):
        rms_norm(torch.ones(2, 8, dtype=torch.int64), torch.ones(8))


def test_it_traces_whole(isa):
    compiled = torch.compile(lambda x, w: rms_norm(x, w) * 2, fullgraph=True, backend="aot_eager")
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    y = compiled(x, weight)
    assert torch.equal(y, rms_norm(x, weight) * 2)
    got = torch.autograd.grad(y.sum(), (x, weight))
    want = torch.autograd.grad((rms_norm(x, weight) * 2).sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

"""dora_linear on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_engine.ops import dora_linear as public
from peft_engine.ops.dora_linear import _Scale, dora_linear, dora_norm, reference, row_squares
from peft_engine.ops.nf4 import DTYPES, NF4Tensor, nf4_quantize, reference_dequantize

NAMES = ("y", "dx", "da", "db", "dm", "dbias")


def gradients(function, x, a, b, m, bias, dy):
    """The output and every gradient, on copies."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b, m, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(x, weight, a, b, m, bias, dy, scaling=1.7, mask=None, what=""):
    def with_dropout(x):
        return None if mask is None else x * mask.to(x.dtype)

    def ours(x, a, b, m, bias):
        return dora_linear(x, weight, a, b, m, scaling, bias=bias, dropped=with_dropout(x))

    def plain(dtype, change=torch.clone, norm=None):
        dense = reference_dequantize(weight, dtype) if isinstance(weight, NF4Tensor) else weight.to(dtype)
        return lambda x, a, b, m, bias: reference(
            x, change(dense), a, b, m, scaling, bias, with_dropout(x), norm
        )

    arguments = (x, a, b, m, bias, dy)
    wide = [t.double() for t in arguments]
    dense = reference_dequantize(weight, torch.float64) if isinstance(weight, NF4Tensor) else weight.double()
    norm = torch.linalg.vector_norm(dense + scaling * wide[2] @ wide[1], dim=1)
    got, same = gradients(ours, *arguments), gradients(plain(x.dtype), *arguments)
    exact = gradients(plain(torch.float64), *wide)
    terms = gradients(plain(torch.float64, torch.abs, norm), *(t.abs() for t in wide))
    for name, *results in zip(NAMES, got, same, exact, terms, strict=True):
        assert_twice_as_good(*results, f"{name} {what}")


def case(rows, k, n, rank, dtype, *, nf4, adapter=torch.float32, scale=1.0, dropout=False):
    generator = torch.Generator().manual_seed(rows * 7 + k * 3 + n + rank)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, dy = (
        (randn(rows, k) * scale).to(dtype),
        (randn(n, k) / k**0.5).to(dtype),
        randn(rows, n).to(dtype),
    )
    a, b = (randn(rank, k) / k**0.5).to(adapter), (0.2 * randn(n, rank)).to(adapter)
    m = (0.5 + torch.rand(n, generator=generator)).to(adapter)
    mask = 2.0 * (torch.rand(rows, k, generator=generator) < 0.5) if dropout else None
    weight = nf4_quantize(weight, double_quant=True) if nf4 else weight
    what = f"{rows}x{k}x{n}, r={rank}, {dtype}, nf4={nf4}, dropout={dropout}"
    check(x, weight, a, b, m, randn(n).to(dtype), dy, mask=mask, what=what)


def small(rows=3, k=8, n=5, rank=2):
    """x, weight, A, B, magnitude."""
    shapes = (rows, k), (n, k), (rank, k), (n, rank), (n,)
    return [torch.randn(*shape) for shape in shapes]


SHAPES = [(1, 64, 16, 4), (3, 128, 33, 16), (17, 100, 50, 3), (130, 192, 700, 8), (40, 77, 31, 5)]


@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(isa, dtype, nf4):
    for i, (rows, k, n, rank) in enumerate(SHAPES):
        adapter = dtype if i % 3 == 0 else torch.float32
        case(rows, k, n, rank, dtype, nf4=nf4, adapter=adapter, dropout=i % 2 == 1)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 70), st.integers(16, 130), st.integers(1, 200), st.integers(1, 9), st.sampled_from(DTYPES),
    st.booleans(), st.sampled_from((1e-6, 1.0, 100.0)),
)  # fmt: skip
def test_any_shape_and_magnitude(rows, k, n, rank, dtype, nf4, scale):
    case(rows, k, n, rank, dtype, nf4=nf4, scale=scale)


@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_whole_weight(isa, dtype, nf4):
    weight, a, b = torch.randn(70, 192).to(dtype), torch.randn(8, 192), torch.randn(70, 8)
    weight = nf4_quantize(weight) if nf4 else weight
    dense = reference_dequantize(weight, torch.float64) if nf4 else weight.double()
    exact = torch.linalg.vector_norm(dense + 0.3 * b.double() @ a.double(), dim=1)
    got = dora_norm(weight, a, b, 0.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    assert torch.equal(got, dora_norm(weight, a, b, 0.3, squares=row_squares(weight)))
    # An adapter that adds nothing has the norm of W to the bit: it starts as the base.
    assert torch.equal(dora_norm(weight, a, torch.zeros_like(b), 0.3), row_squares(weight).sqrt())


def test_many_rows_are_summed_as_exactly_as_torch_does(isa):
    case(20000, 8, 40, 2, torch.float32, nf4=False)


def test_threads_do_not_change_the_bits(isa):
    y, dy = torch.randn(300, 1000), torch.randn(300, 1000)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            op = torch.ops.peft_engine.dora_linear_backward
            answers.append(op(dy, y, torch.ones(1000), torch.ones(1000), True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_strides_do_not_change_the_answer(isa):
    x, weight, a, b = (
        torch.randn(9, 6).t(),
        torch.randn(33, 18)[:, ::2],
        torch.randn(9, 4).t(),
        torch.randn(4, 33).t(),
    )
    m, norm = torch.rand(66)[::2], torch.rand(66)[::2] + 0.5
    got = dora_linear(x, weight, a, b, m, 1.0, norm=norm)
    same = [t.contiguous() for t in (x, weight, a, b, m)]
    assert torch.equal(got, dora_linear(*same, 1.0, norm=norm.contiguous()))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (2, 3, 8)])
def test_leading_dimensions_and_no_rows(isa, shape):
    x = torch.randn(shape, requires_grad=True)
    a, b, m = torch.randn(2, 8), torch.randn(5, 2), torch.rand(5, requires_grad=True)
    y = dora_linear(x, torch.randn(5, 8), a, b, m, 1.0)
    assert y.shape == (*shape[:-1], 5)
    dx, dm = torch.autograd.grad(y.sum(), (x, m))
    assert dx.shape == x.shape and (x.numel() or not dm.any())


def test_a_row_of_zeros_gives_the_bias_and_no_gradient_of_its_magnitude(isa):
    weight, a, b = torch.randn(4, 8), torch.randn(2, 8), torch.zeros(4, 2)
    weight[1] = 0
    m = row_squares(weight).sqrt().requires_grad_()
    y = dora_linear(torch.randn(3, 8), weight, a, b, m, 1.0, bias=torch.arange(4.0))
    assert (y[:, 1] == 1).all()
    (dm,) = torch.autograd.grad(y.sum(), m)
    assert dm[1] == 0 and dm.isfinite().all()


def test_gradient_of_the_reference_is_exact():
    x, a, b, m, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 6), (2, 6), (5, 2), (5,), (5,))
    )
    weight = torch.randn(5, 6, dtype=torch.float64)
    norm = torch.rand(5, dtype=torch.float64) + 0.5  # the paper's constant; finite differences would move it

    def y(x, a, b, m, bias):
        return reference(x, weight, a, b, m, 0.7, bias, x * 0.5, norm)

    assert torch.autograd.gradcheck(y, (x, a, b, m, bias))


def test_a_frozen_magnitude_keeps_no_product(isa):
    saved = []
    x, weight, a, b = (
        torch.randn(3, 8),
        torch.randn(5, 8),
        torch.randn(2, 8, requires_grad=True),
        torch.randn(5, 2),
    )
    for learns in (True, False):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved[-1].append(t.shape) or t, lambda t: t):
            saved.append([])
            dora_linear(x, weight, a, b, torch.rand(5, requires_grad=learns), 1.0)
    assert (3, 5) in saved[0] and (3, 5) not in saved[1]


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(_Scale, "apply", None)
    with torch.no_grad():
        assert dora_linear(*small(), 1.0).shape == (3, 5)


def test_under_autocast_the_norm_stays_in_float32(isa):
    x, weight, a, b, m = small(k=64, n=48, rank=4)
    for base in (weight, nf4_quantize(weight)):
        plain = dora_norm(base, a, b, 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(dora_norm(base, a, b, 0.5), plain)
            assert dora_linear(x, base, a, b, m, 0.5).dtype == torch.bfloat16


def test_wrong_arguments_are_named():
    x, weight, a, b, m = small()
    with pytest.raises(ValueError, match=r"magnitude must be \(out_features,\)=\(5,\).*got \(4,\)"):
        public(x, weight, a, b, m[:4], 1.0)
    with pytest.raises(ValueError, match=r"dropped must be as x, \(3, 8\).*got \(2, 8\)"):
        public(x, weight, a, b, m, 1.0, dropped=x[:2])
    with pytest.raises(ValueError, match=r"A must be \(r, in_features\)=\(2, 8\), got \(2, 7\)"):
        public(x, weight, a[:, :7], b, m, 1.0, norm=m)


def test_it_traces_whole(isa):
    weight, norm = nf4_quantize(torch.randn(48, 64)), torch.rand(48) + 0.5
    leaves = [torch.randn(*s, requires_grad=True) for s in ((3, 64), (4, 64), (48, 4), (48,))]

    def run(x, a, b, m):
        return F.relu(dora_linear(x, weight, a, b, m, 0.5, norm=norm))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    assert torch.equal(y, run(*leaves))
    want = torch.autograd.grad(run(*leaves).sum(), leaves)
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(y.sum(), leaves), want, strict=True))


def test_a_bias_and_a_norm_that_do_not_fit_are_named():
    x, weight, a, b, m = small()
    for bias in (torch.ones(1), torch.tensor(1.0), torch.ones(10)):
        with pytest.raises(ValueError, match=r"bias must be \(out_features,\)=\(5,\)"):
            public(x, weight, a, b, m, 1.0, bias=bias)
    for norm in (torch.ones(1), torch.ones(5).double(), torch.ones(5).bfloat16()):
        with pytest.raises(ValueError, match=r"norm must be \(out_features,\)=\(5,\) float32"):
            public(x, weight, a, b, m, 1.0, norm=norm)


def test_a_bias_may_lie_apart(isa):
    x, weight, a, b, m = small()
    for bias in (torch.randn(5, 3)[:, 1], torch.randn(1).expand(5)):
        for learns in (False, True):
            bias = bias.detach().requires_grad_(learns)
            got = public(x, weight, a, b, m, 1.0, bias=bias)
            assert torch.equal(got, public(x, weight, a, b, m, 1.0, bias=bias.detach().contiguous()))

"""swiglu on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_engine.ops import swiglu as module
from peft_engine.ops.swiglu import ACTIVATIONS, reference, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def run(function, gate, up, dy, activation):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up, activation)
    return (y.detach(), *torch.autograd.grad(y, (gate, up), dy))


def check(gate, up, dy, what, activation="silu"):
    got, plain = (run(function, gate, up, dy, activation) for function in (swiglu, reference))
    exact = run(reference, gate.double(), up.double(), dy.double(), activation)
    for name, a, b, c in zip(("y", "dgate", "dup"), got, plain, exact, strict=True):
        assert_twice_as_good(a, b, c, what=f"{name} {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@each_activation
@pytest.mark.parametrize("shape", [(1, 1536), (2, 3, 17), (130, 64), (1,), (5, 1031)])
def test_output_and_gradients_are_within_twice_the_reference_error(isa, shape, activation, dtype):
    for scale in (1e-6, 1.0, 30.0):
        gate, up, dy = (torch.randn(shape).to(dtype) * s for s in (scale, 1.0, 1.0))
        check(gate, up, dy, f"{shape} {dtype} {scale}", activation)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(0, 200),
    st.sampled_from(DTYPES),
    st.sampled_from((1e-6, 1.0, 100.0)),
    st.sampled_from(list(ACTIVATIONS)),
)
def test_any_shape_and_magnitude(rows, n, dtype, scale, activation):
    gate, up, dy = (torch.randn(rows, n).to(dtype) * s for s in (scale, 1.0, 1.0))
    check(gate, up, dy, f"{rows}x{n} {dtype} {scale}", activation)


def test_halves_of_one_row_are_read_in_place(isa):
    both = torch.randn(2, 5, 38)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    check(gate, up, torch.randn(2, 5, 19), "chunked")


def test_strides_do_not_change_the_answer(isa):
    gate, up = torch.randn(6, 9).t(), torch.randn(9, 12)[:, ::2]
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    check(gate, up, torch.ones(()).expand(9, 6), "strided")


@each_activation
def test_far_tails_saturate(isa, activation):
    far = torch.tensor([-3e38, -1e15, -1e4, -200.0, 0.0, 88.0, 200.0, 1e4, 1e15, 3e38])
    y, slope, same = run(swiglu, far, torch.ones(10), torch.ones(10), activation)
    assert torch.equal(y, far.clamp(min=0.0)) and torch.equal(same, y)
    assert torch.equal(slope, (far > 0).float() + 0.5 * (far == 0))
    assert swiglu(torch.tensor([float("nan")]), torch.ones(1), activation).isnan().all()


@each_activation
def test_gradient_of_the_reference_is_exact(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: reference(g, u, activation), (gate, up))


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(module._Swiglu, "apply", None)
    with torch.no_grad():
        assert swiglu(torch.randn(1, 8, requires_grad=True), torch.randn(1, 8)).shape == (1, 8)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"swiglu: gate and up must have one shape.*\(2, 8\).*\(2, 7\)"):
        swiglu(torch.randn(2, 8), torch.randn(2, 7))
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, gelu, got 'relu'"):
        swiglu(torch.randn(2, 8), torch.randn(2, 8), "relu")


@pytest.mark.parametrize("number", [-1, 3])
def test_the_raw_op_takes_the_number_of_an_activation_alone(isa, number):
    rows = [torch.randn(2, 8) for _ in range(3)]
    for op, count in ((torch.ops.peft_engine.swiglu_forward, 2), (torch.ops.peft_engine.swiglu_backward, 3)):
        with pytest.raises(RuntimeError, match=f"swiglu: activation must be 0 to 2, got {number}"):
            op(*rows[:count], number)


def test_it_traces_whole(isa):
    compiled = torch.compile(lambda g, u: swiglu(g, u) * 2, fullgraph=True, backend="aot_eager")
    gate, up = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    y = compiled(gate, up)
    assert torch.equal(y, swiglu(gate, up) * 2)
    got = torch.autograd.grad(y.sum(), (gate, up))
    want = torch.autograd.grad((swiglu(gate, up) * 2).sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

"""swiglu in Triton against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.swiglu.backward import backward
from peft_engine.kernels.swiglu.forward import forward

from peft_engine.activations import with_spare
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.swiglu import ACTIVATIONS, reference

# The interpreter's exp; on a GPU it is infinite without a word.
pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]


each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def plain(gate, up, dy, activation):
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    y = reference(gate, up, activation)
    return y.detach(), *torch.autograd.grad(y, (gate, up), dy)


def check(device, gate, up, dy, what, activation="silu"):
    given = [t.to(device) for t in (gate, up, dy)]
    got = forward(*given[:2], activation), *backward(given[2], *given[:2], activation)
    same = plain(gate, up, dy, activation)
    exact = plain(gate.double(), up.double(), dy.double(), activation)
    for name, a, b, c in zip(("y", "dgate", "dup"), got, same, exact, strict=True):
        assert_twice_as_good(a.cpu(), b, c, what=f"{name} {what}")


# several programs of one row, rows that share one, tails
@pytest.mark.parametrize("shape", [(1, 2500), (3, 17), (5, 1024), (0, 4), (2, 0)])
@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, activation, shape):
    for scale in (1e-6, 1.0, 30.0):
        gate, up, dy = (torch.randn(shape).to(dtype) * s for s in (scale, 1.0, 1.0))
        check(device, gate, up, dy, f"{shape} {dtype} {scale}", activation)


@pytest.mark.parametrize("columns", [17, 1500])
def test_halves_of_one_row_are_read_in_place(device, columns):
    gate, up = torch.randn(5, 2 * columns).chunk(2, dim=-1)
    check(device, gate, up, torch.randn(5, columns + 3)[:, :columns], f"halves of {columns}")


@each_activation
def test_far_tails_saturate(device, activation):
    gate = torch.tensor([[-3e38, -1e4, -200.0, 0.0, 88.0, 200.0, 1e4, 3e38]], device=device)
    ones = torch.ones_like(gate)
    y, (slope, _) = forward(gate, ones, activation), backward(ones, gate, ones, activation)
    assert torch.equal(y, gate.clamp(min=0.0))
    assert torch.equal(slope, (gate > 0).float() + 0.5 * (gate == 0))
    assert forward(torch.full_like(gate, float("nan")), ones, activation).isnan().all()


@pytest.mark.parametrize("columns", [17, 1500])
def test_room_behind_the_rows_is_left_and_not_written(device, columns):
    gate, up, dy = (torch.randn(5, columns, device=device) for _ in range(3))
    plain_y, plain_grads = forward(gate, up), backward(dy, gate, up)
    y, (dgate, dup) = forward(gate, up, spare=24), backward(dy, gate, up, spare=(24, 8))
    for got, want, width in ((y, plain_y, 24), (dgate, plain_grads[0], 24), (dup, plain_grads[1], 8)):
        assert torch.equal(got, want)
        wide = with_spare(got, width)
        assert wide.shape == (5, columns + width) and wide[:, columns:].isnan().all()

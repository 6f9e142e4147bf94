"""rotary in Triton against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from peft_engine.kernels.rotary import rotate as module
from peft_engine.kernels.rotary.rotate import rotate

from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.rotary import reference

NAMES = ("q", "k", "dq", "dk")
pytestmark = pytest.mark.usefixtures("nan_filled")


def plain(q, k, cos, sin, dq, dk):
    """The turned q and k and the gradients, by token: (B, T, H, D)."""
    leaves = [t.transpose(1, 2).clone().requires_grad_() for t in (q, k)]
    out = reference(*leaves, cos, sin)
    grads = torch.autograd.grad(out, leaves, (dq.transpose(1, 2), dk.transpose(1, 2)))
    return [t.detach().transpose(1, 2) for t in (*out, *grads)]


def check(device, q, k, cos, sin, what=""):
    dq, dk = torch.randn(q.shape).to(q.dtype), torch.randn(k.shape).to(q.dtype)
    given = q, k, cos, sin, dq, dk
    on = [t.to(device) for t in given]
    got = *rotate(*on[:4], False), *rotate(*on[4:], *on[2:4], True)
    same, exact = plain(*given), plain(*(t.double() for t in given))
    for name, a, b, c in zip(NAMES, got, same, exact, strict=True):
        assert_twice_as_good(a.cpu(), b, c, what=f"{name} {what}")


def angles(batch, tokens, rotated, dtype):
    """cos and sin whose halves differ, so that a kernel that mixes them up is found."""
    phase = torch.randn(batch, tokens, rotated)
    return phase.cos().to(dtype), phase.sin().to(dtype)


# heads that are no power of two, one token, parts of a head, nothing turned
@pytest.mark.parametrize(
    "heads_q,heads_k,tokens,head_dim,rotated",
    [(9, 3, 5, 64, 64), (2, 1, 1, 18, 18), (4, 4, 3, 48, 22), (1, 1, 0, 8, 8), (2, 1, 2, 6, 0)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(
    device, dtype, heads_q, heads_k, tokens, head_dim, rotated
):
    for batch, rows in ((2, 2), (3, 1)):
        q, k = (torch.randn(batch, tokens, h, head_dim).to(dtype) for h in (heads_q, heads_k))
        check(device, q, k, *angles(rows, tokens, rotated, dtype), f"{batch} {rows}")


def test_many_heads_take_several_tiles(device, monkeypatch):
    monkeypatch.setattr(module, "PAIRS", 32)
    q, k = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 5, 16)
    check(device, q, k, *angles(2, 3, 16, torch.float32))


def test_strided_heads_are_read_in_place(device):
    qkv = torch.randn(2, 5, 8, 16)
    check(device, qkv[:, :, :4], qkv[:, :, 4:6], *angles(1, 5, 16, torch.float32))
    q = torch.randn(2, 4, 5, 16).transpose(1, 2)
    check(device, q, q, *angles(1, 5, 16, torch.float32))

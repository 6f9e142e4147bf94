"""rotary on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_engine.ops import rotary as module
from peft_engine.ops.rotary import reference, rotary

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def angles(batch, tokens, rotated, dtype):
    """cos and sin whose halves differ, so that a kernel that mixes them up is found."""
    phase = torch.randn(batch, tokens, rotated)
    return phase.cos().to(dtype), phase.sin().to(dtype)


def run(function, q, k, cos, sin, dq, dk):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = function(q, k, cos, sin)
    return (*(t.detach() for t in out), *torch.autograd.grad(out, (q, k), (dq, dk)))


def check(q, k, cos, sin, what=""):
    dq, dk = torch.randn(q.shape).to(q.dtype), torch.randn(k.shape).to(q.dtype)
    inputs = (q, k, cos, sin, dq, dk)
    got, plain = run(rotary, *inputs), run(reference, *inputs)
    exact = run(reference, *(t.double() for t in inputs))
    for name, a, b, c in zip(("q", "k", "dq", "dk"), got, plain, exact, strict=True):
        assert_twice_as_good(a, b, c, what=f"{name} {what}")


def heads(batch, count, tokens, head_dim, dtype):
    """As a linear leaves them: (B, H, T, D), a view of (B, T, H, D)."""
    return torch.randn(batch, tokens, count, head_dim).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hq,hk,tokens,head_dim,rotated", [(9, 3, 7, 64, 64), (2, 1, 1, 18, 18), (4, 4, 5, 48, 22)]
)
def test_output_and_gradients_are_within_twice_the_reference_error(
    isa, hq, hk, tokens, head_dim, rotated, dtype
):
    for batch, rows in ((2, 2), (3, 1)):
        q, k = heads(batch, hq, tokens, head_dim, dtype), heads(batch, hk, tokens, head_dim, dtype)
        check(q, k, *angles(rows, tokens, rotated, dtype))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 40), st.integers(1, 40), st.sampled_from(DTYPES))
def test_any_shape(batch, count, tokens, half, dtype):
    q, k = heads(batch, count, tokens, 2 * half, dtype), heads(batch, 1, tokens, 2 * half, dtype)
    check(q, k, *angles(1, tokens, 2 * half, dtype))


def test_strides_do_not_change_the_answer(isa):
    qkv = torch.randn(2, 5, (4 + 2 + 2) * 16)
    q, k = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (qkv[..., :64], qkv[..., 64:96]))
    cos, sin = angles(2, 5, 16, torch.float32)
    for a, b in zip(rotary(q, k, cos, sin), rotary(q.contiguous(), k.contiguous(), cos, sin), strict=True):
        assert torch.equal(a, b)
    odd = torch.randn(2, 16, 5, 4).permute(0, 3, 2, 1)
    assert torch.equal(rotary(odd, k, cos, sin)[0], rotary(odd.contiguous(), k, cos, sin)[0])


def test_a_view_of_the_linear_output_stays_one(isa):
    q, k = heads(2, 4, 5, 16, torch.float32), heads(2, 2, 5, 16, torch.float32)
    for out in rotary(q, k, *angles(2, 5, 16, torch.float32)):
        assert out.transpose(1, 2).is_contiguous()


def test_it_equals_transformers(isa):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = heads(2, 4, 5, 16, torch.float64), heads(2, 2, 5, 16, torch.float64)
    cos, sin = angles(2, 5, 16, torch.float64)
    want = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    for a, b in zip(reference(q, k, cos, sin), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_gradient_of_the_reference_is_exact():
    q, k = (torch.randn(1, h, 3, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = angles(1, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: reference(q, k, cos, sin), (q, k))


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(module._Rotary, "apply", None)
    q = heads(1, 2, 1, 8, torch.float32)
    assert rotary(q, q, *angles(1, 1, 8, torch.float32))[0].shape == q.shape


def test_wrong_arguments_are_named():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"rotary: q and k must be .*\(1, 2, 3, 8\) and \(1, 2, 4, 8\)"):
        rotary(q, torch.randn(1, 2, 4, 8), *angles(1, 3, 8, torch.float32))
    with pytest.raises(ValueError, match=r"rotary: cos and sin must be .*\(1, 4, 8\)"):
        rotary(q, q, *angles(1, 4, 8, torch.float32))
    with pytest.raises(TypeError, match=r"rotary: .* one dtype"):
        rotary(q, q, *angles(1, 3, 8, torch.bfloat16))


def test_it_traces_whole(isa):
    def turned(q, k):
        a, b = rotary(q, k, cos, sin)
        return a * 2, b

    q, k = (heads(2, h, 3, 8, torch.float32).requires_grad_() for h in (2, 1))
    cos, sin = angles(2, 3, 8, torch.float32)
    got, want = torch.compile(turned, fullgraph=True, backend="aot_eager")(q, k), turned(q, k)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    weights = [torch.randn(t.shape) for t in want]
    pairs = zip(
        torch.autograd.grad(got, (q, k), weights), torch.autograd.grad(want, (q, k), weights), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)

"""prefix_attention with capped scores, as Gemma 2 has them: values, gradients, and who takes such a call."""

import pytest
import torch
from peft_engine.kernels.prefix_attention import decode
from test_prefix_attention import by_reference, case, check, run

from peft_engine.ops.attention import Intervals
from peft_engine.ops.prefix_attention import (
    PREFIX_ATTENTION,
    PrefixAttentionCall,
    prefix_attention,
    reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = torch.tensor([7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 9, 3, 50, 50, 32, 64),
        (1, 4, 4, 77, 80, 17, 40),
        (24, 6, 2, 1, 131, 5, 80),
        (2, 2, 2, 16, 16, 0, 7),
        (1, 2, 1, 37, 40, 130, 300),
    ],
)
@pytest.mark.parametrize("softcap", [50.0, 1.5])
def test_output_and_gradients_are_within_twice_the_reference_error(isa, shape, dtype, softcap):
    for own, size in ((False, 1.0), (True, 4.0)):
        check(case(*shape, dtype, own, size), f"{size}", is_causal=True, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_masks_what_is_added_and_dropout(isa, dtype):
    tensors = case(2, 6, 3, 33, 41, 6, 48, dtype)
    first = torch.randint(0, 30, (2, 33), dtype=torch.int32)
    intervals = Intervals(first, (first + torch.randint(0, 11, (2, 33))).int())
    bias = torch.randn(1, 6, 33, 41)
    check(tensors, intervals=intervals, softcap=2.0)
    check(tensors, intervals=intervals, position_bias=bias, softcap=2.0)
    check(tensors, is_causal=True, dropout_p=0.3, seed=SEED, softcap=2.0)
    check(case(3, 2, 2, 2, 90, 4, 32, dtype), position_bias=torch.randn(1, 2, 1, 90), softcap=3.0)


def test_scores_far_above_the_cap(isa):
    """All of a row's are the cap or its negative: two values of P, and no gradient of q and k."""
    q, k, v, pk, pv = case(2, 4, 2, 20, 20, 3, 16, size=1000.0)
    out, dq, dk, *_ = run((q, k, v, pk, pv), torch.randn(q.shape), softcap=4.0)
    plain = by_reference(q, k, v, pk, pv, softcap=4.0)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    assert out.isfinite().all() and dq.isfinite().all() and dk.isfinite().all()


def test_a_wide_cap_is_hardly_one_and_a_narrow_one_makes_all_keys_alike(isa):
    tensors = case(2, 4, 2, 30, 30, 5, 32)
    wide = prefix_attention(*tensors, softcap=1e4)
    torch.testing.assert_close(wide, prefix_attention(*tensors), rtol=1e-4, atol=1e-4)
    _, _, v, _, pv = tensors
    mean = torch.cat((pv.expand(2, -1, -1, -1), v), 2).mean(2, keepdim=True).repeat_interleave(2, 1)
    alike = prefix_attention(*tensors, softcap=1e-6)
    torch.testing.assert_close(alike, mean.expand(alike.shape), rtol=1e-4, atol=1e-5)


def test_it_is_capped_before_anything_is_added(backend):
    tensors = case(1, 2, 2, 4, 6, 0, 8, size=3.0)
    q, k, v = tensors[:3]
    bias = torch.randn(1, 2, 4, 6) * 5
    scores = (q @ k.mT * 8**-0.5 / 2.0).tanh() * 2.0 + bias
    got = prefix_attention(*tensors, position_bias=bias, softcap=2.0)
    torch.testing.assert_close(got, scores.softmax(-1) @ v)


def test_the_reference_has_its_derivatives():
    tensors = [t.double().requires_grad_() for t in case(1, 2, 1, 3, 4, 2, 3)]
    masks = (None, None, None, True, 0.5, 0.0, None, 1.3)
    prefixes = [t[None] for t in tensors[3:]]
    assert torch.autograd.gradcheck(
        lambda q, k, v, pk, pv: reference(q, k, v, pk, pv, *masks),
        (*tensors[:3], *(p.detach().requires_grad_() for p in prefixes)),
    )


def test_it_traces_whole(isa):
    tensors = [t.requires_grad_() for t in case(2, 4, 2, 5, 5, 3, 8)]

    def layer(*t):
        return prefix_attention(*t, is_causal=True, softcap=2.0) * 2

    got, want = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors), layer(*tensors)
    assert torch.equal(got, want)
    assert all(map(torch.equal, *(torch.autograd.grad(t.square().sum(), tensors) for t in (got, want))))


def test_on_a_gpu_triton_takes_it_and_few_queries_too():
    call = PrefixAttentionCall("cuda", torch.bfloat16, 64, softcap=True)
    refuse = {entry.name: entry.refuse for entry in PREFIX_ATTENTION._entries}
    assert refuse["cuda"](call) == "its kernel of few queries does not cap scores"
    assert "cap" not in (refuse["triton"](call) or "")
    q, k = case(1, 2, 2, 1, 4, 1, 16, torch.bfloat16)[:2]
    assert decode.refuse_sizes(q, k, None) is None
    assert decode.refuse_sizes(q, k, None, softcap=2.0) == "it does not cap scores"


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_that_is_none_is_refused(softcap):
    with pytest.raises(ValueError, match="softcap must be a number above 0, or None, got"):
        prefix_attention(*case(1, 1, 1, 2, 2, 1, 4), softcap=softcap)


def test_float64_is_the_references():
    tensors = case(1, 2, 2, 4, 4, 1, 16, torch.float64)
    assert torch.equal(prefix_attention(*tensors, softcap=2.0), by_reference(*tensors, softcap=2.0))

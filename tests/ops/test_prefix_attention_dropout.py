"""prefix_attention and attention with dropout: the mask of the hash, on every instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_attention import DTYPES, any_case, by_reference, case, check, run
from torch.utils.checkpoint import checkpoint

from peft_engine import dispatch
from peft_engine.ops.attention import Intervals, attention
from peft_engine.ops.dropout import draw_seed, dropout_mask
from peft_engine.ops.prefix_attention import (
    PREFIX_ATTENTION,
    PrefixAttentionCall,
    prefix_attention,
    reference,
)

SEED = torch.tensor([123456789012345678])


def dropout(p, seed=SEED):
    return {"dropout_p": p, "seed": seed}


# --- against the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 9, 3, 50, 50, 32, 64),
        (1, 4, 4, 77, 80, 17, 40),
        (24, 6, 2, 1, 131, 5, 80),  # few rows: it takes many for a largest error to mean much
        (2, 2, 2, 16, 16, 0, 7),
        (1, 2, 1, 37, 40, 130, 300),
    ],
)
def test_output_and_gradients_are_within_twice_the_reference_error(isa, shape, dtype):
    for own, p in ((False, 0.1), (True, 0.5)):
        check(case(*shape, dtype, own), f"{p}", is_causal=True, **dropout(p))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_intervals_and_biases(data):
    tensors, what, masks = any_case(data.draw)
    check(tensors, what, **masks, **dropout(data.draw(st.sampled_from((0.1, 0.5)))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_a_prefix(isa, causal, dtype):
    *tensors, _, _ = case(2, 6, 2, 40, 70, 0, 24, dtype)
    ends = torch.zeros(2, 40, dtype=torch.int32), torch.full((2, 40), 70, dtype=torch.int32)
    intervals = None if causal else Intervals(*ends)

    def ours(q, k, v):
        return attention(q, k, v, intervals=intervals, **dropout(0.3))

    nothing = (torch.empty(2, 0, 24, dtype=dtype),) * 2
    got = run(tensors, tensors[0], ours)
    want = run((*tensors, *nothing), tensors[0], is_causal=causal, **dropout(0.3))
    assert all(torch.equal(a, b) for a, b in zip(got, want[:4], strict=True))
    with dispatch.force_backend("reference"):
        plain = run(tensors, tensors[0], ours)
        want = run((*tensors, *nothing), tensors[0], is_causal=causal, **dropout(0.3))
    assert all(torch.equal(a, b) for a, b in zip(plain, want[:4], strict=True))


def test_gradient_of_the_reference_is_exact():
    tensors = [t.double().requires_grad_() for t in case(2, 2, 1, 4, 4, 2, 3)]
    tensors = [*tensors[:3], *(t.detach()[None].requires_grad_() for t in tensors[3:])]
    assert torch.autograd.gradcheck(
        lambda *t: reference(*t, None, None, None, True, 0.5, 0.4, SEED), tensors, nondet_tol=0.0
    )


# --- the mask -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [0, 123456789012345678, -3, 2**63 - 2])
def test_what_is_kept_is_the_hash_of_row_and_column(isa, seed, dtype):
    """With [P_v ; V] = identity, out is the dropped softmax itself."""
    batch, queries, prefix, keys = 3, 41, 19, 45
    q, k, _, pk, _ = case(batch, 4, 2, queries, keys, prefix, 64, dtype)
    eye = torch.eye(64, dtype=dtype).expand(batch, 2, 64, 64)
    pv, v = eye[0, :, :prefix], eye[:, :, prefix:]
    seed = torch.tensor([seed])
    whole = prefix_attention(q, k, v, pk, pv).float()
    for p in (0.1, 0.5):
        out = prefix_attention(q, k, v, pk, pv, **dropout(p, seed)).float()
        kept = dropout_mask(seed, batch * 4 * queries, 64, p).view(batch, 4, queries, 64)
        assert torch.equal(out != 0, kept)
        torch.testing.assert_close(out, whole * kept / (1 - p), rtol=2e-2, atol=0)


def test_the_mask_of_a_column_does_not_depend_on_what_is_seen(isa):
    """A window reads the keys from another place on: their columns stay."""
    tensors = case(1, 2, 1, 200, 200, 10, 32)
    got = prefix_attention(*tensors, window=9, **dropout(0.5))
    torch.testing.assert_close(got, by_reference(*tensors, window=9, **dropout(0.5)))


def test_the_mean_over_seeds_is_the_attention_without(isa):
    tensors = case(1, 2, 2, 16, 16, 4, 8)
    outs = [prefix_attention(*tensors, **dropout(0.1, torch.tensor([s]))) for s in range(400)]
    assert not torch.equal(outs[0], outs[1])
    mean, spread = torch.stack(outs).mean(0), torch.stack(outs).std(0)
    assert ((mean - prefix_attention(*tensors)).abs() < 5 * spread / 20).all()


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [2, 40])
def test_a_dropout_of_nothing_is_none(isa, queries, dtype):
    tensors = case(2, 4, 2, queries, 40, 7, 24, dtype)
    for extra in (dropout(0.0), dropout(0.0, None)):
        got = run(tensors, tensors[0], is_causal=True, **extra)
        assert all(map(torch.equal, got, run(tensors, tensors[0], is_causal=True)))


def test_lse_is_that_of_all(isa):
    q, k, v, pk, pv = case(2, 4, 2, 9, 11, 5, 16)
    op = torch.ops.peft_engine.prefix_attention_forward
    rest = q, k, v, pk[None], pv[None], None, None, None, False, 0.25
    torch.testing.assert_close(op(*rest, 0.5, SEED, 0.0)[1], op(*rest, 0.0, None, 0.0)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 20])
def test_threads_do_not_change_the_bits(isa, prefix, dtype):
    tensors = case(3, 4, 1, 300, 300, prefix, 16, dtype)
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(run(tensors, tensors[0], is_causal=True, **dropout(0.1)))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *answers))


def test_a_checkpoint_drops_the_same_again(isa):
    tensors = [t.requires_grad_() for t in case(2, 4, 2, 20, 20, 5, 16)]

    def layer(*t):
        return prefix_attention(*t, is_causal=True, **dropout(0.3, draw_seed(0.3, t[0].device)))

    grads = []
    for go in (layer, lambda *t: checkpoint(layer, *t, use_reentrant=False)):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(go(*tensors).square().sum(), tensors))
    assert all(map(torch.equal, *grads))


def test_the_backward_keeps_the_seed_beside_its_inputs(isa):
    """No mask."""
    tensors, kept = case(2, 4, 2, 9, 9, 3, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        prefix_attention(*(t.detach().requires_grad_() for t in tensors), **dropout(0.1))
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.data_ptr() for t in (*tensors, SEED)}


# --- tracing and the door -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_traces_whole(isa, dtype):
    tensors = [t.requires_grad_() for t in case(2, 4, 2, 5, 5, 3, 8, dtype)]

    def layer(*t):
        return prefix_attention(*t, window=3, **dropout(0.3)) * 2

    got, want = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors), layer(*tensors)
    assert torch.equal(got, want)
    assert all(map(torch.equal, *(torch.autograd.grad(t.square().sum(), tensors) for t in (got, want))))


@pytest.mark.parametrize("p,softcap", [(0.0, 0.0), (0.3, 0.0), (0.3, 5.0)])
def test_opcheck_of_the_raw_ops(p, softcap):
    q, k, v, pk, pv = case(2, 4, 2, 5, 5, 3, 8)
    ops, inputs = torch.ops.peft_engine, (q, k, v, pk[None], pv[None])
    rest = None, None, None, True, 0.3, p, SEED if p else None, softcap
    torch.library.opcheck(ops.prefix_attention_forward.default, (*inputs, *rest))
    torch.library.opcheck(ops.prefix_attention_backward.default, (q, *inputs, None, None, *rest))


def test_on_a_gpu_the_triton_kernels_take_it_and_that_of_few_queries_does_not():
    call = PrefixAttentionCall("cuda", torch.bfloat16, 64, dropout=True)
    refuse = {entry.name: entry.refuse for entry in PREFIX_ATTENTION._entries}
    assert refuse["triton"](call) is None
    assert refuse["cuda"](call) == "its kernel of few queries has no dropout"


def test_the_door_says_what_does_not_fit():
    tensors = case(1, 2, 2, 3, 3, 1, 4)
    for wrong, says in (
        (dropout(1.0), r"dropout_p must be in \[0, 1\), got 1.0"),
        (dropout(-0.1), r"dropout_p must be in \[0, 1\)"),
        (dropout(0.1, None), "dropout needs seed, an int64 tensor of one element"),
        (dropout(0.1, torch.zeros(2, dtype=torch.int64)), "dropout needs seed"),
        (dropout(0.1, torch.zeros(1)), "dropout needs seed"),
        (dropout(0.1, SEED.to("meta")), "q is on cpu and seed on meta; draw it on q's device"),
    ):
        with pytest.raises(ValueError, match=f"prefix_attention: {says}"):
            prefix_attention(*tensors, **wrong)
        with pytest.raises(ValueError, match=f"^attention: {says}"):
            attention(*tensors[:3], **wrong)

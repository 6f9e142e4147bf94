"""prompt_embedding against cat, bit for bit: nothing is computed but roundings and the sum over the batch."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.prompt_embedding import extend_inputs, prompt_embedding, reference


def by_cat(ids, embedding, prompt):
    """The definition."""
    first = prompt.to(embedding.dtype).expand(ids.shape[0], *prompt.shape)
    return torch.cat([first, F.embedding(ids, embedding)], dim=1)


def case(batch, tokens, length, features, dtype, prompt_dtype, scale=1.0):
    torch.manual_seed(batch * 31 + tokens * 7 + length)
    ids = torch.randint(0, 11, (batch, tokens))
    embedding = (torch.randn(11, features) * scale).to(dtype)
    return ids, embedding, (torch.randn(length, features) * scale).to(prompt_dtype)


def check(ids, embedding, prompt):
    embedding, prompt = (t.detach().clone().requires_grad_() for t in (embedding, prompt))
    y = prompt_embedding(ids, embedding, prompt)
    assert torch.equal(y, by_cat(ids, embedding, prompt))
    dy = torch.randn(y.shape).to(y.dtype)
    got = torch.autograd.grad(y, (embedding, prompt), dy)
    plain = torch.autograd.grad(by_cat(ids, embedding, prompt), (embedding, prompt), dy)
    wide = [t.detach().double().requires_grad_() for t in (embedding, prompt)]
    exact = torch.autograd.grad(by_cat(ids, *wide), wide, dy.double())
    terms = torch.autograd.grad(by_cat(ids, *wide), wide, dy.double().abs())
    for name, *results in zip(("dembedding", "dprompt"), got, plain, exact, terms, strict=True):
        assert_twice_as_good(*results, f"{name}, ids {tuple(ids.shape)}, prompt {tuple(prompt.shape)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch,tokens,length", [(1, 1, 1), (3, 7, 5), (2, 0, 4), (0, 3, 2), (4, 6, 0), (2, 0, 0)]
)
def test_values_and_gradients(batch, tokens, length, dtype):
    for prompt_dtype in (dtype, torch.float32):
        check(*case(batch, tokens, length, 17, dtype, prompt_dtype))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.integers(1, 40), st.sampled_from(DTYPES),
    st.sampled_from((1e-6, 1.0, 1e4)),
)  # fmt: skip
def test_any_shape_and_magnitude(batch, tokens, length, features, dtype, scale):
    check(*case(batch, tokens, length, features, dtype, torch.float32, scale))


def test_strides_and_int32_do_not_matter():
    ids, embedding, prompt = case(6, 8, 4, 10, torch.float32, torch.float32)
    want = by_cat(ids.t()[::2], embedding[:, ::2], prompt.t()[::2].t())
    got = prompt_embedding(ids.t()[::2].int(), embedding[:, ::2], prompt.t()[::2].t())
    assert torch.equal(got, want)


def test_the_sum_over_the_batch_is_in_float32():
    """1 and 4096 times 2^-8 in bfloat16: added in bfloat16, the small ones would be lost."""
    ids = torch.zeros(4097, 0, dtype=torch.int64)
    prompt = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.full((4097, 1, 1), 2.0**-8, dtype=torch.bfloat16)
    dy[0] = 1.0
    (got,) = torch.autograd.grad(prompt_embedding(ids, torch.zeros(3, 1).bfloat16(), prompt), prompt, dy)
    assert got.item() == 17.0


def test_a_frozen_embedding_gets_no_gradient_and_keeps_no_ids():
    ids, embedding, prompt = case(2, 3, 4, 5, torch.float32, torch.float32)
    y = prompt_embedding(ids, embedding, prompt.requires_grad_())
    assert [t for t in y.grad_fn.saved_tensors if t is not None] == []
    y.sum().backward()
    assert embedding.grad is None and torch.equal(prompt.grad, torch.full_like(prompt, 2.0))


def test_without_gradient_no_autograd_node_is_made():
    ids, embedding, prompt = case(2, 3, 4, 5, torch.float32, torch.float32)
    with torch.no_grad():
        assert not prompt_embedding(ids, embedding, prompt.requires_grad_()).requires_grad


def test_gradcheck_of_the_reference():
    ids = torch.randint(0, 5, (3, 4))
    embedding, prompt = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda e, p: reference(ids, e, p), (embedding, prompt))


def test_traces_in_one_graph():
    ids, embedding, prompt = case(3, 4, 2, 8, torch.float32, torch.float32)
    prompt.requires_grad_()
    compiled = torch.compile(
        lambda ids, prompt: prompt_embedding(ids, embedding, prompt) * 2, fullgraph=True, backend="aot_eager"
    )
    y = compiled(ids, prompt)
    assert torch.equal(y, by_cat(ids, embedding, prompt) * 2)
    (got,) = torch.autograd.grad(y.sum(), prompt)
    assert torch.equal(got, torch.full_like(prompt, 6.0))


@pytest.mark.parametrize("bad", (-1, 11, 2**40))
def test_an_id_outside_the_vocabulary_is_named(bad):
    ids, embedding, prompt = case(2, 3, 4, 5, torch.float32, torch.float32)
    ids[1, 1] = bad
    with pytest.raises(IndexError, match=rf"prompt_embedding: id {bad} is outside the vocabulary of 11;"):
        prompt_embedding(ids, embedding, prompt)


def test_wrong_arguments_are_named():
    ids, embedding, prompt = case(2, 3, 4, 5, torch.float32, torch.float32)
    with pytest.raises(
        ValueError, match=r"input_ids must be int64 or int32 \(batch, tokens\), got torch.float32"
    ):
        prompt_embedding(ids.float(), embedding, prompt)
    with pytest.raises(ValueError, match=r"input_ids must be .* got torch.int64 \(6,\)"):
        prompt_embedding(ids.view(-1), embedding, prompt)
    with pytest.raises(
        ValueError, match=r"prompt must be \(length, features\)=\(length, 5\).*got \(4, 4\); was it"
    ):
        prompt_embedding(ids, embedding, prompt[:, :4])
    with pytest.raises(ValueError, match=r"embedding must be \(vocabulary, features\), got \(5,\)"):
        prompt_embedding(ids, embedding[0], prompt)
    with pytest.raises(
        TypeError, match=r"prompt of its dtype or float32, got torch.float32 and torch.float16; cast"
    ):
        prompt_embedding(ids, embedding, prompt.half())
    with pytest.raises(ValueError, match=r"embedding is on meta and input_ids on cpu; move"):
        prompt_embedding(ids, embedding.to("meta"), prompt)
    with dispatch.force_backend("cpu"), pytest.raises(dispatch.BackendError, match="no kernel for this op"):
        prompt_embedding(ids, embedding, prompt)


def test_inputs_are_extended():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    positions = torch.tensor([[0, 0, 1], [0, 1, 2]])
    labels = torch.tensor([[-100, 4, 5], [6, 7, 8]])
    got = extend_inputs(2, attention_mask=mask, position_ids=positions, labels=labels, token_type_ids=mask)
    assert {name: t.tolist() for name, t in got.items()} == {
        "attention_mask": [[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 2, 3], [0, 1, 2, 3, 4]],
        "labels": [[-100, -100, -100, 4, 5], [-100, -100, 6, 7, 8]],
        "token_type_ids": [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
    }
    assert all(t.dtype == torch.int64 for t in got.values())
    assert list(extend_inputs(2, labels=labels)) == ["labels"]
    assert extend_inputs(2) == {}
    assert extend_inputs(2, attention_mask=mask.bool())["attention_mask"].dtype == torch.bool
    assert torch.equal(extend_inputs(0, attention_mask=mask)["attention_mask"], mask)


def test_a_mask_with_a_row_for_every_query_is_extended():
    causal = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 1, 3, 3).clone()
    causal[1, :, :, 0] = False  # padding on the left
    wide = extend_inputs(2, attention_mask=causal)["attention_mask"]
    assert wide[0, 0].tolist() == torch.ones(5, 5).tril().bool().tolist()
    assert wide[1, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    both = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    both[..., 2] = False
    wide = extend_inputs(1, attention_mask=both, is_causal=False)["attention_mask"]
    assert wide[0, 0].int().tolist() == [[1, 1, 1, 0]] * 4
    for mask, is_causal in ((causal, True), (both, False)):
        least = torch.finfo(torch.bfloat16).min
        added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, least)
        want = extend_inputs(2, attention_mask=mask, is_causal=is_causal)["attention_mask"]
        got = extend_inputs(2, attention_mask=added, is_causal=is_causal)["attention_mask"]
        assert torch.equal(got, torch.zeros(want.shape, dtype=torch.bfloat16).masked_fill(~want, least))


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"extend_inputs: labels must be \(batch, tokens\), got \(2,\)"):
        extend_inputs(2, labels=torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"attention_mask must be .* or \(batch, heads, tokens, tokens\), got"
    ):
        extend_inputs(2, attention_mask=torch.zeros(2, 1, 1, 4))

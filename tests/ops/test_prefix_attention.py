"""prefix_attention on every instruction set against float64, by the rule of twice the reference's error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from bench.bench_prefix_attention import extra_bytes
from peft_engine import dispatch
from peft_engine.ops import prefix_attention as exported
from peft_engine.ops.attention import Intervals, mask_from_intervals
from peft_engine.ops.dropout import dropout_mask
from peft_engine.ops.prefix_attention import prefix_attention, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")


def heads(batch, count, tokens, head_dim, dtype=torch.float32, scale=1.0):
    """As a linear leaves them: (B, H, T, D), a view of (B, T, H, D)."""
    return (torch.randn(batch, tokens, count, head_dim) * scale).to(dtype).transpose(1, 2)


def case(
    batch, hq, hk, queries, keys, prefix, head_dim, dtype=torch.float32, own=False, size=1.0, stored=None
):
    """q, k, v, prefix_k, prefix_v; own: a prefix for each row of the batch; stored: the prefix's dtype."""
    q = heads(batch, hq, queries, head_dim, dtype, size)
    k, v = (heads(batch, hk, keys, head_dim, dtype, s) for s in (size, 1.0))
    shape = (*((batch,) if own else ()), hk, prefix, head_dim)
    learned = ((torch.randn(shape) * s).to(stored or dtype) for s in (size, 1.0))
    return (q, k, v, *learned)


def run(tensors, dout, function=prefix_attention, **masks):
    """out and the five gradients."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors, **masks)
    return (out.detach(), *torch.autograd.grad(out, tensors, dout))


def by_reference(*tensors, **masks):
    with dispatch.force_backend("reference"):
        return prefix_attention(*tensors, **masks)


def terms(tensors, dout, seen, bias, dropped=1.0, softcap=None):
    """The magnitudes added up to each result: of dS = P (dP - sum(P dP)) little may be left.

    dropped: what dropout multiplies P by.
    """
    q, k, v, pk, pv, dout = (t.double() for t in (*tensors, dout))
    batch, repeats, prefix, scale = q.shape[0], q.shape[1] // k.shape[1], pk.shape[-2], q.shape[-1] ** -0.5
    shared = pk.dim() == 3
    k, v = (
        torch.cat((p.expand(batch, -1, -1, -1), t), 2).repeat_interleave(repeats, 1)
        for p, t in ((pk, k), (pv, v))
    )
    scores, slope = q @ k.mT * scale, 1.0
    if softcap is not None:
        capped = (scores / softcap).tanh()
        scores, slope = capped * softcap, 1.0 - capped.square()
    if bias is not None:
        scores = scores + F.pad(bias.double(), (prefix, 0))
    p = scores.masked_fill(~F.pad(seen, (prefix, 0), value=True), float("-inf")).softmax(-1).nan_to_num(0)
    dp = dout.abs() @ v.abs().mT * dropped
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * slope * scale
    p = p * dropped
    dk, dv = (t.unflatten(1, (-1, repeats)).sum(2) for t in (ds.mT @ q.abs(), p.mT @ dout.abs()))
    dpk, dpv = (t[:, :, :prefix].sum(0) if shared else t[:, :, :prefix] for t in (dk, dv))
    return p @ v.abs(), ds @ k.abs(), dk[:, :, prefix:], dv[:, :, prefix:], dpk, dpv


def check(tensors, what="", **masks):
    q, k = tensors[:2]
    dout = torch.randn(q.shape).to(q.dtype)
    seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
    if masks.get("is_causal"):
        seen = mask_from_intervals(q, k.shape[2], None)
    if masks.get("intervals") is not None:
        seen = mask_from_intervals(q, k.shape[2], masks["intervals"])
    bias = masks.get("position_bias")
    got = run(tensors, dout, **masks)
    plain = run(tensors, dout, by_reference, **masks)
    # What the prefix rounds to is the input; its rounding is not the kernels' error.
    wide = [t.to(q.dtype).double() for t in tensors]
    exact_masks = masks | ({} if bias is None else {"position_bias": bias.double()})
    exact = run(wide, dout.double(), by_reference, **exact_masks)
    dropped, p = 1.0, masks.get("dropout_p", 0.0)
    if p > 0.0:
        columns = tensors[3].shape[-2] + k.shape[2]
        kept = dropout_mask(masks["seed"], q.shape[:3].numel(), columns, p)
        dropped = kept.view(*q.shape[:3], columns) / (1.0 - p)
    sizes = terms(wide, dout, seen, bias, dropped, masks.get("softcap"))
    for name, *results in zip(NAMES, got, plain, exact, sizes, strict=True):
        assert results[0].isfinite().all(), f"{name} {what}"
        assert_twice_as_good(*results, f"{name} {what}")


# --- against the reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 9, 3, 50, 50, 32, 64),
        (2, 2, 1, 1, 1, 1, 1),
        (1, 4, 4, 77, 80, 17, 40),
        (24, 6, 2, 1, 131, 5, 80),  # few rows: it takes many for a largest error to mean much
        (2, 2, 2, 16, 16, 0, 7),
        (1, 2, 1, 37, 40, 130, 300),
    ],
)
def test_causal_output_and_gradients_are_within_twice_the_reference_error(isa, shape, dtype):
    for own, size in ((False, 1.0), (True, 4.0)):
        check(case(*shape, dtype, own, size), f"{size}", is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 100.0])
def test_magnitudes(isa, size, dtype):
    if size == 100.0 and dtype == torch.float16:
        size = 10.0
    check(case(2, 4, 2, 20, 20, 9, 32, dtype, size=size), f"{size}", is_causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_prefix_and_no_real_keys(isa, dtype):
    check(case(2, 4, 2, 3, 30, 1000, 16, dtype))
    check(case(2, 4, 2, 3, 0, 9, 16, dtype))


def any_case(draw):
    """Tensors, intervals and a bias, or not, and a name for them."""
    batch, queries, keys = (draw(st.integers(low, high)) for low, high in ((0, 3), (0, 40), (0, 60)))
    group, kv_heads, head_dim = (draw(st.integers(1, high)) for high in (3, 2, 40))
    dtype, own = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    stored = draw(st.sampled_from((dtype, torch.float32)))
    prefix = draw(st.sampled_from((0, 1, 7, 33)))
    tensors = case(
        batch, group * kv_heads, kv_heads, queries, keys, prefix, head_dim, dtype, own, 1.0, stored
    )
    masks = {}
    if draw(st.booleans()):
        ends = torch.randint(0, keys + 1, (2, batch, queries), dtype=torch.int32)
        masks["intervals"] = Intervals(ends.amin(0), ends.amax(0))
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from((1, n))) for n in (batch, group * kv_heads, queries)]
        masks["position_bias"] = torch.randn(*sizes, keys).to(draw(st.sampled_from((dtype, torch.float32))))
    return tensors, f"{batch} {queries}x{keys} {prefix}", masks


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_intervals_and_biases(data):
    tensors, what, masks = any_case(data.draw)
    check(tensors, what, **masks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_all_kinds_equal_the_explicit_one(isa, dtype):
    tokens, ends = 40, torch.tensor([0, 3, 3, 30, 40], dtype=torch.int32)
    tensors = case(1, 4, 2, tokens, tokens, 6, 16, dtype)
    key, query = torch.arange(tokens), torch.arange(tokens)[:, None]
    document = torch.tensor([0] * 3 + [1] * 27 + [2] * 10)
    together = document[:, None] == document
    for masks, seen in (
        ({"is_causal": True}, key <= query),
        ({"window": 5}, (key <= query) & (key > query - 5)),
        ({"cu_seqlens": ends}, together),
        ({"cu_seqlens": ends, "window": 4}, together & (key <= query) & (key > query - 4)),
        ({"attn_mask": (together & (key <= query))[None, None]}, together & (key <= query)),
    ):
        added = torch.zeros(tokens, tokens, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
        got = prefix_attention(*tensors, **masks)
        wide = [t.double() for t in tensors]
        exact = by_reference(*wide, attn_mask=added.double())
        assert_twice_as_good(got, by_reference(*tensors, attn_mask=added), exact, exact.abs() + 1, f"{masks}")
        holed = seen & (torch.rand(tokens, tokens) > 0.3)
        mask = holed[None, None].expand(1, 4, tokens, tokens)
        exact = by_reference(*wide, attn_mask=mask)
        assert_twice_as_good(
            prefix_attention(*tensors, attn_mask=mask),
            by_reference(*tensors, attn_mask=mask),
            exact,
            exact.abs() + 1,
        )


def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient(isa):
    tensors = case(1, 2, 2, 5, 5, 0, 8)
    first, last = torch.zeros(1, 5, dtype=torch.int32), torch.tensor([[0, 0, 3, 4, 5]], dtype=torch.int32)
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :2, :] = float("-inf")
    for masks in ({"intervals": Intervals(first, last)}, {"position_bias": mask}):
        out, dq, *others = run(tensors, torch.ones(1, 2, 5, 8), **masks)
        assert out[:, :, :2].abs().max() == 0 and dq[:, :, :2].abs().max() == 0
        assert out[:, :, 2:].abs().min() > 0
        assert all(t.isfinite().all() for t in (out, dq, *others))
        nothing = masks | {"first": None}
        lse = raw_lse(tensors, masks.get("intervals"), masks.get("position_bias"))
        assert (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all(), nothing


def test_nothing_is_read_behind_the_keys(isa):
    """What an earlier call left in the scratch: NaN, which zero weights do not take away."""
    nothing = torch.empty(1, 0, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # one scratch
        left = [torch.full((1, 1, 64, 64), torch.nan) for _ in range(3)]
        run((*left, nothing, nothing), left[0], window=64)
        tensors = case(1, 1, 1, 64, 64, 0, 16)
        results = run(tensors, tensors[0], window=20)
    finally:
        torch.set_num_threads(before)
    assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_read_no_keys_that_none_of_them_sees(isa, dtype):
    """As in a static cache, most of which is empty: here NaN."""
    q, k, v, pk, pv = case(1, 4, 2, 2, 1100, 5, 40, dtype)
    ends = (torch.tensor([at], dtype=torch.int32) for at in ([290, 280], [300, 500]))
    masks = {"intervals": Intervals(*ends), "position_bias": torch.randn(1, 4, 1, 1100)}
    want = prefix_attention(q, k, v, pk, pv, **masks)
    for t in (k, v):
        t[:, :, :272] = t[:, :, 512:] = torch.nan
    assert torch.equal(prefix_attention(q, k, v, pk, pv, **masks), want)


def raw_lse(tensors, intervals, bias):
    q, k, v, pk, pv = tensors
    first, last = intervals or (None, None)
    bias = None if bias is None else bias.expand(*q.shape[:3], k.shape[2])
    op = torch.ops.peft_engine.prefix_attention_forward
    return op(q, k, v, pk[None], pv[None], first, last, bias, False, q.shape[-1] ** -0.5, 0.0, None, 0.0)[1]


def test_lse_is_the_log_of_the_sum(isa):
    q, k, v, pk, pv = case(2, 4, 2, 9, 11, 5, 16)
    keys = torch.cat((pk.expand(2, -1, -1, -1), k), 2).double().repeat_interleave(2, 1)
    want = (q.double() @ keys.mT / 4).logsumexp(-1)
    assert (raw_lse((q, k, v, pk, pv), None, None) - want).abs().max() < 4 * torch.finfo(
        torch.float32
    ).eps * 8


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 70])
def test_a_row_of_the_batch_is_the_same_bits_whatever_stands_beside_it(isa, queries, dtype):
    """And whether its prefix is shared or its own."""
    tensors = case(5, 6, 2, queries, 70, 19, 24, dtype, own=True)
    dout = torch.randn(tensors[0].shape).to(dtype)
    first = torch.randint(0, 30, (5, queries), dtype=torch.int32)
    masks = {"intervals": Intervals(first, first + 40), "position_bias": torch.randn(1, 6, queries, 70)}
    together = run(tensors, dout, **masks)
    for i in range(5):
        one = {**masks, "intervals": Intervals(first[i : i + 1], first[i : i + 1] + 40)}
        alone = run([t[i : i + 1] for t in tensors], dout[i : i + 1], **one)
        shared = run(
            [*(t[i : i + 1] for t in tensors[:3]), *(t[i] for t in tensors[3:])], dout[i : i + 1], **one
        )
        for name, a, b, c in zip(NAMES, together, alone, shared, strict=True):
            assert torch.equal(a[i : i + 1], b), f"{name} of row {i}"
            assert torch.equal(a[i], c.reshape(a[i].shape)), f"{name} of row {i}, prefix shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("queries", [1, 300, 900])
def test_threads_do_not_change_the_bits(isa, queries, prefix, dtype):
    keys = max(300, queries)
    tensors = case(3, 4, 1, queries, keys, prefix, 16, dtype)
    at = torch.arange(keys - queries, keys)
    document = torch.tensor([0, 10, 200, 210, 250])  # of unlike work
    first = document[torch.searchsorted(document, at, right=True) - 1]
    ends = Intervals(*(t.int().expand(3, queries).contiguous() for t in (first, at + 1)))
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            answers.append(run(tensors, tensors[0], is_causal=True))
            answers[-1] += run(tensors, tensors[0], intervals=ends)
            with torch.no_grad():
                answers[-1] += (prefix_attention(*tensors, is_causal=True),)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_strides_do_not_change_the_bits(isa):
    q, k, v = (torch.randn(2, 8, 2, 5).permute(0, 2, 3, 1) for _ in range(3))
    pk, pv = (torch.randn(8, 2, 3).permute(1, 2, 0) for _ in range(2))
    bias = torch.randn(5, 5, 2).permute(2, 0, 1)[None]
    parts = (q, k, v, pk, pv)
    got = run(parts, q, is_causal=True, position_bias=bias)
    want = run([t.contiguous() for t in parts], q, is_causal=True, position_bias=bias.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    wide = torch.randn(2, 5, 6 * 8).unflatten(-1, (6, 8)).transpose(1, 2)
    parts = (*wide.split(2, dim=1), pk, pv)
    assert torch.equal(prefix_attention(*parts), prefix_attention(*(t.contiguous() for t in parts)))


# --- the rest -----------------------------------------------------------------------------------------------


def test_memory_beside_the_results_does_not_grow_with_the_batch(isa):
    """What is allocated through torch is out, lse and the gradients, whatever the batch."""

    def allocated(batch):
        tensors = [t.detach().requires_grad_() for t in case(batch, 4, 2, 64, 64, 512, 32)]
        lse = batch * 4 * 64 * 4
        return extra_bytes(lambda *t: prefix_attention(*t, is_causal=True), tensors) - lse

    assert allocated(32) <= allocated(1) + 4096


def test_the_backward_keeps_its_inputs_alone(isa):
    """Not out: with adapters on q and v only, nothing else would keep it."""
    tensors, kept = case(2, 4, 2, 9, 9, 3, 8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        prefix_attention(*(t.detach().requires_grad_() for t in tensors), is_causal=True)
    assert {t.untyped_storage().data_ptr() for t in kept} == {t.data_ptr() for t in tensors}


def test_gradient_of_the_reference_is_exact():
    for prefix, own in ((2, False), (2, True), (0, False)):
        tensors = [t.double().requires_grad_() for t in case(2, 2, 1, 4, 4, prefix, 3, own=own)]
        first = torch.tensor([[0, 0, 1, 2]] * 2, dtype=torch.int32)
        ends = first, torch.tensor([[0, 2, 3, 4]] * 2, dtype=torch.int32)
        bias = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *a, e=ends: reference(*a[:5], *e, a[5], False, 0.5), (
            *tensors[:3], *(t if own else t[None] for t in tensors[3:]), bias))  # fmt: skip


def test_it_is_sdpa_over_what_is_concatenated(backend):
    q, k, v, pk, pv = case(2, 4, 2, 6, 9, 3, 8)
    k2, v2 = (torch.cat((p.expand(2, -1, -1, -1), t), 2) for p, t in ((pk, k), (pv, v)))
    mask = F.pad(torch.ones(6, 9, dtype=torch.bool).tril(3), (3, 0), value=True)
    want = F.scaled_dot_product_attention(q, k2, v2, attn_mask=mask, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(exported(q, k, v, pk, pv, is_causal=True, scale=0.3), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_traces_whole(isa, dtype):
    tensors = [t.requires_grad_() for t in case(2, 4, 2, 5, 5, 3, 8, dtype)]
    compiled = torch.compile(
        lambda *t: prefix_attention(*t, window=3) * 2, fullgraph=True, backend="aot_eager"
    )
    got, want = compiled(*tensors), prefix_attention(*tensors, window=3) * 2
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), tensors) for t in (got, want)), strict=True):
        assert torch.equal(a, b)

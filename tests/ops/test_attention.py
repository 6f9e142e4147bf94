"""attention on every instruction set against float64, by the rule of twice the reference's own error."""

import importlib

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_engine.ops.attention import Intervals, attention, intervals_from_mask, kept_intervals, reference

module = importlib.import_module("peft_engine.ops.attention")  # not the function
prefix_attention = importlib.import_module("peft_engine.ops.prefix_attention")  # not the function
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heads(batch, count, tokens, head_dim, dtype, scale=1.0):
    """As a linear leaves them: (B, H, T, D), a view of (B, T, H, D)."""
    return (torch.randn(batch, tokens, count, head_dim) * scale).to(dtype).transpose(1, 2)


def run(function, q, k, v, dout, intervals):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = function(q, k, v, intervals)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def terms(q, k, v, dout, intervals, scale):
    """The magnitudes added up to out, dq, dk and dv: of dS = P (dP - sum(P dP)) little may be left."""
    queries, keys, repeats = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q, k, v, dout = (t.double() for t in (q, k, v, dout))
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    first, last = torch.zeros(queries), torch.arange(queries) + keys - queries + 1
    if intervals is not None:
        first, last = (t[:, None] for t in intervals)
    key = torch.arange(keys)
    seen = (key >= first[..., None]) & (key < last[..., None])
    p = (q @ k.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    dp = dout.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = (t.unflatten(1, (-1, repeats)).sum(2) for t in (ds.mT @ q.abs(), p.mT @ dout.abs()))
    return p @ v.abs(), ds @ k.abs(), dk, dv


def check(q, k, v, intervals=None, what=""):
    dout = torch.randn(q.shape).to(q.dtype)
    scale = q.shape[-1] ** -0.5
    got = run(lambda q, k, v, i: attention(q, k, v, intervals=i), q, k, v, dout, intervals)
    plain = run(lambda *a: reference(*a, scale), q, k, v, dout, intervals)
    exact = run(lambda *a: reference(*a, scale), *(t.double() for t in (q, k, v, dout)), intervals)
    sizes = terms(q, k, v, dout, intervals, scale)
    for name, *results in zip(("out", "dq", "dk", "dv"), got, plain, exact, sizes, strict=True):
        assert_twice_as_good(*results, f"{name} {what}")


def packed(lengths, batch=1):
    """Documents of these lengths, back to back in a row."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    total = int(starts[-1])
    first = starts[:-1].repeat_interleave(torch.tensor(lengths))
    last = torch.arange(1, total + 1)
    return Intervals(*(t.int().expand(batch, total).contiguous() for t in (first, last)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "hq,hk,tokens,head_dim", [(9, 3, 50, 64), (2, 1, 1, 18), (4, 4, 77, 40), (2, 2, 16, 7)]
)
def test_causal_output_and_gradients_are_within_twice_the_reference_error(
    isa, hq, hk, tokens, head_dim, dtype
):
    for scale in (0.1, 1.0, 4.0):
        q, k = heads(2, hq, tokens, head_dim, dtype, scale), heads(2, hk, tokens, head_dim, dtype, scale)
        check(q, k, heads(2, hk, tokens, head_dim, dtype), what=f"{scale}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_documents_equal_each_document_alone(isa, dtype):
    lengths = [1, 30, 3, 47, 16, 200, 2]
    q, k, v = (heads(1, h, sum(lengths), 32, dtype) for h in (4, 2, 2))
    check(q, k, v, packed(lengths))
    together = attention(q, k, v, intervals=packed(lengths)).split(lengths, dim=2)
    for a, b, c, got in zip(*(t.split(lengths, dim=2) for t in (q, k, v)), together, strict=True):
        assert_twice_as_good(
            got, attention(a, b, c), reference(a.double(), b.double(), c.double(), None, 32**-0.5)
        )


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_intervals(data):
    batch, queries, keys = (data.draw(st.integers(low, high)) for low, high in ((0, 2), (0, 60), (0, 60)))
    group, kv_heads, head_dim = (data.draw(st.integers(1, high)) for high in (3, 2, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    ends = torch.randint(0, keys + 1, (2, batch, queries))
    kind = data.draw(st.sampled_from(("any", "window", "nothing")))
    if kind == "window":
        ends = torch.stack((torch.arange(queries) - 5, torch.arange(queries) + 1)).clamp(0, keys)
        ends = ends[:, None].expand(2, batch, queries)
    elif kind == "nothing":
        ends = torch.zeros_like(ends)
    intervals = Intervals(*(t.int().contiguous() for t in (ends.amin(0), ends.amax(0))))
    q = heads(batch, group * kv_heads, queries, head_dim, dtype)
    k, v = (heads(batch, kv_heads, keys, head_dim, dtype) for _ in range(2))
    check(q, k, v, intervals, f"{kind} {queries}x{keys}")


def test_the_last_query_sees_the_last_key(isa):
    q, k, v = heads(2, 4, 3, 16, torch.float32), *(heads(2, 2, 11, 16, torch.float32) for _ in range(2))
    check(q, k, v)
    full = attention(torch.cat((torch.randn(2, 4, 8, 16), q), 2), k, v)
    torch.testing.assert_close(attention(q, k, v), full[:, :, 8:])


def test_a_query_that_sees_nothing_gives_zero_and_takes_no_gradient(isa):
    q, k, v = (heads(1, 2, 5, 8, torch.float32).requires_grad_() for _ in range(3))
    first, last = torch.zeros(1, 5, dtype=torch.int32), torch.tensor([[0, 0, 3, 4, 5]], dtype=torch.int32)
    out = attention(q, k, v, intervals=Intervals(first, last))
    assert out[:, :, :2].abs().max() == 0
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq[:, :, :2].abs().max() == 0
    assert all(t.isfinite().all() for t in (dq, dk, dv))


def test_keys_that_nobody_sees_take_no_gradient_and_their_nan_stays_out(isa):
    q, k, v = (heads(1, 2, 6, 8, torch.float32) for _ in range(3))
    first, last = torch.full((1, 6), 2, dtype=torch.int32), torch.full((1, 6), 4, dtype=torch.int32)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    dk, dv = torch.autograd.grad(attention(q, k, v, intervals=Intervals(first, last)).sum(), (k, v))
    for t in (dk, dv):
        assert t[:, :, [0, 1, 4, 5]].abs().max() == 0


def test_strides_do_not_change_the_answer(isa):
    q, k, v = (torch.randn(2, 8, 2, 5).permute(0, 2, 3, 1) for _ in range(3))
    dense = [t.contiguous() for t in (q, k, v)]
    assert torch.equal(attention(q, k, v), attention(*dense))
    wide = torch.randn(2, 5, 3 * 2 * 8).unflatten(-1, (6, 8)).transpose(1, 2)
    parts = wide.split(2, dim=1)
    assert torch.equal(attention(*parts), attention(*(t.contiguous() for t in parts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_answer(isa, dtype):
    q, k, v = (heads(2, h, 300, 16, dtype) for h in (4, 2, 2))
    before = torch.get_num_threads()
    answers = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        answers.append(run(lambda q, k, v, i: attention(q, k, v), q, k, v, q, None))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_a_mask_of_intervals_is_recognised():
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    block = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    for rows in (causal, causal & block, causal & (torch.arange(6) >= 2), causal.triu(-2)):
        found = intervals_from_mask(rows[None, None])
        key = torch.arange(6)
        assert found is not None
        assert torch.equal((key >= found.first[0, :, None]) & (key < found.last[0, :, None]), rows)
    holed = causal.clone()
    holed[4, 2] = False
    assert intervals_from_mask(holed[None, None]) is None
    assert intervals_from_mask(causal[None, None].float()) is None


def test_one_interval_for_all_rows_or_all_queries_is_spread(backend):
    q = heads(2, 2, 6, 8, torch.float32)
    for rows, queries in ((1, 6), (2, 1), (1, 1)):
        first, last = (torch.randint(low, low + 3, (rows, queries), dtype=torch.int32) for low in (0, 3))
        spread = Intervals(*(t.expand(2, 6).contiguous() for t in (first, last)))
        got, want = (attention(q, q, q, intervals=i) for i in (Intervals(first, last), spread))
        assert torch.equal(got, want)


def test_a_mask_is_not_read_while_a_graph_is_captured(monkeypatch):
    """What was kept of its values before is not used either: the graph may run with others."""
    q, k, v = (heads(1, 2, 6, 8, torch.float32) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    prefix = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    want = prefix_attention.prefix_attention(q, k, v, *prefix, attn_mask=mask)
    kept = kept_intervals(mask)
    with monkeypatch.context() as patch:
        patch.setattr(module, "is_readable", lambda mask: False)
        patch.setattr(torch, "equal", None)  # waits for the device
        assert kept_intervals(mask) is None and intervals_from_mask(mask) is None
        assert kept_intervals(mask.clone()) is None
        got = prefix_attention.prefix_attention(q, k, v, *prefix, attn_mask=mask)
    torch.testing.assert_close(got, want)
    assert kept_intervals(mask) is kept


def test_gradient_of_the_reference_is_exact():
    q, k, v = (torch.randn(1, h, 4, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *a: reference(*a, packed([1, 3]), 0.5), (q, k, v))


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(prefix_attention._PrefixAttention, "apply", None)
    for dtype in DTYPES:
        q = heads(1, 2, 3, 8, dtype)
        assert attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_are_within_twice_the_reference_error(isa, dtype):
    check(*(heads(1, h, 391, 16, dtype) for h in (2, 1, 1)))


def test_wrong_arguments_are_named():
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(
        ValueError, match=r"attention: query heads must be a multiple of key heads, got 3 and 2"
    ):
        attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match=r"attention: causal needs as many keys as queries, got 2 and 4"):
        attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match=r"attention: intervals.first must be int32"):
        attention(q, q, q, intervals=Intervals(torch.zeros(1, 4), torch.ones(1, 4)))


def test_it_traces_whole(isa):
    q, k, v = (heads(2, h, 5, 8, torch.float32).requires_grad_() for h in (4, 2, 2))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    got, want = compiled(q, k, v), attention(q, k, v) * 2
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    pairs = zip(*(torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix_dtypes", [None, (torch.float32, torch.float32), (torch.float32, "half")])
def test_under_autocast_heads_of_two_dtypes_are_taken_as_torch_takes_them(dtype, prefix_dtypes):
    """Rotary and norms leave q and k in float32 there, beside v in half precision."""
    q, k = heads(2, 4, 5, 8, torch.float32), heads(2, 2, 5, 8, torch.float32)
    v = heads(2, 2, 5, 8, dtype)
    halves = q.to(dtype), k.to(dtype), v
    prefix = ()
    if prefix_dtypes is not None:
        prefix = tuple(torch.randn(2, 3, 8).to(dtype if d == "half" else d) for d in prefix_dtypes)
    mixed = any(t.dtype == dtype for t in prefix)

    def attend(*tensors):
        q, k, v, *prefix = tensors
        if prefix:
            return prefix_attention.prefix_attention(q, k, v, *prefix, is_causal=True)
        return attention(q, k, v)

    with pytest.raises(TypeError, match="must have one dtype"):
        attend(q, k, v, *prefix)
    with torch.autocast("cpu", dtype=dtype):
        found = attend(q, k, v, *prefix)
    assert found.dtype == dtype
    assert torch.equal(found, attend(*halves, *(t.to(dtype) if mixed else t for t in prefix)))

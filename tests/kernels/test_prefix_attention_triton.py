"""prefix_attention in Triton against float64, by the rule of twice the reference's own error."""

import contextlib

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.prefix_attention import dkv, parts, tiles
from peft_engine.kernels.prefix_attention.backward import backward
from peft_engine.kernels.prefix_attention.call import Call
from peft_engine.kernels.prefix_attention.forward import forward

from peft_engine.kernels.tiles import setting
from peft_engine.ops.dropout import dropout_mask
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.prefix_attention import reference

NAMES = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
NOTHING = (None, None, None, False)  # first, last, bias, causal
CAUSAL = (None, None, None, True)
pytestmark = pytest.mark.usefixtures("nan_filled")


@contextlib.contextmanager
def small_tiles():
    """Tiles of 16 by 16: a few tokens are then several, with tails."""
    with contextlib.ExitStack() as stack:
        for kernel in tiles.TABLE:
            stack.enter_context(setting(kernel, (16, 16, 4, 1)))
        yield


def ours(dout, tensors, masks, scale, dropout=(), softcap=0.0):
    """out, its gradients and lse; dropout: p and the seed."""
    out, lse = forward(*tensors, *masks, scale, *dropout, softcap=softcap)
    return [out, *backward(dout, *tensors, out, lse, *masks, scale, *dropout, softcap=softcap)], lse


def plain(dout, tensors, masks, scale, dropout=(), softcap=0.0):
    """The same of the reference, by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = reference(*leaves, *masks, scale, *dropout, softcap=softcap)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def wide(tensors):
    return [None if t is None else t.double() if torch.is_tensor(t) and t.is_floating_point() else t
            for t in tensors]  # fmt: skip


def terms(dout, tensors, masks, scale, dropout=(), softcap=0.0):
    """The magnitudes added up to each result: of dS = P (dP - sum(P dP)) little may be left.

    Those added up to a score count as often as they are rounded, in the scores and in lse: P = exp(S - lse)
    makes of their error a relative one. Where scores are huge one key takes all, and that P is exact.
    """
    q, k, v, prefix_k, prefix_v = wide(tensors)
    prefix, group = prefix_k.shape[2], q.shape[1] // k.shape[1]
    k, v = (
        torch.cat((p.expand(q.shape[0], -1, -1, -1), t), 2).repeat_interleave(group, 1)
        for p, t in ((prefix_k, k), (prefix_v, v))
    )
    eye = torch.eye(k.shape[2], dtype=torch.double, device=q.device)  # as values: out is the probabilities
    eye = eye.expand(*k.shape[:2], -1, -1)
    p = reference(q, k[:, :, prefix:], eye[:, :, prefix:], k[:, :, :prefix], eye[:, :, :prefix],
                  *wide(masks), scale, softcap=softcap)  # fmt: skip
    depth, slope = q.abs() @ k.abs().mT * abs(scale), 1.0
    if softcap:
        capped = (q @ k.mT * scale / softcap).tanh()
        slope = 1.0 - capped.square()
        depth = depth * slope + softcap * capped.abs()
    p = p * (1 + torch.where(depth < 1e3, depth, 0))
    m = 1.0
    if dropout:
        rate, seed = dropout
        m = dropout_mask(seed, p.shape[:3].numel(), p.shape[3], rate).view(p.shape) / (1 - rate)
    dp = dout.double().abs() @ v.abs().mT * m
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * slope * abs(scale)
    p = p * m
    dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (ds.mT @ q.abs(), p.mT @ dout.double().abs()))
    shares = [t[:, :, :prefix] for t in (dk, dv)]
    if prefix_k.shape[0] == 1:
        shares = [t.sum(0, keepdim=True) for t in shares]
    return [p @ v.abs(), ds @ k.abs(), dk[:, :, prefix:], dv[:, :, prefix:], *shares]


def check(dout, tensors, masks=NOTHING, scale=None, what="", dropout=(), softcap=0.0):
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    got, lse = ours(dout, tensors, masks, scale, dropout, softcap)
    same = plain(dout, tensors, masks, scale, dropout, softcap)
    exact = plain(dout.double(), wide(tensors), wide(masks), scale, dropout, softcap)
    sizes = terms(dout, tensors, masks, scale, dropout, softcap)
    assert not lse.isnan().any(), what
    for name, *results in zip(NAMES, got, same, exact, sizes, strict=True):
        results = [r.cpu() for r in results]
        assert_twice_as_good(
            *results, f"{name} of {[tuple(t.shape) for t in tensors]}, {got[0].dtype} {what}"
        )


def case(
    batch=2, heads=2, kv_heads=1, queries=19, keys=19, head_dim=24, prefix=5, copies=1, dtype=torch.float32,
    prefix_dtype=torch.float32, size=1.0,
):  # fmt: skip
    """dout and the tensors; q, k, v as linears leave them, a view of (B, T, H, D)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tokens(count, n):
        return (torch.randn(batch, n, count, head_dim, device=device) * size).to(dtype).transpose(1, 2)

    learned = [torch.randn(copies, kv_heads, prefix, head_dim, device=device) * size for _ in range(2)]
    dout = torch.randn(batch, heads, queries, head_dim, device=device).to(dtype)
    tensors = tokens(heads, queries), tokens(kv_heads, keys), tokens(kv_heads, keys)
    return dout, [*tensors, *(t.to(prefix_dtype) for t in learned)]


def intervals(kind, batch, queries, keys):
    """first, last: documents in a row, left padding, a window, any, or none that see anything."""
    at = torch.arange(keys - queries, keys).expand(batch, -1)
    first, last = torch.zeros_like(at), at + 1
    if kind == "documents":
        first = at // 13 * 13
    elif kind == "padding":
        first = first + torch.arange(batch)[:, None] * 19
        last = torch.where(at < first, 0, last)
    elif kind == "window":
        first = (at - 20).clamp(min=0)
    elif kind == "any":
        ends = torch.randint(-3, keys + 4, (2, batch, queries))
        first, last = ends.amin(0), ends.amax(0)
    elif kind == "nothing":
        last = first
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [t.int().contiguous().to(device) for t in (first, last)]


def added(*shape, dtype=torch.float32, hidden=0.2):
    """A bias, -inf for some keys."""
    bias = torch.randn(shape).masked_fill(torch.rand(shape) < hidden, float("-inf")).to(dtype)
    return bias.to("cuda" if torch.cuda.is_available() else "cpu")


KINDS = ("documents", "padding", "window", "any", "nothing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mask_is_within_twice_the_reference_error(dtype):
    with small_tiles():
        check(*case(dtype=dtype), what="no mask")
        check(*case(dtype=dtype), CAUSAL, what="causal")
        for i, kind in enumerate(KINDS):
            ends = intervals(kind, 2, 19, 37)
            check(*case(keys=37, dtype=dtype, prefix=5 * (i % 2)), (*ends, None, False), what=kind)
        for shape in ((2, 2, 19, 20), (1, 2, 19, 20), (2, 1, 1, 20)):
            masks = None, None, added(*shape, dtype=dtype), False
            check(*case(keys=20, dtype=dtype), masks, what=f"bias {shape}")
        both = *intervals("documents", 2, 19, 20), added(2, 2, 19, 20), False
        check(*case(keys=20, dtype=dtype), both, what="both")
        causal = None, None, added(1, 4, 19, 37), True
        check(*case(heads=4, kv_heads=2, keys=37, dtype=dtype), causal, what="causal and bias")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_prefix_is_within_twice_the_reference_error(dtype):
    """None, one token, more than a block; one for the batch or for each row; in float32 or q's dtype."""
    with small_tiles():
        for prefix, copies, own in (
            (0, 1, True),
            (1, 1, False),
            (16, 3, True),
            (21, 1, False),
            (21, 3, False),
        ):
            given = case(
                batch=3, queries=9, keys=9, prefix=prefix, copies=copies, dtype=dtype,
                prefix_dtype=dtype if own else torch.float32,
            )  # fmt: skip
            check(*given, CAUSAL, what=f"prefix {prefix}, copies {copies}")
        check(*case(keys=0, dtype=dtype), what="no keys")
        check(*case(keys=0, prefix=0, dtype=dtype), what="no keys at all")


def test_a_prefix_shared_by_many_rows_is_summed_over_shares():
    with small_tiles():
        for batch, copies in ((1, 1), (2, 1), (2, 2)):
            check(*case(batch=batch, queries=130, keys=5, head_dim=16, copies=copies))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("queries,heads,kv_heads", [(1, 8, 1), (3, 4, 2)])
def test_few_rows_over_many_keys_are_split_and_merged(dtype, queries, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK", 64)
    assert tiles.chunks(queries * heads // kv_heads, 150)[1] == 3
    given = case(heads=heads, kv_heads=kv_heads, queries=queries, keys=130, prefix=20, dtype=dtype)
    check(*given, CAUSAL)
    check(*given, (*intervals("nothing", 2, queries, 130), None, False))
    hidden = torch.full((2, 1, 1, 130), float("-inf"), device=given[0].device)  # all but a few of one chunk
    hidden[..., 70:75] = 0
    without = [*given[1][:3], *(t[:, :, :0] for t in given[1][3:])]
    check(given[0], without, (None, None, hidden, False))


@pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 96, 128, 256])
def test_any_head_dim_by_the_tiles_of_the_table(head_dim):
    for dtype in (torch.float32, torch.bfloat16):
        given = case(batch=1, queries=40, keys=70, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
        check(*given, CAUSAL)
    check(*given, (None, None, added(1, 2, 40, 70), False), what="bias")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_shape_stride_and_magnitude(data):
    batch, queries, extra, prefix = (data.draw(st.integers(0, most)) for most in (2, 30, 13, 20))
    kv_heads, group, head_dim = (data.draw(st.integers(1, most)) for most in (2, 2, 40))
    dtype, size = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((1e-6, 1e-2, 1.0, 30.0, 1e4)))
    if dtype == torch.float16:
        size = min(max(size, 1e-2), 1.0)  # beyond, products are subnormal or infinite
    if dtype == torch.float32:
        size = min(size, 4.0)  # a float32 lse of thousands is good to 1e-4, and so is P = exp(S - lse)
    kind = data.draw(st.sampled_from((*KINDS, "causal", "no mask", "bias")))
    copies = data.draw(st.sampled_from((1, batch))) or 1
    keys = queries + extra
    dout, tensors = case(
        batch, kv_heads * group, kv_heads, queries, keys, head_dim, prefix, copies, dtype, size=size
    )  # fmt: skip
    if data.draw(st.booleans()):  # another order of the heads' memory, and columns in between
        tensors = [torch.cat((t, t), -1)[..., :head_dim] for t in tensors]
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    masks = (None, None, None, kind == "causal")
    if kind in KINDS:
        masks = (*intervals(kind, batch, queries, keys), None, False)
    elif kind == "bias":
        masks = (None, None, added(1, kv_heads * group, queries, keys), False)
    with small_tiles():
        check(dout, tensors, masks, what=f"{kind}, size {size}, strides {tensors[0].stride()}")


@pytest.mark.parametrize("queries", (20, 1))
def test_a_row_does_not_depend_on_its_neighbours_in_the_batch(queries, monkeypatch):
    """Bit for bit, also where they are NaN: with a prefix of its own, its gradient too."""
    monkeypatch.setattr(tiles, "CHUNK", 16)
    dout, tensors = case(batch=3, queries=queries, keys=40, copies=3, dtype=torch.bfloat16)
    for t in (dout, *tensors):
        t[0] = t[2] = float("nan")
    whole, lse = ours(dout, tensors, CAUSAL, 0.2)
    alone, lse_alone = ours(dout[1:2], [t[1:2] for t in tensors], CAUSAL, 0.2)
    assert torch.equal(lse[1:2], lse_alone)
    for name, a, b in zip(NAMES, whole, alone, strict=True):
        assert torch.equal(a[1:2], b), name


def test_a_query_that_sees_nothing_gives_zeros_minus_infinity_and_no_gradient():
    dout, tensors = case(prefix=0)
    ends = [t.clone() for t in intervals("documents", 2, 19, 19)]
    ends[1][:, 5:9] = 0
    (out, dq, *others), lse = ours(dout, tensors, (*ends, None, False), 0.2)
    assert (out[:, :, 5:9] == 0).all() and (dq[:, :, 5:9] == 0).all() and (lse[:, :, 5:9] == -torch.inf).all()
    assert all(t.isfinite().all() for t in (out, dq, *others))


def test_offsets_are_64_bit(monkeypatch):
    """Keys 2^20 elements apart, of which the queries see those beyond 2^31."""
    if torch.cuda.is_available():
        pytest.skip("takes 16 GiB of memory, which the interpreter does not touch")
    check_far_keys(forward, monkeypatch)


def check_far_keys(forward, monkeypatch):
    from triton_interpreter import mended

    apart, keys = 1 << 20, (1 << 11) + 5
    dout, tensors = case(batch=1, heads=1, kv_heads=1, queries=1, keys=16, prefix=1, head_dim=16)
    torch.use_deterministic_algorithms(False)  # or the memory between the keys would be written
    far = []
    for t in tensors[1:3]:
        view = torch.empty(apart * keys, dtype=t.dtype).as_strided((1, 1, keys, 16), (0, 0, apart, 1))
        view[:, :, keys - 16 :] = t
        far.append(view)
    masks = (
        torch.tensor([[keys - 16]], dtype=torch.int32),
        torch.tensor([[keys]], dtype=torch.int32),
        None,
        False,
    )
    near = torch.tensor([[0]], dtype=torch.int32), torch.tensor([[16]], dtype=torch.int32), None, False
    expected, _ = ours(dout, tensors, near, 0.25)
    monkeypatch.setattr(tiles, "CHUNK", 1 << 20)
    with mended(only=(0,)):
        out, _ = forward(tensors[0], *far, *tensors[3:], *masks, 0.25)
    torch.testing.assert_close(out, expected[0])


def test_the_tile_of_dkv_goes_by_the_keys_of_a_row_and_never_by_the_batch():
    """Blocks of 64 keys while those of 128 would be too few programs."""

    def block(batch, kv_heads, keys, head_dim):
        k = torch.empty(batch, kv_heads, keys, head_dim, dtype=torch.bfloat16, device="meta")
        return tiles.tile("dkv", Call(k, k, k, k, k, None, None, None, True))[0]

    for head_dim in (64, 128):
        assert {block(batch, 3, 2048, head_dim) for batch in (1, 8, 64)} == {64}
        assert block(1, 32, 2048, head_dim) == 128
    with setting("dkv", (128, 32, 8, 2)):
        check(*case(queries=140, keys=140, head_dim=16, dtype=torch.bfloat16), CAUSAL)


@pytest.mark.parametrize("most", (0, 1 << 20))
def test_programs_are_right_in_both_orders(most, monkeypatch):
    monkeypatch.setattr(parts, "FEW_PROGRAMS", most)
    with small_tiles():
        check(*case(heads=4, kv_heads=2, queries=40, keys=40, head_dim=16), CAUSAL)


def test_the_queries_that_see_a_block_are_found_in_several_turns(monkeypatch):
    monkeypatch.setattr(dkv, "SCANNED", 8)
    with small_tiles():
        for kind in KINDS:
            ends = intervals(kind, 2, 19, 37)
            check(*case(keys=37, dtype=torch.bfloat16), (*ends, None, False), what=kind)


# --- dropout ------------------------------------------------------------------------------------------------


def dropped(p=0.3, seed=123456789012345678):
    return p, torch.tensor([seed], device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_is_within_twice_the_reference_error(dtype):
    with small_tiles():
        check(*case(dtype=dtype), dropout=dropped(0.5), what="no mask")
        check(*case(heads=4, kv_heads=2, dtype=dtype), CAUSAL, dropout=dropped(), what="causal")
        for i, kind in enumerate(("documents", "window", "any")):
            ends = *intervals(kind, 2, 19, 37), None, False
            check(*case(keys=37, dtype=dtype, prefix=21 * (i % 2)), ends, dropout=dropped(), what=kind)
        both = *intervals("documents", 2, 19, 20), added(2, 2, 19, 20), False
        check(*case(keys=20, copies=2, dtype=dtype), both, dropout=dropped(), what="both")
        check(*case(keys=0, dtype=dtype), dropout=dropped(), what="no keys")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dropout_by_the_tiles_of_the_table(head_dim):
    for dtype in (torch.float32, torch.bfloat16):
        given = case(batch=1, queries=40, keys=70, heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
        check(*given, CAUSAL, dropout=dropped())


def test_dropout_of_split_keys_and_of_a_prefix_summed_over_shares(monkeypatch):
    check(*case(queries=130, keys=5, head_dim=16, copies=1), dropout=dropped())
    monkeypatch.setattr(tiles, "CHUNK", 64)
    check(*case(heads=4, kv_heads=2, queries=3, keys=130, prefix=20), CAUSAL, dropout=dropped())


@pytest.mark.parametrize("seed", [0, -3, 2**63 - 2])
def test_what_is_kept_is_the_hash_of_row_and_column(seed):
    """With [P_v ; V] = identity, out is the dropped softmax itself."""
    _, (q, k, _, pk, _) = case(batch=3, heads=4, kv_heads=2, queries=21, keys=45, head_dim=64, prefix=19)
    eye = torch.eye(64, device=q.device).expand(3, 2, 64, 64)
    for p in (0.1, 0.5):
        tensors = q, k, eye[:, :, 19:], pk, eye[:1, :, :19]
        out, lse = forward(*tensors, *NOTHING, 0.2, *dropped(p, seed))
        kept = dropout_mask(dropped(p, seed)[1], 3 * 4 * 21, 64, p).view(out.shape)
        assert torch.equal(out != 0, kept)
        whole, same = forward(*tensors, *NOTHING, 0.2)
        torch.testing.assert_close(out, whole * kept / (1 - p))
        torch.testing.assert_close(lse, same)

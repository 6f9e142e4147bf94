"""The raw ops of the CPU refuse what they would read beyond, whoever calls; and the shortest way to them."""

import pytest
import torch

from peft_engine import dispatch, native
from peft_engine.ops.attention import attention
from peft_engine.ops.lora_linear import flat_base, lora_linear
from peft_engine.ops.nf4 import nf4_quantize
from peft_engine.ops.rms_norm import rms_norm
from peft_engine.ops.rotary import rotary_by_token
from peft_engine.ops.swiglu import swiglu

pytestmark = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))
M, K, N, R = 3, 64, 32, 4
SEED = torch.zeros(1, dtype=torch.int64)


def op(name):
    return getattr(torch.ops.peft_engine, name).default


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def cases():
    """(op, its arguments, {argument: what it refuses there})."""
    x, dense, q = normal(M, K), normal(N, K), nf4_quantize(normal(N, K), double_quant=True)
    a, b, dy, h = normal(R, K), normal(N, R), normal(M, N), normal(M, R)
    packed, absmax, nested, offset, blocksize = flat_base(q)
    adapter = {5 + 2: [a[:, :-1], a.t(), a[:, ::2], None], 5 + 3: [b[:-1], b.half(), b.double(), None]}
    floats = nf4_quantize(normal(N, K))
    base = {1: [packed[:-1], packed.float(), packed[::2]], 2: [absmax[:-1], absmax.float()]}
    base |= {3: [nested[:0], nested.double()], 4: [None, offset.double()], 5: [0, 48]}
    forward = [x, packed, absmax, nested, offset, blocksize, N, a, b, 1.0, normal(N), 0.0, None]
    yield "lora_linear_forward", forward, base | adapter | {
        0: [x[:, :-1], x.double(), normal(K, M).t(), torch.tensor(1.0)],
        6: [N + 1, -1],
        10: [normal(N - 1), normal(2 * N)[::2], normal(1, N)],
    }  # fmt: skip
    yield "lora_linear_forward", [x, dense, None, None, None, 0, N, None, None, 1.0, None, 0.0, None], {
        1: [dense[:-1], dense.half(), dense.t(), dense[:, :-1]], 7: [a],
    }  # fmt: skip
    yield "lora_linear_forward", [x, *flat_base(floats), N, a, b, 1.0, None, 0.1, SEED], {
        2: [floats.absmax[:-1], floats.absmax.double()], 11: [1.5], 12: [None, SEED.int(), SEED[:0]],
    }  # fmt: skip
    yield "lora_linear_backward", [dy, x, *forward[1:6], a, b, h, 1.0, 0.0, None, True, True], {
        0: [dy[:-1], dy.half(), dy[:, :-1], normal(N, M).t()], 1: [x[:-1], x.half(), normal(K, M).t()],
        7: adapter[7], 8: adapter[8], 9: [h[:-1], h.half(), h[:, :-1]],
    }  # fmt: skip
    w, rstd = normal(K), normal(M)
    yield "rms_norm_forward", [x, w, 1e-5, 0.0], {
        0: [normal(K, M).t(), torch.tensor(1.0)], 1: [w[:-1], w.half(), w[None], normal(2 * K)[::2]],
    }  # fmt: skip
    yield "rms_norm_backward", [normal(M, K), x, w, rstd, 0.0, True, True], {
        0: [x[:-1], x.half()], 2: [w[:-1]], 3: [rstd[:-1], rstd.half()],
    }  # fmt: skip
    other = [x[:-1], x.half(), x[:, :-1], x[None], x.double(), normal(K, M).t()]
    yield "swiglu_forward", [x, normal(M, K), 0], {1: other, 2: [3, -1]}
    yield "swiglu_backward", [normal(M, K), x, normal(M, K), 0], {0: [x[:-1], x.half()], 2: other}
    q, k, cos = normal(2, 5, 4, 8), normal(2, 5, 2, 8), normal(1, 5, 6)
    yield "rotary", [q, k, cos, cos.clone(), False], {
        0: [q[0], q[:1], q.mT, q.half()], 1: [k[:, :4], k[..., :6], k.half()],
        2: [cos[:, :4], normal(1, 5, 10), cos[0], normal(1, 5, 5), cos.half()],
        3: [cos[..., :4], cos.double()],
    }  # fmt: skip
    q, k, p = normal(2, 4, 5, 8), normal(2, 2, 6, 8), normal(1, 2, 3, 8)
    first, last = torch.zeros(2, 5, dtype=torch.int32), torch.full((2, 5), 6, dtype=torch.int32)
    bias = normal(2, 4, 5, 6)
    heads = [q, k, k.clone(), p, p.clone()]
    bad = {
        0: [q[0], q[:1], q[:, :3], q[..., :6], q.half(), q.mT.contiguous().mT],
        1: [k[:, :, :5], k[:1], k.half()],
        2: [k[:, :, :5], k[..., :6], k.half()], 3: [p[:, :1], p[..., :6], normal(3, 2, 3, 8), p.half()],
        4: [p[:, :, :2], p.half()], 5: [first[:1], first.long(), None], 6: [last[:, :4], None],
        7: [bias[..., :5], bias[:, :3], bias[0], bias.double()], 11: [SEED.int(), None],
    }  # fmt: skip
    yield "prefix_attention_forward", [*heads, first, last, bias, False, 0.3, 0.1, SEED, 0.0], bad
    backward = [normal(2, 4, 5, 8), *heads, None, None, first, last, bias, False, 0.3, 0.0, None, 0.0]
    wrong = {n + 1 + 2 * (n > 4): tensors for n, tensors in bad.items() if n < 8}
    yield "prefix_attention_backward", backward, wrong | {0: [q[:, :3], q.half(), q[0]]}
    yield "prefix_attention_forward", [*heads, None, None, None, True, 0.3, 0.0, None, 0.0], {
        0: [normal(2, 4, 7, 8)],
    }  # fmt: skip
    y, m = normal(M, N), normal(N)
    yield "dora_linear_forward", [y, m, normal(N), normal(N)], {
        0: [y[:, :-1], normal(N, M).t(), y.double()], 1: [m[:-1], m.half()], 2: [m[:-1]],
        3: [m[:-1], m.half()],
    }  # fmt: skip
    yield "dora_linear_backward", [dy, y, m, normal(N), True], {0: [dy[:-1], dy.half()], 2: [m[:-1]]}
    down, up, bd, bu = normal(R, K), normal(K, R), normal(R), normal(K)
    norm = [normal(K), normal(K)]
    weights = [down, bd, up, bu, *norm]
    parts = {
        0: [down[:, :-1], down.half(), down.t()], 1: [bd[:-1], bd.half()], 2: [up[:-1], up.half(), up.t()],
        3: [bu[:-1], bu.double()], 4: [bu[:-1], None], 5: [bu[:-1], bu.half()],
    }  # fmt: skip
    yield "bottleneck_forward", [x, normal(M, K), *weights, 0, 1.0, 1e-5], {
        0: [x[:, :-1], normal(K, M).t(), x.double()], 1: [x[:-1], x.half()],
        **{2 + n: tensors for n, tensors in parts.items()}, 8: [4, -1],
    }  # fmt: skip
    middle, stats = normal(M, R), normal(M, 2)
    yield "bottleneck_backward", [normal(M, K), x, middle, stats, *weights, 0, 1.0, True, [True] * 7], {
        0: [x[:-1], x.half(), x[0]], 1: [x[:-1], x.half()], 2: [middle[:-1], middle.half()],
        3: [stats[:-1], stats.half()], **{4 + n: tensors for n, tensors in parts.items()}, 13: [[True] * 6],
    }  # fmt: skip
    yield (
        "dropout",
        [x, 0.5, SEED],
        {0: [x[0], normal(K, M).t(), x.double()], 1: [1.0], 2: [SEED.int(), SEED[:0]]},
    )
    yield "nf4_quantize", [x, 64], {0: [normal(K, M).t(), x.double()], 1: [0, 63]}
    labels, scale, stats = torch.zeros(M, dtype=torch.int64), torch.ones(M), torch.zeros(M, 2)
    rows = {1: [labels[:-1], labels.int()], 2: [scale[:-1], scale.half()]}
    yield "cross_entropy_rows", [normal(M, N), labels, scale, torch.zeros(M), stats, True], rows | {
        0: [normal(M), normal(M, N).double(), normal(N, M).t()], 3: [scale[:-1]], 4: [stats[:-1]],
    }  # fmt: skip
    yield "cross_entropy_columns", [normal(M, N), labels, scale, stats, 0], rows | {3: [stats[:-1]]}


@pytest.mark.parametrize("which", range(sum(1 for _ in cases())))
def test_what_does_not_fit_is_refused(which, isa):
    name, arguments, wrong = list(cases())[which]
    op(name)(*arguments)
    for at, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match=r"expected|must"):
                op(name)(*arguments[:at], value, *arguments[at + 1 :])


def calls():
    """(function, arguments with x first, the same with an argument that does not fit, its error)."""
    x, q = normal(2, 1, K), nf4_quantize(normal(N, K))
    a, b = normal(R, K), normal(N, R)
    yield lora_linear, (x, q, a, b, 0.5), (x, q, a.t(), b, 0.5), ValueError
    yield lora_linear, (x.half(), q, a, b, 0.5), (x.half(), q, a, b.double(), 0.5), TypeError
    yield (
        lora_linear,
        (x, normal(N, K), None, None, 1.0),
        (x, normal(N, K).half(), None, None, 1.0),
        TypeError,
    )
    yield lora_linear, (x, q, None, None, 1.0), (x.double(), q, None, None, 1.0), TypeError
    yield rms_norm, (x, normal(K), 1e-5), (x, normal(K - 1), 1e-5), ValueError
    yield swiglu, (x, normal(2, 1, K), "gelu"), (x, normal(1, 1, K), "gelu"), ValueError
    yield swiglu, (x, normal(2, 1, K), "silu"), (x, normal(2, 1, K), "relu"), ValueError
    heads, keys = normal(2, 4, 1, 8), normal(2, 2, 7, 8)
    yield attention, (heads, keys, keys), (heads, keys, keys[:, :, :6]), ValueError
    by_token, cos = normal(2, 1, 4, 8), normal(1, 1, 8)
    yield (
        rotary_by_token,
        (by_token, by_token, cos, cos),
        (by_token, by_token, cos[..., :5], cos),
        RuntimeError,
    )


@pytest.mark.parametrize("which", range(sum(1 for _ in calls())))
def test_a_call_that_records_nothing_has_the_same_bits_and_errors(which, monkeypatch):
    function, good, bad, error = list(calls())[which]
    careful = function(*good)
    with pytest.raises(error) as said:
        function(*bad)
    ran = []
    choose = dispatch.Op.choose
    monkeypatch.setattr(dispatch.Op, "choose", lambda self, *rest: ran.append(1) or choose(self, *rest))
    with torch.no_grad():
        torch.testing.assert_close(function(*good), careful, rtol=0, atol=0)
        assert not ran  # the shortest way
        with pytest.raises(error) as again:
            function(*bad)
    if error is not RuntimeError:
        assert str(again.value) == str(said.value)


def test_what_asks_for_more_goes_the_careful_way(monkeypatch):
    x, weight = normal(2, 5, 6), normal(6)
    ran = []
    choose = dispatch.Op.choose
    monkeypatch.setattr(dispatch.Op, "choose", lambda self, *rest: ran.append(1) or choose(self, *rest))

    def careful(x=x, weight=weight):
        ran.clear()
        y = rms_norm(x, weight)
        assert ran
        return y

    want = careful()
    with torch.no_grad():
        rms_norm(x, weight)
        assert len(ran) == 1  # as before
        torch.testing.assert_close(careful(normal(5, 2, 6).transpose(0, 1)).shape, want.shape)
        assert careful(x.to("meta"), weight.to("meta")).is_meta
        with pytest.raises(ValueError, match="is on cpu and weight on meta"):
            careful(x, weight.to("meta"))
        with dispatch.force_backend("reference"):
            torch.testing.assert_close(careful(), want)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            careful()
        with torch.autograd.forward_ad.dual_level():
            careful()
            with pytest.raises(dispatch.BackendError):
                careful(torch.autograd.forward_ad.make_dual(x, x))


def test_a_backend_is_pinned_at_once_and_with_restores():
    assert dispatch.forced() is None
    with dispatch.force_backend("reference"):
        dispatch.force_backend("cpu")
        assert dispatch.forced() == "cpu"
    assert dispatch.forced() is None
    with pytest.raises(
        ValueError, match="force_backend: expected one of cuda, triton, cpu, reference, got 'x'"
    ):
        dispatch.force_backend("x")
    assert dispatch.forced() is None

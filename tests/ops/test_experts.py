"""experts on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_together_twice_as_good, assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_engine.ops import experts as module
from peft_engine.ops.experts import Lora, experts, not_sliced, reference
from peft_engine.ops.nf4 import NF4Tensor, nf4_dequantize, nf4_quantize
from peft_engine.ops.swiglu import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("y", "dx", "dweights", "dA of gate_up", "dB of gate_up", "dA of down", "dB of down")


def case(dtype, *, tokens=33, features=64, width=128, count=8, each=2, rank=4, base="dense", scale=1.0):
    """x, index, weights, gate_up, down and the two adapters, A and B in float32."""
    x = (torch.randn(tokens, features) * scale).to(dtype)
    index = torch.rand(tokens, count).argsort(-1)[:, :each]
    weights = torch.softmax(torch.randn(tokens, each), -1).to(dtype)
    up = (torch.randn(count, 2 * width, features) / features**0.5).to(dtype)
    down = (torch.randn(count, features, width) / width**0.5).to(dtype)
    if base != "dense":
        up, down = (nf4_quantize(w, double_quant=base == "double") for w in (up, down))
    if not rank:
        return x, index, weights, up, down, None, None
    return (
        x,
        index,
        weights,
        up,
        down,
        lora(count, 2 * width, features, rank),
        lora(count, features, width, rank),
    )


def lora(count, n, k, rank, dtype=torch.float32):
    a, b = torch.randn(count, rank, k) / k**0.5, torch.randn(count, n, rank) / 4
    return Lora(a.to(dtype), b.to(dtype), 2.0)


def exactly(weight):
    if isinstance(weight, NF4Tensor):
        return nf4_dequantize(weight, dtype=torch.float32).double()
    return weight.double()


def run(function, inputs, dy, activation="silu"):
    x, index, weights, up, down, up_lora, down_lora = inputs
    leaves = [x, weights, *(t for held in (up_lora, down_lora) if held is not None for t in held[:2])]
    leaves = [t.detach().requires_grad_() for t in leaves]
    rest = iter(leaves[2:])
    loras = [
        None if held is None else Lora(next(rest), next(rest), held.scaling) for held in (up_lora, down_lora)
    ]
    y = function(leaves[0], index, leaves[1], up, down, activation, gate_up_lora=loras[0], down_lora=loras[1])
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def results(inputs, activation="silu"):
    """What the op, the reference and, in float64, the exact values are: y and the gradients of each."""
    x, index, weights, up, down, *loras = inputs
    dy = torch.randn(x.shape).to(x.dtype)
    got, plain = (run(function, inputs, dy, activation) for function in (experts, reference))
    doubled = [
        None if held is None else Lora(held.a.double(), held.b.double(), held.scaling) for held in loras
    ]
    wide = (x.double(), index, weights.double(), exactly(up), exactly(down), *doubled)
    return got, plain, run(reference, wide, dy.double(), activation)


def check(inputs, what, activation="silu"):
    for name, a, b, c in zip(NAMES, *results(inputs, activation), strict=False):
        assert_twice_as_good(a, b, c, what=f"{name} {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", ["dense", "nf4", "double"])
def test_output_and_gradients_are_within_twice_the_reference_error(isa, base, dtype):
    check(case(dtype, base=base, features=128), f"{base} {dtype}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(activation, dtype):
    check(case(dtype), f"{activation} {dtype}", activation)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.data(),
    st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(tokens, features, width, count, data, dtype):
    each, rank = data.draw(st.integers(1, count)), data.draw(st.sampled_from((0, 1, 3)))
    found = []
    for _ in range(3):
        inputs = case(dtype, tokens=tokens, features=features, width=width, count=count, each=each, rank=rank)
        found += zip(*results(inputs), strict=True)
    assert_together_twice_as_good(found)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_small_and_large_inputs(scale):
    check(case(torch.bfloat16, scale=scale, base="nf4"), f"{scale}")


def test_an_adapter_on_one_of_the_two(isa):
    x, index, weights, up, down, up_lora, down_lora = case(torch.float32)
    check((x, index, weights, up, down, up_lora, None), "gate_up alone")
    x, index, weights, up, down, up_lora, down_lora = case(torch.float32)
    dy = torch.randn_like(x)
    inputs = (x, index, weights, up, down, None, down_lora)
    for a, b in zip(run(experts, inputs, dy), run(reference, inputs, dy), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_has_no_gradient_and_one_that_is_none_adds_nothing():
    x, index, weights, up, down, up_lora, down_lora = case(torch.float32, count=4)
    index = torch.tensor([[0, 2]]).expand(len(x), 2).clone()
    index[5:8, 1], index[8, 1] = 4, -1  # past the last, as expert parallelism has for another process's
    inputs = (x, index, weights, up, down, up_lora, down_lora)
    check(inputs, "experts 0 and 2")
    _, _, dweights, *adapters = run(experts, inputs, torch.ones_like(x))
    assert all(not d[[1, 3]].any() and d[[0, 2]].any() for d in adapters)
    assert not dweights[5:9, 1].any() and dweights[:5].all()


def test_adapters_in_half_precision(isa):
    x, index, weights, up, down, *_ = case(torch.bfloat16)
    loras = lora(8, 256, 64, 4, torch.bfloat16), lora(8, 64, 128, 4, torch.bfloat16)
    check((x, index, weights, up, down, *loras), "bfloat16 adapters")


def test_weights_of_tokens_may_be_wider_than_x():
    inputs = list(case(torch.bfloat16))
    inputs[2] = inputs[2].float()
    got, plain = (run(function, inputs, torch.ones_like(inputs[0])) for function in (experts, reference))
    assert got[0].dtype == torch.bfloat16 and got[2].dtype == torch.float32
    assert torch.allclose(got[2], plain[2], rtol=0.1, atol=0.1)


def test_strides_do_not_change_the_answer(isa):
    x, index, weights, up, down, *loras = case(torch.float32)
    strided = torch.randn(64, 33).t(), torch.stack((index, index), -1)[..., 0], weights.t().contiguous().t()
    got, want = (
        run(experts, (*given_, up, down, *loras), torch.ones_like(x))
        for given_ in (strided, [t.contiguous() for t in strided])
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_only_rows_of_the_middle_are_kept():
    x, index, weights, up, down, up_lora, down_lora = case(torch.bfloat16)
    own = {t.data_ptr() for t in (x, weights, up, down, up_lora.a, up_lora.b, down_lora.a, down_lora.b)}
    for t in (*up_lora[:2], *down_lora[:2], x):
        t.requires_grad_()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (held.append(t), t)[1], lambda t: t):
        experts(x, index, weights, up, down, gate_up_lora=up_lora, down_lora=down_lora)
    kept = {t.data_ptr(): t.nbytes for t in held if t.data_ptr() not in own}
    pairs = 33 * 2
    order, ends = 8 * pairs, 8 * 8
    assert sum(kept.values()) == pairs * 2 * 128 * 2 + 2 * pairs * 4 * 4 + order + ends


def test_gradient_of_the_reference_is_exact():
    inputs = case(torch.float32, tokens=5, features=3, width=2, count=3, rank=2)
    x, index, weights, up, down, *loras = inputs
    leaves = [t.double().requires_grad_() for t in (x, weights, *loras[0][:2], *loras[1][:2])]

    def of(x, weights, a, b, c, d):
        return reference(
            x, index, weights, up.double(), down.double(), "silu", Lora(a, b, 2.0), Lora(c, d, 2.0)
        )

    assert torch.autograd.gradcheck(of, leaves)


def test_without_gradient_nothing_is_kept(isa, monkeypatch):
    monkeypatch.setattr(module._Experts, "apply", None)
    inputs = case(torch.float32)
    with torch.no_grad():
        y = experts(*inputs[:5], gate_up_lora=inputs[5], down_lora=inputs[6])
    assert torch.allclose(y, reference(*inputs[:5], "silu", *inputs[5:]), atol=1e-5)


def test_it_traces_whole(isa):
    inputs = case(torch.float32)
    dy = torch.randn(33, 64)
    compiled = torch.compile(lambda *a, **k: experts(*a, **k) * 2, fullgraph=True, backend="aot_eager")
    got, want = run(compiled, inputs, dy), run(lambda *a, **k: experts(*a, **k) * 2, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("base", ["dense", "double"])
def test_the_raw_op_passes_opcheck(base):
    x, index, weights, up, down, up_lora, down_lora = case(torch.float32, base=base, features=128)
    held = (
        *module.flat_base(up), *up_lora, *module.flat_base(down), *down_lora, 8, 128, 0
    )  # fmt: skip
    for keep in (True, False):
        torch.library.opcheck(torch.ops.peft_engine.experts_forward.default, (x, index, weights, *held, keep))
    _, *saved = torch.ops.peft_engine.experts_forward.default(x, index, weights, *held, True)
    backward = (torch.randn_like(x), x, weights, *held, *saved, True, True)
    torch.library.opcheck(torch.ops.peft_engine.experts_backward.default, backward)


def test_wrong_arguments_are_named():
    x, index, weights, up, down, up_lora, down_lora = case(torch.float32)
    nf4 = nf4_quantize(torch.randn(8, 6, 64), double_quant=False)
    for change, error, what in (
        ({"x": x[0]}, TypeError, "x must be"),
        ({"x": x.long()}, TypeError, "x must be"),
        ({"index": index.int()}, TypeError, r"index must be int64 of shape .*\(33, j\)"),
        ({"index": index[:5]}, TypeError, "index must be"),
        ({"weights": weights[:, :1]}, ValueError, r"weights must be .*\(33, 2\)"),
        ({"gate_up": up[0]}, ValueError, "gate_up must have three dimensions"),
        ({"gate_up": up[:, :-2]}, ValueError, r"down \(experts, features, width\)"),
        ({"down": down.bfloat16()}, TypeError, "x is torch.float32 and down torch.bfloat16"),
        ({"down": down.clone().requires_grad_()}, ValueError, "down must be frozen"),
        ({"activation": "relu"}, ValueError, "activation must be one of silu"),
        ({"gate_up_lora": down_lora}, ValueError, r"gate_up: A must be .*\(8, 4, 64\)"),
        ({"down_lora": Lora(down_lora.a.half(), down_lora.b.half(), 1.0)}, TypeError, "both be float32"),
        ({"gate_up": nf4, "down": torch.randn(8, 64, 3)}, None, ""),
    ):  # fmt: skip
        arguments = {
            "x": x, "index": index, "weights": weights, "gate_up": up, "down": down, "gate_up_lora": up_lora,
            "down_lora": down_lora,
        }  # fmt: skip
        arguments |= change
        if error is None:
            arguments |= {"gate_up_lora": None, "down_lora": None}
            assert experts(**arguments).shape == x.shape
            continue
        with pytest.raises(error, match=what):
            experts(**arguments)


def test_an_expert_that_shares_a_scale_with_another_is_refused():
    assert not_sliced((8, 4, 64), 64, nested=False) is None
    assert not_sliced((8, 256, 64), 64, nested=True) is None
    x, index, weights, _, down, *_ = case(torch.float32, features=16)
    up = nf4_quantize(torch.randn(8, 254, 16))
    with pytest.raises(ValueError, match="254 x 16 values are no whole number of the 64 that share a scale"):
        experts(x, index, weights, up, torch.randn(8, 16, 127))
    up = nf4_quantize(torch.randn(8, 256, 16), double_quant=True)
    with pytest.raises(ValueError, match="16384 that share a scale"):
        experts(x, index, weights, up, down)

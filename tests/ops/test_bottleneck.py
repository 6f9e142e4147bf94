"""bottleneck on every instruction set against float64, by the rule of twice the reference's own error."""

import sys

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_engine import dispatch, native
from peft_engine.ops.bottleneck import ACTIVATIONS, FEW_ROWS, Norm, bottleneck, reference
from peft_engine.ops.nf4 import DTYPES

NAMES = ("x", "residual", "down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
EPS = 1e-5


def ours(activation, scaling):
    def call(x, residual, down, down_bias, up, up_bias, norm_weight, norm_bias):
        return bottleneck(
            x, down, up, down_bias=down_bias, up_bias=up_bias, activation=activation, scaling=scaling,
            norm=None if norm_weight is None else (norm_weight, norm_bias, EPS), residual=residual,
        )  # fmt: skip

    return call


def plain(activation, scaling):
    def call(*tensors):
        norm = None if tensors[6] is None else Norm(tensors[6], tensors[7], EPS)
        return reference(*tensors[:6], norm, activation, scaling)

    return call


def gradients(function, tensors, dy):
    """The output and every gradient of `function`, on copies."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def case(
    rows, features, width, dtype, *, weights=None, norm=None, residual=False, biases=True, activation="relu",
    scale=1.0,
):  # fmt: skip
    """The tensors of a call, in the order of NAMES, and dy."""
    generator = torch.Generator().manual_seed(rows * 131 + features * 7 + width)
    weights = weights or dtype

    def randn(*shape, factor=1.0, dtype=weights):
        return (torch.randn(*shape, generator=generator) * factor).to(dtype)

    tensors = [
        randn(rows, features, factor=scale, dtype=dtype),
        randn(rows, features, factor=scale, dtype=dtype) if residual else None,
        randn(width, features, factor=features**-0.5),
        randn(width) if biases else None,
        randn(features, width, factor=width**-0.5),
        randn(features) if biases else None,
        randn(features, dtype=norm) if norm else None,
        randn(features, dtype=norm) if norm and biases else None,
    ]
    return tensors, randn(rows, features, dtype=dtype)


def check(tensors, dy, activation="relu", scaling=0.7):
    got = gradients(ours(activation, scaling), tensors, dy)
    same = gradients(plain(activation, scaling), tensors, dy)
    wide = [None if t is None else t.double() for t in tensors]
    exact = gradients(plain(activation, scaling), wide, dy.double())
    sizes = magnitudes(tensors, dy, activation, scaling)
    names = ["y", *("d" + name for name, t in zip(NAMES, tensors, strict=True) if t is not None)]
    for name, *results in zip(names, got, same, exact, strict=True):
        call = f"{tuple(tensors[0].shape)}, width {tensors[2].shape[0]}, {tensors[0].dtype}, {activation}"
        assert_twice_as_good(*results, sizes.get(name), f"{name} of {call}")


def magnitudes(tensors, dy, activation, scaling):
    """What is added up to an output or a gradient, all with one sign: what float32 sums can be held to."""
    x, residual, down, down_bias, up, up_bias, norm_weight, norm_bias = (
        None if t is None else t.double() for t in tensors
    )
    z, rstd, normed = x, 1.0, None
    if norm_weight is not None:
        rstd = (x.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
        normed = (x - x.mean(-1, keepdim=True)) * rstd
        z = normed * norm_weight + (0 if norm_bias is None else norm_bias)
    bias = [0 if b is None else b.abs() for b in (down_bias, up_bias)]
    middle = (torch.nn.functional.linear(z, down, down_bias)).requires_grad_()
    act = ACTIVATIONS[activation](middle)
    (slope,) = torch.autograd.grad(act.sum(), middle)
    act, slope, dy = act.detach().abs(), slope.abs(), dy.double().abs()
    middle_terms = z.abs() @ down.abs().t() + bias[0]
    dmiddle = scaling * (dy @ up.abs()) * slope
    dz = dmiddle @ down.abs()
    out = {
        "y": (x if residual is None else residual).abs()
        + scaling * ((act + slope * middle_terms) @ up.abs().t() + bias[1]),
        "ddown_weight": dmiddle.t() @ z.abs(),
        "ddown_bias": dmiddle.sum(0),
        "dup_weight": scaling * (dy.t() @ (act + slope * middle_terms)),
        "dup_bias": scaling * dy.sum(0),
    }
    if norm_weight is not None:
        out["dnorm_weight"], out["dnorm_bias"] = (dz * normed.abs()).sum(0), dz.sum(0)
        g = dz * norm_weight.abs()
        dz = rstd * (g + g.mean(-1, keepdim=True) + normed.abs() * (g * normed.abs()).mean(-1, keepdim=True))
    out["dx"] = dz + (dy if residual is None else 0)
    return out


# rows, features, width: one tile and less, tails of every tile, several groups of rows, widths beyond a tile
SHAPES = [
    (1, 64, 16),
    (3, 1, 1),
    (5, 37, 3),
    (17, 100, 50),
    (33, 129, 16),
    (300, 130, 33),
    (2, 1031, 7),
    (70, 576, 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_output_and_gradients_are_within_twice_the_reference_error(isa, activation, dtype):
    for i, (rows, features, width) in enumerate(SHAPES):
        weights, norm = (dtype, torch.float32)[i % 2], (None, dtype, torch.float32)[i % 3]
        settings = {"weights": weights, "norm": norm, "residual": i % 2 == 1, "biases": i % 4 != 2}
        check(*case(rows, features, width, dtype, **settings), activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_alone_and_a_bias_alone(isa, dtype):
    for norm in (None, dtype):
        tensors, dy = case(19, 80, 24, dtype, norm=norm)
        for missing in (3, 5, 7):
            if tensors[missing] is not None:
                check([None if i == missing else t for i, t in enumerate(tensors)], dy, "gelu")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 70), st.integers(1, 200), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans(),
    st.booleans(), st.sampled_from(sorted(ACTIVATIONS)), st.sampled_from((1e-6, 1.0, 1e4)),
)  # fmt: skip
def test_any_shape_and_magnitude(rows, features, width, dtype, norm, residual, activation, scale):
    if native.load_error() is not None:
        pytest.skip(str(native.load_error()))
    if dtype == torch.float16:
        scale = min(scale, 1e2)  # 65504 is the largest float16
    with dispatch.force_backend("cpu"):
        tensors, dy = case(
            rows, features, width, dtype, norm=dtype if norm else None, residual=residual, scale=scale
        )
        check(tensors, dy, activation)


def test_a_row_does_not_depend_on_the_batch(isa):
    """Bit for bit, of up to FEW_ROWS and of more: the row alone, among others, behind others not finite."""
    for dtype in DTYPES:
        for norm in (None, dtype):
            tensors, _ = case(530, 200, 24, dtype, norm=norm)
            x, rest = tensors[0], tensors[1:]
            whole = ours("gelu", 0.7)(x, *rest)
            for first, last in ((0, FEW_ROWS + 1), (7, 17), (16, 49), (500, 530)):
                assert torch.equal(ours("gelu", 0.7)(x[first:last], *rest), whole[first:last])
            few = ours("gelu", 0.7)(x[5 : 5 + FEW_ROWS], *rest)
            for i in range(FEW_ROWS):
                assert torch.equal(ours("gelu", 0.7)(x[5 + i : 6 + i], *rest), few[i : i + 1])
            x = x.clone()
            x[3] = float("nan")
            got = ours("gelu", 0.7)(x, *rest)
            assert (
                got[3].isnan().all() and torch.equal(got[4:], whole[4:]) and torch.equal(got[:3], whole[:3])
            )


def test_gradients_do_not_depend_on_the_threads(isa):
    before = torch.get_num_threads()
    try:
        for rows in (9, 150, 530):
            tensors, dy = case(rows, 288, 40, torch.bfloat16, norm=torch.float32)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(gradients(ours("silu", 0.7), tensors, dy))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", range(8))
def test_one_gradient_asked_for_is_that_of_all(isa, wanted):
    """The frozen ones are not computed; the backward then takes other ways."""
    tensors, dy = case(21, 70, 18, torch.float32, norm=torch.float32, residual=True)
    every = gradients(ours("tanh", 0.7), tensors, dy)
    leaves = [t.detach().clone().requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    (got,) = torch.autograd.grad(ours("tanh", 0.7)(*leaves), leaves[wanted], dy)
    assert torch.equal(got, every[1 + wanted])


def test_what_memory_held_before_is_not_read(isa, monkeypatch):
    """Outputs and scratch are as another call left them: full of NaN."""
    bad, dy = case(70, 576, 64, torch.float32, norm=torch.float32)
    nan = [None if t is None else torch.full_like(t, float("nan")) for t in bad]
    for dtype in DTYPES:
        for rows, features, width in ((3, 77, 19), (21, 77, 19)):
            gradients(ours("relu", 1.0), nan, dy)
            held = [torch.full((rows, features), float("nan"), dtype=dtype) for _ in range(8)]
            del held  # the allocator hands these out again
            check(*case(rows, features, width, dtype, norm=dtype))


def test_what_lies_beyond_a_tail_is_never_read(isa):
    """Tensors inside larger ones full of NaN: a read past their end would show in the result."""
    for dtype in DTYPES:
        tensors, dy = case(21, 77, 19, dtype, norm=dtype, residual=True)
        inside = []
        for t in (*tensors, dy):
            buffer = torch.full((t.numel() + 4096,), float("nan"), dtype=t.dtype)
            inside.append(buffer[: t.numel()].view(t.shape).copy_(t))
        check(inside[:-1], inside[-1], "silu")


def test_strides_do_not_matter(isa):
    tensors, dy = case(40, 64, 8, torch.float32, norm=torch.float32, residual=True)
    want = gradients(ours("silu", 0.7), tensors, dy)

    def strided(t):
        wide = torch.zeros(*(2 * n for n in reversed(t.shape)), dtype=t.dtype)
        return wide[(slice(None, None, 2),) * t.dim()].t().copy_(t) if t.dim() == 2 else wide[::2].copy_(t)

    leaves = [strided(t).requires_grad_() for t in tensors]
    y = ours("silu", 0.7)(*leaves)
    got = [y, *torch.autograd.grad(y, leaves, strided(dy))]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    y = ours("silu", 0.7)(*leaves)
    check([t.detach() for t in leaves], torch.randn(1).expand(40, 64), "silu")


@pytest.mark.parametrize("rows", (0, 3))
def test_leading_dimensions_are_kept_and_may_be_empty(backend, rows):
    tensors, _ = case(2 * rows, 16, 4, torch.float32, norm=torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    y = ours("relu", 1.0)(leaves[0].view(2, rows, 16), *leaves[1:])
    assert y.shape == (2, rows, 16)
    grads = torch.autograd.grad(y.sum(), [t for t in leaves if t is not None])
    assert grads[0].shape == (2 * rows, 16)
    if rows == 0:
        assert all(not grad.any() for grad in grads)


def test_gradcheck_of_the_reference():
    for activation in ACTIVATIONS:
        for norm in (None, torch.float64):
            tensors, _ = case(3, 6, 2, torch.float64, norm=norm, residual=norm is not None)
            leaves = [t.requires_grad_() for t in tensors if t is not None]
            places = [i for i, t in enumerate(tensors) if t is not None]

            def f(*given, places=places, activation=activation):
                tensors = dict(zip(places, given, strict=True))
                return plain(activation, 0.7)(*(tensors.get(i) for i in range(8)))

            assert torch.autograd.gradcheck(f, leaves)


def test_saved_for_the_backward_are_x_and_the_middle_alone(isa):
    tensors, _ = case(64, 256, 8, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ours("gelu", 1.0)(*leaves)
    parameters = {t.data_ptr() for t in tensors[2:] if t is not None}
    assert sorted(s for at, s in saved.items() if at not in parameters and 0 not in s) == [(64, 8), (64, 256)]


def test_a_frozen_adapter_keeps_the_middle_alone(isa):
    tensors, dy = case(64, 256, 8, torch.float32)
    y = ours("gelu", 1.0)(tensors[0].requires_grad_(), *tensors[1:])
    assert not [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == (64, 256)]
    want = gradients(ours("gelu", 1.0), tensors, dy)[1]
    assert torch.equal(torch.autograd.grad(y, tensors[0], dy)[0], want)


def test_without_gradient_no_autograd_node_is_made(isa, monkeypatch):
    monkeypatch.setattr(sys.modules[bottleneck.__module__]._Bottleneck, "apply", None)
    tensors, _ = case(3, 16, 4, torch.float32)
    with torch.no_grad():
        assert ours("relu", 1.0)(*(None if t is None else t.requires_grad_() for t in tensors)).shape == (
            3,
            16,
        )


def test_traces_in_one_graph(isa):
    tensors, dy = case(6, 64, 4, torch.float32, norm=torch.float32)
    call = ours("gelu", 0.5)
    want = gradients(call, tensors, dy)
    got = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_module_is_taken_as_norm(isa):
    tensors, _ = case(5, 32, 4, torch.float32, norm=torch.float32)
    norm = torch.nn.LayerNorm(32, eps=EPS)
    norm.load_state_dict({"weight": tensors[6], "bias": tensors[7]})
    assert torch.equal(bottleneck(tensors[0], tensors[2], tensors[4], norm=norm), ours("relu", 1.0)(
        tensors[0], None, tensors[2], None, tensors[4], None, *tensors[6:]))  # fmt: skip
    bare = bottleneck(
        tensors[0], tensors[2], tensors[4], norm=torch.nn.LayerNorm(32, elementwise_affine=False)
    )
    ones = bottleneck(tensors[0], tensors[2], tensors[4], norm=(torch.ones(32), None, 1e-5))
    assert torch.equal(bare, ones)


def test_autocast_runs_in_its_dtype(isa):
    tensors, _ = case(5, 64, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours("swish", 1.0)(*tensors).dtype == torch.bfloat16


WRONG = [
    ({"x": torch.ones(2, 8, dtype=torch.int64)}, TypeError, r"x must be float32, .*got torch.int64"),
    ({"x": torch.zeros(3, 0)}, ValueError, r"x must be \(\.\.\., features\) with features > 0, got \(3, 0\)"),
    (
        {"down_weight": torch.zeros(2, 9)},
        ValueError,
        r"down_weight must be .*=\(width > 0, 8\).*; was this adapter",
    ),
    (
        {"up_weight": torch.zeros(2, 8)},
        ValueError,
        r"up_weight must be .*=\(8, 2\), got \(2, 8\); transpose it",
    ),
    ({"down_bias": torch.zeros(3)}, ValueError, r"down_bias must be \(width,\)=\(2,\), got \(3,\)"),
    ({"up_bias": torch.zeros(3)}, ValueError, r"up_bias must be \(features,\)=\(8,\), got \(3,\)"),
    ({"up_weight": torch.zeros(8, 2).half()}, TypeError, "weights and biases must all be float32 or all"),
    ({"residual": torch.zeros(3, 7)}, ValueError, r"residual must be of x's shape and dtype, \(3, 8\)"),
    ({"residual": torch.zeros(3, 8, device="meta")}, ValueError, "x is on cpu and another argument on meta"),
    (
        {"activation": "selu"},
        ValueError,
        "activation must be one of relu, gelu, silu, tanh, swish, got 'selu'",
    ),
    ({"scaling": torch.ones(1)}, TypeError, "scaling must be a number, got Tensor"),
    ({"norm": torch.nn.LayerNorm(9)}, ValueError, r"norm must be a LayerNorm over \(features,\)=\(8,\)"),
    (
        {"norm": (torch.zeros(7), None, 1e-5)},
        ValueError,
        r"norm's weight must be \(features,\)=\(8,\), got \(7,\)",
    ),
    (
        {"norm": (torch.zeros(8), torch.zeros(8).half(), 1e-5)},
        TypeError,
        "its bias is torch.float16; cast it",
    ),
    ({"norm": "layer"}, TypeError, r"norm must be None, a torch.nn.LayerNorm or .*got str"),
]


@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_wrong_arguments_are_named(change, error, says):
    given = {
        "x": torch.randn(3, 8),
        "down_weight": torch.randn(2, 8),
        "up_weight": torch.randn(8, 2),
    } | change
    with pytest.raises(error, match=f"bottleneck: .*{says}"):
        bottleneck(**given)

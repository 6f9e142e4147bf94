"""lora_linear on every instruction set against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_engine import dispatch, native
from peft_engine.ops.dropout import dropout_mask
from peft_engine.ops.lora_linear import lora_linear, reference
from peft_engine.ops.nf4 import DTYPES, NF4Tensor, nf4_quantize, reference_dequantize

SEED = torch.tensor([123456789012345])


def gradients(function, x, lora_a, lora_b, bias, dy):
    """The output and every gradient of `function`, on copies."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, lora_a, lora_b, bias) if t is not None]
    parts = iter(leaves)
    args = [next(parts) if t is not None else None for t in (x, lora_a, lora_b, bias)]
    y = function(*args)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def exact_weight(weight, dtype):
    return reference_dequantize(weight, dtype) if isinstance(weight, NF4Tensor) else weight.to(dtype)


def wide(t):
    return None if t is None else t.double()


def check(x, weight, lora_a, lora_b, bias, dy, scaling=1.7, p=0.0):
    names = (
        "y",
        *(
            n
            for n, t in zip(("dx", "da", "db", "dbias"), (x, lora_a, lora_b, bias), strict=True)
            if t is not None
        ),
    )
    seed = SEED if p else None

    def ours(x, a, b, bias):
        return lora_linear(x, weight, a, b, scaling, bias=bias, dropout_p=p, seed=seed)

    def plain(dtype, change=torch.clone):
        dense = change(exact_weight(weight, dtype))
        return lambda x, a, b, bias: reference(x, dense, a, b, scaling, bias, p, SEED)

    got = gradients(ours, x, lora_a, lora_b, bias, dy)
    same = gradients(plain(x.dtype), x, lora_a, lora_b, bias, dy)
    exact = gradients(plain(torch.float64), wide(x), wide(lora_a), wide(lora_b), wide(bias), wide(dy))
    sizes = [None if t is None else t.double().abs() for t in (x, lora_a, lora_b, bias, dy)]
    terms = gradients(plain(torch.float64, torch.abs), *sizes)
    for name, *results in zip(names, got, same, exact, terms, strict=True):
        assert_twice_as_good(
            *results, f"{name} of {tuple(x.shape)} x {tuple(weight.shape)}, {x.dtype}, p={p}"
        )


def case(
    rows, k, n, rank, dtype, *, nf4,
    adapter=torch.float32, bias=True, p=0.0, blocksize=64, scale=1.0, double=True,
):  # fmt: skip
    generator = torch.Generator().manual_seed(rows * 7 + k * 3 + n + rank)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, dy = (randn(rows, k) * scale).to(dtype), randn(n, k).to(dtype), randn(rows, n).to(dtype)
    if nf4:
        weight = nf4_quantize(weight, blocksize=blocksize, double_quant=double)
    lora_a = (randn(rank, k) / k**0.5).to(adapter) if rank else None
    lora_b = randn(n, rank).to(adapter) if rank else None
    check(x, weight, lora_a, lora_b, randn(n).to(dtype) if bias else None, dy, p=p)


# rows, in, out, rank: 1 to 5 tiles of 16 rows, tails of every tile, ranks beyond a tile, more than a chunk
SHAPES = [
    (1, 64, 16, 4),
    (3, 128, 33, 16),
    (4, 576, 192, 16),
    (5, 192, 70, 1),
    (17, 100, 50, 3),
    (33, 320, 129, 40),
    (2, 77, 31, 5),
    (70, 576, 320, 16),
    (530, 192, 96, 8),
    (16, 448, 50, 20),
    (20, 192, 96, 4),
    (45, 320, 71, 16),
    (64, 128, 40, 2),
]


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(isa, dtype, nf4, p):
    for i, (rows, k, n, rank) in enumerate(SHAPES):
        adapter = dtype if i % 3 == 0 else torch.float32
        case(
            rows,
            k,
            n,
            rank,
            dtype,
            nf4=nf4,
            adapter=adapter,
            p=p,
            bias=i % 2 == 0,
            blocksize=(64, 256)[i % 2],
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_base_without_an_adapter(isa, dtype):
    for rows, k, n in ((1, 576, 49), (40, 129, 65), (16, 128, 128)):
        for nf4 in (True, False):
            case(rows, k, n, 0, dtype, nf4=nf4)


@pytest.mark.parametrize("blocksize", (64, 128, 512, 4096))
@pytest.mark.parametrize("double", (True, False))
def test_every_block_size_and_scale_format(isa, blocksize, double):
    for rows in (2, 20):
        for k in (64, 192, 1088):  # blocks that end inside a row, and blocks that span several
            case(rows, k, 37, 4, torch.bfloat16, nf4=True, blocksize=blocksize, double=double)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 70), st.integers(1, 300), st.integers(1, 150), st.integers(0, 20), st.sampled_from(DTYPES),
    st.booleans(), st.sampled_from((1e-6, 1.0, 1e2)), st.sampled_from((0.0, 0.5)),
)  # fmt: skip
def test_any_shape_and_magnitude(rows, k, n, rank, dtype, nf4, scale, p):
    if native.load_error() is not None:
        pytest.skip(str(native.load_error()))
    if dtype == torch.float16:
        scale = max(scale, 1e-2)  # below that the products are subnormal in float16
    with dispatch.force_backend("cpu"):
        case(rows, k, n, rank, dtype, nf4=nf4, scale=scale, p=p if rank else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (24, 0), (0, 0)], ids=str)
def test_a_weight_without_rows_or_columns(isa, shape, dtype):
    n, k = shape
    seed, bias = torch.tensor([3]), torch.randn(n).to(dtype)
    for weight in (torch.randn(n, k).to(dtype), nf4_quantize(torch.randn(n, k).to(dtype))):
        for rows in (1, 40):
            x, a, b = (torch.randn(s).requires_grad_() for s in ((rows, k), (4, k), (n, 4)))
            y = lora_linear(x.to(dtype), weight, a, b, 2.0, bias=bias, dropout_p=0.5, seed=seed)
            assert torch.equal(y, bias.expand(rows, n))
            assert not any(t.any() for t in torch.autograd.grad(y.sum(), (x, a, b)))


@pytest.mark.parametrize("rows", (0, 3, 9))
def test_leading_dimensions_are_kept_and_may_be_empty(backend, rows):
    x = torch.randn(2, rows, 64, requires_grad=True)
    weight = torch.randn(24, 64)
    lora_a, lora_b = torch.randn(4, 64, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    y = lora_linear(x, weight, lora_a, lora_b, 0.5)
    assert y.shape == (2, rows, 24)
    y.sum().backward()
    assert x.grad.shape == x.shape
    if rows == 0:
        assert not lora_a.grad.any() and not lora_b.grad.any()


def test_strides_do_not_matter(isa):
    torch.manual_seed(1)
    x = torch.randn(128, 2 * 40).t()[::2]  # (40, 128), neither dimension contiguous
    weight = torch.randn(128, 48).t()
    lora_a, lora_b = torch.randn(128, 8).t(), torch.randn(8, 48).t()
    dy = torch.randn(1).expand(40, 48)
    check(x, weight, lora_a, lora_b, torch.randn(96)[::2], dy)


def test_what_lies_beyond_a_tail_is_never_read(isa):
    """A tensor inside a larger one full of NaN: a read past its end would show in the result."""
    for dtype in DTYPES:
        for rows, k, n in ((3, 77, 19), (21, 77, 19)):
            buffer = torch.full((rows * k + 4096,), float("nan"), dtype=dtype)
            x = buffer[: rows * k].view(rows, k)
            x.copy_(torch.randn(rows, k))
            check(
                x, nf4_quantize(torch.randn(n, k).to(dtype)), None, None, None, torch.randn(rows, n).to(dtype)
            )


def test_gradcheck_of_the_reference():
    torch.manual_seed(2)
    x, a, b, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (2, 6), (4, 2), (4,))
    )
    weight = torch.randn(4, 6, dtype=torch.float64)
    for p in (0.0, 0.4):

        def f(x, a, b, bias, p=p):
            return reference(x, weight, a, b, 0.7, bias, p, SEED)

        assert torch.autograd.gradcheck(f, (x, a, b, bias))


def test_every_instruction_set_and_the_reference_drop_the_same_elements(isa):
    """With W = 0 and A B = identity, y is the dropped x itself."""
    x = torch.ones(37, 64)
    eye = torch.eye(64)
    y = lora_linear(x, torch.zeros(64, 64), eye, eye, 1.0, dropout_p=0.25, seed=SEED)
    mask = dropout_mask(SEED, 37, 64, 0.25)
    assert torch.equal(y != 0, mask)
    torch.testing.assert_close(y[mask], torch.full_like(y[mask], 1 / 0.75))


def test_rows_beyond_a_chunk_have_a_mask_of_their_own(isa):
    y = lora_linear(
        torch.ones(1100, 64), torch.zeros(64, 64), torch.eye(64), torch.eye(64), 1.0, dropout_p=0.5, seed=SEED
    )
    assert torch.equal(y != 0, dropout_mask(SEED, 1100, 64, 0.5))


def test_dropout_keeps_the_share_it_should_and_depends_on_the_seed():
    mask = dropout_mask(SEED, 1000, 1000, 0.1)
    assert abs(mask.float().mean().item() - 0.9) < 4 * (0.09 / 1e6) ** 0.5
    other = dropout_mask(SEED + 1, 1000, 1000, 0.1)
    agree = (mask == other).float().mean().item()
    assert abs(agree - (0.81 + 0.01)) < 0.002  # as two independent masks do
    for shifted in (mask[1:] == mask[:-1], mask[:, 1:] == mask[:, :-1]):
        assert abs(shifted.float().mean().item() - 0.82) < 0.002


def test_frozen_adapter_keeps_no_activation(isa):
    x = torch.randn(8, 64, requires_grad=True)
    y = lora_linear(x, nf4_quantize(torch.randn(32, 64)), torch.randn(4, 64), torch.randn(32, 4), 1.0)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
    assert not kept
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_asked_for_alone_has_the_same_bits(isa, dtype):
    leaves = [torch.randn(s) for s in ((40, 192), (5, 192), (70, 5))]
    weight, dy = nf4_quantize(torch.randn(70, 192).to(dtype)), torch.randn(40, 70).to(dtype)

    def gradients(*which):
        x, a, b = (t.clone().requires_grad_(i in which) for i, t in enumerate(leaves))
        y = lora_linear(x.to(dtype), weight, a, b, 0.5, dropout_p=0.1, seed=SEED)
        return dict(zip(which, torch.autograd.grad(y, [(x, a, b)[i] for i in which], dy), strict=True))

    together = gradients(0, 1, 2)
    for which in ((1,), (2,), (0, 1), (0, 2)):
        assert all(torch.equal(g, together[i]) for i, g in gradients(*which).items()), which


@pytest.mark.parametrize("learns", ["ab", "a", "b"])
def test_saved_for_the_backward_are_x_for_a_and_h_for_b(isa, learns):
    """Of the activations: no mask, no scaled copy."""
    x, rank = torch.randn(64, 256, requires_grad=True), 4
    q = nf4_quantize(torch.randn(128, 256), double_quant=True)
    lora_a, lora_b = torch.randn(rank, 256), torch.randn(128, rank)
    lora_a.requires_grad_("a" in learns), lora_b.requires_grad_("b" in learns)
    saved = {}

    def pack(t):
        saved[t.data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, q, lora_a, lora_b, 1.0, dropout_p=0.1, seed=SEED)
    weights = {t.data_ptr() for t in (q.packed, q.absmax, q.nested_absmax, q.offset, lora_a, lora_b, SEED)}
    want = [(64, rank)] * ("b" in learns) + [(64, 256)] * ("a" in learns)
    assert sorted(shape for at, shape in saved.items() if at not in weights) == want


def test_traces_in_one_graph(isa):
    q = nf4_quantize(torch.randn(32, 64), double_quant=True)
    lora_a, lora_b = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)

    def f(x):
        return lora_linear(x, q, lora_a, lora_b, 0.5).relu()

    x = torch.randn(6, 64)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
    compiled(x).sum().backward()
    got = lora_a.grad.clone()
    lora_a.grad = None
    f(x).sum().backward()
    torch.testing.assert_close(got, lora_a.grad)


def test_autocast_runs_in_its_dtype(isa):
    x, weight = torch.randn(5, 64), torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, torch.randn(2, 64), torch.randn(16, 2), 1.0)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.randn(3, 9)}, r"x must be \(\.\.\., in_features\)=\(\.\.\., 8\), got \(3, 9\)"),
        (
            {"lora_a": torch.randn(2, 9)},
            r"A must be \(r, in_features\)=\(2, 8\), got \(2, 9\); was this adapter",
        ),
        ({"lora_b": torch.randn(6, 3)}, r"B must be \(out_features, r\)=\(6, 2\), got \(6, 3\)"),
        ({"lora_b": None}, "both lora_a and lora_b, or neither"),
        ({"bias": torch.randn(5)}, r"bias must be \(out_features,\)=\(6,\)"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5}, "dropout needs seed"),
        ({"weight": torch.randn(6, 8, requires_grad=True)}, "weight must be frozen"),
        ({"weight": torch.randn(6)}, r"weight must be \(out_features, in_features\)"),
    ],
)
def test_bad_arguments_are_named_at_the_door(change, says):
    args = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
    }
    args |= {"scaling": 1.0} | change
    with pytest.raises(ValueError, match=says):
        lora_linear(**args)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(3, 8, dtype=torch.int64)}, "x must be float32, bfloat16 or float16"),
        ({"x": torch.randn(3, 8).bfloat16()}, "x is torch.bfloat16 and weight torch.float32"),
        ({"lora_a": torch.randn(2, 8).half()}, "A and B must both be float32"),
    ],
)
def test_bad_dtypes_are_named_at_the_door(change, says):
    args = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "lora_a": torch.randn(2, 8),
        "lora_b": torch.randn(6, 2),
    }
    args |= {"scaling": 1.0} | change
    with pytest.raises(TypeError, match=says):
        lora_linear(**args)


def test_threads_do_not_change_the_result(isa):
    torch.manual_seed(4)
    x, q = torch.randn(100, 320).bfloat16(), nf4_quantize(torch.randn(1000, 320))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(lora_linear(x, q, None, None, 1.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
def test_a_row_has_the_same_bits_among_many_rows_and_few(isa, dtype, nf4):
    """From MANY_ROWS (methods/lora.py) on, whichever operand is turned; of 192 columns 64 are a tail."""
    x = torch.randn(600, 192).to(dtype)
    weight, a, b = torch.randn(96, 192).to(dtype), torch.randn(5, 192), torch.randn(96, 5)
    weight = nf4_quantize(weight, double_quant=True) if nf4 else weight
    dy = torch.randn(600, 96).to(dtype)

    def run(rows):
        part = x[:rows].clone().requires_grad_()
        y = lora_linear(part, weight, a, b, 0.5)
        return y.detach(), torch.autograd.grad(y, part, dy[:rows])[0]

    y, dx = run(600)
    for rows in (17, 40, 130, 512):
        some_y, some_dx = run(rows)
        assert torch.equal(some_y, y[:rows]) and torch.equal(some_dx, dx[:rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
def test_a_row_has_the_same_bits_alone_and_among_a_few(isa, dtype, nf4):
    """Whichever rows of the weight it is taken with: 577 of them leave one over, and two threads cut anew."""
    x, weight = torch.randn(4, 576).to(dtype), torch.randn(577, 576).to(dtype)
    a, b = torch.randn(5, 576), torch.randn(577, 5)
    weight = nf4_quantize(weight, double_quant=True) if nf4 else weight
    y = lora_linear(x, weight, a, b, 0.5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 4):
                for first in range(5 - rows):
                    part = slice(first, first + rows)
                    assert torch.equal(lora_linear(x[part], weight, a, b, 0.5), y[part]), (threads, part)
    finally:
        torch.set_num_threads(before)


def test_forward_mode_derivatives_are_refused_and_plain_torch_has_them(backend):
    x, weight = torch.randn(3, 8), torch.randn(5, 8)

    def y(x):
        return lora_linear(x, weight, None, None, 1.0)

    if backend != "reference":
        with pytest.raises(dispatch.BackendError, match="lora_linear: its kernels have no forward-mode"):
            torch.func.jvp(y, (x,), (x,))
    # A call without tangents goes through: the level that jvp opens is that of all threads.
    beside = torch.func.jvp(lambda t: (t, lora_linear(x, weight, None, None, 1.0)), (x[0],), (x[0],))[0][1]
    assert torch.equal(beside, y(x))
    with dispatch.force_backend("reference"):
        assert torch.equal(torch.func.jvp(y, (x,), (x,))[1], y(x))

"""lora_linear in Triton: every path against float64, by the rule of twice the reference's own error."""

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.lora_linear import paths
from peft_engine.kernels.lora_linear.backward import backward
from peft_engine.kernels.lora_linear.forward import forward

from peft_engine.activations import padded_empty
from peft_engine.ops.lora_linear import reference
from peft_engine.ops.nf4 import DTYPES, NF4Tensor, nf4_quantize, reference_dequantize

SEED = 123456789012345
NAMES = ("y", "dx", "da", "db")


def base_of(weight):
    if isinstance(weight, NF4Tensor):
        return weight.packed, weight.absmax, weight.nested_absmax, weight.offset, weight.blocksize
    return weight, None, None, None, 0


def ours(x, weight, a, b, bias, dy, scaling, p, seed):
    """y and the gradients of the kernels, in the order of NAMES."""
    base = base_of(weight)
    y, h = forward(x, *base, weight.shape[0], a, b, scaling, bias, p, seed)
    dx, da, db = backward(dy, x, *base, a, b, h, scaling, p, seed, True, True)
    return [y, dx] if a is None else [y, dx, da, db]


def plain(x, dense, a, b, bias, dy, scaling, p, seed):
    """The same of the reference, by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, a, b) if t is not None]
    args = leaves if a is not None else [*leaves, None, None]
    y = reference(args[0], dense, args[1], args[2], scaling, bias, p, seed)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def wide(t):
    return None if t is None else t.double()


def check(x, weight, a, b, bias, dy, scaling=1.7, p=0.0, what=""):
    seed = torch.tensor([SEED], device=x.device) if p else None
    nf4 = isinstance(weight, NF4Tensor)

    def dense(dtype):
        return reference_dequantize(weight, dtype) if nf4 else weight.to(dtype)

    got = ours(x, weight, a, b, bias, dy, scaling, p, seed)
    same = plain(x, dense(x.dtype), a, b, bias, dy, scaling, p, seed)
    exact = plain(wide(x), dense(torch.float64), wide(a), wide(b), wide(bias), wide(dy), scaling, p, seed)
    sizes = [None if t is None else t.double().abs() for t in (x, a, b, bias, dy)]
    terms = plain(sizes[0], dense(torch.float64).abs(), *sizes[1:], scaling, p, seed)
    for name, *results in zip(NAMES, got, same, exact, terms, strict=False):
        results = [r.cpu() for r in results]
        assert_twice_as_good(
            *results, f"{name} of {tuple(x.shape)} x {tuple(weight.shape)}, {x.dtype}, p={p} {what}"
        )


def case(
    device, rows, k, n, rank, dtype, *, nf4=True, adapter=torch.float32, bias=True, p=0.0, blocksize=64,
    scale=1.0,
    double=True, padded=False, strong=1.0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(rows * 7 + k * 3 + n + rank)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, dy = (randn(rows, k) * scale).to(dtype), randn(n, k).to(dtype), randn(rows, n).to(dtype)
    if nf4:
        weight = nf4_quantize(weight, blocksize=blocksize, double_quant=double)
    a = (strong * randn(rank, k) / k**0.5).to(adapter) if rank else None
    b = randn(n, rank).to(adapter) if rank else None
    bias = randn(n).to(dtype) if bias else None
    x, weight, a, b, bias, dy = (
        t if t is None else t.to(torch.device(device)) for t in (x, weight, a, b, bias, dy)
    )
    if padded:
        room = [padded_empty(*t.shape, max(rank, 1), dtype, device, adapter) for t in (x, dy)]
        x, dy = room[0].copy_(x), room[1].copy_(dy)
    check(x, weight, a, b, bias, dy, p=p, what=f"rank {rank}, adapter {adapter}, nf4 {nf4}, padded {padded}")


# rows, in, out, rank: tails of every tile, ranks that are no multiple of 8, several tiles
SHAPES = [
    (1, 64, 16, 4),
    (5, 192, 70, 1),
    (17, 128, 50, 3),
    (33, 320, 129, 40),
    (130, 192, 96, 16),
    (70, 64, 260, 9),
]


@pytest.mark.parametrize("path", ("single", "workspace"))
@pytest.mark.parametrize("nf4", (True, False), ids=("nf4", "dense"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_within_twice_the_reference_error(device, dtype, nf4, path):
    with paths.pinned(path):
        for i, (rows, k, n, rank) in enumerate(SHAPES):
            adapter = dtype if i % 3 == 0 else torch.float32
            case(
                device, rows, k, n, rank, dtype, nf4=nf4, adapter=adapter, p=0.3 * (i % 2), bias=i % 2 == 0,
                blocksize=(64, 256)[i % 2], double=i != 2,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", ("own", "float32"))
def test_an_adapter_that_outweighs_the_base_keeps_its_precision(device, dtype, adapter):
    """Half-precision terms in the augmented product must not be what a float32 adapter is rounded to."""
    adapter = dtype if adapter == "own" else torch.float32
    for path in ("single", "workspace"):
        with paths.pinned(path):
            for padded in (True, False):
                case(device, 40, 64, 72, 12, dtype, adapter=adapter, strong=30.0, bias=False, padded=padded)


@pytest.mark.parametrize("path", ("single", "workspace"))
def test_base_without_an_adapter(device, path):
    with paths.pinned(path):
        for rows, k, n in ((1, 576, 49), (40, 128, 65)):
            for nf4 in (True, False):
                case(device, rows, k, n, 0, torch.bfloat16, nf4=nf4)


def test_a_gradient_of_the_adapter_asked_for_alone_is_the_same(device):
    x, weight, a, b, dy = (
        torch.randn(s, device=device) for s in ((33, 128), (70, 128), (5, 128), (70, 5), (33, 70))
    )
    seed, base = torch.tensor([SEED], device=device), base_of(weight)
    _, h = forward(x, *base, 70, a, b, 0.5, None, 0.1, seed)
    for need_dx in (True, False):

        def gradients(x, h, need_da, need_dx=need_dx):
            return backward(dy, x, *base, a, b, h, 0.5, 0.1, seed, need_dx, need_da)

        both, nothing = gradients(x, h, True), dy.new_empty(()).expand(x.shape)
        torch.testing.assert_close(gradients(x, None, True)[:2], both[:2])
        torch.testing.assert_close(gradients(nothing, h, False)[::2], both[::2])


def test_any_number_of_columns_runs_in_the_workspace(device):
    """77 columns: blocks that go on in the next row, rows that begin in the middle of a byte."""
    for rows, k, n, rank in ((3, 77, 31, 5), (40, 100, 33, 16)):
        for padded in (True, False):
            case(device, rows, k, n, rank, torch.bfloat16, padded=padded)
    with paths.pinned("single"), pytest.raises(ValueError, match="77 input columns are no multiple of 64"):
        case(device, 3, 77, 31, 5, torch.bfloat16)


def of_one_huge_value(device, size, where, padded):
    """y and the gradients of the kernels and of the reference, in float16; h, dh, or an element of a or b, is
    `size`.
    """
    x, dy, a, b = (torch.full(shape, 0.25) for shape in ((1, 64), (1, 64), (1, 64), (64, 1)))
    x[0, 5] = dy[0, 7] = 16.0
    a[0, 9] = b[3, 0] = -0.25
    if where in ("a", "b"):
        one, other, factor = (a, b, x) if where == "a" else (b, a, dy)
        one.view(-1)[5 if where == "a" else 7] = size
        factor /= 2.0**14
    else:
        one, other = (a, b) if where == "h" else (b, a)
        one.view(-1)[5 if where == "h" else 7] = size / 16
        other /= 2.0**12
    x, dy, a, b = x.half().to(device), dy.half().to(device), a.to(device), b.to(device)
    if padded:
        x, dy = (padded_empty(1, 64, 1, t.dtype, device, a.dtype).copy_(t) for t in (x, dy))
    weight = nf4_quantize(torch.zeros(64, 64, dtype=x.dtype, device=device), blocksize=64)
    got = ours(x, weight, a, b, None, dy, 1.0, 0.0, None)
    want = plain(x, reference_dequantize(weight, x.dtype), a, b, None, dy, 1.0, 0.0, None)
    return [t.cpu() for t in got], [t.cpu() for t in want]


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("where", ("h", "dh", "a", "b"))
def test_what_is_too_large_for_float16_is_large_and_never_nan(device, where):
    """Terms of a value above 65504 must not be infinities of both signs."""
    with paths.pinned("workspace"):
        for size, padded in ((-65519.0, True), (7e4, False), (1.2e5, True), (-1e30, False)):
            for name, got, want in zip(NAMES, *of_one_huge_value(device, size, where, padded), strict=True):
                finite = got.isfinite()
                assert not got.isnan().any(), (name, size)
                assert torch.equal(got[~finite].sign(), want[~finite].sign()), (name, size)
                torch.testing.assert_close(got[finite], want[finite], rtol=2e-3, atol=1e-3)
                if abs(size) < (131008 if where in ("h", "dh") else 65536):  # what the terms hold
                    assert torch.equal(finite, want.isfinite()), (name, size)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 70), st.integers(1, 6), st.integers(1, 150), st.integers(0, 20), st.sampled_from(DTYPES),
    st.booleans(), st.sampled_from((1e-6, 1.0, 1e2)), st.sampled_from((0.0, 0.5)),
    st.sampled_from(("single", "workspace")), st.booleans(),
)  # fmt: skip
def test_any_shape_and_magnitude(rows, k, n, rank, dtype, nf4, scale, p, path, padded):
    if dtype == torch.float16:
        scale = max(scale, 1e-2)  # below that the products are subnormal in float16
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with paths.pinned(path):
        case(
            device, rows, 64 * k, n, rank, dtype, nf4=nf4, scale=scale, p=p if rank else 0.0, padded=padded
        )  # fmt: skip

"""linear_cross_entropy: the maths, backends and instruction sets by the rule of twice the error, memory."""

import functools
import importlib
import math

import pytest
import torch
from accuracy import assert_twice_as_good
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from peft_engine import dispatch, native
from peft_engine.ops import linear_cross_entropy
from peft_engine.ops.linear_cross_entropy import CHUNKS, REDUCTIONS, _kernel, reference
from peft_engine.ops.nf4 import DTYPES

module = importlib.import_module(
    "peft_engine.ops.linear_cross_entropy"
)  # the package's name is the function's
needs_cpu = pytest.mark.skipif(native.load_error() is not None, reason=str(native.load_error()))


@pytest.fixture
def nan_in_fresh_memory():
    """torch.empty gives NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows, vocabulary, hidden, dtype, magnitude=1.0, labelled=0.6):
    x = (torch.randn(rows, hidden) * magnitude).to(dtype)
    weight = (torch.randn(vocabulary, hidden) / math.sqrt(max(hidden, 1))).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,)).masked_fill(torch.rand(rows) > labelled, -100)
    return x, weight, labels, bias


def run(loss_of, x, weight, labels, bias, reduction, dtype=None):
    """The loss and the gradients of x, weight and bias, for an upstream gradient that is not one."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    loss = loss_of(leaves[0], leaves[1], labels, bias=leaves[2], reduction=reduction)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    loss.backward(upstream)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def terms(x, weight, labels, bias, reduction, softcap=None):
    """The magnitudes added up to the loss, dx, dW and db; the rounding of a logit moves its probability."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    sizes = x.abs() @ weight.abs().T + bias.abs()
    logits, slope = torch.nn.functional.linear(x, weight, bias), 1.0
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = 1.0 - (logits / softcap).square()
        sizes = sizes * slope + logits.abs()  # tanh rounds as well
    p = logits.softmax(-1)
    kept = (labels != -100).double()
    upstream = kept * 1.5 / (kept.sum().clamp(min=1) if reduction == "mean" else 1)
    dlogits = p * (1 + sizes + (p * sizes).sum(-1, keepdim=True))
    dlogits[torch.arange(len(labels)), labels.clamp(min=0)] += 1
    dlogits *= upstream[:, None] * slope
    losses = 2 * upstream * sizes.amax(-1)
    loss = losses if reduction == "none" else losses.sum()
    return loss, dlogits @ weight.abs(), dlogits.T @ x.abs(), dlogits.sum(0)


def assert_as_good_as_the_reference(x, weight, labels, bias, reduction, softcap=None):
    plain, ours = (functools.partial(f, softcap=softcap) for f in (reference, linear_cross_entropy))
    exact = run(plain, x, weight, labels, bias, reduction, torch.float64)
    usual = run(plain, x, weight, labels, bias, reduction)
    got = run(ours, x, weight, labels, bias, reduction)
    sizes = terms(x, weight, labels, bias, reduction, softcap)
    for name, truth, r, g, size in zip(("loss", "dx", "dW", "db"), exact, usual, got, sizes, strict=True):
        if not r.isfinite().all():
            # Beyond float16's range the reference has NaN in ignored rows too; here those are not computed.
            assert (g.isfinite() | ~r.isfinite()).all(), name
        else:
            assert_twice_as_good(g, r, truth, size, what=name)


# --- the maths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_the_reference_are_those_of_its_differences(reduction):
    x, weight, labels, bias = problem(5, 7, 4, torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, w, b: reference(x, w, labels, bias=b, reduction=reduction), leaves
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_is_the_cross_entropy_of_the_logits(backend, reduction):
    x, weight, labels, bias = problem(30, 37, 16, torch.float32)
    logits = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    want = torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)
    got = linear_cross_entropy(x, weight, labels, bias=bias, reduction=reduction)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


# 1003 = 62 full vectors and a tail; 48 no tail; 17 and 5 shorter than a loop's step.
@pytest.mark.parametrize(
    ("rows", "vocabulary", "hidden"), [(300, 1003, 32), (7, 48, 8), (3, 17, 1), (1, 5, 3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_instruction_set_is_as_good_as_the_reference(
    isa, nan_in_fresh_memory, dtype, reduction, rows, vocabulary, hidden
):
    assert_as_good_as_the_reference(*problem(rows, vocabulary, hidden, dtype), reduction)


@pytest.mark.parametrize(("rows", "vocabulary", "hidden"), [(300, 1003, 32), (7, 48, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_capped_logits_are_as_good_as_the_reference(
    backend, softcap, dtype, reduction, rows, vocabulary, hidden
):
    assert_as_good_as_the_reference(*problem(rows, vocabulary, hidden, dtype), reduction, softcap)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("inf"), float("nan")])
def test_a_softcap_that_is_none_is_refused(softcap):
    x, weight, labels, _ = problem(3, 17, 8, torch.float32)
    with pytest.raises(ValueError, match="softcap must be a number above 0"):
        linear_cross_entropy(x, weight, labels, softcap=softcap)


@needs_cpu
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 31, 200]),
    vocabulary=st.sampled_from([1, 2, 16, 63, 65, 257, 1009]),
    hidden=st.sampled_from([16, 23, 64]),  # of one or two elements the largest error is a matter of luck
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-6, 1.0, 30.0, 1e4]),
    labelled=st.sampled_from([0.0, 0.05, 1.0]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 1 << 20),
)
def test_any_shape_magnitude_and_labelling(
    rows, vocabulary, hidden, dtype, magnitude, labelled, reduction, seed
):
    torch.manual_seed(seed)
    with dispatch.force_backend("cpu"):
        assert_as_good_as_the_reference(
            *problem(rows, vocabulary, hidden, dtype, magnitude, labelled), reduction
        )


def test_logits_of_minus_infinity_have_no_probability_and_nan_stays_nan(isa):
    bias = torch.zeros(40)
    bias[3] = -math.inf
    loss, dx, _, db = run(
        linear_cross_entropy, torch.ones(2, 4), torch.ones(40, 4), torch.tensor([1, 2]), bias, "sum"
    )
    assert loss.item() == pytest.approx(2 * math.log(39), rel=1e-6) and db[3] == 0 and dx.isfinite().all()
    x = torch.ones(2, 4)
    x[1, 0] = math.nan
    loss = linear_cross_entropy(x, torch.ones(40, 4), torch.tensor([1, 2]), reduction="none")
    assert loss[0].isfinite() and loss[1].isnan()


# --- labels ----------------------------------------------------------------------------------------------


def test_without_labels_mean_is_nan_sum_is_zero_and_gradients_are_zero(backend):
    x, weight, _, _ = problem(6, 11, 4, torch.float32)
    labels = torch.full((6,), -100)
    x.requires_grad_()
    assert linear_cross_entropy(x, weight, labels).isnan()
    total = linear_cross_entropy(x, weight, labels, reduction="sum")
    total.backward()
    assert total == 0 and not x.grad.any()
    assert not linear_cross_entropy(x, weight, labels, reduction="none").any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integers_are_compared_as_numbers(backend, dtype):
    """In uint8 -100 is 156, and 300 is 44."""
    x, weight, _, _ = problem(6, 200, 8, torch.float32)
    labels = torch.tensor([44, 100, 44, 3, 120 if dtype == torch.int8 else 156, 9])
    for ignored in (-100, 300):
        want = linear_cross_entropy(x, weight, labels, ignore_index=ignored)
        assert torch.equal(linear_cross_entropy(x, weight, labels.to(dtype), ignore_index=ignored), want)


def test_no_rows_at_all(backend):
    x, labels = torch.empty(2, 0, 4, requires_grad=True), torch.empty(2, 0, dtype=torch.long)
    assert linear_cross_entropy(x, torch.ones(3, 4), labels).isnan()
    linear_cross_entropy(x, torch.ones(3, 4), labels, reduction="sum").backward()
    assert x.grad.shape == x.shape


def test_rows_without_a_label_have_loss_and_gradient_zero_and_are_never_computed(backend):
    x, weight, labels, _ = problem(20, 33, 8, torch.float32)
    x[labels == -100] = math.nan
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, reduction="none")
    assert (loss[labels == -100] == 0).all() and loss[labels != -100].all()
    if backend != "reference":
        assert linear_cross_entropy(x, weight, labels).isfinite()
        loss.sum().backward()
        assert (x.grad[labels == -100] == 0).all() and x.grad.isfinite().all()


def test_leading_dimensions_strides_and_another_ignore_index(backend):
    x, weight, labels, _ = problem(24, 33, 8, torch.float32)
    plain = linear_cross_entropy(x, weight, labels)
    strided = torch.stack((x, x), -1)[..., 1].view(4, 6, 8)
    twice = torch.cat((weight, weight), 1)[:, 8:]
    ignored = labels.masked_fill(labels == -100, 32).view(4, 6).int()
    loss = linear_cross_entropy(strided, twice, labels.view(4, 6).int(), reduction="none")
    assert loss.shape == (4, 6)
    assert torch.equal(linear_cross_entropy(strided, twice, labels.view(4, 6)), plain)
    keep = (ignored != 32).sum()
    got = linear_cross_entropy(strided, twice, ignored, ignore_index=32, reduction="sum") / keep
    torch.testing.assert_close(got, loss[ignored != 32].mean())


@needs_cpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_captured_graph_computes_all_rows_and_gives_the_same(monkeypatch, reduction):
    """How many rows have a label is not known to the host then."""
    x, weight, labels, bias = problem(40, 33, 8, torch.float32)
    x[labels == -100] = math.nan
    with dispatch.force_backend("cpu"):
        want = run(linear_cross_entropy, x, weight, labels, bias, reduction)
        monkeypatch.setattr(dispatch, "is_captured", lambda x: True)
        got = run(linear_cross_entropy, x, weight, labels, bias, reduction)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        nothing = torch.full_like(labels, -100)
        assert linear_cross_entropy(x, weight, nothing).isnan()
        assert linear_cross_entropy(x, weight, nothing, reduction="sum") == 0


# --- memory ----------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@needs_cpu
def test_a_large_weight_has_a_quarter_of_its_bytes_beside_it_and_a_small_one_no_more_than_before():
    for vocabulary, rows in ((1 << 18, 128), (1 << 16, 128), (49152, 128)):
        weight = torch.empty(vocabulary, 640, device="meta")
        chunks = CHUNKS["cpu"].beside(weight)
        assert chunks.nbytes == max(CHUNKS["cpu"].nbytes, weight.nbytes // 4)
        assert chunks.step(896, vocabulary * 4, chunks.rows) == rows
    assert CHUNKS["cpu"].beside(weight) == CHUNKS["cpu"]


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_chunks_stay_within_their_bytes_and_cover_all_rows(chunks):
    for rows, vocabulary, size in [
        (512, 49152, 2),
        (10_000, 49152, 2),
        (5, 300_000, 4),
        (1, 1, 2),
        (129, 49152, 2),
    ]:
        step = chunks.step(rows, vocabulary * size, chunks.rows)
        assert 1 <= step <= max(1, chunks.nbytes // (vocabulary * size))
        assert step <= max(chunks.rows, rows // 16)


def test_a_gpus_chunks_fill_it():
    chunks = CHUNKS["cuda"]
    assert chunks.step(8192, 128_256 * 2, chunks.rows) == 1024 == chunks.step(2048, 49_152 * 2, chunks.rows)


@needs_cpu
def test_logits_are_never_held_as_a_whole_not_even_for_the_gradient_of_the_weight():
    rows, vocabulary, hidden = 2048, 8000, 2
    x, weight, labels, bias = problem(rows, vocabulary, hidden, torch.bfloat16, labelled=1.0)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    traced = LargestTensor()
    with traced, torch.no_grad():
        _kernel(leaves[0], leaves[1], leaves[2], labels, -100, None, None, True, True, True, True)
    assert traced.elements * 2 <= CHUNKS["cpu"].nbytes
    assert traced.elements < rows * vocabulary / 15


@needs_cpu
def test_only_a_gradient_of_the_size_of_x_is_kept_for_the_backward():
    x, weight, labels, _ = problem(64, 500, 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x.requires_grad_(), weight, labels)
    assert sorted(t.numel() for t in kept) == [0, 0, 64, 64 * 8]


@needs_cpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_allocates_its_result_alone(dtype, reduction):
    """And no copies in float32 of a half-precision gradient."""
    x, weight, labels, _ = problem(512, 50, 64, dtype)
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels, reduction=reduction)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(loss, x)
    asked = (event.self_cpu_memory_usage for event in profile.events())
    assert sum(n for n in asked if n > 0) < x.nbytes + 4096


# --- around it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_traces_as_one_graph_with_any_number_of_labels(backend, reduction):
    x, weight, labels, bias = problem(20, 33, 8, torch.float32)
    x.requires_grad_()
    compiled = torch.compile(
        lambda x, labels: linear_cross_entropy(x, weight, labels, bias=bias, reduction=reduction) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    for masked in (0, 7):
        labels[:masked] = -100
        plain = linear_cross_entropy(x, weight, labels, bias=bias, reduction=reduction) * 2
        (want,) = torch.autograd.grad(plain.sum(), x)
        (got,) = torch.autograd.grad(compiled(x, labels).sum(), x)
        assert torch.equal(got, want)


def test_a_second_backward_over_a_kept_graph_gives_the_same_gradient(backend):
    x, weight, labels, _ = problem(20, 33, 8, torch.float32)
    loss = linear_cross_entropy(x.requires_grad_(), weight, labels)
    (first,) = torch.autograd.grad(loss * 3, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 3, x)
    assert torch.equal(first, second)


def test_autocast_casts_x_and_weight_and_returns_float32(backend):
    x, weight, labels, bias = problem(20, 33, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(x, weight, labels, bias=bias)
        want = torch.nn.functional.cross_entropy(torch.nn.functional.linear(x, weight, bias).float(), labels)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def _one(**changes):
    x, weight, labels, bias = problem(4, 9, 8, torch.float32)
    return {"x": x, "weight": weight, "labels": labels, "bias": bias} | changes


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"x": torch.ones(4, 7)},
            ValueError,
            r"x must be \(\.\.\., in_features\)=\(\.\.\., 8\), got \(4, 7\)",
        ),
        ({"x": torch.ones(4, 8, dtype=torch.float64)}, TypeError, "got torch.float64"),
        ({"weight": torch.ones(9, 8).half()}, TypeError, "weight torch.float16; cast"),
        ({"weight": torch.ones(9)}, ValueError, "weight must be"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, ValueError, r"labels must be \(4,\).*got \(5,\)"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be integers, got torch.float32"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must be \(9,\)"),
        ({"reduction": "max"}, ValueError, "one of mean, sum, none, got 'max'"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(changes, error, words):
    with pytest.raises(error, match=f"linear_cross_entropy: .*{words}"):
        linear_cross_entropy(**_one(**changes))


@needs_cpu
def test_a_float16_weight_gradient_leaves_the_range_only_when_it_does_so_itself():
    """The sum over rows is beyond 65,504 before it is divided by the items of the batch, and not after."""
    x, weight = torch.full((2000, 1), 100.0).half(), torch.zeros(2, 1).half().requires_grad_()
    (linear_cross_entropy(x, weight, torch.zeros(2000, dtype=torch.long), reduction="sum") / 2000).backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[-50.0], [50.0]]).half(), rtol=2e-3, atol=0)


@needs_cpu
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_scaled_float16_loss_keeps_small_gradients(reduction):
    """As with GradScaler: a row's share of the mean is below float16's normal numbers before the scale."""
    x, weight, labels, _ = problem(2048, 4000, 16, torch.float32)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x.half() / 16, weight.half() / 16)]
        run = linear_cross_entropy if dtype == torch.float16 else reference
        loss = run(*leaves, labels, reduction=reduction)
        scale = 65536.0 if reduction == "mean" else 65536.0 / len(labels)
        gradients.append(torch.autograd.grad(loss * scale, leaves))
    for got, want in zip(*gradients, strict=True):
        assert ((got.double() - want).norm() / want.norm()).item() < 1e-3


@needs_cpu
@pytest.mark.parametrize("label", [9, -1])
def test_a_label_outside_the_vocabulary_is_named(label):
    words = f"label {label} is outside the vocabulary, 0 to 8"
    with dispatch.force_backend("cpu"), pytest.raises(IndexError, match=words):
        linear_cross_entropy(**_one(labels=torch.tensor([1, -100, label, 2])))

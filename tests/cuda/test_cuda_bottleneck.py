"""bottleneck's CUDA kernel on the CPU: right on any input and in any order, clean under sanitizers."""

import ctypes

import bottleneck_cases
import pytest
import torch
from accuracy import assert_twice_as_good
from bottleneck_cases import call_of, check, expected, operands
from cuda_cases import blank, same_bits
from cuda_on_cpu import LaunchFailed, Library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_engine.kernels.bottleneck import few_rows, tiles
from peft_engine.kernels.bottleneck.call import Call
from peft_engine.kernels.bottleneck.forward import choose, forward

from peft_engine.kernels import scratch
from peft_engine.ops.bottleneck import ACTIVATIONS
from peft_engine.ops.nf4 import DTYPES

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = [*((dtype, dtype) for dtype in DTYPES), (HALF, FLOAT), (BF16, FLOAT)]
LIBRARY = "bottleneck"  # for as_if_on_a_gpu
ANY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def adapter() -> Library:
    return bottleneck_cases.kernels()


@pytest.mark.parametrize("dtype,weight", PAIRS)
def test_any_rows(adapter, dtype, weight):
    for rows in (1, 2, 4, 5, 16):
        check(adapter, rows, 136, 24, dtype, weight=weight, residual=rows == 2)


@pytest.mark.parametrize("dtype,weight", PAIRS)
@pytest.mark.parametrize(
    "features,width", ((1, 1), (7, 3), (97, 16), (264, 1), (2200, 64), (48, 301), (32, 512))
)
def test_any_features_and_width(adapter, features, width, dtype, weight):
    """Whole blocks, tails, what is not read 16 bytes at a time, several steps of each loop."""
    check(adapter, 3, features, width, dtype, weight=weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_activation(adapter, activation):
    for dtype in DTYPES:
        check(adapter, 4, 64, 40, dtype, activation=activation, scaling=-1.5)


@pytest.mark.parametrize("dtype,weight", PAIRS)
def test_biases_and_a_residual_of_its_own_may_be_there_or_not(adapter, dtype, weight):
    for biases, residual in ((False, False), (True, True), (False, True)):
        check(adapter, 2, 72, 16, dtype, weight=weight, biases=biases, residual=residual)


@pytest.mark.parametrize("dtype,weight", PAIRS)
def test_the_norm_is_part_of_it(adapter, dtype, weight):
    for rows, features, norm, norm_bias in (
        (1, 64, dtype, True),
        (3, 601, FLOAT, False),
        (9, 2304, FLOAT, True),
    ):
        check(adapter, rows, features, 12, dtype, weight=weight, norm=norm, norm_bias=norm_bias)


@pytest.mark.parametrize("magnitude", (1e-6, 1.0, 30.0, 1e4))
def test_any_magnitude(adapter, magnitude):
    for dtype in (FLOAT, BF16):
        check(adapter, 3, 160, 20, dtype, magnitude=magnitude, activation="silu")
        check(adapter, 3, 160, 20, dtype, magnitude=magnitude, norm=FLOAT)


@ANY
@given(
    st.integers(1, 16), st.integers(1, 700), st.integers(1, 140), st.sampled_from(PAIRS),
    st.sampled_from(list(ACTIVATIONS)), st.booleans(), st.booleans(),
    st.sampled_from((None, None, "own", FLOAT)), st.sampled_from((0, 0, 1, 8)), st.sampled_from((1, 3, 132)),
)  # fmt: skip
def test_any_call(adapter, rows, features, width, pair, activation, biases, residual, norm, shift, many):
    dtype, weight = pair
    check(
        adapter, rows, features, width, dtype, weight=weight, activation=activation, biases=biases,
        residual=residual, norm=dtype if norm == "own" else norm, shift=shift, multiprocessors=many,
    )  # fmt: skip


def test_what_is_no_number_stays_none(adapter):
    for activation in ACTIVATIONS:
        given_ = operands(2, 64, 8, BF16)
        given_[0][0, 5] = float("nan")
        y, middle = blank(2, 64, dtype=BF16), blank(2, 8, dtype=BF16)
        arguments = y, middle, blank(0, 2), bottleneck_cases.workspace()
        adapter.run(call_of(given_, activation, 1.0, *arguments))
        assert y[0].isnan().all() and middle[0].isnan().all()
        assert not y[1].isnan().any() and not middle[1].isnan().any()


def test_the_result_does_not_depend_on_the_order_of_blocks_and_threads(adapter):
    results = []
    orders = ({}, {"seed": -1}, {"seed": 1, "room": 1}, {"seed": 2, "blocks": 3}, {"multiprocessors": 1})
    for order in orders:
        torch.manual_seed(0)
        results.append(check(adapter, 3, 200, 20, BF16, norm=BF16, times=2, **order))
    assert all(same_bits(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_no_block_waits_for_one_that_has_not_started(adapter):
    """As many as run at once take all the pieces, in any order of starting."""
    for room in (1, 2, 3):
        for seed in (0, -1, 1):
            check(adapter, 2, 64, 40, HALF, room=room, seed=seed)


@pytest.mark.parametrize("dtype,weight", PAIRS)
def test_a_row_has_the_same_bits_whatever_else_is_in_the_batch(adapter, dtype, weight):
    given_ = operands(16, 328, 20, dtype, weight=weight, norm=dtype, residual=True)
    whole = check(adapter, 16, 328, 20, dtype, given=given_)
    for rows in (1, 3, 4, 5, 11):
        part = [None if t is None else t[-rows:].clone() for t in given_[:2]]
        found = check(adapter, rows, 328, 20, dtype, given=(*part, *given_[2:]))
        assert all(same_bits(a, b[-rows:]) for a, b in zip(found, whole, strict=True)), rows


def test_one_launch_of_a_block_for_each_part_as_far_as_they_run_at_once(adapter):
    check(adapter, 1, 320, 30, BF16)
    assert adapter.last_launch()[:4] == (15, 1, 1, 256)  # pieces of the width, two each
    check(adapter, 1, 1024, 6, BF16)
    assert adapter.last_launch()[0] == 32  # columns of y, 32 each
    check(adapter, 1, 1024, 6, BF16, multiprocessors=4)
    assert adapter.last_launch()[0] == 4


def test_without_rows_nothing_is_launched_and_what_it_does_not_take_is_refused(adapter):
    ask = adapter.dll.pe_bottleneck_workspace
    ask.restype = ctypes.c_int64
    assert ask() == 4 * bottleneck_cases.WORDS
    check(adapter, 0, 8, 4, HALF)
    for rows, features, width in ((17, 8, 4), (1, 8, 513)):
        with pytest.raises(LaunchFailed, match="returned 1:"):
            check(adapter, rows, features, width, HALF)
    y = blank(1, 8)
    call = list(call_of(operands(1, 8, 4, FLOAT), "relu", 1.0, y, blank(1, 4), blank(0, 2), y))
    call[14] = 4  # no such activation
    with pytest.raises(LaunchFailed, match="returned 1:"):
        adapter.run(tuple(call))
    assert y.isnan().all()


# --- from Python --------------------------------------------------------------------------------------------


@pytest.fixture
def few_rows_on_a_gpu(as_if_on_a_gpu, monkeypatch):
    """Few rows are for the emulated library."""
    monkeypatch.setattr(few_rows, "refuse", lambda call, x: few_rows.refuse_sizes(*x.shape, call.width))


def test_python_passes_what_the_op_was_given(few_rows_on_a_gpu):
    """The raw op's arguments, each there or not; scratch serves calls of several sizes."""
    cases = (
        (2, 24, 5, HALF, FLOAT, FLOAT, True, "silu"), (5, 40, 8, BF16, BF16, BF16, False, "gelu"),
        (1, 9, 3, FLOAT, FLOAT, None, True, "tanh"),
    )  # fmt: skip
    for rows, features, width, dtype, weight, norm, biases, activation in cases:
        options = {"weight": weight, "norm": norm, "biases": biases, "residual": biases}
        tensors = operands(rows, features, width, dtype, **options)
        y, middle, stats = forward(*tensors, activation, 0.3, bottleneck_cases.EPS)
        exact = expected([None if t is None else t.double() for t in tensors], activation, 0.3)
        plain = expected(tensors, activation, 0.3)
        found = (y, middle, stats) if norm else (y, middle)
        for got, same, right in zip(found, plain, exact, strict=False):
            assert_twice_as_good(got, same, right, torch.ones(1))
        assert stats.shape == (rows if norm else 0, 2) and middle.dtype == weight
    assert len(scratch._held) == 1


def test_which_path_runs_and_why_another_does_not(few_rows_on_a_gpu, monkeypatch):
    def path(rows, width=8):
        tensors = operands(rows, 24, width, BF16)
        return choose(Call(*tensors[2:], "relu", 1.0), tensors[0])

    assert path(1) == path(16) == "few_rows" and path(17) == path(1, 513) == "split"
    monkeypatch.undo()
    assert path(1) == "split"
    tensors = operands(1, 24, 8, BF16)
    call = Call(*tensors[2:], "relu", 1.0)
    assert few_rows.refuse(call, tensors[0]) == "the tensors are on cpu"
    assert few_rows.refuse_sizes(17, 8, 8) == "it takes up to 16 rows, got 17"
    assert few_rows.refuse_sizes(1, 8, 513) == "width 513 is above 512, the most it holds"
    assert "2^30" in few_rows.refuse_sizes(1, 2**30, 8)
    with tiles.pinned("split"):
        assert tiles.pinned_path() == "split"
    assert tiles.pinned_path() is None


# --- sanitizers ---------------------------------------------------------------------------------------------


def whole(target):
    """Several pieces and tiles; 16 bytes at a time."""
    check(target, 3, 96, 8, BF16, norm=BF16, multiprocessors=2, times=2)


def odd(target):
    """What is not read 16 bytes at a time, and more rows."""
    check(target, 9, 45, 5, HALF, weight=FLOAT, residual=True, multiprocessors=3)


@pytest.mark.parametrize("kind", ("address", "thread"))
@pytest.mark.parametrize("case", (whole, odd), ids=lambda f: f.__name__)
def test_it_is_clean(program, kind, case):
    case(program(kind))

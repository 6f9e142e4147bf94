"""prefix_attention's CUDA kernel on the CPU: right on any input and in any order, clean, its faults found."""

import ctypes

import prefix_cases
import pytest
import torch
from accuracy import assert_twice_as_good
from cuda_on_cpu import BadAccess, LaunchFailed, Library, Race
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_engine.kernels.prefix_attention import decode
from planted import Fault, in_kernel
from prefix_cases import check, padded, windows

from peft_engine.kernels import scratch
from peft_engine.ops.attention import by_token
from peft_engine.ops.nf4 import DTYPES
from peft_engine.ops.prefix_attention import reference

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
LIBRARY = "prefix_attention"  # for as_if_on_a_gpu
ANY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def attention() -> Library:
    return prefix_cases.kernels()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (1, 8, 40, 64, 100, 128, 192, 256))
def test_any_head_dim(attention, head_dim, dtype):
    check(attention, 2, 1, 4, 1, 45, 7, head_dim, dtype, multiprocessors=2)


@pytest.mark.parametrize("keys", (0, 1, 63, 64, 65, 300))
@pytest.mark.parametrize("prefix", (0, 1, 31, 33, 100))
def test_any_number_of_keys(attention, keys, prefix):
    check(attention, 2, 1, 2, 1, keys, prefix, 64, BF16, multiprocessors=1)


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("group,queries", ((1, 1), (3, 1), (4, 1), (5, 1), (8, 1), (1, 8), (4, 4), (7, 3)))
def test_any_rows(attention, group, queries, shared):
    for batch in (1, 5):
        check(attention, batch, 2, group, queries, 20, 5, 32, HALF, shared=shared, causal=True)


@pytest.mark.parametrize("dtype", (FLOAT, BF16))
def test_padding_on_the_left_and_rows_that_see_nothing(attention, dtype):
    for keys, queries, prefix in ((90, 1, 5), (90, 3, 0), (200, 2, 33)):
        intervals = padded(4, queries, keys)
        check(attention, 4, 1, 2, queries, keys, prefix, 64, dtype, intervals=intervals, multiprocessors=1)


@pytest.mark.parametrize("width", (1, 9, 100))
def test_windows_that_differ_from_query_to_query(attention, width):
    for queries, keys in ((4, 90), (7, 230)):
        intervals = windows(2, queries, keys, width)
        check(attention, 2, 1, 2, queries, keys, 5, 64, HALF, intervals=intervals, multiprocessors=1)


def test_a_prefix_in_float32_is_rounded_as_it_is_read(attention):
    for shared, head_dim in ((True, 64), (False, 20)):
        check(attention, 3, 2, 2, 1, 30, 40, head_dim, BF16, shared=shared, wide=True)


@pytest.mark.parametrize("gap", (1, 8))
def test_keys_may_lie_apart(attention, gap):
    for dtype in DTYPES:
        check(attention, 2, 2, 2, 1, 40, 9, 16, dtype, gap=gap)


@pytest.mark.parametrize("magnitude", (1e-6, 1.0, 30.0, 1e4))
def test_any_magnitude(attention, magnitude):
    for dtype in (FLOAT, BF16):
        check(attention, 2, 1, 2, 1, 150, 20, 64, dtype, magnitude=magnitude, multiprocessors=1)


@ANY
@given(
    st.integers(1, 6), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 120),
    st.integers(0, 70), st.integers(1, 140), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from(("all", "causal", "padded")), st.sampled_from((0, 0, 1, 8)), st.sampled_from((1, 132)),
)  # fmt: skip
def test_any_call(
    attention, batch, kv_heads, group, queries, keys, prefix, head_dim, dtype, shared, wide, sees, gap, many
):
    keys = max(keys, queries if sees != "all" else 0)
    intervals = padded(batch, queries, keys) if sees == "padded" else None
    check(
        attention, batch, kv_heads, group, queries, keys, prefix, head_dim, dtype, shared=shared, gap=gap,
        wide=wide, causal=sees == "causal", intervals=intervals, multiprocessors=many,
    )  # fmt: skip


def test_the_result_does_not_depend_on_the_order_of_blocks_and_threads(attention):
    outs = []
    for order in ({}, {"seed": -1}, {"seed": 1, "room": 1}, {"seed": 2, "blocks": 3}, {"seed": 3}):
        torch.manual_seed(0)
        outs.append(check(attention, 3, 2, 2, 1, 300, 40, 64, BF16, multiprocessors=4, times=2, **order))
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_without_rows_nothing_is_launched_and_what_it_does_not_take_is_refused(attention):
    for sizes in ((0, 2, 1, 1), (2, 2, 1, 0)):
        check(attention, *sizes, 8, 4, 16, HALF)
    ask = attention.dll.pe_prefix_attention_workspace
    ask.restype = ctypes.c_int64
    for sizes in ((2, 2, 1, 1, 8, 4, 257, 1), (2**10, 32, 1, 1, 8, 4, 64, 1), (1, 1, 1, 1, -1, 4, 64, 1)):
        assert ask(*sizes, 0) == -1


def test_the_keys_are_cut_for_many_multiprocessors_and_the_prefix_is_read_for_several_rows(attention):
    check(attention, 4, 1, 2, 1, 1000, 32, 8, BF16)
    assert attention.last_launch()[:4] == (4 * 16 + 1, 1, 1, 128)  # 16 slots of 64 keys for each row
    check(attention, 4, 1, 2, 1, 1000, 32, 8, BF16, shared=False, multiprocessors=1)
    assert attention.last_launch()[0] == 4 * 1 + 4


# --- from Python --------------------------------------------------------------------------------------------


def test_python_passes_what_the_op_was_given(as_if_on_a_gpu):
    """Any strides, each mask; out is by token; scratch serves calls of several sizes."""
    for batch, groups, keys, masks in ((2, 1, 90, "padded"), (3, 3, 5, "causal"), (1, 1, 0, "all")):
        q = torch.randn(batch, 2, 4, 24).transpose(1, 2)
        k, v = (torch.randn(keys, batch, 2, 32).permute(1, 2, 0, 3)[..., :24] for _ in range(2))
        pk, pv = (torch.randn(groups, 6, 2, 24).transpose(1, 2) for _ in range(2))
        first, last = padded(batch, 2, keys) if masks == "padded" else (None, None)
        out, lse = decode.forward(q, k, v, pk, pv, first, last, masks == "causal", 0.3)
        given = q, k, v, pk, pv, first, last, None, masks == "causal", 0.3
        exact = reference(*(t.double() for t in given[:5]), *given[5:])
        assert_twice_as_good(out, reference(*given), exact)
        assert out.stride() == by_token(q).stride() and lse.shape == q.shape[:3] and not lse.isnan().any()
    assert len(scratch._held) == 1


def test_sizes_that_the_library_refuses_are_told(as_if_on_a_gpu):
    q, k, prefix = (torch.zeros(2**10, 32, 1, 8), torch.zeros(2**10, 32, 3, 8), torch.zeros(1, 32, 4, 8))
    with pytest.raises(
        RuntimeError, match=r"prefix_attention: the CUDA library refuses .*\(1024, 32, 1, 8\)"
    ):
        decode.forward(q, k, k, prefix, prefix, None, None, True, 1.0)


def test_why_it_does_not_run_is_told():
    def why(batch=1, heads=4, queries=1, d=64, kv_heads=2, bias=None, dtype=BF16):
        q, k = (torch.empty(batch, h, queries, d, dtype=dtype, device="meta") for h in (heads, kv_heads))
        return decode.refuse_sizes(q, k, bias)

    assert why() is None and why(heads=32) is None and why(queries=8, heads=2) is None
    assert why(bias=torch.zeros(1)) == "it adds no bias"
    assert why(d=257) == "head_dim 257 is above 256"
    assert why(queries=9) == "it takes 8 queries and 16 rows of a key head, got 9 and 18"
    assert why(heads=34) == "it takes 8 queries and 16 rows of a key head, got 1 and 17"
    assert "which is less than torch.float64" in why(dtype=torch.float64)
    assert "16384" in why(batch=8193)
    q = torch.zeros(1, 2, 1, 8)
    assert decode.refuse(q, q, None) == "the tensors are on cpu"


# --- sanitizers and faults ----------------------------------------------------------------------------------


def slots(target):
    """Several slots of prefix and keys; a prefix that several rows share; a tail of head_dim."""
    check(target, 3, 1, 2, 1, 170, 40, 56, BF16, multiprocessors=2, times=2)


def alone(target):
    check(target, 1, 1, 2, 1, 43, 0, 32, FLOAT, multiprocessors=1)


def many_tiles(target):
    """Largest scores that grow from one tile of a warp to the next."""
    check(target, 1, 1, 1, 1, 1100, 0, 64, BF16, multiprocessors=1)


def prefix_last(target):
    check(target, 3, 1, 2, 1, 70, 5, 32, BF16, seed=-1)


def in_windows(target):
    check(target, 1, 1, 2, 4, 70, 3, 64, HALF, intervals=windows(1, 4, 70, 5), multiprocessors=1)


def causal(target):
    check(target, 2, 1, 2, 3, 70, 5, 64, HALF, causal=True, multiprocessors=1)


def left_padding(target):
    check(target, 4, 1, 2, 1, 150, 5, 64, HALF, intervals=padded(4, 1, 150), multiprocessors=1)


def odd(target):
    """What is not read 16 bytes at a time."""
    check(target, 2, 1, 5, 2, 30, 9, 13, HALF, wide=True, gap=1, multiprocessors=1)


def own_prefixes(target):
    check(target, 3, 2, 2, 1, 40, 9, 32, BF16, shared=False)


@pytest.mark.parametrize("kind", ("address", "thread"))
@pytest.mark.parametrize("case", (slots, causal, left_padding, odd), ids=lambda f: f.__name__)
def test_it_is_clean(program, kind, case):
    case(program(kind))


# What, the file, the program that must find it, old, new, how it is found, the check.
FAULTS = [
    ("a split's largest score forgotten in the merge", "merge", "plain",
     "const float weight = states[slot * kRows].x;", "const float weight = 1.0f;", AssertionError,
     slots),
    ("a split's sum added unweighed", "merge", "plain",
     "total = fmaf(states[s * apart].y, weight, total);\n    states[s * apart].x = weight;\n  }\n  for",
     "total += states[s * apart].y;\n    states[s * apart].x = weight;\n  }\n  for", AssertionError, slots),
    ("the lanes' sums not added", "merge", "plain", "total += __shfl_xor_sync",
     "total += 0.0f * __shfl_xor_sync", AssertionError, slots),
    ("the last slot left out", "merge", "plain", "slot < slots; ++slot", "slot < slots - 1; ++slot",
     AssertionError, slots),
    ("counters not put back", "arrivals", "plain", "if (last) *counter = 0;", "", AssertionError, slots),
    ("only the first row of the batch finished", "merge", "plain", "i < work.batches; ++i", "i < 1; ++i",
     AssertionError, prefix_last),
    ("zeros where nothing is seen forgotten", "merge", "plain",
     "whole.y == 0.0f ? 0.0f : 1.0f / whole.y", "1.0f / whole.y", AssertionError,
     lambda target: check(target, 2, 1, 1, 1, 9, 0, 8, BF16, intervals=padded(2, 1, 9))),
    ("sums not faded", "keys", "plain", "acc[i][e] *= of;", "acc[i][e] *= 1;", AssertionError, many_tiles),
    ("the total not faded", "keys", "plain", "total *= fade, top = higher;", "top = higher;", AssertionError,
     many_tiles),
    ("one key too many", "keys", "plain", "|| key >= seen.y", "|| key > seen.y", AssertionError, causal),
    ("padding seen", "keys", "plain", "key < seen.x || ", "", AssertionError, in_windows),
    ("a key read past the end", "keys", "address", "key < end && d < call.head_dim;", "d < call.head_dim;",
     BadAccess, alone),
    ("head_dim's tail read", "keys", "address", "key < end && d + i < call.head_dim", "key < end", BadAccess,
     lambda target: check(target, 1, 1, 1, 1, 3, 2, 13, HALF)),
    ("head_dim's tail written", "merge", "plain", "d >= call.head_dim || ", "", AssertionError, slots),
    ("rows that are not there written", "merge", "address", "rows = min(kRows, call.rows() - work.first_row)",
     "rows = kRows", BadAccess, slots),
    ("no wait for the copies", "keys", "plain", "cp_async_wait<1>();", "", AssertionError, slots),
    ("a wait for the wrong group", "keys", "plain", "cp_async_wait<1>", "cp_async_wait<2>", AssertionError,
     slots),
    ("the causal end off by one", "call", "plain", "call.keys - call.queries + query + 1",
     "call.keys - call.queries + query", AssertionError, causal),
    ("the prefix of the first row for all", "keys", "plain", "keys_from(w.batch * keys.batch + ",
     "keys_from(", AssertionError, own_prefixes),
    ("states laid over stages that are read", "keys", "thread",
     "__syncthreads();  // the stages are no longer read", "", Race, slots),
    ("states read before they are there", "keys", "thread", "__syncthreads();  // all states are there", "",
     Race, slots),
    ("weights read before they are there", "merge", "thread", "__syncthreads();  // the weights are there",
     "", Race, slots),
    ("no barrier before the arrival", "merge", "thread", "__syncthreads();  // the parts are written", "",
     Race, slots),
    ("no release fence", "arrivals", "thread", "__threadfence();\n  const unsigned", "const unsigned", Race,
     slots),
    ("no acquire fence", "arrivals", "thread", "__threadfence();\n  const bool", "const bool", Race, slots),
    ("two slots in one place", "merge", "thread", "call.plan.slots() + slot) * rows",
     "call.plan.slots() + slot / 2) * rows", Race, slots),
]  # fmt: skip


def planted_kernel(what, part, kind, old, new, found, case) -> Fault:
    name = part if part == "arrivals" else f"prefix_attention_{part}"
    return in_kernel(("prefix_attention",), what, f"{name}.cuh", kind, old, new, found, case)


@pytest.mark.parametrize("fault", [planted_kernel(*fault) for fault in FAULTS], ids=lambda f: f.what)
def test_a_fault_is_found(planted, fault):
    fault.must_be_found(planted(fault))


def test_a_refused_call_writes_nothing(attention):
    with pytest.raises(LaunchFailed, match="returned 1:"):
        out = torch.full((8,), float("nan"))
        call = (
            "pe_prefix_attention_decode",
            *[out] * 5,
            torch.zeros(18, dtype=torch.int64),
            1,
            1,
            1,
            1,
            1,
            1,
            8,
            1,
        )
        attention.run((*call, None, None, 0, 1.0, 3, 0, out, out, out, 0, 0))
    assert out.isnan().all()

"""Faults planted in lora_linear's Triton kernels are found, each by the interpreter or by the answer."""

import importlib

import faulty
import pytest
import test_lora_groups_triton as groups_test
import test_lora_linear_triton as linear_test
import torch
from peft_engine.kernels.lora_linear import paths
from triton_interpreter import OutOfBounds, Race

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors")

WRONG = AssertionError

# file, what is replaced, by what, how it is found, where the file's functions are used
FAULTS = [
    (
        "single",
        "inside_m[:, None] & there[None, :], other=0)",
        "there[None, :] & (m >= 0)[:, None], other=0)",
        OutOfBounds,
    ),
    (
        "single",
        "(r < rank)[:, None] & inside_m[None, :], other=0.0",
        "(r < rank)[:, None] & (row >= 0)[None, :], other=0.0",
        OutOfBounds,
    ),
    (
        "single",
        "inside_n[:, None] & inside_m[None, :])",
        "inside_n[:, None] & (m >= 0)[None, :])",
        OutOfBounds,
    ),
    # absmax skipped; the nibbles of a byte swapped; another block's scale
    ("single", "table[None, :] * scale[:, None]", "table[None, :] + 0 * scale[:, None]", WRONG),
    ("single", "((j ^ 1) * 4)", "(j * 4)", WRONG),
    ("single", "// BLOCKSIZE", "// 64", (OutOfBounds, WRONG)),
    ("single", "rank, stride_bn, stride_br, RANK) * scaling", "rank, stride_bn, stride_br, RANK)", WRONG),
    # A transposed; dropout's factor and mask; the bias
    (
        "single",
        "rank, stride_ak, stride_ar, RANK)",
        "rank, stride_ar, stride_ak, RANK)",
        (OutOfBounds, WRONG),
    ),
    ("single", "sum * inverse_keep", "sum", WRONG),
    ("single", "tl.trans(kept(seed, m, k, threshold))", "tl.trans(kept(seed, m, k + 1, threshold))", WRONG),
    ("single", "acc += tl.load(bias", "acc -= tl.load(bias", WRONG),
    ("down", "stored, BLOCK_M, RANK) * scaling", "stored, BLOCK_M, RANK) * scaling * 1.01", WRONG),
    ("down", "tl.store(partial + split * size + at,", "tl.store(partial + at,", Race),
    # terms of A, or of h, dropped or taken twice; shares not added
    ("down", "acc += (second + third / STEP) / STEP", "acc += second / STEP", WRONG),
    ("down", "behind + WIDTH, rest", "behind + WIDTH, first", WRONG),
    ("down", "arrives_last(arrivals + tl.program_id(0))", "arrives_last(arrivals)", (WRONG, Race)),
    # the shares' protocol: who adds them, what it may read by then, the counter left for the next launch
    ("parts", "tl.num_programs(1) - 1", "tl.num_programs(1) - 2", Race),
    ("parts", "    tl.debug_barrier()", "    pass", Race),
    ("parts", 'sem="acq_rel"', 'sem="acquire"', Race),
    ("parts", 'sem="acq_rel"', 'sem="release"', Race),
    ("parts", "tl.atomic_xchg(arrivals, 0, ", "tl.atomic_xchg(arrivals, 1, ", (WRONG, Race)),
    ("parts", "for s in range(tl.num_programs(1))", "for s in range(1)", WRONG),
    ("parts", "partial + s * size + at", "partial + at", WRONG),
    ("fill", "tl.store(arrivals + start + i, 0,", "tl.store(arrivals + start + i, 1,", (Race, WRONG)),
    ("down", "there = k < columns", "there = k < columns + 1", OutOfBounds),
    ("down", "tile = tl.where(kept(seed, row, k, threshold), tile, 0.0)", "tile = tile", WRONG),
    # the base dropped
    ("up", "tl.load(at, both, other=0).to(tl.float32) + sum", "sum", WRONG),
    (
        "up",
        "both = inside[:, None] & there[None, :]",
        "both = inside[:, None] & (n >= 0)[None, :]",
        (OutOfBounds, Race),
    ),
    ("up", "sum = tl.where(kept(seed, row, n, threshold), sum, 0.0)", "sum = sum", WRONG),
    ("outer", "last = tl.minimum(rows, first + share)", "last = first + share", OutOfBounds),
    ("outer", "last = tl.minimum(rows, first + share)", "last = tl.minimum(rows, first + share - 1)", WRONG),
    ("outer", "tl.store(partial + split * size + at,", "tl.store(partial + at,", Race),
    # dB over dA's shares, or counted with them; written as dA is
    ("outer", "partial + columns_a, width", "partial, width", Race),
    ("outer", "+ group * tl.num_programs(0) + tl.program_id(0)", "+ group + tile", (WRONG, Race)),
    ("outer", "+ c[:, None].to(tl.int64) * rank + r[None, :]", "+ r[None, :] * columns + c[:, None]", WRONG),
    ("outer", "groups, scaling_a, threshold", "groups, scaling_b, threshold", WRONG),
    ("adapter", "terms_of_value(value * scaling,", "terms_of_value(value,", WRONG),
    ("adapter", "tl.store(at + 2 * size, third", "tl.store(at + size, third", WRONG),
    ("fill", "tl.store(at + 2 * WIDTH, rest", "tl.store(at + 2 * WIDTH, first", WRONG),
    ("fill", "terms_of_value(value * scaling,", "terms_of_value(value,", WRONG),
    ("fill", "stored = (n < out_features)[:, None]", "stored = (n >= 0)[:, None]", (Race, OutOfBounds)),
    ("fill", "tl.store(at + WIDTH, first", "tl.store(at + WIDTH - 1, first", (Race, WRONG)),
    ("fill", "(out_features + r[:, None])", "r[:, None]", (Race, WRONG)),
    ("fill", "program - programs, packed", "program, packed", (OutOfBounds, WRONG)),
    ("fill", "k = (program - programs_b) * BLOCK + i", "k = program * BLOCK + i", WRONG),
    ("workspace", "scaling if split is None else 1.0", "scaling", WRONG),
    # another dropout mask; a term dropped
    ("parts", "key[:, None] +", "key[:, None] + 1 +", WRONG),
    ("parts", "small = tl.dot(second, b, tl.dot(third, b))", "small = tl.dot(second, b)", WRONG),
]

USERS = {
    "single": [("forward", "single"), ("backward", "single")],
    "down": [("workspace", "down"), ("backward", "down"), ("single", "down")],
    "up": [("workspace", "up_")],
    "outer": [("backward", "outer")],
    "workspace": [("forward", "workspace"), ("backward", "workspace")],
    "fill": [("workspace", "fill")],
    "adapter": [("fill", "write_terms"), ("fill", "terms_of_value"), ("down", "adapter")],
    "parts": [(user, name) for user in ("single", "down", "outer") for name in ("kept", "wide_dot")]
    + [(user, name) for user in ("down", "outer") for name in ("arrives_last", "sum_of_shares")]
    + [("up", "kept")],
}


def install(monkeypatch, tmp_path, file, old, new, users):
    package = "peft_engine.kernels.lora_linear"
    copy = faulty.plant(importlib.import_module(f"{package}.{file}"), tmp_path, old, new)
    for user, name in users:
        folder = "lora_groups" if user == "groups" else "lora_linear"
        module = importlib.import_module(f"peft_engine.kernels.{folder}.{user}")
        monkeypatch.setattr(module, name, getattr(copy, name, copy))


def run_linear(first):
    """Both paths, the one that has the fault first: it is found the sooner."""
    for path in (first, "workspace" if first == "single" else "single"):
        with paths.pinned(path):
            for rows, k, n, rank, p in ((70, 640, 50, 16, 0.0), (300, 64, 70, 12, 0.4)):
                for padded in (True, False):
                    linear_test.case(
                        "cpu", rows, k, n, rank, torch.bfloat16, p=p, padded=padded,
                        strong=30.0 if padded else 1.0,
                        blocksize=128 if padded else 64,
                    )  # fmt: skip
            if path == "workspace":  # columns that end in the middle of a tile
                linear_test.case("cpu", 7, 77, 31, 5, torch.bfloat16)


@pytest.mark.parametrize("file,old,new,found", FAULTS)
def test_a_fault_in_lora_linear_is_found(tmp_path, monkeypatch, file, old, new, found):
    install(monkeypatch, tmp_path, file, old, new, USERS[file])
    with pytest.raises(found):
        run_linear("single" if file == "single" else "workspace")


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    "file,old,new,where",
    [
        ("down", "adapter.term(sum, buffer.dtype.element_ty)", "sum.to(buffer.dtype.element_ty)", "h"),
        ("adapter", "value > 65504.0, 65504.0,", "value > 65504.0, value,", "dh"),
        ("adapter", "value < -65504.0, -65504.0,", "value < -65504.0, value,", "dh"),
        ("adapter", "first = term(value, DTYPE)", "first = value.to(DTYPE)", "a"),
        ("adapter", "second = term(rest * STEP, DTYPE)", "second = (rest * STEP).to(DTYPE)", "b"),
    ],
)
def test_an_infinity_among_a_value_s_terms_is_found(tmp_path, monkeypatch, file, old, new, where):
    install(monkeypatch, tmp_path, file, old, new, USERS[file])
    with pytest.raises(WRONG):
        linear_test.test_what_is_too_large_for_float16_is_large_and_never_nan("cpu", where)


def test_a_fault_in_the_tiles_of_many_adapters_is_found(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, "adapter", "tl.program_id(1) * RANK", "0", [("down", "adapter")])
    with pytest.raises((WRONG, Race)):
        groups_test.test_many_adapters_are_split_in_tiles_of_their_ranks("cpu")


@pytest.mark.parametrize(
    "file,old,new,found",
    [
        ("parts", "last = end", "last = end + 1", (Race, OutOfBounds, WRONG)),  # a row of the next adapter
        ("parts", "start + (tile - before) * BLOCK_M", "start", (Race, WRONG)),
        (
            "parts",
            "tl.load(order + place, inside, other=0)",
            "place.to(tl.int64)",
            WRONG,
        ),  # rows not gathered
        ("down", "a += group.to(tl.int64) * stride_ag", "a += 0", WRONG),  # the first adapter for all
        ("outer", "first += split * each", "first += 0", WRONG),
        ("up", "b += group.to(tl.int64) * stride_bg", "b += 0", WRONG),
    ],
)
def test_a_fault_in_sorted_rows_is_found(tmp_path, monkeypatch, file, old, new, found):
    users = {
        "parts": [("down", "rows_of_tile"), ("up", "rows_of_tile")],
        "down": [("groups", "down")],
        "outer": [("groups", "outer")],
        "up": [("groups", "up_")],
    }
    install(monkeypatch, tmp_path, file, old, new, users[file])
    check = groups_test.test_each_row_has_its_own_adapter_forward_and_backward
    with pytest.raises(found):
        for adapters, each in (((0, 1, 2, 0), 9), ((2, -1, 0, -1, 0), 170)):
            check("cpu", torch.bfloat16, adapters, each)

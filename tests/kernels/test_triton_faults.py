"""The checks are checked: faults planted in the kernels are found, by the interpreter or by the answer."""

import faulty
import pytest
import test_nf4_triton
import torch
import triton
import triton.language as tl
from peft_engine.kernels.nf4 import dequantize, quantize
from triton_interpreter import OutOfBounds, Race, mended

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the mended interpreter is for CPU tensors")


@pytest.mark.parametrize(
    "old,new,found",
    [
        ("2 * byte < left, other=0", "byte >= 0, other=0", OutOfBounds),  # mask of a load dropped
        (", i < left)", ")", OutOfBounds),  # mask of a store dropped
        ("block, inside, NESTED", "block, None, NESTED", OutOfBounds),  # of the scales
        ("+ word, inside[:, None], other=0)", "+ word)", OutOfBounds),  # of the words of whole blocks
        ("element_ty), inside[:, None])", "element_ty))", OutOfBounds),
        ("% chunks).to(tl.int64) * BYTES", "% chunks).to(tl.int64) * 0", Race),
        ("row_of * stride", "row_of * columns", AssertionError),  # rows that are not apart
        ("packed += row_of * columns // 2", "packed += row_of * columns", (OutOfBounds, AssertionError)),
        ("codes_of_words(words, table) * scale[:, None]", "codes_of_words(words, table)", AssertionError),
        (
            "left, other=0), table) * scale[:, None]",
            "left, other=0), table)",
            AssertionError,
        ),  # absmax skipped
        (
            "table) * scale[:, None]",
            "table) * scale[:, None].to(tl.bfloat16).to(tl.float32)",  # rounded too early
            AssertionError,
        ),
        ("block >> 8", "block >> 7", (AssertionError, OutOfBounds)),  # another nested scale
        (" + tl.load(offset)", "", AssertionError),
        ("tl.join(packed >> 4, packed & 15)", "tl.join(packed & 15, packed >> 4)", AssertionError),
        ("((j ^ 1) * 4)", "(j * 4)", AssertionError),  # the nibbles of a byte swapped, in words
    ],
)
def test_a_fault_in_dequantise_is_found(tmp_path, monkeypatch, old, new, found):
    copy = faulty.plant(dequantize, tmp_path, old, new)
    monkeypatch.setattr(test_nf4_triton, "dequantize", copy.dequantize)
    with pytest.raises(found):
        for dtype in (torch.float32, torch.bfloat16):
            for n in (9999, 70000, 9984):  # the last: whole blocks
                test_nf4_triton.check_dequantize(n, 64, True, dtype, "cpu")
            test_nf4_triton.check_rows_apart(dtype, "cpu")


@pytest.mark.parametrize(
    "old,new,found",
    [
        ("i < numel, other=0.0", "i >= 0, other=0.0", OutOfBounds),
        ("2 * byte < numel)", "byte >= 0)", OutOfBounds),
        ("high * 16 + low", "low * 16 + high", AssertionError),
        ("(scaled > tl.load", "(scaled >= tl.load", AssertionError),  # ties go to the wrong side
        ("tl.where(short[:, None], divided, w * inverse[:, None])", "w * inverse[:, None]", AssertionError),
        ("tl.abs(w)", "w", AssertionError),
        ("* BLOCKS + tl.arange(0, BLOCKS)", "* (BLOCKS - 1) + tl.arange(0, BLOCKS)", (Race, AssertionError)),
        ("* BLOCKS + tl.arange(0, BLOCKS)", "+ tl.arange(0, BLOCKS)", Race),
    ],
)
def test_a_fault_in_quantise_is_found(tmp_path, monkeypatch, old, new, found):
    copy = faulty.plant(quantize, tmp_path, old, new)
    monkeypatch.setattr(test_nf4_triton, "quantize", copy.quantize)
    torch.manual_seed(0)
    with pytest.raises(found):
        for n in (9999, *range(1, 400, 7)):
            test_nf4_triton.check_quantize(torch.randn(n), 64)
        test_nf4_triton.check_quantize(test_nf4_triton.ties(), 64)
        for seed in range(20):
            test_nf4_triton.check_quantize(test_nf4_triton.short_ties(seed), 64)


@triton.jit
def add(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(a + i, i < n) + tl.load(b + i, i < n), i < n)


@triton.jit
def copy_row(source, out, stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + tl.program_id(0), tl.load(source + row * stride))


@triton.jit
def running_sum(x, out, n, ATOMIC: tl.constexpr):
    i = tl.program_id(0)
    value = tl.load(x + i)
    if ATOMIC:
        tl.atomic_add(out, value)
    else:
        tl.store(out, tl.load(out) + value)


@triton.jit
def shift(x):
    i = tl.program_id(0)
    tl.store(x + i + 1, tl.load(x + i))


@triton.jit
def matmul(a, b, out, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(out + i * N + j, tl.dot(tl.load(a + i * N + j), tl.load(b + i * N + j)))


def test_bfloat16_is_added_as_torch_adds_it():
    a, b = torch.randn(1000).bfloat16(), torch.randn(1000).bfloat16()
    out = torch.full_like(a, float("nan"))
    add[(8,)](a, b, out, 1000, BLOCK=128)
    assert torch.equal(out, a + b)


def test_a_product_of_bfloat16_is_summed_in_float32():
    a, b, out = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16(), torch.empty(32, 32)
    matmul[(1,)](a, b, out, N=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_an_offset_in_32_bits_is_found():
    stride = 1 << 20
    source, out = torch.empty(4096 * stride, dtype=torch.uint8), torch.empty(4096, dtype=torch.uint8)
    source[4095 * stride] = 7
    with mended(only=(4095,)):
        copy_row[(4096,)](source, out, stride, WIDE=True)
        assert out[4095] == 7
        with pytest.raises(OutOfBounds, match="copy_row: program 0 reads far outside"):
            copy_row[(4096,)](source, out, stride, WIDE=False)


def test_a_race_is_found_in_any_order_and_an_atomic_is_none():
    x, out = torch.ones(8), torch.zeros(1)
    running_sum[(8,)](x, out, 8, ATOMIC=True)
    assert out == 8
    for seed in range(3):
        with mended(shuffle=seed), pytest.raises(Race, match="running_sum: program"):
            running_sum[(8,)](x, out, 8, ATOMIC=False)
        with mended(shuffle=seed), pytest.raises(Race):
            shift[(6,)](x)


def test_neighbouring_tensors_do_not_hide_a_read_past_the_end():
    whole = torch.zeros(300)
    with pytest.raises(OutOfBounds, match=r"add: program \d reads a at byte 400, which has 400"):
        add[(3,)](whole[:100], whole[100:], torch.empty(200), 110, BLOCK=128)

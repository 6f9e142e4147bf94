"""NF4 in Triton: the bytes of the reference, whatever the shape, block size and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_engine.kernels.nf4 import tables
from peft_engine.kernels.nf4.dequantize import BYTES, dequantize
from peft_engine.kernels.nf4.quantize import quantize
from triton_interpreter import mended

from peft_engine import dispatch
from peft_engine.ops.nf4 import (
    BLOCKSIZES,
    CODE,
    DTYPES,
    NF4Tensor,
    nf4_quantize,
    reference_dequantize,
    reference_quantize,
)

# tails of a block, of a program, of a byte
SIZES = (1, 2, 63, 64, 65, 127, 2048, 2049, 4096 + 64, 9999)


def same_bits(a, b):
    kinds = {2: torch.int16, 4: torch.int32}
    kind = kinds.get(a.element_size(), torch.uint8)
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def run_dequantize(q, out):
    dequantize(q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize, out)


def check_dequantize(n, blocksize, nested, dtype, device, scale=1.0):
    q = nf4_quantize(torch.randn(n) * scale, blocksize=blocksize, double_quant=nested).to(
        torch.device(device)
    )
    out = torch.full((n,), float("nan"), dtype=dtype, device=device)
    run_dequantize(q, out)
    assert same_bits(out, reference_dequantize(q, dtype)), (n, blocksize, nested, dtype)


def check_rows_apart(dtype, device):
    """Into rows that are apart, as in a workspace; what lies between them stays."""
    for rows, columns in ((3, 128), (5, 4160), (2, 77)):
        q = nf4_quantize(torch.randn(rows, columns), double_quant=True).to(torch.device(device))
        space = torch.full((rows, columns + 24), 7.0, dtype=dtype, device=device)
        run_dequantize(q, space[:, :columns])
        assert same_bits(space[:, :columns].contiguous(), reference_dequantize(q, dtype)), (rows, columns)
        assert (space[:, columns:] == 7.0).all()


def check_quantize(flat, blocksize):
    packed, absmax = quantize(flat, blocksize)
    want_packed, want_absmax = reference_quantize(flat, blocksize)
    assert same_bits(absmax, want_absmax), (flat.shape, blocksize)
    assert torch.equal(packed, want_packed), (flat.shape, blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", (True, False))
def test_dequantised_bits_are_those_of_the_reference(device, dtype, nested):
    for n in SIZES:
        check_dequantize(n, 64, nested, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart(device, dtype):
    check_rows_apart(dtype, device)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_block_size(device, blocksize):
    for n in (100, 3 * blocksize + 17):
        check_dequantize(n, blocksize, True, torch.bfloat16, device)
        check_quantize(torch.randn(n, device=device), blocksize)


def ties():
    """Blocks that hold 1 and every midpoint between two codes: a value on it goes to the lower index."""
    block = torch.cat((torch.ones(1), (CODE[1:] + CODE[:-1]) / 2, CODE, torch.zeros(32)))
    return torch.cat((block, -block, block[:50]))


def short_ties(seed):
    """A short block of values at midpoints but for rounding: w / absmax and w * (1 / absmax) differ there."""
    absmax = torch.rand(1, generator=torch.Generator().manual_seed(seed)) + 0.5
    return torch.cat((absmax, (CODE[1:] + CODE[:-1]) / 2 * absmax))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_bytes_are_those_of_the_reference(device, dtype):
    for n in SIZES:
        check_quantize(torch.randn(n, device=device).to(dtype), 64)
    check_quantize(torch.zeros(200, device=device, dtype=dtype), 64)
    check_quantize(ties().to(device, dtype), 64)
    for seed in range(20):
        check_quantize(short_ties(seed).to(device, dtype), 64)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6000), st.sampled_from(BLOCKSIZES), st.booleans(), st.sampled_from(DTYPES),
    st.sampled_from((1e-6, 1.0, 1e4)), st.integers(0, 1 << 20),
)  # fmt: skip
def test_any_size_and_magnitude(n, blocksize, nested, dtype, scale, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_dequantize(n, blocksize, nested, dtype, device, scale)
    check_quantize((torch.randn(n, device=device) * scale).to(dtype), blocksize)


def test_nothing_is_launched_for_an_empty_weight(device):
    out = torch.empty(0, device=device)
    run_dequantize(nf4_quantize(out), out)
    packed, absmax = quantize(out, 64)
    assert packed.shape == (0, 1) and absmax.shape == (0,)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_what_is_not_finite_shows_in_the_absmax(device, value):
    flat = torch.randn(200, device=device)
    flat[70] = value
    _, absmax = quantize(flat, 64)
    assert absmax.isfinite().tolist() == [True, False, True, True]


def test_offsets_hold_beyond_two_to_the_31_elements():
    """The last two programs of a weight of 2^31 + 5,000 values; what they do not touch is never in memory."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU the whole weight is run, by tests/ops")
    n = (1 << 31) + 5000
    packed, out = torch.empty(-(-n // 2), 1, dtype=torch.uint8), torch.empty(n, dtype=torch.bfloat16)
    packed[-4096:] = torch.randint(0, 256, (4096, 1), dtype=torch.uint8)
    absmax = torch.ones(-(-n // 64))
    absmax[-100:] = torch.rand(100)
    q = NF4Tensor(packed, absmax, None, None, (n,), 64, torch.bfloat16)
    values = 2 * BYTES[0]  # of a program
    programs = -(-n // values)
    with mended(only=(programs - 2, programs - 1)):
        run_dequantize(q, out)
    tail = n - (programs - 2) * values
    scales = absmax[-((tail + 63) // 64) :]
    part = NF4Tensor(packed[-(tail // 2) :], scales, None, None, (tail,), 64, torch.bfloat16)
    assert same_bits(out[-tail:], reference_dequantize(part, torch.bfloat16))


def test_the_code_tables_are_there_before_the_first_product(monkeypatch):
    """A copy to the GPU inside a CUDA graph's capture would end the capture."""
    made = []
    monkeypatch.setattr(tables, "make", made.append)
    monkeypatch.setattr(dispatch, "on_gpu", lambda x: True)
    q = nf4_quantize(torch.randn(4, 64))
    assert made == [q.device]
    q.to("cpu")
    assert made == [q.device] * 2

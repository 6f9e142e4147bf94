"""nf4_quantize and nf4_dequantize: the maths, the backends, every instruction set, bitsandbytes' bytes."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_engine import dispatch, native
from peft_engine.ops import lora_linear, nf4
from peft_engine.ops.nf4 import BLOCKSIZES, DTYPES, NF4Tensor, nf4_dequantize, nf4_quantize

SHAPES = [(), (0,), (0, 8), (1,), (2, 3), (64,), (65,), (7, 64), (33, 131), (96, 256), (4097,)]
GIB = 1 << 30


def weight(shape, dtype=torch.float32, magnitude=1.0):
    return (torch.randn(shape) * magnitude).to(dtype)


def same(a: NF4Tensor, b: NF4Tensor) -> bool:
    pairs = [(getattr(a, n), getattr(b, n)) for n in ("packed", "absmax", "nested_absmax", "offset")]
    return all((x is y is None) or torch.equal(x, y) for x, y in pairs) and (
        a.shape,
        a.blocksize,
        a.dtype,
    ) == (b.shape, b.blocksize, b.dtype)


def nan_filled(q: NF4Tensor, dtype) -> torch.Tensor:
    return nf4_dequantize(q, out=torch.full(q.shape, math.nan, dtype=dtype))


def assert_as_good_as_the_reference(got: torch.Tensor, q: NF4Tensor) -> None:
    """Largest error and norm of it against float64 at most twice those of the reference in the same dtype."""
    exact = nf4.reference_dequantize(q, torch.float64)
    error = (got.double() - exact).abs()
    reference = (nf4.reference_dequantize(q, got.dtype).double() - exact).abs()
    if got.numel():
        ulp = torch.finfo(got.dtype).eps * exact.abs().max()
        assert error.max() <= 2 * reference.max() + ulp
        assert error.norm() <= 2 * reference.norm() + ulp


# --- the maths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_goes_to_the_nearest_entry_of_the_table(backend, dtype, blocksize):
    w = weight(3 * blocksize + 17, dtype)
    q = nf4_quantize(w, blocksize=blocksize)
    scale = q.absmax.double().repeat_interleave(blocksize)[: w.numel()]
    code = nf4.CODE.double()
    best = (w.double()[:, None] - code * scale[:, None]).abs().amin(1)
    got = (w.double() - nf4.reference_dequantize(q, torch.float64)).abs()
    # A tie may fall either way: the scaled value is rounded to float32 before it is compared.
    assert torch.all(got <= best + 2**-23 * scale)


def test_absmax_is_the_largest_magnitude_of_each_block(backend):
    w = weight((5, 100))
    expected = torch.stack([block.abs().max() for block in w.reshape(-1).split(128)])
    assert torch.equal(nf4_quantize(w, blocksize=128).absmax, expected)


def test_the_first_value_of_a_byte_is_in_the_high_nibble(backend):
    q = nf4_quantize(torch.tensor([-1.0, 1.0, 0.0]))
    assert q.packed.flatten().tolist() == [0x0F, 0x70 | nf4_quantize(torch.tensor([0.0])).packed.item() & 15]


def test_a_block_of_zeros_stays_zero(backend):
    w = torch.zeros(3, 64)
    w[1] = torch.randn(64)
    restored = nf4_quantize(w).dequantize()
    assert torch.all(restored[0] == 0) and torch.all(restored[2] == 0)


def test_tables_are_handed_out_as_copies():
    q = nf4_quantize(weight(64), double_quant=True)
    q.to_bnb_state_dict()["weight.quant_map"].zero_()
    q.to_bnb_state_dict()["weight.nested_quant_map"].zero_()
    assert nf4.CODE[-1] == 1 and nf4.ABSMAX_CODE[-1] == 1


# --- backends against the reference ----------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_quantised_bytes_are_the_references_at_every_isa(isa, blocksize, double_quant):
    for dtype in DTYPES:
        for shape in SHAPES:
            for magnitude in (1e-6, 1.0, 1e4):
                w = weight(shape, dtype, magnitude)
                got = nf4_quantize(w, blocksize=blocksize, double_quant=double_quant)
                with dispatch.force_backend("reference"):
                    expected = nf4_quantize(w, blocksize=blocksize, double_quant=double_quant)
                assert same(got, expected), (dtype, shape, magnitude)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_dequantised_bits_are_the_references_at_every_isa(isa, blocksize, double_quant):
    for dtype in DTYPES:
        for shape in SHAPES:
            with dispatch.force_backend("reference"):
                q = nf4_quantize(weight(shape, dtype), blocksize=blocksize, double_quant=double_quant)
            for out_dtype in DTYPES:
                got = nan_filled(q, out_dtype)
                assert torch.equal(got, nf4.reference_dequantize(q, out_dtype)), (dtype, shape, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_values_are_as_close_to_float64_as_the_reference(backend, dtype):
    for magnitude in (1e-6, 1.0, 1e4):
        for shape in SHAPES:
            q = nf4_quantize(weight(shape, torch.float32, magnitude), double_quant=True)
            assert_as_good_as_the_reference(nan_filled(q, dtype), q)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 300),
    blocksize=st.sampled_from(BLOCKSIZES),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-6, 4),
    double_quant=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
)
def test_any_weight_gives_the_bytes_of_its_contiguous_copy(
    backend, rows, columns, blocksize, dtype, exponent, double_quant, layout
):
    def draw(*shape):
        return weight(shape, dtype, 10.0**exponent)

    w = {
        "contiguous": lambda: draw(rows, columns),
        "transposed": lambda: draw(columns, rows).t(),
        "sliced": lambda: draw(rows, 2 * columns + 1)[:, 1::2],
        "expanded": lambda: draw(1, columns).expand(rows, columns),
    }[layout]()
    got = nf4_quantize(w, blocksize=blocksize, double_quant=double_quant)
    with dispatch.force_backend("reference"):
        expected = nf4_quantize(w.clone(memory_format=torch.contiguous_format), blocksize=blocksize,
                                double_quant=double_quant)  # fmt: skip
    assert same(got, expected)
    assert torch.equal(nan_filled(got, dtype), nf4.reference_dequantize(expected, dtype))


def test_weight_and_packed_bytes_may_start_at_any_address(backend):
    w = weight(1025)[1:]
    q = nf4_quantize(w)
    shifted = torch.empty(q.packed.numel() + 1, 1, dtype=torch.uint8)[1:].copy_(q.packed)
    moved = NF4Tensor(shifted, q.absmax, None, None, q.shape, q.blocksize, q.dtype)
    assert torch.equal(nan_filled(moved, torch.bfloat16), nf4.reference_dequantize(q, torch.bfloat16))


def test_result_does_not_depend_on_the_number_of_threads(backend):
    w = weight((300, 1000), torch.bfloat16)
    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            q = nf4_quantize(w)
            got.append((q, q.dequantize()))
    finally:
        torch.set_num_threads(before)
    assert same(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])


def _available_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_offsets_hold_beyond_two_to_the_31_elements():
    why = native.load_error()
    if why is not None:
        pytest.skip(f"the reference takes minutes for 2^31 values, and the cpu backend is off: {why}")
    n, need = 2**31 + 4096 + 37, 6 * GIB
    if _available_memory() < need:
        pytest.skip(f"needs {need >> 30} GiB of memory, {_available_memory() >> 30} GiB are available")
    places = [0, 2**30 - 64, 2**31 - 4096, 2**31, 2**31 + 4096]  # starts of blocks
    w = torch.zeros(n, dtype=torch.bfloat16)
    parts = [torch.randn(min(64, n - start)).to(w.dtype) for start in places]
    for start, part in zip(places, parts, strict=True):
        w[start : start + 64] = part
    with dispatch.force_backend("cpu"):
        q = nf4_quantize(w)
        out = nf4_dequantize(q, out=w.fill_(math.nan))  # touching fresh memory is what takes the time
    for start, part in zip(places, parts, strict=True):
        with dispatch.force_backend("reference"):
            expected = nf4_quantize(part)
        assert torch.equal(q.packed[start // 2 : start // 2 + expected.packed.numel()], expected.packed)
        assert q.absmax[start // 64] == expected.absmax
        assert torch.equal(out[start : start + 64], nf4.reference_dequantize(expected, w.dtype))


# --- bitsandbytes ----------------------------------------------------------------------------------------


def assert_bnb_bytes(bnb, w, blocksize, double_quant) -> None:
    q = nf4_quantize(w, blocksize=blocksize, double_quant=double_quant)
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=double_quant, quant_type="nf4"
    )
    theirs = {"packed": packed, "absmax": state.absmax, "quant_map": state.code}
    ours = {"packed": q.packed, "absmax": q.absmax, "quant_map": nf4.CODE}
    if double_quant:
        theirs |= {"nested": state.state2.absmax, "code": state.state2.code, "offset": state.offset}
        ours |= {"nested": q.nested_absmax, "code": nf4.ABSMAX_CODE, "offset": q.offset}
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
        pair = (ours[name].reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
        assert torch.equal(*pair), name


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_bitsandbytes(bnb, backend, dtype, blocksize, double_quant):
    for numel in (1, 63, 64, 65, blocksize - 1, blocksize, 3 * blocksize + 7, 300 * 64 + 11):
        for magnitude in (1e-6, 1.0, 1e4):
            assert_bnb_bytes(bnb, weight(numel, dtype, magnitude), blocksize, double_quant)


@pytest.mark.peers
def test_bytes_are_bitsandbytes_at_every_isa(bnb, isa):
    for dtype in DTYPES:
        assert_bnb_bytes(bnb, weight((67, 300), dtype), 64, True)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    "w",
    [
        torch.zeros(200),
        torch.zeros(64 * 300),
        torch.full((130,), -3.0),
        torch.full((64,), 1e-39),
        torch.full((70,), 1e-39),
        torch.full((70,), 3e38),
        torch.full((65,), 6e4, dtype=torch.float16),
        torch.full((65,), 6e-8, dtype=torch.float16),
        torch.tensor([0.0, -0.0] * 40),
    ],
    ids=[
        "zeros",
        "many zeros",
        "equal",
        "subnormal",
        "subnormal tail",
        "huge",
        "f16 max",
        "f16 min",
        "signs",
    ],
)
def test_bytes_of_extreme_weights_are_bitsandbytes(bnb, backend, w, double_quant):
    assert_bnb_bytes(bnb, w, 64, double_quant)


@pytest.mark.peers
def test_values_at_and_beside_each_threshold_go_where_bitsandbytes_puts_them(bnb, backend):
    middle = (nf4.CODE[1:] + nf4.CODE[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.tensor(s)) for s in (2.0, -2.0))
    w = torch.cat((down, middle, up, torch.ones(1)))
    for scale in (1.0, 0.7, 3e-5, *torch.rand(50).tolist()):
        full = torch.nn.functional.pad(w * scale, (0, 64 - w.numel()))
        assert_bnb_bytes(bnb, full, 64, False)
        assert_bnb_bytes(bnb, full[:-1], 64, False)  # a short last block is divided, a full one multiplied


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_values_are_bitsandbytes(bnb, backend, dtype, double_quant):
    w = weight((120, 640), dtype)  # more than the reference takes at a time
    packed, state = bnb.functional.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4")
    expected = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4_quantize(w, double_quant=double_quant).dequantize(), expected)


@pytest.mark.peers
@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_reads_and_writes_as_bitsandbytes_own(bnb, double_quant):
    w = weight((30, 50), torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4")
    theirs = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    q = nf4_quantize(w, double_quant=double_quant)
    ours = q.to_bnb_state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert same(NF4Tensor.from_bnb_state_dict(theirs), q)
    back = bnb.functional.QuantState.from_dict(
        {key: value for key, value in ours.items() if key != "weight"}, device=torch.device("cpu")
    )
    assert torch.equal(bnb.functional.dequantize_4bit(ours["weight"], back), q.dequantize())


@pytest.mark.peers
def test_bytes_stored_as_another_dtype_are_read(bnb):
    w = weight((32, 64), torch.bfloat16)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    stored = {"weight": packed} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert same(NF4Tensor.from_bnb_state_dict(stored), nf4_quantize(w))


# --- at the door -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict_round_trip(double_quant):
    q = nf4_quantize(weight((5, 77), torch.float16), blocksize=128, double_quant=double_quant)
    assert same(NF4Tensor.from_bnb_state_dict(q.to_bnb_state_dict("a.weight"), "a.weight"), q)


def broken(name, value):
    tensors = nf4_quantize(weight((8, 64)), double_quant=True).to_bnb_state_dict()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("weight.quant_state.bitsandbytes__nf4", None, "expected an nf4 quant_state"),
        ("weight.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8), "broken"),
        ("weight.absmax", None, "weight.absmax"),
        ("weight.nested_absmax", None, "weight.nested_absmax"),
        ("weight.nested_absmax", torch.ones(2), "nested_absmax"),
        ("weight.absmax", torch.zeros(3, dtype=torch.uint8), "8 scales"),
        ("weight.absmax", torch.zeros(8), "absmax in uint8 needs"),
        ("weight", torch.zeros(9, 1, dtype=torch.uint8), "256 bytes"),
        ("weight.quant_map", torch.zeros(16), "standard table"),
        ("weight.nested_quant_map", torch.zeros(256), "standard table"),
    ],
)
def test_a_broken_state_dict_is_refused_with_what_is_wrong(name, value, says):
    with pytest.raises(ValueError, match=says):
        NF4Tensor.from_bnb_state_dict(broken(name, value))


def test_a_state_in_fp4_is_refused_by_name():
    tensors = nf4_quantize(weight(64)).to_bnb_state_dict()
    tensors["weight.quant_state.bitsandbytes__fp4"] = tensors.pop("weight.quant_state.bitsandbytes__nf4")
    with pytest.raises(ValueError, match="expected an nf4 quant_state, got fp4"):
        NF4Tensor.from_bnb_state_dict(tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 63, 64, 100, 129])
def test_nan_and_inf_are_refused_wherever_they_are(backend, position, bad):
    w = weight(130)
    w[position] = bad
    with pytest.raises(ValueError, match="nf4_quantize: weight holds NaN or inf"):
        nf4_quantize(w)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        nf4_quantize(torch.zeros(64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"blocksize must be one of .* got 100"):
        nf4_quantize(torch.zeros(64), blocksize=100)
    q = nf4_quantize(weight((4, 16)))
    with pytest.raises(ValueError, match=r"of shape \(4, 16\)"):
        nf4_dequantize(q, out=torch.empty(16, 4))
    with pytest.raises(ValueError, match="not contiguous"):
        nf4_dequantize(q, out=torch.empty(16, 4).t())
    with pytest.raises(TypeError, match="give one of them"):
        nf4_dequantize(q, out=torch.empty(4, 16), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="out asks for a gradient"):
        nf4_dequantize(q, out=torch.empty(4, 16, requires_grad=True))
    with pytest.raises(TypeError, match="dtype must be"):
        nf4_dequantize(q, dtype=torch.float64)


def test_dequantise_writes_into_the_buffer_given_and_returns_it(backend):
    q = nf4_quantize(weight((4, 16), torch.bfloat16))
    out = torch.full((4, 16), math.nan)
    assert nf4_dequantize(q, out=out) is out
    assert torch.equal(out.bfloat16(), q.dequantize())
    product = torch.ones(16, requires_grad=True) * out
    nf4_dequantize(q, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    assert q.dequantize().dtype == torch.bfloat16 and q.dequantize(torch.float16).dtype == torch.float16


def test_a_weight_that_needs_a_gradient_is_quantised_without_one(backend):
    q = nf4_quantize(torch.nn.Parameter(weight((4, 16))))
    assert not q.dequantize().requires_grad


def test_a_copy_shares_nothing():
    q = nf4_quantize(weight(128), double_quant=True)
    other = copy.deepcopy(q)
    other.packed.zero_()
    assert not same(q, other) and q.nbytes == 64 + 2 + 4 + 4


def test_scales_on_another_device_are_named_at_the_door():
    q = nf4_quantize(torch.randn(4, 64), double_quant=True)
    for name in ("absmax", "nested_absmax", "offset"):
        moved = dataclasses.replace(q, **{name: getattr(q, name).to("meta")})
        with pytest.raises(ValueError, match=f"weight is on cpu and its {name} on meta; move the whole"):
            moved.dequantize()
        with pytest.raises(ValueError, match=f"lora_linear: the packed weight is on cpu and its {name}"):
            lora_linear(torch.randn(1, 64), moved, None, None, 1.0)

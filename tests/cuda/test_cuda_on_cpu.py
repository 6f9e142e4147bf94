"""The CUDA kernels on the CPU: right on every input and in every order, and clean under sanitizers."""

import ctypes

import cuda_cases
import cuda_on_cpu
import pytest
import torch
from cuda_cases import (
    blank,
    check_dequantize,
    check_far_rows,
    check_huge_dequantize,
    check_huge_weight,
    check_lora,
    same_bits,
)
from cuda_on_cpu import LaunchFailed, Library
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_engine.ops.nf4 import BLOCKSIZES, DTYPES, nf4_quantize

HALVES = (torch.float16, torch.bfloat16)
ANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- dequantise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", (True, False))
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantised_bits_are_those_of_the_reference(kernels, dtype, nested):
    for n in (0, 1, 2, 31, 63, 64, 65, 127, 2048, 4160, 8191, 8192, 9999, 16384, 16385, 40000):
        check_dequantize(kernels, 1, n, dtype, nested=nested)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_block_size(kernels, blocksize):
    for n in (100, 3 * blocksize + 17, 10000, 16384 + 4096):
        for nested in (True, False):
            check_dequantize(kernels, 1, n, torch.bfloat16, blocksize=blocksize, nested=nested)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_begin_anywhere(kernels, dtype):
    for rows, columns in ((7, 96), (33, 7), (5, 4160), (2, 1), (59, 576), (130, 192), (300, 64)):
        for gap, shift in ((0, 0), (5, 0), (32, 0), (32, 1), (8, 4)):
            check_dequantize(kernels, rows, columns, dtype, gap=gap, shift=shift)


# Half of the rows are whole pieces of 64 weights, which the fast kernels take where there are enough.
COLUMNS = st.integers(0, 700) | st.integers(1, 11).map(lambda pieces: 64 * pieces)


@ANY
@given(
    st.integers(0, 60), COLUMNS, st.integers(0, 70) | st.sampled_from((8, 64)), st.sampled_from((0, 0, 1, 8)),
    st.sampled_from(DTYPES), st.sampled_from(BLOCKSIZES), st.booleans(), st.sampled_from((1e-6, 1.0, 1e4)),
)  # fmt: skip
def test_any_shape_stride_and_magnitude(kernels, rows, columns, gap, shift, dtype, blocksize, nested, scale):
    check_dequantize(
        kernels, rows, columns, dtype, blocksize=blocksize, nested=nested, gap=gap, shift=shift, scale=scale
    )


@pytest.mark.parametrize(
    "rows,columns,gap,least",
    [
        (1, 2**32 + 2**16 + 64, 0, 8192),
        (1, 2**32 + 2**16 + 37, 0, 8192),
        (7456600, 576, 32, 8192),
        (4097, 2**20, 64, 8192),
        (17 * 2**18, 1024, 1, 512),  # rows that are not aligned: the plain loop
    ],
)
def test_weights_beyond_32_bits_are_dequantised(program, rows, columns, gap, least):
    """Only the last blocks run: what they write of the end is right, and it is there."""
    check_huge_dequantize(program("plain"), rows, columns, gap, least)


# --- product ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", (1, 2, 7, 8, 9, 16, 17, 31, 33, 64))
def test_any_number_of_rows(kernels, rows, dtype):
    check_lora(kernels, rows, 192, 130, 8, dtype)
    check_lora(kernels, rows, 128, 49, 0, dtype, bias=False)


@pytest.mark.parametrize("rank", (0, 1, 8, 16, 33, 64))
def test_any_rank_and_adapter_type(kernels, rank):
    for i, rows in enumerate((1, 12, 40)):
        dtype = HALVES[i % 2]
        for adapter in (torch.float32, dtype):
            check_lora(kernels, rows, 256, 70, rank, dtype, adapter=adapter, bias=i != 1, times=2)


@pytest.mark.parametrize("n", (1, 15, 16, 17, 127, 128, 129, 255, 257, 520))
def test_any_tail_of_n(kernels, n):
    for rows in (3, 24):
        check_lora(kernels, rows, 64, n, 4, torch.bfloat16)


@pytest.mark.parametrize("multiprocessors", (1, 2, 5, 132))
@pytest.mark.parametrize("k", (64, 128, 704, 1088, 2112))
def test_any_division_of_k(kernels, k, multiprocessors):
    check_lora(kernels, 5, k, 140, 8, torch.float16, multiprocessors=multiprocessors, times=2)
    check_lora(kernels, 20, k, 260, 3, torch.bfloat16, multiprocessors=multiprocessors, times=2)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("nested", (True, False))
def test_every_block_size_and_scale_format(kernels, blocksize, nested):
    for rows, k in ((2, 192), (20, 1088)):  # blocks that end inside a row, and blocks that span several
        check_lora(kernels, rows, k, 37, 4, torch.bfloat16, blocksize=blocksize, nested=nested)


@pytest.mark.parametrize("gap", (1, 3, 8, 64))
def test_rows_of_x_may_lie_apart(kernels, gap):
    for rows in (2, 11):
        check_lora(kernels, rows, 320, 33, 8, torch.float16, gap=gap)


@ANY
@given(
    st.integers(1, 64), st.integers(1, 12), st.integers(1, 300), st.integers(0, 64), st.sampled_from(HALVES),
    st.booleans(), st.sampled_from((64, 256, 4096)), st.booleans(), st.integers(0, 9),
    st.sampled_from((1, 3, 132)), st.sampled_from((1e-2, 1.0, 1e2)),
)  # fmt: skip
def test_any_call(kernels, rows, units, n, rank, dtype, wide, blocksize, nested, gap, multiprocessors, scale):
    check_lora(
        kernels, rows, 64 * units, n, rank, dtype, adapter=torch.float32 if wide else dtype,
        blocksize=blocksize, nested=nested, gap=gap, multiprocessors=multiprocessors, scale=scale,
        bias=n % 2 == 0,
    )  # fmt: skip


def test_the_result_does_not_depend_on_the_order_of_blocks_and_threads(kernels):
    for rows, dtype in ((4, torch.bfloat16), (30, torch.float16)):
        ys = []
        orders = ({}, {"seed": -1}, {"seed": 1}, {"seed": 2, "blocks": 2}, {"seed": 3, "blocks": 4})
        for order in orders:
            torch.manual_seed(0)
            ys.append(check_lora(kernels, rows, 704, 300, 9, dtype, multiprocessors=4, times=2, **order))
        assert all(same_bits(y, ys[0]) for y in ys)


@pytest.mark.parametrize("rows", (20, 50))
@pytest.mark.parametrize("room", (1, 2, 3))
def test_no_block_waits_for_one_that_has_not_started(kernels, rows, room):
    """CUDA promises no order: where the last blocks start first, they may leave the first ones no room."""
    for seed in (-1, *range(1, 6)):
        check_lora(
            kernels, rows, 192, 260, 8, torch.bfloat16, multiprocessors=8, room=room, seed=seed, times=2
        )


def test_one_workspace_serves_calls_of_any_shape(kernels):
    shapes = [(1, 704, 300, 8), (64, 128, 520, 64), (9, 320, 17, 0), (3, 64, 900, 1)]
    scratch = max((cuda_cases.workspace(r, n, k, rank) for r, k, n, rank in shapes), key=torch.numel)
    alone = []
    for shared in (False, True):
        for i, (rows, k, n, rank) in enumerate(shapes):
            torch.manual_seed(i)
            x, lora_a, lora_b, bias = cuda_cases.lora_operands(rows, k, n, rank, torch.float16, torch.float32)
            q = nf4_quantize(torch.randn(n, k), double_quant=True)
            y = blank(rows, n, dtype=torch.float16)
            memory = scratch if shared else cuda_cases.workspace(rows, n, k, rank)
            kernels.run(cuda_cases.lora_call(q, x, lora_a, lora_b, 1.0, bias, y, None, memory))
            alone.append(y)
    assert all(same_bits(a, b) for a, b in zip(alone[:4], alone[4:], strict=True))


def test_without_rows_or_columns_nothing_is_launched(kernels):
    for rows, n in ((0, 40), (3, 0)):
        check_lora(kernels, rows, 64, n, 4, torch.float16, want_h=False)


@pytest.mark.parametrize("rows", (1, 12, 20))
def test_weights_beyond_32_bits_are_multiplied(program, rows):
    check_huge_weight(program("plain"), rows)


@pytest.mark.parametrize("rows", (3, 12, 20))
def test_rows_of_x_beyond_32_bits(program, rows):
    check_far_rows(program("plain"), rows)


# --- the C functions ----------------------------------------------------------------------------------------


def test_stream_and_device_reach_the_launch_and_the_device_is_put_back(kernels):
    q, out = nf4_quantize(torch.randn(8, 64)), blank(8, 64)
    scratch, x, y = cuda_cases.workspace(2, 8, 64, 0), torch.randn(2, 64).half(), blank(2, 8).half()
    calls = [
        lambda device, stream: (
            "pe_nf4_dequantize",
            *cuda_cases.scale_arguments(q),
            out,
            0,
            8,
            64,
            64,
            device,
            stream,
        ),
        lambda device, stream: cuda_cases.lora_call(
            q, x, None, None, 1.0, None, y, None, scratch, device, stream
        ),
    ]
    for call in calls:
        for current in (0, 1):
            kernels.dll.pe_cpu_set_device(current)
            for device, stream in ((0, 7), (1, 9)):
                kernels.run(call(device, stream))
                assert kernels.last_launch()[4:6] == (stream, device)
                assert kernels.dll.pe_cpu_device() == current
    kernels.dll.pe_cpu_set_device(0)
    for call in calls:
        with pytest.raises(LaunchFailed, match="returned 101"):
            kernels.run(call(7, 0))
        assert kernels.dll.pe_cpu_device() == 0
        kernels.run(call(0, 0))  # the error does not stay


def test_a_probe_says_whether_a_device_has_code_and_puts_the_former_back(kernels):
    kernels.run(("pe_cuda_probe", 1))
    assert kernels.dll.pe_cpu_device() == 0
    with pytest.raises(LaunchFailed, match="returned 209"):
        kernels.run(("pe_cuda_probe", 1), no_image=1)
    with pytest.raises(LaunchFailed, match="returned 101"):
        kernels.run(("pe_cuda_probe", 7))


def test_a_workspace_that_cannot_be_told_is_none(kernels):
    ask = kernels.dll.pe_lora_linear_workspace
    ask.restype = ctypes.c_int64
    sizes = ctypes.c_int64(8), ctypes.c_int64(64)
    assert [ask(rows, *sizes, 4, device) for rows, device in ((65, 0), (3, 7))] == [-1, -1]
    assert ask(0, *sizes, 4, 0) == 0 < ask(3, *sizes, 4, 0)


def test_a_capture_is_told_by_its_stream(kernels):
    ask, begin = kernels.dll.pe_cuda_capture, kernels.dll.pe_cpu_capture
    ask.restype = ctypes.c_ulonglong
    begin(ctypes.c_void_p(7), ctypes.c_ulonglong(2**40 + 1))
    try:
        assert [ask(ctypes.c_void_p(stream), 1) for stream in (7, 9, 0)] == [2**40 + 1, 0, 0]
        assert ask(ctypes.c_void_p(7), 5) == 0, "there is no such device"
        assert kernels.dll.pe_cpu_device() == 0
    finally:
        begin(None, ctypes.c_ulonglong(0))


def test_what_no_kernel_takes_is_refused(kernels):
    q, out = nf4_quantize(torch.randn(8, 64)), blank(8, 64)
    for blocksize, dtype, rows, stride in (
        (63, 0, 8, 64),
        (32, 0, 8, 64),
        (64, 3, 8, 64),
        (64, 0, -1, 64),
        (64, 0, 8, 63),
    ):
        with pytest.raises(LaunchFailed, match="returned 1:"):
            kernels.run(
                (
                    "pe_nf4_dequantize",
                    q.packed,
                    q.absmax,
                    None,
                    None,
                    blocksize,
                    out,
                    dtype,
                    rows,
                    64,
                    stride,
                    0,
                    0,
                )
            )
    assert out.isnan().all()
    for rows, k, rank in ((65, 64, 4), (2, 64, 65)):
        with pytest.raises(LaunchFailed, match="returned 1:"):
            check_lora(kernels, rows, k, 8, rank, torch.float16)
    with pytest.raises(LaunchFailed, match="returned 1:"):
        check_lora(kernels, 2, 64, 8, 0, torch.float32)


def test_sm_75_takes_float16_and_refuses_bfloat16():
    turing = Library(cuda_on_cpu.build(cuda_on_cpu.sources(), "library", arch=750, level="-O1"))
    for rows in (1, 9, 30, 64):
        check_lora(turing, rows, 192, 140, 8, torch.float16, times=2)
    check_dequantize(turing, 7, 96, torch.bfloat16)
    with pytest.raises(LaunchFailed, match="returned 801"):
        check_lora(turing, 4, 64, 8, 4, torch.bfloat16)


# --- sanitizers ---------------------------------------------------------------------------------------------

# rows, k, n, rank, dtype, multiprocessors, gap: each width of the product; few thread blocks
SMALL = [
    (3, 192, 130, 8, torch.bfloat16, 2, 8),
    (16, 192, 260, 33, torch.float16, 2, 3),
    (24, 1088, 130, 5, torch.bfloat16, 1, 0),
    (40, 192, 300, 64, torch.float16, 2, 8),
]


@pytest.mark.parametrize("kind", ("address", "thread"))
@pytest.mark.parametrize("rows,k,n,rank,dtype,multiprocessors,gap", SMALL)
def test_the_product_is_clean(program, kind, rows, k, n, rank, dtype, multiprocessors, gap):
    check_lora(
        program(kind),
        rows,
        k,
        n,
        rank,
        dtype,
        multiprocessors=multiprocessors,
        gap=gap,
        times=2,
        adapter=dtype,
    )


def test_the_product_of_sm_75_is_clean(program):
    """It has one buffer for x where the others have two, hence other barriers."""
    check_lora(program("thread", 750), 20, 1088, 130, 5, torch.float16, multiprocessors=1)


@pytest.mark.parametrize("kind", ("address", "thread"))
def test_dequantise_is_clean(program, kind):
    for rows, columns, dtype, gap, shift in (
        (3, 320, torch.bfloat16, 32, 0),
        (5, 96, torch.float32, 5, 1),
        (9, 7, torch.float16, 0, 0),
    ):
        check_dequantize(program(kind), rows, columns, dtype, gap=gap, shift=shift)

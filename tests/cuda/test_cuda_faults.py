"""The checks are checked: faults planted in the CUDA kernels are found, each in the way that is named."""

import pytest
import torch
from cuda_cases import check_dequantize, check_far_rows, check_huge_dequantize, check_huge_weight, check_lora
from cuda_on_cpu import BadAccess, LaunchFailed, Race
from planted import in_kernel

OF = ("nf4", "lora_linear")
FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


def dequantize(target):
    """The fast kernels and what they leave to the plain one; rows apart."""
    check_dequantize(target, 17, 576, BF16, gap=32)
    check_dequantize(target, 1, 16384 + 70, FLOAT, nested=False)
    check_dequantize(target, 9, 7, HALF, gap=2, shift=1)


def dequantize_float32(target):
    check_dequantize(target, 1, 16384, FLOAT)


def dequantize_unaligned(target):
    check_dequantize(target, 1, 16384, BF16, shift=1)


def far_rows_of_out(target):
    check_huge_dequantize(target, 7456600, 576, 32, 8192)


def far_plain_rows_of_out(target):
    check_huge_dequantize(target, 17 * 2**18, 1024, 1, 512)


def many_blocks_of_scales(target):
    check_dequantize(target, 1, 40000, HALF)


def product(target):
    for seed in (0, -1):  # the adapter's thread block comes first, and comes last
        check_lora(target, 20, 192, 130, 8, BF16, times=2, seed=seed)


def windows(target):
    """Several windows of x in a thread block, which has several tiles."""
    for seed in (0, -1):
        check_lora(target, 40, 320, 260, 33, HALF, multiprocessors=1, adapter=HALF, seed=seed)


def shared_tiles(target):
    """Thread blocks that each have a part of a tile; few, for ThreadSanitizer."""
    for seed in (0, -1):
        check_lora(target, 20, 192, 130, 8, BF16, multiprocessors=4, seed=seed)


def last_blocks_first(target):
    check_lora(target, 20, 192, 130, 8, BF16, multiprocessors=8, room=1, seed=-1)


def shared_tiles_alone(target):
    check_lora(target, 20, 192, 130, 0, BF16, multiprocessors=4)


def few_rows(target):
    """More thread blocks than multiprocessors; the adapter in pieces."""
    check_lora(target, 3, 320, 130, 8, BF16, multiprocessors=2, times=2)


def twelve_rows(target):
    check_lora(target, 12, 128, 70, 8, HALF)


def few_rows_in_blocks(target):
    check_lora(target, 3, 128, 70, 8, BF16, multiprocessors=3)


def huge_weight_few_rows(target):
    check_huge_weight(target, 1)


def far_few_rows(target):
    check_far_rows(target, 3)


def huge_weight(target):
    check_huge_weight(target, 20)


def far_rows(target):
    check_far_rows(target, 20)


# What, the file, the program that must find it, old, new, how it is found, the check.
FAULTS = [
    # dequantise
    ("nibbles exchanged", "nf4.cu", "plain", "i & 1 ? byte & 15 : byte >> 4",
     "i & 1 ? byte >> 4 : byte & 15", AssertionError, dequantize),
    ("nibbles exchanged in the lookup", "nf4.cu", "plain", "0x4051", "0x5140", AssertionError, dequantize),
    ("absmax skipped", "nf4.cu", "plain", "byte >> 4)), scale)", "byte >> 4)), 1.0f)", AssertionError,
     dequantize),
    ("nested absmax of the block before", "scale.cuh", "plain", "nested_absmax + (block >> 8)",
     "nested_absmax + (block >> 9)", AssertionError, many_blocks_of_scales),
    ("one rounding for two", "scale.cuh", "plain",
     "__fadd_rn(__fmul_rn(__ldg(absmax_code.value + index), nested), __ldg(offset))",
     "fmaf(__ldg(absmax_code.value + index), nested, __ldg(offset))", AssertionError, many_blocks_of_scales),
    ("the gap between rows forgotten", "nf4.cu", "plain", "i / work.columns", "0 * (i / work.columns)",
     AssertionError, dequantize),
    ("one weight too far", "nf4.cu", "address", "i < last", "i <= last", BadAccess, dequantize),
    ("one thread block too many", "nf4.cu", "address", "static_cast<unsigned>(numel / kOfBlock)",
     "static_cast<unsigned>(numel / kOfBlock + 1)", BadAccess, dequantize),
    ("alignment not looked at", "nf4.cu", "address", " || !pe::aligned16(work.out)", "", BadAccess,
     dequantize_unaligned),
    ("no barrier after the table", "nf4.cu", "thread", "__syncthreads();", "", Race, dequantize_float32),
    ("half of the table not written", "nf4.cu", "plain", "i < 2; ++i) codes", "i < 1; ++i) codes",
     AssertionError, dequantize_float32),
    ("the table written past its end", "nf4.cu", "address", "i < 2; ++i) codes", "i < 3; ++i) codes",
     BadAccess, dequantize_float32),
    ("a 32-bit offset", "nf4.cu", "plain", "static_cast<int64_t>(piece) * kPiece + row * work.gap",
     "static_cast<int>(piece * kPiece + row * work.gap)", AssertionError, far_rows_of_out),
    ("a 32-bit offset in the plain loop", "nf4.cu", "plain", "+ i + row * work.gap",
     "+ static_cast<int>(i + row * work.gap)", BadAccess, far_plain_rows_of_out),
    # product
    ("nibbles exchanged", "lora_linear_product.cuh", "plain", "bits_of(first) | bits_of(second) << 16",
     "bits_of(second) | bits_of(first) << 16", AssertionError, product),
    ("absmax skipped", "lora_linear_product.cuh", "plain", "scale * (1.0f / kCodeFactor<T>)",
     "(1.0f / kCodeFactor<T>)", AssertionError, product),
    ("the factor of another type", "lora_linear_product.cuh", "plain", "(1.0f / kCodeFactor<T>)",
     "(1.0f / kCodeFactor<__half>)", AssertionError, product),
    ("scaling dropped", "lora_linear_finish.cuh", "plain", "fmaf(call.scaling,", "fmaf(1.0f,",
     AssertionError, product),
    ("bias dropped", "lora_linear_finish.cuh", "plain", "sum[i] + bias)", "sum[i])", AssertionError,
     product),
    ("A transposed", "lora_linear_adapter.cuh", "plain", "r * call.k + start + c", "(start + c) * rank + r",
     AssertionError, product),
    ("one column group too many", "lora_linear_adapter.cuh", "plain", "group < column_groups",
     "group <= column_groups", AssertionError, product),
    ("counter not reset", "arrivals.cuh", "plain", "if (last) *counter = 0;", "", AssertionError,
     product),
    ("no wait for the copies", "lora_linear_product.cuh", "plain", "cp_async_wait<0>();", "", AssertionError,
     windows),
    ("row tail of W not clamped", "lora_linear_product.cuh", "address",
     "min(first + t * 16 + half * 8, last)", "(first + t * 16 + half * 8)", BadAccess, product),
    ("column tail of y not masked", "lora_linear_finish.cuh", "address", "if (n >= call.n) return;", "",
     BadAccess, product),
    ("row tail of x not masked", "lora_linear_adapter.cuh", "address", "m < call.rows ? widen(x[c]) : 0.0f",
     "widen(x[c])", BadAccess, product),
    ("a 32-bit offset into W", "lora_linear_product.cuh", "plain",
     "quarter + min(first + t * 16 + half * 8, last) * (call.k / 2)",
     "quarter + static_cast<int>(min(first + t * 16 + half * 8, last) * (call.k / 2))", BadAccess,
     huge_weight),
    ("a 32-bit offset into x", "lora_linear_adapter.cuh", "plain", "m * call.x_stride",
     "static_cast<int>(m * call.x_stride)", BadAccess, far_rows),
    ("no barrier before the arrival", "arrivals.cuh", "thread",
     "__syncthreads();\n  if (threadIdx.x == 0) *flag = arrive", "if (threadIdx.x == 0) *flag = arrive", Race,
     shared_tiles),
    ("no release fence", "arrivals.cuh", "thread", "__threadfence();\n  const unsigned", "const unsigned",
     Race, shared_tiles),
    ("no acquire fence", "arrivals.cuh", "thread", "__threadfence();\n  const bool", "const bool", Race,
     shared_tiles_alone),
    ("a counter that is no atomic", "arrivals.cuh", "thread", "before = atomicAdd(counter, 1u)",
     "before = (*counter)++", Race, shared_tiles),
    ("two blocks write one partial sum", "lora_linear_product.cuh", "thread", "store_segment(worker + tile)",
     "store_segment(tile)", Race, shared_tiles),
    ("a window of x filled while it is read", "lora_linear_product.cuh", "thread",
     "__syncthreads();  // x and the scales are there", "//", Race, windows),
    ("h laid over what is still read", "lora_linear_finish.cuh", "thread",
     "__syncthreads();  // what lay here before is no longer read", "", Race, windows),
    ("the flag written while it is read", "lora_linear_finish.cuh", "thread",
     "__syncthreads();  // the flag and h may be written again", "", Race, windows),
    ("h told of before its fence", "lora_linear_adapter.cuh", "thread",
     "arrive(call.workspace.h_there)", "atomicAdd(call.workspace.h_there, 1u)", Race, shared_tiles),
    ("h said to be there for good", "lora_linear_finish.cuh", "plain", ", *call.workspace.h_there = 0", "",
     AssertionError, product),
    ("blocks numbered as CUDA numbers them", "lora_linear.cu", "plain",
     "number = number_by_start(call.workspace.started, gridDim.x, flag, fill);", "fill(), __syncthreads();",
     LaunchFailed, last_blocks_first),
    ("the numbers not put back", "arrivals.cuh", "plain",
     "if (number == draws - 1) *counter = 0;", "", BadAccess, product),
    # up to 16 rows
    ("nibbles exchanged", "lora_linear_few.cuh", "plain", "word[1][i] = make_uint2(lower ? other.x",
     "word[1][i] = make_uint2(lower ? other.y", AssertionError, few_rows),
    ("scaling dropped", "lora_linear_few.cuh", "plain", "fmaf(call.scaling, adapter, value)",
     "fmaf(1.0f, adapter, value)", AssertionError, few_rows),
    ("absmax of another row", "lora_linear_few.cuh", "plain", "lane / 4 + 8 * (2 * t + half)",
     "lane / 4 + 8 * t", AssertionError, few_rows),
    ("A transposed", "lora_linear_few.cuh", "plain", "r * call.k + start + c", "(start + c) * rank + r",
     AssertionError, few_rows),
    ("counters not put back", "lora_linear_few.cuh", "plain", ", seen[1] = 0", "", LaunchFailed, few_rows),
    ("the count of pieces not put back", "lora_linear_few.cuh", "plain", ", *call.workspace.pieces_done = 0",
     "", AssertionError, few_rows),
    ("column tail of y not masked", "lora_linear_few.cuh", "address", "if (n >= call.n) continue;", "",
     BadAccess, few_rows),
    ("row tail of B not masked", "lora_linear_few.cuh", "address",
     "row < call.n ? load_adapter<T>(call, call.lora_b, first * rank + i) : 0.0f",
     "load_adapter<T>(call, call.lora_b, first * rank + i)", BadAccess, few_rows),
    ("row tail of x not masked", "lora_linear_few.cuh", "address",
     "present[m] = m * 8 + static_cast<int>(lane / 4) < call.rows", "present[m] = true", BadAccess,
     twelve_rows),
    ("a 32-bit offset into W", "lora_linear_few.cuh", "plain", "row * (call.k / 2)",
     "static_cast<int>(row * (call.k / 2))", BadAccess, huge_weight_few_rows),
    ("a 32-bit offset into x", "lora_linear_few.cuh", "plain", "x_row * call.x_stride",
     "static_cast<int>(x_row * call.x_stride)", BadAccess, far_few_rows),
    ("the table overwritten while it is read", "lora_linear_few.cuh", "thread",
     "__syncthreads();  // the table is no longer read", "", Race, few_rows_in_blocks),
    ("a piece told of before its fence", "lora_linear_few.cuh", "thread",
     "arrive(call.workspace.pieces_done)", "atomicAdd(call.workspace.pieces_done, 1u)", Race,
     few_rows_in_blocks),
    ("no wait for the pieces", "lora_linear_few.cuh", "thread",
     "wait_for(call.workspace.pieces_done, call.plan.pieces);", "", Race, few_rows_in_blocks),
    ("waits for blocks that cannot start", "lora_linear.cu", "plain",
     "min(static_cast<unsigned>(device.multiprocessors), most)", "most", LaunchFailed, few_rows),
]  # fmt: skip


@pytest.mark.parametrize(
    "fault", [in_kernel(OF, *fault) for fault in FAULTS], ids=lambda f: f"{f.source.name}: {f.what}"
)
def test_a_fault_is_found(planted, fault):
    fault.must_be_found(planted(fault))

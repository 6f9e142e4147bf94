"""Faults planted in bottleneck's CUDA kernel are found, each in the way that is named."""

import pytest
import torch
from bottleneck_cases import check
from cuda_on_cpu import BadAccess, LaunchFailed, Race
from planted import in_kernel

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


def whole(target):
    """Several pieces of a block, and tiles; 16 bytes at a time."""
    check(target, 3, 160, 8, BF16, norm=BF16, multiprocessors=3)


def odd(target):
    """Tails of rows, columns and width."""
    check(target, 3, 45, 5, HALF, norm=HALF, residual=True, multiprocessors=2)


def long(target):
    """Columns for every warp, and a width of several steps."""
    check(target, 1, 2200, 301, FLOAT, multiprocessors=2)


def without_room(target):
    check(target, 1, 64, 8, HALF, room=1)


# What, the file, the program that must find it, old, new, how it is found, the check.
FAULTS = [
    ("the activation skipped", "bottleneck_down.cuh", "plain", "activate(call.activation, value)", "value",
     AssertionError, whole),
    ("Wd's bias dropped", "bottleneck_down.cuh", "plain", "total + bias_at<W>(call.down_bias, r)", "total",
     AssertionError, whole),
    ("a warp's sum left out", "bottleneck_down.cuh", "plain", "w < kWarps; ++w", "w < kWarps - 1; ++w",
     AssertionError, long),
    ("squares about 0", "bottleneck_down.cuh", "plain", "pass == 0 ? 0.0f : stats[m].x", "0.0f",
     AssertionError, whole),
    ("columns that are not there in the statistics", "bottleneck_down.cuh", "plain",
     "k + i < call.features ? __fsub_rn(value[i], mean) : 0.0f", "__fsub_rn(value[i], mean)", AssertionError,
     odd),
    ("the norm's bias dropped", "bottleneck_down.cuh", "plain", "fmaf(normal, scale[i], shift[i])",
     "normal * scale[i]", AssertionError, whole),
    ("padding left as it was found", "bottleneck_down.cuh", "plain", "round_to(activated + i, 0.0f);", ";",
     AssertionError, odd),
    ("scaling dropped", "bottleneck_up.cuh", "plain", "fmaf(call.scaling, ", "fmaf(1.0f, ", AssertionError,
     whole),
    ("the residual dropped", "bottleneck_up.cuh", "plain", "raised, base[i])", "raised, 0.0f)",
     AssertionError, whole),
    ("only the first steps of the width", "bottleneck_up.cuh", "plain",
     "for (r += kAhead * kStep; r < call.width;", "for (r += kAhead * kStep; r < 0;", AssertionError, long),
    ("only a block's first tile", "bottleneck_up.cuh", "plain", "tile += gridDim.x;", "tile = call.tiles;",
     AssertionError, whole),
    ("the count of pieces not put back", "bottleneck_up.cuh", "plain", ", counters->done = 0;", ";",
     AssertionError, whole),
    ("the numbers not put back", "arrivals.cuh", "plain", "if (number == draws - 1) *counter = 0;", "",
     AssertionError, whole),
    ("pieces dealt out beforehand", "bottleneck_down.cuh", "plain",
     "number = number_by_start(&call.counters->started, draws, flag, [&] { run<kAligned>(number); });",
     "run<kAligned>(number), number += gridDim.x;", LaunchFailed, without_room),
    ("rows that are not there read", "bottleneck_down.cuh", "address", "m < call.rows && k < call.features",
     "k < call.features", BadAccess, whole),
    ("columns that are not there read", "bottleneck_down.cuh", "address", "there ? call.features - k : 0",
     "there ? kVector : 0", BadAccess, odd),
    ("a row too many of Wd", "bottleneck_down.cuh", "address", "first + t < call.width && column",
     "column", BadAccess, odd),
    ("the end of Wu overrun", "bottleneck_up.cuh", "address", "there ? call.width - at : 0",
     "there ? kPer16 : 0", BadAccess, odd),
    ("columns that are not there written", "bottleneck_up.cuh", "address",
     "*m < call.rows && *column < call.features", "*m < call.rows", BadAccess, odd),
    ("statistics read before they are there", "bottleneck_down.cuh", "thread",
     "__syncthreads();  // they are there", "", Race, whole),
    ("warps' sums read before they are there", "bottleneck_down.cuh", "thread",
     "__syncthreads();  // the warps' sums are there", "", Race, whole),
    ("no barrier before the arrival", "bottleneck_down.cuh", "thread",
     "__syncthreads();  // the piece is written", "", Race, whole),
    ("a piece told of before its fence", "bottleneck_down.cuh", "thread", "arrive(&call.counters->done)",
     "atomicAdd(&call.counters->done, 1u)", Race, whole),
    ("no wait for the pieces", "bottleneck_up.cuh", "thread", "wait_for(&counters->done, call.pieces);", "",
     Race, whole),
    ("the middle read ahead of the wait", "bottleneck_up.cuh", "thread",
     "__syncthreads();  // the middle may be read", "", Race, whole),
    ("the middle used before it is in shared memory", "bottleneck_up.cuh", "thread",
     "__syncthreads();  // it is in shared memory", "", Race, whole),
    ("columns' sums read before they are there", "bottleneck_up.cuh", "thread",
     "__syncthreads();  // the sums are there", "", Race, whole),
    ("columns' sums overwritten while they are read", "bottleneck_up.cuh", "thread",
     "__syncthreads();  // they may be written again", "", Race, whole),
    ("two pieces in one place", "bottleneck_down.cuh", "plain",
     "const int r = static_cast<int>(piece) * kTile +", "const int r = static_cast<int>(piece) +",
     AssertionError, whole),
]  # fmt: skip


@pytest.mark.parametrize(
    "fault", [in_kernel(("bottleneck",), *fault) for fault in FAULTS], ids=lambda f: f.what
)
def test_a_fault_is_found(planted, fault):
    fault.must_be_found(planted(fault))

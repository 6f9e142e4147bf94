"""What the kernels of lora_linear share: the products of mixed precision, the dropout mask, sorted rows, sums
of the shares that programs leave.
"""

import triton
import triton.language as tl


@triton.jit
def wide_dot(a, b, acc):
    """acc + a b in float32, exact to float32 where a is float32 and b half precision.

    A float32 a beside bfloat16 is split into three bfloat16 terms, which hold its 24 bits; beside float16,
    whose range is too short for terms, both go through tf32 split in two.
    """
    if a.dtype == b.dtype:
        if a.dtype == tl.float32:
            acc = tl.dot(a, b, acc, input_precision="tf32x3")
        else:
            acc = tl.dot(a, b, acc)
    elif b.dtype == tl.bfloat16:
        first = a.to(tl.bfloat16)
        rest = a - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        small = tl.dot(second, b, tl.dot(third, b))
        acc = tl.dot(first, b, acc) + small
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3")
    return acc


@triton.jit
def mix(h):
    """The 32-bit finaliser of MurmurHash3, as ops/dropout.py has it."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def kept(seed, row, column, threshold):
    """The dropout mask of rows (64-bit) by columns: hash(seed, row, column) >= p * 2^32."""
    bits = tl.load(seed)
    high = mix((bits >> 32).to(tl.uint32) ^ (row >> 32).to(tl.uint32))
    key = mix(bits.to(tl.uint32) ^ mix(row.to(tl.uint32) ^ high))
    return mix(key[:, None] + (column.to(tl.uint32) * 0x9E3779B9)[None, :]) >= threshold.to(tl.uint32)


@triton.jit
def rows_of_tile(order, bounds, tile, groups, BLOCK_M: tl.constexpr):
    """Of rows sorted by adapter: the adapter of a tile, its places in the sorted order, which are inside.

    Adapter g has the places bounds[g] to bounds[g + 1]; its tiles follow those of the adapters before it.
    The adapter is -1 for a tile beyond the last: the launch counts as many as there can be.
    """
    group = -1
    first = tl.full((), 0, tl.int32)
    last = tl.full((), 0, tl.int32)
    before = 0
    for g in range(groups):
        start = tl.load(bounds + g)
        end = tl.load(bounds + g + 1)
        tiles = (end - start + BLOCK_M - 1) // BLOCK_M
        if (tile >= before) & (tile < before + tiles):
            group = g
            first = start + (tile - before) * BLOCK_M
            last = end
        before += tiles
    place = first + tl.arange(0, BLOCK_M)
    inside = place < last
    row = tl.load(order + place, inside, other=0)
    return group, place, row, inside


@triton.jit
def arrives_last(arrivals):
    """Whether this program, whose share is stored, is the last of those along axis 1 of the grid.

    Then the shares of the others can be read, and the counter is 0 again.
    """
    tl.debug_barrier()  # the atomic is one thread's, and releases what the others stored before the barrier
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(1) - 1
    if last:
        tl.atomic_xchg(arrivals, 0, sem="relaxed")
    return last


@triton.jit
def sum_of_shares(partial, size, at, stored, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over axis 1 of the grid of partial[s * size + at], in order."""
    sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(tl.num_programs(1)):
        sum += tl.load(partial + s * size + at, stored, other=0.0, cache_modifier=".cg")
    return sum

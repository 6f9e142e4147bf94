"""What the forward and the backward of prefix_attention share: packed rows, who sees what, a block's scores.

The query heads of one key head are packed: row r of a (batch, key head) is query r // GROUP in head r % GROUP
of the group, so that a block of keys is read once for all of them, and one token fills a tile at decode.
Rows and keys beyond the last are read as the last (no mask on the loads) and never stored.
"""

import triton
import triton.language as tl
from peft_engine.kernels.bottleneck.parts import tanh
from peft_engine.kernels.lora_linear.parts import mix

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Eight waves of an H200's 132 multiprocessors: of more the last is short against the rest, and what all heads
# read together outgrows the L2.
FEW_PROGRAMS = tl.constexpr(8 * 132)
# What changes with the lengths and the size of a batch. No access is wider for one of these that is divisible
# by 16, and a training run would compile every kernel for all cases of all of them.
LENGTHS = ["queries", "keys", "prefix", "tiles", "chunk", "chunks", "per_copy", "share", "parts", "rows"]
LENGTHS += ["stride_lb", "stride_lc"]  # from one row of the batch to the next in lse, which has no padding
LENGTHS += ["threshold"]  # of a dropout; None, as its other arguments, where there is none


@triton.jit
def power(x, EXACT: tl.constexpr):
    """e^x; without EXACT 2^x, for what was multiplied by log2(e) along with the scale."""
    if EXACT:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def product(a, b):
    """a b, added up in float32; of float32 itself no digit is dropped."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sum_product(a, b, acc):
    """acc + a b, with a rounded to b's type, as the reference rounds it."""
    return tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")


@triton.jit
def program(tiles, kv_heads):
    """Tile, key head and batch row (both 64-bit) of this program.

    Of few programs the first tiles of all heads come first, which the callers make the heaviest, so that the
    light ones fill up the last wave; of many those that read the same keys are next to each other.
    """
    pid = tl.program_id(0)
    few = tl.num_programs(0) < FEW_PROGRAMS
    heads = tl.num_programs(0) // tiles
    tile = tl.where(few, pid // heads, pid % tiles)
    row = tl.where(few, pid % heads, pid // tiles)
    return tile, (row % kv_heads).to(tl.int64), (row // kv_heads).to(tl.int64)


@triton.jit
def packed(row, head, queries, GROUP: tl.constexpr):
    """Query, and head (64-bit), of packed rows of a key head; those beyond the last are the last."""
    row = tl.minimum(row, queries * GROUP - 1)
    return row // GROUP, head * GROUP + row % GROUP


@triton.jit
def rows_anew(tile, number, BLOCK_M: tl.constexpr):
    """The rows of a tile, for what comes after a loop of `number` turns; the compiler does not see that they
    are those from before it, which it would hold in registers, and spill.
    """
    return tile * BLOCK_M + tl.minimum(number, 0) + tl.arange(0, BLOCK_M)


@triton.jit
def at_rows(base, h, t, stride_h, stride_t):
    """Where the rows of heads h and queries t begin."""
    return base + h * stride_h + t.to(tl.int64) * stride_t


@triton.jit
def seen_by(first, last, batch, t, queries, keys, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr):
    """The real keys [a, z) that the queries t see; a = keys and z = 0 for one that sees none."""
    if INTERVALS:
        at = batch * queries + t
        a = tl.maximum(tl.load(first + at), 0)
        z = tl.minimum(tl.load(last + at), keys)
    elif CAUSAL:
        a = t * 0
        z = t + (keys - queries + 1)
    else:
        a = t * 0
        z = a + keys
    some = a < z
    return tl.where(some, a, keys), tl.where(some, z, 0)


@triton.jit
def blocks_of(start, end, whole_start, whole_end, ALL_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """How many blocks from start to end hold a pair that is not seen, how many of those come first, how many
    do not: those lie between, within [whole_start, whole_end), and need no mask.

    ALL_MASKED: free is 0. A bias and float32's products hold so many registers that a second loop spills.
    """
    number = tl.cdiv(tl.maximum(end - start, 0), BLOCK)
    lead = tl.minimum(tl.cdiv(tl.maximum(whole_start - start, 0), BLOCK), number)
    free = tl.maximum(tl.minimum(whole_end, end) - start - lead * BLOCK, 0) // BLOCK
    if ALL_MASKED:
        free = free * 0
    return number - free, lead, free


@triton.jit
def units(scale, softcap, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """What products are multiplied by, and what their tanh is where scores are capped."""
    if CAPPED:
        unit = scale / softcap if EXACT else scale * (2.0 * LOG2_E) / softcap
        cap = softcap if EXACT else softcap * LOG2_E
    else:
        unit = scale if EXACT else scale * LOG2_E
        cap = unit
    return unit, cap


@triton.jit
def scores(
    s, n, a, z, bias_at, unit, cap, MASKED: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Products scaled, capped, the bias added, -inf where key n is not in [a, z); and, with CAPPED, what the
    cap multiplies gradients by. Of n and a, z any two shapes that spread to s's.

    bias_at: pointers to key 0 of each row of the bias. unit, cap: of `units`.
    """
    s *= unit
    slope = s
    if CAPPED:
        if EXACT:
            capped = tanh(s)
        else:  # of small scores few digits are left, but more than those of half precision
            capped = 1.0 - 2.0 / (1.0 + tl.exp2(s))
        slope = 1.0 - capped * capped
        s = capped * cap
    if MASKED:
        there = (n >= a) & (n < z)
        if BIAS:
            added = tl.load(bias_at + n, there, other=0.0).to(tl.float32)
            s += added if EXACT else added * LOG2_E
        s = tl.where(there, s, float("-inf"))
    elif BIAS:
        added = tl.load(bias_at + n).to(tl.float32)
        s += added if EXACT else added * LOG2_E
    return s, slope


@triton.jit
def row_keys(seed, row):
    """What the hash of dropout makes of the seed and of rows, their places in lse (64-bit)."""
    bits = tl.load(seed)
    high = mix((bits >> 32).to(tl.uint32) ^ (row >> 32).to(tl.uint32))
    return mix(bits.to(tl.uint32) ^ mix(row.to(tl.uint32) ^ high))


@triton.jit
def kept(key, column, threshold):
    """The mask of ops/dropout.py, of rows' keys and columns of [prefix ; keys]; any two shapes that
    spread.
    """
    return mix(key + column.to(tl.uint32) * 0x9E3779B9) >= threshold.to(tl.uint32)


@triton.jit
def block(base, stride, n, d, HEAD_DIM: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr):
    """Rows n of keys, values or a prefix, (n, D), in the queries' type."""
    at = base + n.to(tl.int64)[:, None] * stride + d[None, :]
    if HEAD_DIM == D:
        tile = tl.load(at)
    else:
        tile = tl.load(at, (d < HEAD_DIM)[None, :], other=0.0)
    return tile.to(DTYPE)


@triton.jit
def probabilities(s, lse, EXACT: tl.constexpr):
    """exp(s - lse), by `power`; at most 1, also where a huge score was rounded otherwise in the forward."""
    return power(tl.minimum(s - lse, 0.0, propagate_nan=tl.PropagateNan.ALL), EXACT)


@triton.jit
def unless_empty(lse, EXACT: tl.constexpr):
    """lse in the unit of the scores; inf, so that all its probabilities are 0, where a row sees nothing."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    return lse if EXACT else lse * LOG2_E

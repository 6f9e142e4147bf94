"""The tiles of prefix_attention's kernels: a table for each, by architecture, packed rows and head_dim.

Nothing tunes at run time. Not one was timed on a GPU: of those tried that compile without spills they mostly
have the fewest instructions for a pair of row and key, counted. Warps that cover more than a product's tile
form it twice: two warpgroups of sm_90 take 128 rows, and 8 warps of mma.sync 64 keys where D is 256. Where no
other tile was free of spills, as with a bias, some still do.
"""

from peft_engine.kernels.prefix_attention.call import Call

from peft_engine.kernels.launch import cdiv
from peft_engine.kernels.tiles import MANY, Entry, Table, Tile, entries_for, tile_of

# Keys that all heads of one row of the batch have together, up to which blocks of 128 would be less than two
# programs for each of an H200's 132 multiprocessors.
FEW_KEYS = 264 * 128

# kernel: architecture: (rows up to, head_dim up to, tile in half precision, tile in float32)
# attend  BLOCK_M (packed rows), BLOCK_N (keys), warps, stages; of the forward
# dq      the same, of the backward
# dkv     BLOCK_N (keys), BLOCK_M (packed rows in each turn), warps, stages; not by rows, but by a batch row's
#         keys: blocks of 128 are read for half as often, blocks of 64 are twice as many programs
# prefix  the same; a prefix is one or two blocks of 64
# A bias takes registers, and the hash of dropout: with either, the kernels have tiles of their own. Those of
# dropout also hold a bias beside it.
TABLE: Table = {
    "attend": {
        80: (
            (16, 128, (16, 64, 4, 3), (16, 32, 4, 1)),
            (16, 256, (16, 32, 4, 3), (16, 16, 4, 1)),
            (MANY, 64, (128, 64, 8, 3), (32, 32, 8, 1)),
            (MANY, 128, (128, 32, 8, 3), (32, 32, 8, 1)),
            (MANY, 256, (64, 64, 8, 2), (16, 16, 4, 1)),
        ),
        86: (
            (16, 128, (16, 64, 4, 2), (16, 32, 4, 1)),
            (16, 256, (16, 64, 8, 2), (16, 16, 4, 1)),
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (128, 32, 8, 2), (32, 32, 8, 1)),
            (MANY, 256, (64, 64, 8, 1), (16, 16, 4, 1)),
        ),
        90: (
            (16, 128, (16, 64, 4, 3), (16, 32, 4, 1)),
            (16, 256, (16, 32, 4, 3), (16, 16, 4, 1)),
            (MANY, 64, (128, 64, 8, 3), (32, 32, 8, 1)),
            (MANY, 128, (128, 64, 8, 3), (32, 32, 8, 1)),
            (MANY, 256, (128, 32, 8, 2), (16, 16, 4, 1)),
        ),
        100: (
            (16, 128, (16, 64, 4, 3), (16, 32, 4, 1)),
            (16, 256, (16, 32, 4, 3), (16, 16, 4, 1)),
            (MANY, 64, (128, 32, 8, 3), (32, 32, 8, 1)),
            (MANY, 128, (128, 64, 8, 3), (32, 32, 8, 1)),
            (MANY, 256, (64, 16, 8, 2), (16, 16, 4, 1)),
        ),
    },
    "attend, bias": {
        80: (
            (16, 256, (16, 32, 4, 2), (16, 16, 8, 1)),
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 2), (32, 16, 16, 1)),
        ),
        90: (
            (16, 256, (16, 32, 4, 2), (16, 16, 8, 1)),
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 2), (32, 16, 16, 1)),
        ),
        100: (
            (16, 256, (16, 32, 4, 2), (16, 16, 8, 1)),
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 2), (32, 16, 16, 1)),
        ),
    },
    "dq": {
        80: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (64, 32, 8, 1), (32, 16, 8, 1)),
        ),
        86: (
            (MANY, 64, (64, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 2), (32, 16, 8, 1)),
        ),
        90: (
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (128, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (128, 32, 8, 2), (32, 16, 8, 1)),
        ),
    },
    "dq, bias": {
        80: (
            (MANY, 64, (32, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (32, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 2), (32, 16, 8, 1)),
        ),
        90: (
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 2), (32, 16, 8, 1)),
        ),
    },
    "dkv": {
        80: (
            (MANY, 64, (64, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        86: (
            (MANY, 64, (64, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 1), (32, 16, 16, 1)),
        ),
        90: (
            (FEW_KEYS, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (FEW_KEYS, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (128, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        100: (
            (MANY, 64, (128, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
    },
    "dkv, bias": {
        80: (
            (MANY, 64, (64, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        90: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 16, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        86: (
            (MANY, 64, (32, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 1), (32, 16, 16, 1)),
        ),
        100: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
    },
    "prefix": {
        80: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        86: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 1), (32, 16, 16, 1)),
        ),
        100: (
            (MANY, 64, (64, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
        90: (
            (MANY, 64, (64, 64, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 4, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 64, 8, 1), (32, 16, 16, 1)),
        ),
    },
    "attend, dropout": {
        80: (
            (MANY, 64, (64, 32, 4, 1), (32, 16, 8, 1)),
            (MANY, 128, (64, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 2), (16, 16, 4, 1)),
        ),
        100: (
            (MANY, 64, (64, 32, 4, 1), (32, 16, 8, 1)),
            (MANY, 128, (64, 16, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 2), (16, 16, 4, 1)),
        ),
    },
    "dq, dropout": {
        80: (
            (MANY, 64, (32, 64, 8, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 8, 1), (32, 16, 8, 1)),
            (MANY, 256, (32, 16, 8, 1), (32, 16, 16, 1)),
        ),
    },
    "dkv, dropout": {
        80: (
            (MANY, 64, (32, 64, 8, 2), (32, 16, 8, 1)),
            (MANY, 128, (64, 32, 8, 2), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 1), (32, 16, 16, 1)),
        ),
    },
    "prefix, dropout": {
        80: (
            (MANY, 64, (32, 32, 4, 2), (32, 32, 8, 1)),
            (MANY, 128, (64, 32, 8, 1), (32, 16, 8, 1)),
            (MANY, 256, (32, 32, 8, 1), (32, 16, 16, 1)),
        ),
    },
}

SPLIT_ROWS = 64  # with more packed rows the tiles of rows alone fill a GPU
CHUNK = 256  # keys; 512 KiB of a head of 128, so that a batch of one has enough chunks of its 4k keys


def tile(kernel: str, call: Call) -> Tile:
    """The tile of a kernel for a call's packed rows or keys, head_dim and bias.

    Never by the batch: what a row gives does not change with the batch it is in.
    """
    size = call.k.shape[1] * call.k.shape[2] if kernel == "dkv" else call.rows
    if call.dropout_p or call.softcap:
        kernel = f"{kernel}, dropout"
    elif call.bias is not None and f"{kernel}, bias" in TABLE:
        kernel = f"{kernel}, bias"
    q = call.q
    return tile_of("prefix_attention", TABLE, kernel, size, q.shape[3], q.dtype, q.device)


def entries(kernel: str, arch: int) -> tuple[Entry, ...]:
    """The table of a kernel for an architecture (compute capability times ten)."""
    return entries_for(TABLE[kernel], arch)


def prefix_stages(call: Call, block_m: int, stages: int) -> int:
    """Of the loop over the prefix: keys and values are asked for together, before the loop, with two.

    A float32 prefix, as a trainer holds it, takes twice the shared memory of a block of real keys, and where
    registers are short, as with a bias or dropout, its turn spills.
    """
    plain = call.bias is None and not call.dropout_p and not call.softcap
    return min(stages, 2) if block_m > 16 and plain and call.q.shape[3] <= 128 else 1


def chunks(rows: int, keys: int) -> tuple[int, int]:
    """Keys in a chunk of the forward, and the number of chunks.

    They depend on nothing but the row's own sizes: what a row gives does not change with the batch it is in.
    """
    if rows > SPLIT_ROWS or keys <= CHUNK:
        return keys, 1
    return CHUNK, cdiv(keys, CHUNK)


def shares(number: int, programs: int) -> tuple[int, int]:
    """Tiles in a share of a `number` for the prefix's gradient, and the shares: of 8 or more, and about two
    programs for each of an H200's 132 multiprocessors where one share is `programs`.
    """
    share = cdiv(number, max(1, min(cdiv(264, programs), number // 8)))
    return share, cdiv(number, share)

"""What the resource table says of a kernel, read from its machine code, and the faults that none may have.

registers                of a thread
shared_bytes             of a block; of CUDA kernels the static part
spill_bytes              the stack of a thread where an instruction loads or stores local memory, else 0
instructions_per_weight  instructions of a thread over the weights it decodes; see `counted`
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench import sass
from peft_engine.kernels.variants import TENSOR_CORE

# Bytes a block may have, by compute capability: CUDA C++ programming guide, technical specifications.
SHARED_LIMIT = {
    75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376,
}  # fmt: skip
WIDTHS = ("U8", "S8", "U16", "S16", "32", "64", "128", "256")  # of loads and stores; none said is 32


@dataclass(frozen=True)
class Row:
    """One line of the table: a kernel in one variant on one architecture."""

    kernel: str
    backend: str
    variant: str
    arch: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    instructions_per_weight: float | None
    instructions: int
    tensor_core: str  # the instruction that a dot became
    widest_load: str
    widest_store: str
    warps: int | None
    stages: int | None
    compiler: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.kernel, self.backend, self.variant, self.arch

    def __str__(self) -> str:
        return f"{self.kernel} [{self.variant}] sm_{self.arch}".replace(" []", "")


@dataclass(frozen=True)
class Result:
    """What a compilation gave. `row` is None where there is no machine code; `faults` is what must not be."""

    name: str
    row: Row | None
    faults: tuple[str, ...]


def faults(row: Row) -> Iterator[str]:
    """What no kernel may have, whatever the table says."""
    if row.spill_bytes:
        yield f"spills: {row.spill_bytes} bytes of a thread"
    if row.shared_bytes > SHARED_LIMIT[row.arch]:
        limit = SHARED_LIMIT[row.arch]
        yield f"shared memory: {row.shared_bytes} bytes, a block of sm_{row.arch} has {limit}"


def counted(body: Sequence[sass.Instruction]) -> list[sass.Instruction]:
    """The instructions whose number is divided by the weights that they decode.

    With a loop: one turn of the main loop, the innermost one that has the most tensor-core instructions or,
    where none has any, the longest. The weights are those of one turn in the kernel's source: a loop that the
    compiler unrolled counts too high and never too low. Without a loop: the whole way through the kernel,
    address arithmetic and scales included.
    """
    body = list(body)
    if (dot := tensor_core(body)) and len(loop := sass.main_loop(body, dot)) < len(body):
        return loop
    return max(sass.loops(body), key=len, default=longest_path(body))


def cuda_per_weight(kernel: str, variant: str, body: Sequence[sass.Instruction]) -> float | None:
    """Instructions per weight of a CUDA kernel; `variant` is its template arguments, "__nv_bfloat16, 4".

    The weights are taken from what is counted itself, so that unrolled loops are counted right: of a product
    those that its mma instructions are fed, each to as many of them as there are tiles of 8 rows of x (the
    second argument); else the bytes stored over the size of one result.
    """
    code = counted(body)
    if tensor_core(code):
        deep = any("16816" in i.opcode for i in code)
        tiles = int(variant.split(", ")[1])
        return round(sass.per_weight_multiplied(code, column_tiles=tiles, weights=8 if deep else 4), 2)
    if "dequantize" not in kernel or not sass.stored_bytes(code):
        return None
    itemsize = 4 if "32bit" in kernel or variant.startswith("float") else 2
    return round(sass.per_weight_stored(code, itemsize), 2)


def longest_path(body: Sequence[sass.Instruction]) -> list[sass.Instruction]:
    """The longest way from the entry to the exit; of those without masked loads and stores, if there are any.

    A kernel that asks first whether it is at a tail has a way with masks and one without, and all but its
    last program take the one without. Loops are gone through once.
    """
    at = {instruction.address: n for n, instruction in enumerate(body)}
    rest: dict[int, tuple[bool, int, int | None]] = {}  # from here to the exit: no masks?, length, next
    for n in reversed(range(len(body))):
        i = body[n]
        clear = not (i.predicate and i.opcode.startswith(("LDG", "STG")))
        if i.opcode == "EXIT" and not i.predicate:
            rest[n] = clear, 1, None
            continue
        nexts = [] if i.target is None else [at[i.target]]
        if i.target is None or i.predicate or not i.operands.startswith("0x"):  # as in BRA.U !UP0, 0x7c0
            nexts.append(n + 1)
        ways = [(*rest[m][:2], m) for m in nexts if m in rest]
        if ways:
            unmasked, length, m = max(ways)
            rest[n] = clear and unmasked, length + 1, m
    path = []
    at_n: int | None = 0 if 0 in rest else None
    while at_n is not None:
        path.append(body[at_n])
        at_n = rest[at_n][2]
    return path


def tensor_core(body: Sequence[sass.Instruction]) -> str:
    """The instruction that products became, without its modifiers; empty where there is none."""
    opcodes = dict.fromkeys(i.opcode for i in body)  # a kernel has thousands of instructions of a few kinds
    return next((opcode.split(".")[0] for opcode in opcodes if re.search(TENSOR_CORE, opcode)), "")


def widest(body: Sequence[sass.Instruction], *stems: str) -> str:
    """The widest of the opcodes that begin with one of `stems`, with no other modifier than its width."""
    found = {"": -1}
    for opcode in dict.fromkeys(i.opcode for i in body):
        stem, *parts = opcode.split(".")
        if stem in stems:
            width = next((part for part in parts if part in WIDTHS), "32")
            found[f"{stem}.{width}"] = WIDTHS.index(width)
    return max(found, key=found.__getitem__)


def spilled(body: Sequence[sass.Instruction], stack: int) -> int:
    """`stack` where an instruction uses local memory: a frame that none touches costs nothing."""
    return stack if any(i.opcode.startswith(("STL", "LDL")) for i in body) else 0


def missing(body: Sequence[sass.Instruction], wants: Sequence[str]) -> Iterator[str]:
    """A line for each of a Variant's `wants` that the code has not, or not often enough.

    Without a loop it must be on the way that most programs take, not in the code for a tail.
    """
    code = body if sass.loops(list(body)) else longest_path(body)
    for want in wants:
        number, _, pattern = want.rpartition(" ")
        have = sum(re.search(pattern, i.opcode) is not None for i in code)
        if have < int(number or 1):
            yield f"wants {want}, has {have or 'none'}"

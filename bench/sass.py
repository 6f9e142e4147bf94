"""Reads machine code: instructions, registers, shared memory, spills of the kernels in a .cubin or a fat .so.

cuobjdump and nvdisasm list what is in the file; nothing here needs a GPU. How instructions per weight are
counted: take one loop (or the whole body, where the hot path has no loop), count every instruction in it,
predicated ones and those of branches not taken as well, and divide by the weights a thread decodes in it. The
weights are not taken from the source but from the body itself, by what it must do for them: so many bytes
stored, or so many tensor-core instructions. An unrolled loop is thus counted right.
"""

import functools
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "aot"
RESERVED_SHARED = 1024  # bytes of a block that CUDA keeps for itself from sm_80 on; cuobjdump counts them in


class Instruction(NamedTuple):
    """One line of SASS, for example 0x60, "@P0", "BRA", "0x950"."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for what is no branch."""
        if not self.opcode.startswith("BRA"):
            return None
        found = re.search(r"0x[0-9a-f]+$", self.operands)
        return int(found.group(), 16) if found else None


class Usage(NamedTuple):
    """What one block or thread of a kernel takes.

    spill_bytes: all local memory of a thread, registers that were spilled and arrays that did not become
    registers; both cost the same.
    """

    registers: int
    shared: int
    spill_bytes: int


@functools.cache
def cuobjdump() -> str | None:
    """The path of cuobjdump: CUDA's own, or the one in the triton package; None where there is neither."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")
    found = str(home) if home.exists() else shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        own = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(own) if own.exists() else None
    return found


def _tool() -> str:
    if (tool := cuobjdump()) is None:
        raise RuntimeError("bench.sass: no cuobjdump; it comes with CUDA and with the triton package")
    return tool


def _number(arch: str | int) -> str:
    return str(arch).removeprefix("sm_")


def _listing(path: Path | str, arch: str | int | None, option: str) -> str:
    """The output of cuobjdump; `arch` picks from a fat file and is left out for a cubin, which has one."""
    pick = [] if arch is None or Path(path).suffix == ".cubin" else ["-arch", f"sm_{_number(arch)}"]
    done = subprocess.run([_tool(), option, *pick, str(path)], capture_output=True, text=True, check=True)
    return done.stdout


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")


def functions(library: Path, arch: int) -> dict[str, list[Instruction]]:
    """Kernel name (as the compiler mangled it) to its instructions, without the padding after its end."""
    codes: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [_tool(), "-xelf", f"sm_{arch}", str(library.resolve())]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for path in sorted(Path(folder).iterdir()):
            codes |= _codes(path.read_bytes())
    return dict(zip(codes, _disassembled(list(codes.values()), arch), strict=True))


def kept_functions(path: Path, arch: int) -> dict[str, list[Instruction]]:
    """`functions` of a fat file, kept in .cache: to list all kernels of one architecture takes seconds."""
    key = hashlib.sha256(path.read_bytes() + Path(__file__).read_bytes() + str(arch).encode()).hexdigest()
    kept = CACHE / f"{key}.sass"
    if kept.exists():
        plain = pickle.loads(zlib.decompress(kept.read_bytes()))
        return {name: [Instruction(*i) for i in body] for name, body in plain.items()}
    CACHE.mkdir(parents=True, exist_ok=True)
    found = functions(path, arch)
    plain = {name: [tuple(i) for i in body] for name, body in found.items()}
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(zlib.compress(pickle.dumps(plain), 1))
    partial.replace(kept)
    return found


def _instruction(line: re.Match[str], start: int) -> Instruction:
    """What a line of a listing says, of code that begins at `start`."""
    address, predicate, opcode, operands = line.groups()
    if start and opcode.startswith(("BRA", "BSSY", "CALL.REL", "RET.REL", "WARPSYNC.COLLECTIVE")):
        operands = re.sub(r"0x[0-9a-f]+$", lambda at: hex(int(at.group(), 16) - start), operands)
    return Instruction(int(address, 16) - start, (predicate or "").strip(), opcode, operands)


def _without_padding(body: list[Instruction]) -> list[Instruction]:
    while body and (body[-1].opcode == "NOP" or body[-1].target == body[-1].address):
        body.pop()  # a branch to itself and no-ops fill up the last line of the instruction cache
    return body


def bodies(cubins: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of the only kernel in each of Triton's cubins, as `functions` gives them."""
    codes = []
    for cubin in cubins:
        (code,) = _codes(cubin).values()
        codes.append(code)
    return _disassembled(codes, arch)


def _disassembled(codes: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each kernel's code.

    nvdisasm, which `cuobjdump -sass` starts as well, takes longer to start than to read a kernel: it is given
    the code of all, one after another. That of the files they lie in takes it twice as long.
    """
    tool = Path(_tool()).with_name("nvdisasm")
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        target = f"SM{arch}a" if arch >= 90 else f"SM{arch}"  # what Triton compiles for; it has all of SM90's
        command = [str(tool), "--binary", target, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = filter(None, map(_LINE.match, done.stdout.splitlines()))
    found, start = [], 0
    for code in codes:
        body = [
            _instruction(line, start) for line in islice(lines, len(code) // 16)
        ]  # bytes of an instruction
        found.append(_without_padding(body))
        start += len(code)
    return found


def _codes(cubin: bytes) -> dict[str, bytes]:
    """The machine code of its kernels by their names: an ELF file's sections .text.<kernel>."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    number, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + 64 * n) for n in range(number)]
    found = {}
    for section in sections:
        at = sections[names][4] + section[0]
        name = cubin[at : cubin.index(b"\0", at)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = cubin[section[4] : section[4] + section[5]]
    return found


def usage(path: Path | str, arch: str | int) -> dict[str, Usage]:
    """Kernel name to its registers and local bytes (of a thread) and static shared memory (of a block)."""
    reserved = RESERVED_SHARED if int(_number(arch).rstrip("af")) >= 80 else 0
    found: dict[str, Usage] = {}
    name = ""
    for line in _listing(path, arch, "-res-usage").splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif name and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)):
            registers, stack, shared, local = map(int, match.groups())
            found[name] = Usage(registers, max(0, shared - reserved), stack + local)
            name = ""
    return found


def _spans(body: list[Instruction]) -> list[tuple[int, int]]:
    """First and last address of the loops: from the target of a backward branch to that branch."""
    return sorted({(i.target, i.address) for i in body if i.target is not None and i.target <= i.address})


def _between(body: list[Instruction], span: tuple[int, int]) -> list[Instruction]:
    return [i for i in body if span[0] <= i.address <= span[1]]


def _innermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops: those with no other loop within."""
    return [_between(body, span) for span in _innermost(_spans(body))]


def count(body: Iterable[Instruction], opcode: str) -> int:
    """How many instructions have this opcode: `HMMA`, or with its modifiers in the order given, `STG.128`."""
    wanted = opcode.split(".")
    return sum(
        parts[0] == wanted[0] and all(part in parts[1:] for part in wanted[1:])
        for parts in (i.opcode.split(".") for i in body)
    )


def main_loop(body: list[Instruction], opcode: str) -> list[Instruction]:
    """The loop with the most instructions of `opcode`; the whole body when no loop has one.

    Of loops within each other it is the innermost that has any: one without (a copy, say) is part of it.
    """
    having = [span for span in _spans(body) if count(_between(body, span), opcode)]
    found = [_between(body, span) for span in _innermost(having)]
    return max(found, key=lambda loop: count(loop, opcode), default=body)


def stored_bytes(body: Iterable[Instruction]) -> int:
    """Bytes that a thread writes to global memory in one pass through `body`."""
    total = 0
    for instruction in body:
        parts = instruction.opcode.split(".")
        if parts[0] == "STG":
            bits = [int(part.lstrip("US")) for part in parts if part.lstrip("US").isdigit()]
            total += (bits[0] if bits else 32) // 8
    return total


def per_weight_stored(body: list[Instruction], itemsize: int) -> float:
    """Instructions per weight of a loop or body that writes each weight it decodes in `itemsize` bytes."""
    return len(body) * itemsize / stored_bytes(body)


def per_weight_multiplied(body: list[Instruction], column_tiles: int = 1, weights: int = 8) -> float:
    """Instructions per weight of a loop that feeds each weight it decodes to `column_tiles` mma instructions.

    weights: how many one thread holds of the operand of one instruction; 8 for m16n8k16 (16 x 16 in a warp).
    """
    return len(body) * column_tiles / (count(body, "HMMA") * weights)

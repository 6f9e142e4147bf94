"""Builds .cu files with g++ against cuda_on_cpu.h and calls their C functions on CPU tensors.

A `Library` runs in this process, for many correctness tests. A `Program` runs in a process of its own, built
with AddressSanitizer and UndefinedBehaviorSanitizer ("address"), with ThreadSanitizer ("thread") or with
neither ("plain"). What is built lies in .cache/cuda_on_cpu, named by a hash of all it was built from.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "cuda_on_cpu"
CSRC = ROOT / "csrc"
TOYS = [HERE / "toys.cu"]  # to test the emulation itself
RUNTIME = ("fibres.cpp", "launch_on_cpu.cpp", "device_on_cpu.cpp", "memory_order.cpp")

COMMON = ("-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-w")  # warnings are not shown
COMMON += ("-ffp-contract=off",)  # __fmul_rn and __fadd_rn round one by one
COMMON += ("-fno-gnu-unique",)  # each library has its own static variables
SANITIZE = {
    "library": (),
    "plain": (),
    "address": (  # not all of "undefined": the rest of it doubles the time to compile
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=pe_shared*",
        "--param=asan-instrumentation-with-call-threshold=0",  # calls, sooner compiled than what they do
    ),
    "thread": ("-fsanitize=thread",),
}
DEFINES = {"library": (), "plain": (), "address": ("-DPE_ASAN",), "thread": ("-DPE_TSAN",)}


class Race(AssertionError):
    """ThreadSanitizer: two threads touch a word, one of them writes, and nothing orders them."""


class BadAccess(AssertionError):
    """AddressSanitizer or UndefinedBehaviorSanitizer: out of bounds, misaligned, an overflow; or a crash."""


class LaunchFailed(AssertionError):
    """The function returned an error: a launch refused, a barrier or a warp collective misused."""


@dataclass
class Huge:
    """A buffer of `size` bytes of which only some windows hold anything: {byte offset: tensor}."""

    size: int
    windows: dict[int, torch.Tensor]


# --- building -----------------------------------------------------------------------------------------------


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no g++ (or CXX): CUDA kernels are not run on the CPU")
    return found


def _run(command: Sequence[str], **options) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done


@functools.cache
def _version() -> str:
    return _run([compiler(), "--version"]).stdout.splitlines()[0]


def _cached(suffix: str, parts: Sequence[str | bytes], make) -> Path:
    digest = hashlib.sha256()
    for part in (_version(), *parts):
        digest.update(part.encode() if isinstance(part, str) else part)
        digest.update(b"\0")
    path = CACHE / f"{digest.hexdigest()[:24]}{suffix}"
    with _only_one(path.name):
        try:
            os.utime(path)  # for forget_old
        except FileNotFoundError:
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                made = Path(folder) / path.name
                make(made)
                made.replace(path)
    return path


@contextlib.contextmanager
def _only_one(name: str) -> Iterator[None]:
    """Two processes of tests (pytest -n 2), or two threads of one, do not build the same file at once."""
    folder = CACHE / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_old(kept: int = 400) -> None:
    """Removes what was built and not used for longest; all tests of today's sources need about 200 files."""
    with _only_one("forget_old"):
        files = sorted(filter(Path.is_file, CACHE.iterdir()), key=lambda path: path.stat().st_mtime)
        for path in files[:-kept]:
            if time.time() - path.stat().st_mtime > 3600:  # else another process may be about to use it
                path.unlink()
                (CACHE / "locks" / path.name).unlink(missing_ok=True)


def _headers() -> list[bytes]:
    return [path.read_bytes() for path in sorted(HERE.glob("*.h"))]


def _empty_cuda_headers() -> Path:
    """What .cu files include of CUDA's own: cuda_on_cpu.h has it already."""
    folder = CACHE / "include"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cuda.h", "cuda_pipeline.h"):
        (folder / name).touch()
    return folder


def _runtime(kind: str, arch: int) -> list[Path]:
    """The emulation itself is not instrumented: it stands for the device, not for a program on it.

    Nor may its loops become calls of memcpy, which the sanitizers look into."""
    objects = []
    for name in RUNTIME:
        flags = (
            *COMMON,
            "-O2",
            "-fno-tree-loop-distribute-patterns",
            *DEFINES[kind],
            f"-DPE_CPU_ARCH={arch}",
        )
        source = HERE / name
        objects.append(
            _cached(
                ".o",
                (*flags, source.read_bytes(), *_headers()),
                lambda made, source=source, flags=flags: _run([compiler(), *flags, "-c", source, "-o", made]),
            )
        )
    return objects


def _included(source: Path) -> list[Path]:
    """The file and, file by file, those beside it that it includes."""
    found, left = [], [source]
    while left:
        path = left.pop().resolve()
        if path not in found and path.exists():
            found.append(path)
            left += [path.parent / name for name in re.findall(r'#include "(.+)"', path.read_text())]
    return found


def _precompiled(flags: Sequence[str]) -> Path:
    """The name to include cuda_on_cpu.h by: beside it lies, with .gch, what g++ made of it before."""
    command = [compiler(), *flags, "-I", HERE, "-x", "c++-header", HERE / "cuda_on_cpu.h"]
    made = _cached(".h.gch", (*flags, *_headers()), lambda made: _run([*command, "-o", made]))
    return made.with_suffix("")


def _object(source: Path, kind: str, arch: int, level: str, defines: Sequence[str]) -> Path:
    flags = (*COMMON, level, *SANITIZE[kind], *DEFINES[kind], f"-DPE_CPU_ARCH={arch}")

    def compile(made: Path) -> None:
        many = (level, arch) == ("-O0", 900)  # as all faults are, which pays for precompiling
        header = _precompiled(flags) if many else HERE / "cuda_on_cpu.h"
        folders = "-I", HERE, "-I", _empty_cuda_headers()
        command = [compiler(), *flags, *defines, "-Winvalid-pch", "-include", header, *folders]
        _run([*command, "-x", "c++", "-c", source, "-o", made])

    contents = [path.read_bytes() for path in _included(source)]
    return _cached(".o", (*flags, *defines, *contents, *_headers()), compile)


def _harness(kind: str, defines: Sequence[str]) -> Path:
    flags = (*COMMON, "-O1", *SANITIZE[kind], *defines)
    source = HERE / "harness.cpp"
    return _cached(
        ".o",
        (*flags, source.read_bytes()),
        lambda made: _run([compiler(), *flags, "-c", source, "-o", made]),
    )


def build(
    sources: Sequence[Path], kind: str, *, arch: int = 900, level: str = "-O0", defines: Sequence[str] = ()
) -> Path:
    """A shared library (kind "library") or a program (the others) of the .cu files in `sources`."""
    if kind != "library" and (why := unusable(kind)) is not None:
        pytest.skip(why)
    objects = [_object(source, kind, arch, level, defines) for source in sources] + _runtime(kind, arch)
    if kind != "library":
        objects.append(_harness(kind, defines))
    script = HERE / "shared_on_cpu.ld"
    flags = (*SANITIZE[kind], "-shared") if kind == "library" else SANITIZE[kind]
    return _cached(
        ".so" if kind == "library" else "",
        (*flags, script.read_bytes(), *(path.name for path in objects)),
        lambda made: _run([compiler(), *flags, *objects, f"-Wl,-T,{script}", "-o", made]),
    )


def sources(folder: Path = CSRC / "cuda") -> list[Path]:
    return sorted(folder.glob("*.cu"))


# --- running ------------------------------------------------------------------------------------------------


@functools.cache
def _start(kind: str) -> tuple[list[str], str | None]:
    """What a program of this kind is started with, and why it cannot be."""
    flags = SANITIZE[kind]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cpp", Path(folder) / "probe"
        source.write_text("int main() { return 0; }\n")
        built = subprocess.run([compiler(), *flags, source, "-o", program], capture_output=True, text=True)
        if built.returncode != 0:
            return [], f"g++ cannot link {' '.join(flags)}: {built.stderr.strip().splitlines()[-1]}"
        # ThreadSanitizer of older compilers cannot live with much address space randomisation.
        for prefix in ([], ["setarch", "-R"]):
            if prefix and shutil.which(prefix[0]) is None:
                continue
            done = subprocess.run([*prefix, program], capture_output=True, text=True)
            if done.returncode == 0:
                return prefix, None
    return [], f"a program with {' '.join(flags)} does not start: {done.stderr.strip()[:300]}"


def unusable(kind: str) -> str | None:
    return _start(kind)[1]


Argument = int | float | None | torch.Tensor | Huge
Call = tuple  # a function's name and its arguments


@contextlib.contextmanager
def settings(**values: int | str) -> Iterator[None]:
    """PE_CPU_* by their names in small letters."""
    names = {f"PE_CPU_{name.upper()}": str(value) for name, value in values.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Library:
    """The functions, called in this process."""

    def __init__(self, path: Path):
        self.dll = ctypes.CDLL(str(path))
        self.dll.pe_cpu_message.restype = ctypes.c_char_p
        self.dll.pe_cpu_last_launch.restype = ctypes.c_int64

    def run(self, *calls: Call, **values: int | str) -> None:
        """Calls one after another, with the settings given."""
        with settings(**values):
            for name, *arguments in calls:
                code = getattr(self.dll, name)(*map(_as_ctypes, arguments))
                if code != 0:
                    raise LaunchFailed(f"{name} returned {code}: {self.dll.pe_cpu_message().decode()}")

    def last_launch(self) -> tuple[int, ...]:
        """Of the last launch: the grid (3), threads of a block, stream, device, dynamic shared bytes."""
        return tuple(self.dll.pe_cpu_last_launch(i) for i in range(7))


def _as_ctypes(argument: Argument):
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


class Program:
    """The functions, called in a process of their own, under a sanitizer."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind

    def run(self, *calls: Call, **values: int | str) -> None:
        buffers: dict[int, Huge] = {}
        body = struct.pack("<q", len(calls))
        for name, *arguments in calls:
            body += struct.pack("<q", len(name)) + name.encode() + struct.pack("<q", len(arguments))
            body += b"".join(_packed(argument, buffers) for argument in arguments)
        head = struct.pack("<q", len(buffers))
        for buffer in buffers.values():
            head += struct.pack("<qq", buffer.size, len(buffer.windows))
            for offset, tensor in buffer.windows.items():
                data = _bytes(tensor)
                head += struct.pack("<qq", offset, data.numel()) + data.numpy().tobytes()
        with tempfile.TemporaryDirectory() as folder:
            given, got = Path(folder) / "in", Path(folder) / "out"
            given.write_bytes(head + body)
            with settings(**values):
                self._execute(given, got)
            result = torch.frombuffer(bytearray(got.read_bytes() or b"\0"), dtype=torch.uint8)
        start = 0
        for buffer in buffers.values():
            for tensor in buffer.windows.values():
                data = _bytes(tensor)
                data.copy_(result[start : start + data.numel()])
                start += data.numel()

    def _execute(self, given: Path, got: Path) -> None:
        environment = os.environ | {
            "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
            "ASAN_OPTIONS": "detect_leaks=0:exitcode=67",
            "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=67",
        }
        prefix, _ = _start(self.kind)
        done = subprocess.run(
            [*prefix, self.path, given, got], capture_output=True, text=True, env=environment, timeout=300
        )
        if done.returncode == 0:
            return
        if done.returncode == 66 or "ThreadSanitizer: data race" in done.stderr:
            raise Race(done.stderr)
        if done.returncode == 3:
            raise LaunchFailed(done.stderr)
        if done.returncode == 67 or done.returncode < 0:
            raise BadAccess(f"exit code {done.returncode}\n{done.stderr}")
        raise RuntimeError(f"{self.path}: exit code {done.returncode}\n{done.stderr}")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The storage of a tensor, to its end: that is what a kernel that goes too far finds."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _packed(argument: Argument, buffers: dict[int, Huge]) -> bytes:
    if argument is None:
        return struct.pack("<qqq", 3, 0, 0)
    if isinstance(argument, Huge):
        key, offset = id(argument), 0
        buffers.setdefault(key, argument)
    elif isinstance(argument, torch.Tensor):
        storage = argument.untyped_storage()
        key, offset = storage._cdata, argument.storage_offset() * argument.element_size()
        buffers.setdefault(key, Huge(storage.nbytes(), {0: argument}))
    elif isinstance(argument, float):
        return struct.pack("<qdq", 1, argument, 0)
    else:
        return struct.pack("<qqq", 0, argument, 0)
    return struct.pack("<qqq", 2, list(buffers).index(key), offset)

"""Compiles every kernel for every architecture and writes bench/results/resources.csv; no GPU is needed.

python -m bench.resources              the table anew (also: make resources)
python -m bench.resources --check      only say what is wrong with the kernels, and what is worse than in it

Triton's variants (peft_engine/kernels/variants.py) are compiled for each architecture; what was compiled
before lies in .cache/aot/, by a hash of the kernel's source, types, constants, architecture and compiler.
CUDA kernels are read from peft_engine/_cuda.so. What the columns mean is in bench/machine_code.py.
"""

import argparse
import csv
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import ahead, machine_code, sass
from bench.ahead import ALIKE, Compiled, compile_triton
from bench.machine_code import (
    Result,
    Row,
    counted,
    cuda_per_weight,
    faults,
    missing,
    spilled,
    tensor_core,
    widest,
)
from peft_engine.kernels.variants import Variant, collect

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "bench" / "results" / "resources.csv"
CACHE = ROOT / ".cache" / "aot"
LIBRARY = ROOT / "peft_engine" / "_cuda.so"
MEND = "make resources"
BACKENDS = ("triton", "cuda")
BATCH = 64  # kernels for which a worker starts its tools once
TENSOR_MEMORY_LIMIT = 512  # columns, where a dot is tcgen05


def read_triton(built: Compiled, body: list[sass.Instruction]) -> Result:
    """What its machine code says of it."""
    import triton

    name, variant, arch, metadata = built.name, built.variant, built.arch, built.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.cubin)
        file.flush()
        (usage,) = sass.usage(file.name, arch).values()
    per_weight = None
    if variant.weights is not None:
        per_weight = round(len(counted(body)) * 32 * metadata.num_warps / variant.weights, 2)
    row = Row(
        kernel=name.split(" ", maxsplit=1)[0],
        backend="triton",
        variant=variant.name,
        arch=arch,
        registers=usage.registers,
        shared_bytes=metadata.shared + usage.shared,
        spill_bytes=spilled(body, usage.spill_bytes),
        instructions_per_weight=per_weight,
        instructions=len(body),
        tensor_core=tensor_core(body),
        widest_load=widest(body, "LDG", "LDGSTS"),
        widest_store=widest(body, "STG"),
        warps=metadata.num_warps,
        stages=variant.num_stages,
        compiler=f"triton {triton.__version__}",
    )
    found = [*faults(row), *missing(body, variant.wants)]
    if (metadata.tmem_size or 0) > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory: {metadata.tmem_size} columns, sm_{arch} has {TENSOR_MEMORY_LIMIT}")
    if per_weight == 0:
        found.append("instructions per weight: neither a loop nor one way through the kernel was found")
    return Result(name, row, tuple(found))


def tasks(file: Path | None) -> list[tuple[str, Variant, int]]:
    """(name, variant, architecture) of everything that is compiled, or of what `file`'s variants() yields."""
    kept: dict[tuple[int, str], tuple[str, Variant, int]] = {}
    named: Counter[tuple[str, str, int]] = Counter()
    for variant in collect() if file is None else _module(file).variants():
        # the op whose folder the kernel lies in: others launch it too
        op = variant.kernel.fn.__module__.removeprefix("peft_engine.kernels.").split(".")[0]
        for arch in variant.archs:
            facts = arch, repr(dataclasses.replace(variant, name="", archs=()))
            if facts in kept:  # what several calls launch alike is compiled once, under the first one's name
                continue
            kernel, name = f"{op}.{variant.kernel.__name__}", variant.name
            named[kernel, name, arch] += 1
            if (nth := named[kernel, name, arch]) > 1:  # calls of one name that launch it in several ways
                name = f"{name}, {nth}"
            one = dataclasses.replace(variant, name=name)
            kept[facts] = f"{kernel} [{name}] sm_{arch}", one, arch
    for (
        _,
        variant,
        _,
    ) in kept.values():  # Triton's key depends on whose was formed before: one order
        _ = variant.kernel.cache_key
    return list(kept.values())


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tasks = functools.cache(tasks)  # a worker finds them listed: it is forked


def _compile_tasks(file: Path | None, paths: dict[int, Path]) -> dict[Path, Result]:
    """Tasks of one or of ALIKE architectures, n to file."""
    gc.disable()  # it takes a tenth of the time to find little: a batch leaves some 60 MB
    gc.freeze()  # nor is what was there before the batch looked through after it
    found: dict[Path, Result | Compiled] = {}
    seen: dict[Any, Any] = {}
    for n, path in paths.items():
        with tempfile.TemporaryDirectory() as folder:  # Triton's own cache would grow without end
            os.environ["TRITON_CACHE_DIR"] = folder
            found[path] = compile_triton(*_tasks(file)[n], seen)
    read: dict[Path, Result] = {}
    compiled = {path: built for path, built in found.items() if isinstance(built, Compiled)}
    for arch in {built.arch for built in compiled.values()}:
        of = {path: built for path, built in compiled.items() if built.arch == arch}
        bodies = sass.bodies([built.cubin for built in of.values()], arch)
        read |= {p: read_triton(built, body) for (p, built), body in zip(of.items(), bodies, strict=True)}
    gc.collect()
    return {path: read.get(path, result) for path, result in found.items()}


@functools.cache
def _counting_rules() -> str:
    sources = [inspect.getsource(part) for part in (sass, machine_code, ahead, read_triton, cuda_results)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def _cache_file(variant: Variant, arch: int) -> Path:
    import triton

    facts = {
        name: sorted(value.items()) if isinstance(value, dict) else value
        for name, value in vars(variant).items()
        if name not in ("kernel", "archs")
    }
    key = repr((variant.kernel.cache_key, facts, arch, triton.__version__, _counting_rules()))
    return CACHE / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def triton_results(file: Path | None = None) -> list[Result]:
    """All of Triton's, compiled by two processes where they are not in the cache."""
    everything = _tasks(file)
    paths = [_cache_file(variant, arch) for _, variant, arch in everything]
    CACHE.mkdir(parents=True, exist_ok=True)
    todo: dict[int, list[int]] = {}
    for n, path in enumerate(paths):
        if not path.exists():
            arch = everything[n][2]
            todo.setdefault(ALIKE[0] if arch in ALIKE else arch, []).append(n)
    for of in todo.values():  # what ALIKE architectures share comes one after another
        of.sort(key=lambda n: repr(dataclasses.replace(everything[n][1], name="", archs=())))
    batches = [of[i : i + BATCH] for of in todo.values() for i in range(0, len(of), BATCH)]
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("fork")) as pool:
        # The first one forks the workers: before the bar has its thread.
        waiting = [pool.submit(_compile_tasks, file, {n: paths[n] for n in batch}) for batch in batches]
        with Progress(*columns, console=Console(stderr=True), disable=not todo) as progress:
            bar = progress.add_task("", total=sum(map(len, batches)))
            for done in as_completed(waiting):
                for path, result in done.result().items():
                    _write(path, dataclasses.asdict(result))
                    progress.update(bar, advance=1, description=result.name)
    return [_result(json.loads(path.read_text())) for path in paths]


def _write(path: Path, what: Any) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(what))
    partial.replace(path)


def _result(fields: dict[str, Any]) -> Result:
    row = fields["row"] and Row(**fields["row"])
    return Result(fields["name"], row, tuple(fields["faults"]))


def cuda_results(library: Path) -> list[Result]:
    """Every kernel in the CUDA library, for each architecture it was built for."""
    contents = library.read_bytes()
    cached = CACHE / f"{hashlib.sha256(contents + _counting_rules().encode()).hexdigest()}.json"
    if cached.exists():
        return [_result(fields) for fields in json.loads(cached.read_text())]
    archs = {
        int(number) for number in re.findall(r"sm_(\d+)", _output(sass.cuobjdump(), "--list-elf", library))
    }
    compiler = re.search(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)", contents)
    found = []
    for arch in sorted(archs):
        usage = sass.usage(library, arch)
        for mangled, body in sorted(sass.kept_functions(library, arch).items()):
            kernel, variant = _readable(mangled)
            row = Row(
                kernel=kernel,
                backend="cuda",
                variant=variant,
                arch=arch,
                registers=usage[mangled].registers,
                shared_bytes=usage[mangled].shared,
                spill_bytes=spilled(body, usage[mangled].spill_bytes),
                instructions_per_weight=cuda_per_weight(kernel, variant, body),
                instructions=len(body),
                tensor_core=tensor_core(body),
                widest_load=widest(body, "LDG", "LDGSTS"),
                widest_store=widest(body, "STG"),
                warps=None,
                stages=None,
                compiler=f"nvcc {compiler[1].decode()}" if compiler else "nvcc",
            )
            found.append(Result(str(row), row, tuple(faults(row))))
    CACHE.mkdir(parents=True, exist_ok=True)
    _write(cached, [dataclasses.asdict(result) for result in found])
    return found


@functools.cache
def _readable(mangled: str) -> tuple[str, str]:
    """Name and template arguments, as in ("nf4.dequantize_16bit", "__half, true, false")."""
    plain = _output("c++filt", mangled).strip().replace("(anonymous namespace)::", "").removeprefix("void ")
    name, _, rest = plain.partition("(")[0].partition("<")
    # nvcc names the unnamed namespace after a hash, which may be all digits, and the file: its length tells.
    files = re.findall(r"_(?=(\d+)_(\w+?_cu)_)", mangled)
    file = [f"{name.removesuffix('_cu')}." for length, name in files if int(length) == len(name)]
    return "".join(file[:1]) + name, rest.removesuffix(">")


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


# The table


def write_table(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f.name for f in dataclasses.fields(Row))
        writer.writerows(dataclasses.astuple(row) for row in sorted(rows, key=lambda row: row.key))


def read_table(path: Path) -> list[Row]:
    whole = ("arch", "registers", "shared_bytes", "spill_bytes", "instructions", "warps", "stages")
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            values: dict[str, Any] = dict(line)
            values |= {name: int(line[name]) if line[name] else None for name in whole}
            per_weight = line["instructions_per_weight"]
            rows.append(
                Row(**values | {"instructions_per_weight": float(per_weight) if per_weight else None})
            )
    return rows


def incomparable(table: Sequence[Row], fresh: Sequence[Row], backend: str) -> str | None:
    """Why the rows of a backend say nothing about the table's: none here, or another compiler's."""
    ours = {row.compiler for row in fresh if row.backend == backend}
    theirs = {row.compiler for row in table if row.backend == backend}
    if theirs and not ours:
        return f"the table has {backend} kernels, and none were compiled here"
    if theirs and ours != theirs:
        return f"the table is of {', '.join(sorted(theirs))}, here is {', '.join(sorted(ours))}"
    return None


def compare(table: Sequence[Row], fresh: Sequence[Row], backend: str) -> list[str]:
    """A line for each row of a backend that is worse than in the table, or not what the table says."""
    if incomparable(table, fresh, backend) is not None:
        return []
    new = {row.key: row for row in fresh if row.backend == backend}
    archs = {row.arch for row in new.values()}  # a CUDA library may be built for some only
    old = {row.key: row for row in table if row.backend == backend and row.arch in archs}
    return [
        *(f"{new[key]}: not in the table; run {MEND}" for key in sorted(new.keys() - old.keys())),
        *(f"{old[key]}: in the table, but gone; run {MEND}" for key in sorted(old.keys() - new.keys())),
        *(line for key in sorted(old.keys() & new.keys()) for line in _difference(old[key], new[key])),
    ]


def _difference(old: Row, new: Row) -> Iterator[str]:
    changed = {f.name: (getattr(old, f.name), getattr(new, f.name)) for f in dataclasses.fields(Row)}
    changed = {name: (before, now) for name, (before, now) in changed.items() if before != now}
    worse = [
        f"{name} grew from {changed[name][0]} to {changed[name][1]}"
        for name in ("registers", "shared_bytes", "spill_bytes", "instructions_per_weight")
        if name in changed and (changed[name][1] or 0) > (changed[name][0] or 0)
    ]
    if worse:
        yield f"{new}: {', '.join(worse)}; undo it or, to accept it, run {MEND}"
    elif changed:
        was = ", ".join(f"{name} is {now}, was {before}" for name, (before, now) in changed.items())
        yield f"{new}: {was}; run {MEND}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing is wrong; 1 when a kernel has a fault or, with --check, is not as the table says."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="leave the table as it is, and compare with it")
    parser.add_argument("--variants", type=Path, help="compile what variants() of this file yields; no table")
    parser.add_argument("--json", type=Path, help="write rows, faults, wrong and incomparable to this file")
    arguments = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is defined, here and in the workers
    results = triton_results(arguments.variants)
    if arguments.variants is None and LIBRARY.exists():
        results += cuda_results(LIBRARY)
    rows = [result.row for result in results if result.row is not None]
    bad = {result.name: result.faults for result in results if result.faults}
    table = read_table(TABLE) if TABLE.exists() and arguments.variants is None else []
    wrong = {name: [] if arguments.variants else compare(table, rows, name) for name in BACKENDS}
    unlike = {name: incomparable(table, rows, name) for name in BACKENDS}
    if arguments.json:
        found = {"faults": bad, "wrong": wrong, "incomparable": unlike, "rows": [vars(row) for row in rows]}
        arguments.json.write_text(json.dumps(found))
    for name, lines in bad.items():
        print(f"{name}: {'; '.join(lines)}", file=sys.stderr)
    for line in filter(None, unlike.values()):
        print(line, file=sys.stderr)
    if arguments.check or arguments.variants:
        for line in [line for lines in wrong.values() for line in lines]:
            print(line, file=sys.stderr)
        return int(bool(bad) or any(wrong.values()))
    here = {(row.backend, row.arch) for row in rows}  # a CUDA library may be built for some, or not at all
    write_table(TABLE, rows + [row for row in table if (row.backend, row.arch) not in here])
    print(f"{len(rows)} kernels compiled, {len(bad)} with a fault: {TABLE.relative_to(ROOT)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

"""The tuner: times candidate tiles of Triton's kernels, and lora_linear's paths over the rows, on this GPU.

    python -m bench.tune                          tiles, then paths, into bench/results/<device>/
    python -m bench.tune --only tiles --kernel single --seconds 60

It prints the entries for kernels/*/tiles.py and lora_linear/paths.py with what was measured; nothing tunes at
run time. Candidates are compiled beforehand by several processes, into Triton's cache. Measured in bf16,
lora_linear with r=16 and float32 adapters; bottleneck and prefix_attention are in bench/tune_adapters.py.
"""

import argparse
import concurrent.futures
import itertools
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import measure, peers, tune_adapters
from bench.gpu_sections import clones, rotated, rotation
from bench.gpu_timing import Call, DeviceLost, Section, clock_reader, flat, warm
from peft_engine import ops
from peft_engine.activations import padded_empty, spare_width, with_spare

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
ROWS = {
    "down": (512, 2048, 8192),
    "up": (512, 2048, 8192),
    "outer": (512, 2048, 8192),
    "single": (16, 32, 64, 128, 256),
    "single_backward": (16, 32, 64, 128, 256),
}
# lora_linear's by their names; those of other ops (bench/tune_adapters.py) have the op's before a dot.
ALL_ROWS = ROWS | {name: tuned.rows for name, tuned in tune_adapters.KERNELS.items()}
PATH_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
KEPT = 10  # tiles of the first shape that are timed on the others
Tile = tuple[int, ...]
Base = tuple[Any, ...]  # weight, absmax, nested_absmax, offset, blocksize


def base_of(q: ops.NF4Tensor) -> Base:
    return q.packed, q.absmax, q.nested_absmax, q.offset, q.blocksize


def weights(n: int, k: int, device: torch.device) -> list[ops.NF4Tensor]:
    """Copies of one weight, enough to go round the L2."""
    q = ops.nf4_quantize(torch.randn(n, k, dtype=torch.bfloat16, device=device), double_quant=True)
    return clones(q, rotation(q.nbytes, device))


def kernel_call(kernel: str, n: int, k: int, rows: int, qs: list[ops.NF4Tensor]) -> Call:
    """One launch of a kernel for each weight of qs, as lora_linear makes it for x (rows, k)."""
    from peft_engine.kernels.lora_linear import single
    from peft_engine.kernels.lora_linear.down import down
    from peft_engine.kernels.lora_linear.outer import outer
    from peft_engine.kernels.lora_linear.up import up_

    device, rank = qs[0].device, peers.RANK
    a, b = (torch.randn(shape, device=device) / 64 for shape in ((rank, k), (n, rank)))

    def padded(columns: int) -> torch.Tensor:
        x = padded_empty(rows, columns, rank, torch.bfloat16, device)
        return x.copy_(torch.randn(rows, columns, dtype=torch.bfloat16, device=device))

    if kernel in ("single", "single_backward"):
        x, forward = padded(k if kernel == "single" else n), kernel == "single"
        run = single.forward if forward else single.backward
        end = (None, 0.0, None) if forward else (0.0, None)  # no bias, no dropout
        return rotated([partial(run, x, base_of(q), n if forward else k, a, b, 1.0, *end) for q in qs])
    x = padded(k)
    if kernel == "down":
        width = spare_width(rank, a.dtype, x.dtype)
        return lambda: down(x, a, 1.0, buffer=with_spare(x, width), terms=3)
    h = torch.randn(rows, rank, device=device)
    if kernel == "up":
        y = padded(n)
        return lambda: up_(y, h, b, 1.0)
    return lambda: outer(h, x, torch.float32)


def tiled(kernel: str, tile: Tile, call: Call) -> Call:
    """`call` with this tile in place of the table's."""
    from peft_engine.kernels.tiles import setting

    def run() -> object:
        with setting(kernel.rpartition(".")[2], tile):
            return call()

    return run


# --- tiles -----------------------------------------------------------------------------------------------


def tune_tiles(section: Section, kernels: Iterable[str], shapes=None, rows_of=None) -> list[str]:
    """Times the candidates: on the first shape all, on the others its best; a line for each number of rows.

    The adapter's kernels read activations, which the kernel before left in the L2 where they fit: as here.
    """
    lines = []
    for kernel, rows in [(name, rows) for name in kernels for rows in (rows_of or ALL_ROWS)[name]]:
        sizes = shapes or (tune_adapters.shapes_of(kernel) if "." in kernel else SHAPES)
        now = table_tile(kernel, sizes[0], rows, section.device)
        left = list(dict.fromkeys([now, *(t for t in candidates(kernel) if useful(kernel, t, rows))]))
        times: dict[Tile, list[float]] = {tile: [] for tile in left}
        for shape in sizes:
            size = "x".join(map(str, shape))
            rank = "" if "." in kernel else f", r={peers.RANK}"
            if not section.begin(f"{kernel}, {size}{rank}, {rows} rows"):
                continue
            call, launches = call_of(kernel, shape, rows, section.device)
            makers = {name_of(tile): partial(tiled, kernel, tile, call) for tile in left}
            replays = section.capture(section.make(makers))
            for name, rounds in section.interleave(replays, turn_seconds=0.002).items():
                seconds = [s / launches for s in flat(rounds)]
                section.add(name, "time", "us", (s * 1e6 for s in seconds))
                times[tile_of(name)].append(statistics.median(seconds))
            ran = [tile for tile in left if times[tile]]
            left = sorted(ran, key=lambda tile: times[tile][0])[:KEPT]
            left += [now] if now in ran and now not in left else []
        lines += line_of(kernel, rows, now, times, len(sizes))
    section.finish()
    return lines


def call_of(kernel: str, shape: tuple[int, ...], rows: int, device: torch.device) -> tuple[Call, int]:
    """What launches a kernel, and how often it does."""
    if "." in kernel:
        return tune_adapters.kernel_call(kernel, shape, rows, device), 1
    qs = weights(*shape, device)[: None if kernel.startswith("single") else 1]
    return kernel_call(kernel, *shape, rows, qs), len(qs)


def table_tile(kernel: str, shape: tuple[int, ...], rows: int, device: torch.device) -> Tile:
    """The tile that is in the table now."""
    if "." in kernel:
        return tune_adapters.table_tile(kernel, shape, rows, device)
    from peft_engine.kernels.lora_linear import tiles

    return tiles.tile(kernel, rows, peers.RANK, torch.bfloat16, device)


def candidates(kernel: str) -> list[Tile]:
    if "." in kernel:
        return tune_adapters.candidates(kernel)
    from peft_engine.kernels.lora_linear import tiles

    return tiles.candidates(kernel)


def useful(kernel: str, tile: Tile, rows: int) -> bool:
    """Whether a tile's rows fit: more than there are idle, under a quarter of them decode the weight anew."""
    return not kernel.startswith("single") or (tile[0] <= max(16, rows) and 4 * tile[0] >= rows)


def name_of(tile: Tile) -> str:
    return " ".join(map(str, tile))


def tile_of(name: str) -> Tile:
    return tuple(map(int, name.split()))


def line_of(kernel: str, rows: int, now: Tile, times: dict[Tile, list[float]], shapes: int) -> list[str]:
    """The tile with the least geometric mean over the shapes, and the table's; none where none ran on all."""
    means = {
        tile: 1e6 * statistics.geometric_mean(each) for tile, each in times.items() if len(each) == shapes
    }
    if not means:
        return []
    best = min(means, key=lambda tile: means[tile])
    here = f"{means[now]:.1f} us" if now in means else "does not run"
    return [f"{kernel}, {rows} rows: {best}  # {means[best]:.1f} us; the table's {now} {here}"]


# --- paths -----------------------------------------------------------------------------------------------


def tune_paths(section: Section, shapes=SHAPES, rows_of=PATH_ROWS) -> list[str]:
    """Times the paths over the rows, forward and backward (dx alone); the lines to paste."""
    from peft_engine.kernels.lora_linear import paths

    totals: dict[str, dict[int, dict[str, list[float]]]] = {"forward": {}, "backward": {}}
    for n, k in shapes:
        qs = weights(n, k, section.device)
        for direction, rows in itertools.product(totals, rows_of):
            if not section.begin(f"{direction}, {n}x{k}, r={peers.RANK}, {rows} rows"):
                continue
            names = paths.PATHS if direction == "forward" else [p for p in paths.PATHS if p != "few_rows"]
            makers = {path: partial(path_call, path, direction, n, k, rows, qs) for path in names}
            calls = section.capture(section.make(makers))
            for path, rounds in section.interleave(calls, turn_seconds=0.003).items():
                seconds = [s / len(qs) for s in flat(rounds)]
                section.add(path, "time", "us", (s * 1e6 for s in seconds))
                found = totals[direction].setdefault(rows, {}).setdefault(path, [])
                found.append(statistics.median(seconds))
    section.finish()
    lines = []
    for direction, path in (("forward", "few_rows"), ("forward", "single"), ("backward", "single")):
        others = [p for p in paths.PATHS[paths.PATHS.index(path) + 1 :]]
        best = crossover(totals[direction], path, others, len(shapes))
        lines.append(f"{path}, {direction}: faster than {' and '.join(others)} up to {best} rows")
    return lines


def path_call(path: str, direction: str, n: int, k: int, rows: int, qs: list[ops.NF4Tensor]) -> Call:
    """The product, or dx, by this path, once for each weight."""
    from peft_engine.kernels.lora_linear import paths
    from peft_engine.kernels.lora_linear.backward import backward
    from peft_engine.kernels.lora_linear.forward import forward

    device, rank = qs[0].device, peers.RANK
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=device)
    a, b = (torch.randn(shape, device=device) / 64 for shape in ((rank, k), (n, rank)))
    x, dy = bf16(rows, k), bf16(rows, n)

    def call() -> None:
        with paths.pinned(path):
            for q in qs:
                if direction == "forward":
                    forward(x, *base_of(q), n, a, b, 1.0, None, 0.0, None)
                else:  # h None: the adapter is frozen, so dx is all
                    backward(dy, x, *base_of(q), a, b, None, 1.0, 0.0, None, True)

    return call


def crossover(times: dict[int, dict[str, list[float]]], path: str, others: Iterable[str], shapes: int) -> int:
    """The most rows at which, and at all fewer measured, `path` is the fastest over all shapes together."""
    best = 0
    for rows in sorted(times):
        sums = {p: sum(map(math.log, times[rows].get(p, []))) for p in (path, *others)}
        whole = {p: s for p, s in sums.items() if len(times[rows].get(p, [])) == shapes}
        if path not in whole or whole[path] > min(whole.values()):
            break
        best = rows
    return best


# --- beforehand ------------------------------------------------------------------------------------------


def compile_one(task: tuple[str, Tile]) -> str | None:
    """Runs a candidate once, which leaves it in Triton's cache; why it does not run, or None."""
    kernel, tile = task
    device = torch.device("cuda", 0)
    try:
        shape = tune_adapters.shapes_of(kernel)[0] if "." in kernel else (4096, 4096)
        call, _ = call_of(kernel, shape, ALL_ROWS[kernel][-1], device)
        warm(tiled(kernel, tile, call), device, times=1)
    except Exception as error:  # the section says it again, in a row
        return f"{kernel} {tile}: {type(error).__name__}"
    return None


def compile_all(tasks: list[tuple[str, Tile]], processes: int, seconds: float) -> None:
    """Fills Triton's cache; what is not ready in time is compiled when its turn comes."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
    waiting = [pool.submit(compile_one, task) for task in tasks]
    done, late = concurrent.futures.wait(waiting, timeout=seconds)
    failed = [f.result() for f in done if f.exception() is None and f.result()]
    print(f"compiled {len(done) - len(failed)} of {len(tasks)}; not ready {len(late)}", *failed, sep="\n  ")
    pool.shutdown(wait=not late, cancel_futures=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("tiles", "paths"), help="only these (default: both)")
    parser.add_argument(
        "--kernel", action="append", choices=list(ALL_ROWS), help="only its tiles; repeatable"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="for all of it (default 240)")
    parser.add_argument("--processes", type=int, default=14, help="that compile beforehand (0: none)")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "bench" / "results")
    parser.add_argument("--device-name", help="name of the folder in the results (default: the GPU's)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here; nothing was measured")
        return 0
    started, device = time.monotonic(), torch.device("cuda", 0)
    folder = arguments.out / (arguments.device_name or measure.device_name("cuda"))
    section = partial(Section, device=device, folder=folder, rounds=5, read_clocks=clock_reader())
    todo: list[tuple[str, float, Callable[[Section], list[str]]]] = []
    if arguments.only != "paths":
        kernels = arguments.kernel or list(ALL_ROWS)
        if arguments.processes:
            tasks = [(kernel, tile) for kernel in kernels for tile in candidates(kernel)]
            compile_all(tasks, arguments.processes, arguments.seconds * 0.4)
        share = 1.0 if arguments.only else 0.75
        todo.append(("tiles", share, partial(tune_tiles, kernels=kernels)))
    if arguments.only != "tiles":
        todo.append(("paths", 1.0, tune_paths))
    capability = torch.cuda.get_device_capability(device)
    for name, share, tune in todo:
        deadline = started + arguments.seconds * share
        try:
            lines = tune(section(name, deadline=deadline))
        except DeviceLost as error:
            print(f"tune: {name}: the GPU is lost: {error}", file=sys.stderr)
            return 1
        print(
            f"{name}, {capability}, {torch.cuda.get_device_name()}: {folder / name}.csv", *lines, sep="\n  "
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

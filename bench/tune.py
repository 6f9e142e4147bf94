"""The tuner: times candidate tiles of Triton's kernels, and lora_linear's paths over the rows, on this GPU.

    python -m bench.tune                          tiles, then paths, into bench/results/<device>/
    python -m bench.tune --only tiles --kernel single --seconds 60

It prints the entries for kernels/*/tiles.py and lora_linear/paths.py with what was measured; nothing tunes at
run time. Candidates are compiled beforehand by several processes, into Triton's cache. Measured in bf16;
lora_linear is in bench/tune_lora_linear.py, bottleneck and prefix_attention are in bench/tune_adapters.py.
"""

import argparse
import concurrent.futures
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import measure, tune_adapters, tune_lora_linear
from bench.gpu_timing import Call, DeviceLost, Section, clock_reader, flat, warm

PARTS: tuple[Any, ...] = (tune_lora_linear, tune_adapters)  # alike, each with kernels of its own
KERNELS = tuple(kernel for part in PARTS for kernel in part.KERNELS)
KEPT = 10  # tiles of the first shape that are timed on the others
Tile = tuple[int, ...]


def part_of(kernel: str) -> Any:
    """The module that knows the kernel."""
    return next(part for part in PARTS if kernel in part.KERNELS)


# --- tiles -----------------------------------------------------------------------------------------------


def tune_tiles(section: Section, kernels: Iterable[str], shapes=None, rows_of=None) -> list[str]:
    """Times candidates, on the first shape all, on the others its best; a line for each number of rows."""
    lines = []
    for kernel in kernels:
        for rows in (rows_of or {}).get(kernel) or part_of(kernel).rows_of(kernel):
            lines += tune_kernel(section, kernel, rows, shapes or part_of(kernel).shapes_of(kernel))
    section.finish()
    return lines


def tune_kernel(section: Section, kernel: str, rows: int, sizes: tuple[tuple[int, ...], ...]) -> list[str]:
    """The line for one number of rows; none where no tile ran on all shapes."""
    part = part_of(kernel)
    now = part.table_tile(kernel, sizes[0], rows, section.device)
    left = list(dict.fromkeys([now, *part.candidates(kernel, rows)]))
    times: dict[Tile, list[float]] = {tile: [] for tile in left}
    for shape in sizes:
        if not section.begin(part.case_of(kernel, shape, rows)):
            continue
        call, launches = part.call_of(kernel, shape, rows, section.device)
        makers = {name_of(tile): partial(tiled, kernel, tile, call) for tile in left}
        replays = section.capture(section.make(makers))
        for name, rounds in section.interleave(replays, turn_seconds=0.002).items():
            seconds = [s / launches for s in flat(rounds)]
            section.add(name, "time", "us", (s * 1e6 for s in seconds))
            times[tile_of(name)].append(statistics.median(seconds))
        ran = [tile for tile in left if times[tile]]
        left = sorted(ran, key=lambda tile: times[tile][0])[:KEPT]
        left += [now] if now in ran and now not in left else []
    return line_of(kernel, rows, now, times, len(sizes))


def tiled(kernel: str, tile: Tile, call: Call) -> Call:
    """`call` with this tile in place of the table's."""
    from peft_engine.kernels.tiles import setting

    def run() -> object:
        with setting(kernel.rpartition(".")[2], tile):
            return call()

    return run


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


# --- beforehand ------------------------------------------------------------------------------------------


def compile_one(task: tuple[str, Tile]) -> str | None:
    """Runs a candidate once, which leaves it in Triton's cache; why it does not run, or None."""
    kernel, tile = task
    device = torch.device("cuda", 0)
    try:
        part = part_of(kernel)
        call, _ = part.call_of(kernel, part.shapes_of(kernel)[0], part.rows_of(kernel)[-1], device)
        warm(tiled(kernel, tile, call), device, times=1)
    except Exception as error:  # the section says it again, in a row
        return f"{kernel} {tile}: {type(error).__name__}"
    return None


def compile_all(tasks: list[tuple[str, Tile]], processes: int, seconds: float) -> None:
    """Fills Triton's cache; what is not ready in time is compiled when its turn comes.

    Its processes are gone afterwards: what they still launch would be in the times of the others.
    """
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=context)
    waiting = [pool.submit(compile_one, task) for task in tasks]
    done, late = concurrent.futures.wait(waiting, timeout=seconds)
    failed = [f.result() for f in done if f.exception() is None and f.result()]
    print(f"compiled {len(done) - len(failed)} of {len(tasks)}; not ready {len(late)}", *failed, sep="\n  ")
    workers = set(multiprocessing.active_children()) - others
    pool.shutdown(wait=not late, cancel_futures=True)
    for worker in workers if late else ():
        worker.kill()
    for worker in workers:
        worker.join()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("tiles", "paths"), help="only these (default: both)")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="only its tiles; repeatable")
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
        kernels = arguments.kernel or list(KERNELS)
        if arguments.processes:
            tasks = [(kernel, tile) for kernel in kernels for tile in part_of(kernel).candidates(kernel)]
            compile_all(tasks, arguments.processes, arguments.seconds * 0.4)
        share = 1.0 if arguments.only else 0.75
        todo.append(("tiles", share, partial(tune_tiles, kernels=kernels)))
    if arguments.only != "tiles":
        todo.append(("paths", 1.0, tune_lora_linear.tune_paths))
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

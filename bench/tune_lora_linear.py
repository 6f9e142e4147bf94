"""What bench/tune.py tunes of lora_linear: candidate tiles, calls that launch them, and paths over the rows.

Measured in bf16 over NF4 with r=16 and float32 adapters. The adapter's kernels read activations, which the
kernel before left in the L2 where they fit: as here.
"""

import itertools
import math
import statistics
from collections.abc import Iterable
from functools import partial

import torch

from bench import peers
from bench.gpu_sections import clones, rotated, rotation
from bench.gpu_timing import Call, Section, flat
from peft_engine import ops
from peft_engine.activations import padded_empty, spare_width, with_spare
from peft_engine.ops.lora_linear import flat_base

SHAPES: tuple[tuple[int, ...], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
# The rows at which a kernel is timed.
KERNELS: dict[str, tuple[int, ...]] = {
    "down": (512, 2048, 8192),
    "up": (512, 2048, 8192),
    "outer": (512, 2048, 8192),
    "single": (16, 32, 64, 128, 256),
    "single_backward": (16, 32, 64, 128, 256),
}
PATH_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)
Tile = tuple[int, ...]


def rows_of(kernel: str) -> tuple[int, ...]:
    return KERNELS[kernel]


def shapes_of(kernel: str) -> tuple[tuple[int, ...], ...]:
    return SHAPES


def case_of(kernel: str, shape: tuple[int, ...], rows: int) -> str:
    return f"{kernel}, {'x'.join(map(str, shape))}, r={peers.RANK}, {rows} rows"


def candidates(kernel: str, rows: int | None = None) -> list[Tile]:
    """The tiles to try; for so many rows those that fit: more rows are idle, and a tile of under a quarter of
    them decodes the weight anew.
    """
    from peft_engine.kernels.lora_linear import tiles

    found = tiles.candidates(kernel)
    if rows is None or not kernel.startswith("single"):
        return found
    return [tile for tile in found if tile[0] <= max(16, rows) and 4 * tile[0] >= rows]


def table_tile(kernel: str, shape: tuple[int, ...], rows: int, device: torch.device) -> Tile:
    """The tile that is in the table now."""
    from peft_engine.kernels.lora_linear import tiles

    return tiles.tile(kernel, rows, peers.RANK, torch.bfloat16, device)


def call_of(kernel: str, shape: tuple[int, ...], rows: int, device: torch.device) -> tuple[Call, int]:
    """What launches a kernel, and how often it does: once for each copy of the weight where it reads one."""
    qs = weights(*shape, device)[: None if kernel.startswith("single") else 1]
    return kernel_call(kernel, *shape, rows, qs), len(qs)


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
        return rotated([partial(run, x, flat_base(q), n if forward else k, a, b, 1.0, *end) for q in qs])
    x = padded(k)
    if kernel == "down":
        width = spare_width(rank, a.dtype, x.dtype)
        return lambda: down(x, a, 1.0, buffer=with_spare(x, width), terms=3)
    h = torch.randn(rows, rank, device=device)
    y = padded(n)
    return (lambda: up_(y, h, b, 1.0)) if kernel == "up" else lambda: outer(h, x, h, y, torch.float32)


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
                    forward(x, *flat_base(q), n, a, b, 1.0, None, 0.0, None)
                else:  # h None: the adapter is frozen, so dx is all
                    backward(dy, x, *flat_base(q), a, b, None, 1.0, 0.0, None, True, False)

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

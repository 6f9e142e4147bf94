"""The GPU suite: what kernels.md lists to measure first, in one call of under 6 minutes; CSVs for the device.

python -m bench.gpu                                 all sections into bench/results/<device>/gpu_<section>.csv
python -m bench.gpu --section few_rows --seconds 60
python -m peft_engine bench --suite gpu             the same
python -m bench.runner --draw --device-name nvidia-h200         the pictures, from the CSVs, on any machine

Each section runs in a process of its own, with its share of the time: one that hangs is ended, one whose
kernel brings the GPU's context down goes on without that kernel in a new process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from bench import (
    gpu_bottleneck,
    gpu_decode,
    gpu_layer,
    gpu_prefix,
    gpu_rows,
    gpu_sections,
    gpu_step,
    gpu_tables,
    measure,
)
from bench.gpu_sections import Sizes
from bench.gpu_timing import DeviceLost, Section, clock_reader

SECTIONS: dict[str, Callable[[Section, Sizes], None]] = {
    "ceilings": gpu_sections.ceilings,
    "qlora_layer": gpu_layer.layer,
    "dequantise": gpu_sections.dequantise,
    "few_rows": gpu_sections.few_rows,
    "linear_cross_entropy": gpu_sections.linear_cross_entropy,
    "train_step": gpu_step.train_step,
    "row_ops": gpu_rows.row_ops,
    "bottleneck": gpu_bottleneck.bottleneck,
    "prefix_attention": gpu_prefix.prefix_attention,
    "prefix_decode": gpu_decode.decode,
}
# Of the time: what is left of a section's goes to those after it.
SHARES = {
    "ceilings": 4,
    "qlora_layer": 40,
    "dequantise": 10,
    "few_rows": 26,
    "linear_cross_entropy": 7,
    "train_step": 16,
    "row_ops": 8,
    "bottleneck": 15,
    "prefix_attention": 4,
    "prefix_decode": 7,
}
SECONDS = 340.0
STUCK = 60.0  # a contender silent for as long hangs: it may compile some kernels, at seconds each
GRACE = 45.0  # a section over its time by as much is ended: it ends by itself after a case
LOST = 3  # exit code: the context is gone, the progress file says by what
RESTARTS = 4


def run(
    sections: list[str] | None = None,
    *,
    device: str = "cuda",
    sizes: Sizes | None = None,
    seconds: float = SECONDS,
    rounds: int = 10,
    out: Path | None = None,
    device_name: str | None = None,
) -> int:
    """Measures the sections (None: all) and prints their tables; 0 when all ran, or when there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        print("bench: suite gpu: there is no CUDA device here; nothing was measured", flush=True)
        return 0
    names = list(SECTIONS) if sections is None else [name for name in SECTIONS if name in sections]
    folder = (out or measure.ROOT / "bench" / "results") / (device_name or measure.device_name(device))
    print(f"gpu: {', '.join(names)}; up to {seconds:.0f} s; results into {folder}", flush=True)
    end, codes = time.monotonic() + seconds, []
    for i, name in enumerate(names):
        left = end - time.monotonic()
        share = SHARES.get(name, 1) / sum(SHARES.get(later, 1) for later in names[i:])
        started = time.monotonic()
        settings = {"name": name, "rounds": rounds, "folder": str(folder), "device": device}
        settings["sizes"] = asdict(sizes or Sizes())
        codes.append(run_section(settings, max(5.0, left * share)))
        print(f"==> {name}: {time.monotonic() - started:.0f} s, exit code {codes[-1]}", flush=True)
    gpu_tables.print_all(folder, names)
    return max(codes)


def run_section(settings: dict, seconds: float) -> int:
    """One section in a process; again, without it, when a contender hung or took the context down. 0 or 1."""
    end, skip, name = time.monotonic() + seconds, [], settings["name"]
    (Path(settings["folder"]) / f"gpu_{name}.csv").unlink(missing_ok=True)
    for _ in range(RESTARTS + 1):
        left = max(5.0, end - time.monotonic())
        with tempfile.TemporaryDirectory() as scratch:
            progress = Path(scratch) / "progress.json"
            progress.write_text(json.dumps(["", "all", "failed: it never began"]))
            now = {"seconds": left, "skip": skip, "progress": str(progress)}
            code = wait(command(settings | now), progress, left + GRACE)
            case, contender, why = json.loads(progress.read_text())
        if code is not None and code >= 0 and code != LOST:
            return min(1, code)
        if code is not None and code < 0:
            why = f"failed: its process ended with signal {-code}"
        print(f"bench: {name}: {case}: {contender}: {why}", file=sys.stderr, flush=True)
        skip.append((case, contender, why))
        if time.monotonic() >= end or not case:
            break
    return 1


def command(settings: dict) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "--child", json.dumps(settings)]


def wait(child: list[str], progress: Path, limit: float) -> int | None:
    """The exit code of a child; None when it had to be ended."""
    process = subprocess.Popen(child, cwd=measure.ROOT)
    started = time.monotonic()
    try:
        while process.poll() is None:
            quiet = time.time() - progress.stat().st_mtime
            if quiet > STUCK or time.monotonic() - started > limit:
                return None
            time.sleep(0.1)
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def child(settings: dict) -> int:
    """Measures one section in this process: the cases that its CSV does not hold yet."""
    started, name = time.monotonic(), settings["name"]
    section = Section(
        f"gpu_{name}", torch.device(settings["device"], 0 if settings["device"] == "cuda" else None),
        Path(settings["folder"]), deadline=started + settings["seconds"], rounds=settings["rounds"],
        skip={(case, contender): why for case, contender, why in settings["skip"]},
        read_clocks=clock_reader(), progress=Path(settings["progress"]),
    )  # fmt: skip
    path = section.folder / f"{section.name}.csv"
    if path.exists():
        section.rows = measure.read_csv(path)
        section.done = {row.case for row in section.rows}
    sizes = Sizes(**settings["sizes"])
    if name not in ("ceilings", "prefix_attention"):
        section.copy_bandwidth = gpu_sections.copy_bandwidth(section, sizes)
    try:
        SECTIONS[name](section, sizes)
    except DeviceLost:
        return LOST
    except Exception as error:
        section.give_up()
        print(f"bench: {name} failed in {section.case}: {error!r}", file=sys.stderr, flush=True)
        return 1
    section.finish()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--section", action="append", choices=list(SECTIONS), help="only this one; may be repeated"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time for all sections (default {SECONDS:.0f})"
    )
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contender (default 10)")
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results)")
    parser.add_argument("--device-name", help="name of the folder in the results (default: the GPU's)")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child is not None:
        code = child(arguments.child)
        if code == LOST:  # what is still alive cannot be freed in order
            os._exit(code)
        return code
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    return run(
        arguments.section, seconds=arguments.seconds, rounds=arguments.rounds, out=arguments.out,
        device_name=arguments.device_name,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

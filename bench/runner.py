"""The one runner of all benchmarks: a table, bench/results/<device>/<suite>.csv, and the same drawn.

python -m bench.runner                            every suite, at full size (about 40 minutes on 2 cores)
python -m bench.runner nf4_product train_step     these
python -m bench.runner --quick                    tiny sizes, into out/bench: does it run?
python -m bench.runner --draw                     the pictures again, from the CSVs
python -m bench.runner --suite gpu                on a GPU (bench/gpu.py), under 6 minutes
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if __package__ in (None, ""):  # started by its path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from bench import (
    bench_bottleneck,
    bench_capped_attention,
    bench_dense,
    bench_domains,
    bench_dora_linear,
    bench_families,
    bench_generate,
    bench_linear_cross_entropy,
    bench_lora_linear,
    bench_methods,
    bench_mixture,
    bench_nf4,
    bench_prefix_attention,
    bench_prompt_embedding,
    bench_train,
    gpu,
    gpu_tables,
    measure,
)

SUITES: dict[str, Callable[[measure.Settings], Iterable[measure.Row]]] = {
    "nf4_product": bench_lora_linear.nf4_product,
    "dequantise": bench_nf4.dequantise,
    "qlora_layer": bench_lora_linear.qlora_layer,
    "linear_cross_entropy": bench_linear_cross_entropy.loss,
    "dense_product": bench_dense.dense_product,
    "bottleneck": bench_bottleneck.layer,
    "prompt_embedding": bench_prompt_embedding.embedding,
    "prefix_attention": bench_prefix_attention.suite,
    "capped_attention": bench_capped_attention.capped_attention,
    "methods_step": bench_methods.methods_step,
    "families": bench_families.families,
    "mixture": bench_mixture.mixture,
    "domains": bench_domains.domains,
    # bitsandbytes' training mode before anything that evaluates: its eval repacks weights for good.
    "train_step": bench_train.train_step,
    "finetune": bench_train.finetune,
    "memory": bench_train.memory,
    "loss_parity": bench_train.loss_parity,
    "dora": bench_dora_linear.dora,
    "generate": bench_generate.generate,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the suites named in argv; 0 when all ran, 1 when one failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="peft-engine bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE",
        help=f"any of: {', '.join(SUITES)} (default: all of these); gpu: those of a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--suite", action="append", default=[], metavar="NAME", help="the same, may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, results into out/bench")
    parser.add_argument(
        "--rounds", type=int, default=None, help="turns of each contender (default 15, on a GPU 10)"
    )
    parser.add_argument("--seconds", type=float, default=gpu.SECONDS, help="time of suite gpu (default 340)")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own)")
    parser.add_argument(
        "--device-name", help="name of the folder in the results (default: from the processor)"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default bench/results)")
    parser.add_argument("--model", type=Path, default=measure.Settings.model)
    parser.add_argument("--data", type=Path, default=measure.Settings.data)
    parser.add_argument("--draw", action="store_true", help="only draw the pictures again, from the CSVs")
    arguments = parser.parse_args(argv)
    names = [*arguments.suites, *arguments.suite] or list(SUITES)
    unknown = [name for name in names if name not in (*SUITES, "gpu")]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}, gpu")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or (
        measure.ROOT / "out" / "bench" if arguments.quick else measure.ROOT / "bench" / "results"
    )
    folder = out / (arguments.device_name or measure.device_name())
    if arguments.quick and "gpu" in names:
        parser.error("--quick: suite gpu has no tiny sizes; give it --seconds and --out instead")
    if arguments.draw:
        drawn = sorted(folder.glob("*.csv"))
        if not drawn:
            print(
                f"bench: --draw: {folder} holds no CSV; --device-name names another folder", file=sys.stderr
            )
            return 1
        for csv in drawn:
            if csv.stem in SUITES:
                measure.draw(csv.with_suffix(".png"), csv.stem, measure.read_csv(csv), folder.name)
            elif csv.stem.startswith("gpu_"):
                gpu_tables.draw(csv)
        return 0
    code = 0
    if "gpu" in names:
        names = [name for name in names if name != "gpu"]
        code = gpu.run(
            seconds=arguments.seconds, rounds=arguments.rounds or 10, out=arguments.out,
            device_name=arguments.device_name,
        )  # fmt: skip
        if not names:
            return code
    rounds = arguments.rounds or measure.Settings.rounds
    settings = measure.Settings(
        quick=arguments.quick,
        rounds=min(rounds, 2) if arguments.quick else rounds,
        model=arguments.model,
        data=arguments.data,
    )
    transformers.utils.logging.disable_progress_bar()
    where = f"{measure.cpu_name()}, {measure.isa_name()}, {torch.get_num_threads()} threads"
    if not measure.backend_name().startswith("cpu"):
        where += f", backend {measure.backend_name()}"
    print(f"{', '.join(names)} on {where}; results into {folder}", flush=True)
    return max(code, *(run_suite(name, settings, folder, where) for name in names))


def run_suite(name: str, settings: measure.Settings, folder: Path, where: str) -> int:
    started = time.perf_counter()
    print(f"==> {name}", flush=True)
    try:
        rows = list(SUITES[name](settings))
    except Exception as error:  # one suite that cannot run must not lose the others
        print(
            f"bench: {name} failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            file=sys.stderr,
        )
        if os.environ.get("PEFT_ENGINE_DEBUG"):
            raise
        return 1
    finally:
        gc.collect()
    measure.write_csv(folder / f"{name}.csv", name, rows)
    measure.print_table(name, rows)
    measure.draw(folder / f"{name}.png", name, rows, where)
    print(f"==> {name}: {time.perf_counter() - started:.0f} s, {folder / name}.csv and .png", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

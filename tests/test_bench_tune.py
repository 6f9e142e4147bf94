"""The tuner on CPU tensors, its kernels in Triton's interpreter: what it times, and what it concludes."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from bench import peers, tune, tune_adapters, tune_lora_linear
from bench.gpu_timing import Section

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def section(tmp_path: Path, name: str) -> Section:
    return Section(name, CPU, tmp_path, rounds=1)


@NO_GPU
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path: Path, capsys):
    assert tune.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


@NO_GPU
@pytest.mark.parametrize("kernel", list(tune_lora_linear.KERNELS))
def test_the_tuner_times_tiles_of_every_kernel(kernel, tmp_path: Path, monkeypatch):
    tiles = pytest.importorskip("peft_engine.kernels.lora_linear.tiles", reason="Triton is not installed")
    monkeypatch.setattr(tiles, "candidates", lambda kernel: [tuple(sizes[kernel])])
    sizes = {name: [16, 64, 4, 2] for name in ("down", "up", "outer")}
    sizes |= {name: [16, 64, 64, 4, 2] for name in ("single", "single_backward")}
    given = section(tmp_path, "tiles")
    lines = tune.tune_tiles(given, [kernel], shapes=((64, 64), (128, 64)), rows_of={kernel: (16,)})
    figures = {(r.case, r.contender): r for r in given.rows}
    assert all(r.samples for r in given.rows), [r.note for r in given.rows]
    now = tune.name_of(tiles.tile(kernel, 16, peers.RANK, torch.bfloat16, CPU))
    assert set(figures) == {
        (f"{kernel}, {shape}, r=16, 16 rows", name)
        for shape in ("64x64", "128x64") for name in (now, tune.name_of(sizes[kernel]))
    }  # fmt: skip
    assert len(lines) == 1 and lines[0].startswith(f"{kernel}, 16 rows: (")


@NO_GPU
@pytest.mark.parametrize("kernel", list(tune_adapters.KERNELS))
def test_the_tuner_times_tiles_of_the_other_ops(kernel, tmp_path: Path, monkeypatch):
    pytest.importorskip("peft_engine.kernels.bottleneck.tiles", reason="Triton is not installed")
    tile = (16, 16, 32, 4, 2) if kernel.startswith("bottleneck") else (16, 16, 4, 2)
    monkeypatch.setattr(tune_adapters, "candidates", lambda kernel, rows: [tile])
    monkeypatch.setattr(tune_adapters, "TOKENS", 1)
    shape = (48, 16) if kernel.startswith("bottleneck") else (2, 1, 16)
    given = section(tmp_path, "tiles")
    lines = tune.tune_tiles(given, [kernel], shapes=(shape,), rows_of={kernel: (24,)})
    assert all(r.samples for r in given.rows), [r.note for r in given.rows]
    now = tune_adapters.table_tile(kernel, shape, 24, CPU)
    size = "x".join(map(str, shape))
    assert {(r.case, r.contender) for r in given.rows} == {
        (f"{kernel}, {size}, 24 rows", tune.name_of(t)) for t in (now, tile)
    }
    assert len(lines) == 1 and lines[0].startswith(f"{kernel}, 24 rows: (")


def test_candidates_have_as_many_numbers_as_the_tables_tiles():
    pytest.importorskip("peft_engine.kernels.bottleneck.tiles", reason="Triton is not installed")
    for kernel, tuned in tune_adapters.KERNELS.items():
        for shape in tune_adapters.shapes_of(kernel):
            now = tune_adapters.table_tile(kernel, shape, tuned.rows[0], CPU)
            assert {len(tile) for tile in tune_adapters.candidates(kernel)} == {len(now)}, kernel


@NO_GPU
def test_the_tuner_times_the_paths(tmp_path: Path):
    pytest.importorskip("peft_engine.kernels.lora_linear.paths", reason="Triton is not installed")
    given = section(tmp_path, "paths")
    lines = tune_lora_linear.tune_paths(given, shapes=((64, 64),), rows_of=(2,))
    timed = {(r.case, r.contender) for r in given.rows if r.samples}
    assert {(f"{way}, 64x64, r=16, {m} rows", path) for way in ("forward", "backward") for m in (2,)
            for path in ("single", "workspace")} <= timed  # fmt: skip
    assert len(lines) == 3


def test_who_compiles_beforehand_is_gone_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(tune, "compile_one", time.sleep)
    before = set(multiprocessing.active_children())
    tune.compile_all([600, 0, 600], 2, 5.0)
    assert "not ready" in capsys.readouterr().out
    # The pool's own thread may have waited for one, which stays in the list until that thread goes on.
    for worker in set(multiprocessing.active_children()) - before:
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)


def test_the_best_tile_is_the_best_over_all_shapes():
    times = {(1, 1): [1e-6, 4e-6], (2, 2): [1.5e-6, 1.5e-6], (3, 3): [0.1e-6]}
    assert tune.line_of("down", 16, (1, 1), times, 2) == [
        "down, 16 rows: (2, 2)  # 1.5 us; the table's (1, 1) 2.0 us"
    ]
    assert tune.line_of("down", 16, (3, 3), {(3, 3): [1.0]}, 2) == []


def test_a_path_ends_where_another_is_first_faster():
    fast, slow = [1.0, 1.0], [2.0, 2.0]
    times = {
        1: {"few_rows": fast, "single": slow}, 2: {"few_rows": [1.0, 1.5], "single": [2.0, 1.0]},
        4: {"few_rows": slow, "single": fast}, 8: {"few_rows": fast, "single": slow},
    }  # fmt: skip
    assert tune_lora_linear.crossover(times, "few_rows", ["single"], 2) == 2
    assert tune_lora_linear.crossover({1: {"single": fast}}, "few_rows", ["single"], 2) == 0
    assert (
        tune_lora_linear.crossover({1: {"few_rows": [1.0], "single": fast}}, "few_rows", ["single"], 2) == 0
    )

"""The GPU suite on CPU tensors at tiny sizes: every contender runs, faults become rows, and time is kept."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accuracy import assert_twice_as_good

from bench import (
    gpu,
    gpu_bottleneck,
    gpu_decode,
    gpu_layer,
    gpu_peers,
    gpu_prefix,
    gpu_rows,
    gpu_sections,
    gpu_step,
    gpu_tables,
    gpu_timing,
    measure,
    peers,
    runner,
)
from bench.gpu_sections import Sizes
from bench.gpu_timing import DeviceLost, Missing, Section
from peft_engine import ops

CPU = torch.device("cpu")
TINY = Sizes(
    copied_bytes=(1 << 16,), product=32, dequantise=((64, 128),), products=((64, 128),), few_rows=(1, 3),
    layers=((64, 128),), layer_rows=(16,), head=(16, 256, 64),
    prefix_heads=(4, 2, 16), prefix_training=((2, 16, 3),),
    capped_heads=(4, 2, 16), capped_training=((2, 16, 3),),
    bottlenecks=((32, 4, True), (48, 8, False)), bottleneck_rows=(5,), bottleneck_few_rows=(1, 3),
    row_ops=(5,), row_hidden=64, row_intermediate=96, step_layers=1, step_tokens=((2, 8),),
    decode_heads=(4, 2, 16), decode_batch=(1, 2), decode_keys=(20,), decode_prefix=(3,),
)  # fmt: skip
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def section(tmp_path: Path, name: str = "gpu_x", **changes) -> Section:
    settings = {"rounds": 2, "copy_bandwidth": 1e10} | changes
    return Section(name, CPU, tmp_path, **settings)


def begun(tmp_path: Path, **changes) -> Section:
    made = section(tmp_path, **changes)
    assert made.begin("case")
    return made


# --- where there is no GPU -------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize(
    "start",
    [
        lambda out: gpu.main(["--out", str(out)]),
        lambda out: runner.main(["--suite", "gpu", "--out", str(out)]),
        lambda out: runner.main(["gpu", "--out", str(out)]),
    ],
)
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(start, tmp_path: Path, capsys):
    assert start(tmp_path) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_suites_can_be_named_by_option_too(tmp_path: Path, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "SUITES", {"a": None, "b": None, "c": None})
    monkeypatch.setattr(runner, "run_suite", lambda name, *_: ran.append(name) or 0)
    monkeypatch.setattr(runner.gpu, "run", lambda **_: ran.append("gpu") or 1)
    here = ["--out", str(tmp_path), "--device-name", "here"]
    assert runner.main(["a", "--suite", "b", "--suite", "gpu", *here]) == 1
    assert ran == ["gpu", "a", "b"]
    with pytest.raises(SystemExit) as stopped:
        runner.main(["--suite", "d"])
    assert stopped.value.code == 2


# --- sections --------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ceilings", {"torch copy", "torch product"}),
        ("dequantise", {peers.OURS, "bitsandbytes", gpu_sections.COPY}),
        ("few_rows", {peers.OURS, "dense bf16", "bitsandbytes"}),
        ("linear_cross_entropy", {peers.OURS, "torch, dense logits"}),
        ("row_ops", {peers.OURS, gpu_rows.EAGER}),
        ("train_step", {peers.OURS, peers.PEFT_BNB, gpu_step.PEFT_BF16}),
        ("prefix_attention", {peers.OURS, gpu_prefix.TORCH, gpu_prefix.EAGER}),
        ("bottleneck", {peers.OURS, gpu_bottleneck.EAGER}),
        ("prefix_decode", {gpu_decode.CAT, gpu_decode.HELD}),
        (
            "qlora_layer",
            {gpu_layer.PADDED, gpu_layer.PLAIN, gpu_layer.PADDED_BF16, gpu_layer.SINGLE}
            | {*gpu_peers.PEFT.values(), gpu_peers.BY_HAND, gpu_peers.BY_HAND_H_KEPT},
        ),
    ],
)
def test_every_contender_of_a_section_is_right_and_has_a_figure(name, expected, bnb, tmp_path: Path):
    pytest.importorskip("peft")
    given = section(tmp_path, f"gpu_{name}")
    gpu.SECTIONS[name](given, TINY)
    given.finish()
    rows = measure.read_csv(tmp_path / f"gpu_{name}.csv")
    assert [(r.contender, r.metric, r.median) for r in rows if r.samples] == [
        (r.contender, r.metric, float(f"{r.median:.6g}")) for r in given.rows if r.samples
    ]
    assert expected <= {r.contender for r in rows if r.samples and r.median > 0}
    absent = {r.contender: r.note for r in rows if not r.samples}
    assert not expected & set(absent), absent
    assert gpu_tables.tables(name, rows)


def test_a_contender_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path):
    def fails():
        raise ValueError("two\n  lines")

    def absent():
        raise Missing("not installed")

    def wrong(name, call):
        if name == "wrong":
            gpu_sections.off(call(), torch.ones(2))

    given = begun(tmp_path)
    makers = {
        "fails to be made": fails, "fails to run": lambda: fails, "absent": absent,
        "wrong": lambda: lambda: torch.ones(2) * 1.1, "works": lambda: lambda: None,
    }  # fmt: skip
    calls = given.make(makers, wrong)
    assert list(given.interleave(given.capture(calls))) == ["works"]
    assert {r.contender: r.note for r in given.rows} == {
        "fails to be made": "failed: ValueError: two lines",
        "fails to run": "failed: ValueError: two lines",
        "absent": "not installed",
        "wrong": "failed: ValueError: wrong result: it is off by 0.1 of its norm",
    }


@pytest.mark.parametrize("nan", [float("nan"), float("inf")])
def test_a_result_that_is_no_number_is_wrong(nan):
    with pytest.raises(ValueError, match="wrong result"):
        gpu_sections.off(torch.tensor([1.0, nan]), torch.ones(2))


def test_a_path_that_refuses_is_no_failure():
    error = ValueError(
        "lora_linear: path 'few_rows' is pinned but cannot run this call: it takes 1 to 64 rows"
    )
    assert gpu_timing.one_line(error) == "refused: it takes 1 to 64 rows"


def test_an_absent_package_is_named_not_installed(monkeypatch):
    with pytest.raises(Missing, match=r"^not installed$"):
        gpu_peers.need("no_package_of_this_name")


def test_a_section_out_of_time_says_so_for_each_case_it_leaves_out(tmp_path: Path):
    given = section(tmp_path, deadline=time.monotonic() - 1)
    gpu_sections.few_rows(given, TINY)
    given.finish()
    assert len(given.rows) == 4 and {r.contender for r in given.rows} == {"all"}
    assert {r.note for r in measure.read_csv(tmp_path / "gpu_x.csv")} == {
        "not measured: the section's time was up"
    }


def test_a_case_is_on_disk_when_the_next_begins_and_is_not_measured_twice(tmp_path: Path):
    given = begun(tmp_path)
    given.add("one", "time", "us", [1.0])
    assert not (tmp_path / "gpu_x.csv").exists()
    assert given.begin("next")
    given.add("one", "time", "us", [2.0])
    rows = measure.read_csv(tmp_path / "gpu_x.csv")
    assert [r.case for r in rows] == ["case"]
    given.give_up()
    assert given.rows == rows
    again = section(tmp_path, rows=rows, done={"case"})
    assert not again.begin("case") and again.begin("next")


# --- turns -----------------------------------------------------------------------------------------------


def test_interleave_moves_the_order_on_and_keeps_rounds_apart():
    order = []

    def contender(name: str):
        def call() -> None:
            order.append(name)
            time.sleep(0.002)

        return call

    watched = []
    samples = gpu_timing.interleave(
        {name: contender(name) for name in "ab"}, CPU, rounds=2, turn_seconds=0.001,
        watch=lambda: watched.append(len(order)),
    )  # fmt: skip
    assert "".join(order) == "aaabbb" + "aabb" + "bbaa"
    assert {name: [len(turn) for turn in turns] for name, turns in samples.items()} == {
        "a": [1, 1],
        "b": [1, 1],
    }
    assert len(watched) == 4


def test_ratios_are_of_the_same_round():
    assert gpu_timing.ratios([[2.0, 2.0], [30.0]], [[1.0], [10.0, 10.0]]) == [2.0, 3.0]


# --- a context that is lost, a contender that hangs ------------------------------------------------------


def test_a_lost_context_ends_the_section_and_names_its_contender(tmp_path: Path, monkeypatch):
    progress = tmp_path / "progress.json"
    given = begun(tmp_path, progress=progress)

    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails():
        monkeypatch.setattr(gpu_timing, "synchronize", lost)
        raise RuntimeError("an illegal memory access")

    with pytest.raises(DeviceLost, match="case: bad"):
        given.make({"good": lambda: lambda: None, "bad": lambda: fails})
    assert json.loads(progress.read_text()) == [
        "case",
        "bad",
        "failed: RuntimeError: an illegal memory access",
    ]


def test_what_lost_the_context_is_not_run_again(tmp_path: Path):
    given = begun(tmp_path, skip={("case", "bad"): "failed: earlier", ("other", "all"): "failed: it hung"})
    calls = given.make({"good": lambda: lambda: None, "bad": lambda: lambda: None})
    assert list(calls) == ["good"]
    assert not given.begin("other")
    assert [(r.case, r.contender, r.note) for r in given.rows] == [
        ("case", "bad", "failed: earlier"), ("other", "all", "failed: it hung"),
    ]  # fmt: skip


def test_a_section_is_started_again_without_what_lost_the_gpu(tmp_path: Path, monkeypatch):
    asked = []

    def wait(settings, progress, limit):
        asked.append(settings["skip"][:])
        if len(asked) > 2:
            return 0
        progress.write_text(json.dumps(["case", f"bad {len(asked)}", "failed: why"]))
        return gpu.LOST if len(asked) == 1 else -11

    monkeypatch.setattr(gpu, "wait", wait)
    monkeypatch.setattr(gpu, "command", lambda settings: settings)
    assert gpu.run_section({"name": "few_rows", "folder": str(tmp_path)}, 100.0) == 0
    first, second = (
        ("case", "bad 1", "failed: why"),
        ("case", "bad 2", "failed: its process ended with signal 11"),
    )
    assert asked == [[], [first], [first, second]]


def test_a_child_that_says_nothing_is_ended(tmp_path: Path, monkeypatch):
    progress = tmp_path / "progress.json"
    progress.write_text("")
    monkeypatch.setattr(gpu, "STUCK", 0.3)
    started = time.monotonic()
    assert gpu.wait([sys.executable, "-c", "import time; time.sleep(60)"], progress, 50.0) is None
    assert time.monotonic() - started < 10


def test_sections_run_in_processes_of_their_own_and_share_the_time(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SHARES", {"ceilings": 1, "prefix_attention": 1})
    given = []
    start = gpu.run_section
    monkeypatch.setattr(gpu, "run_section", lambda s, seconds: given.append(seconds) or start(s, seconds))
    names = ["prefix_attention", "ceilings"]
    here = {"device": "cpu", "sizes": TINY, "out": tmp_path, "device_name": "here"}
    assert gpu.run(names, seconds=100, rounds=1, **here) == 0
    assert given[0] == pytest.approx(50, abs=1) and 50 < given[1] < 100
    out = capsys.readouterr().out
    assert "32x32x32 bf16" in out and "prefix_attention, forward and backward, us" in out
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        "gpu_ceilings.csv", "gpu_prefix_attention.csv",
    }  # fmt: skip


def test_sizes_survive_the_way_to_another_process():
    again = Sizes(**json.loads(json.dumps(asdict(TINY))))
    assert [tuple(shape) for shape in again.products] == list(TINY.products)


# --- peers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_h", [False, True])
def test_the_autograd_by_hand_gives_y_and_every_gradient(keep_h):
    weight, x, dy = torch.randn(64, 128), torch.randn(24, 128), torch.randn(24, 64)
    a, b, s = torch.randn(16, 128) / 8, torch.randn(64, 16) / 8, 2.0

    def run(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, a, b)]
        y = function(*leaves, weight.to(dtype))
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    def by_hand(x, a, b, w):
        buffer = torch.full_like(w, float("nan"))
        return gpu_peers.HandWritten.apply(x, lambda out: out.copy_(w), buffer, a, b, s, keep_h)

    def plain(x, a, b, w):
        return x @ w.t() + s * (x @ a.t()) @ b.t()

    for got, same, exact in zip(
        run(by_hand, torch.float32), run(plain, torch.float32), run(plain, torch.float64), strict=True
    ):
        assert_twice_as_good(got, same, exact)


@pytest.mark.peers
def test_bitsandbytes_reads_our_bytes(bnb):
    q = ops.nf4_quantize(torch.randn(64, 128, dtype=torch.bfloat16), double_quant=True)
    out = torch.full((64, 128), float("nan"), dtype=torch.bfloat16)
    assert torch.equal(gpu_peers.dequantizer(q)(out), q.dequantize())


def test_ours_is_compared_with_the_fastest_of_each_group():
    peft = dict(zip(gpu_peers.PEFT.values(), ([[4.0]], [[2.0]], [[3.0]]), strict=True))
    samples = {gpu_layer.PADDED: [[1.0]], **peft, gpu_peers.BY_HAND: [[1.5]]}
    rows = gpu_layer.speedups("case", "graph", samples)
    assert [(r.contender, r.metric, r.median, r.note) for r in rows] == [
        (gpu_layer.PADDED, f"over {peers.PEFT_BNB}, graph", 2.0, f"its best: {gpu_peers.PEFT['autocast']}"),
        (gpu_layer.PADDED, f"over {gpu_peers.BY_HAND}, graph", 1.5, f"its best: {gpu_peers.BY_HAND}"),
    ]


# --- tables and pictures ---------------------------------------------------------------------------------


def test_a_table_has_a_line_for_each_case_and_a_column_for_each_contender():
    rows = [
        measure.row("4x4, 1 rows", "ours", "time", "us", [1.0]),
        measure.row("4x4, 8 rows", "ours", "time", "us", [2.5]),
        measure.row("4x4, 8 rows", "theirs", "time", "us", [12345.0]),
    ]
    assert gpu_tables.table("few rows", rows).splitlines() == [
        "few rows: [1] ours; [2] theirs",
        "                  [1]       [2]",
        "4x4, 1 rows         1         -",
        "4x4, 8 rows       2.5 1.234e+04",
    ]


def test_what_has_no_figure_is_said_once_for_all_its_cases():
    rows = [measure.row(f"case {i}", "theirs", "none", "", [], "not installed") for i in range(3)]
    assert gpu_tables.tables("few_rows", rows) == "few_rows, theirs: not installed (3 cases, first case 0)"


def test_pictures_are_drawn_from_the_csvs(tmp_path: Path):
    rows = [
        measure.row(f"64x128, {adapter}, {m} rows", peers.OURS, "time", "us", [m])
        for adapter in ("no adapter", "r=16") for m in (8, 1)
    ]  # fmt: skip
    for name in ("gpu_few_rows", "gpu_ceilings"):
        measure.write_csv(tmp_path / "here" / f"{name}.csv", name, rows)
    measure.write_csv(tmp_path / "here" / "tiles.csv", "tiles", rows)
    assert runner.main(["--draw", "--out", str(tmp_path), "--device-name", "here"]) == 0
    assert {path.name for path in (tmp_path / "here").glob("*.png")} == {
        "gpu_few_rows.png",
        "gpu_ceilings.png",
    }

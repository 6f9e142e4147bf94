"""Every Triton kernel compiled ahead of time for every architecture: no spills, shared memory, instructions.

Compiling needs no GPU, but a process without TRITON_INTERPRET: bench/resources.py is started as one. What an
unchanged kernel gave comes from its cache. The planted faults at the end are variants of this file.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import triton
import triton.language as tl

from bench import ahead, machine_code, resources
from bench.machine_code import Row
from bench.sass import Instruction
from peft_engine import doctor
from peft_engine.kernels.variants import ARCHS, TENSOR_CORE, Variant

ROOT = Path(__file__).parents[2]
WHY = doctor.toolchain()["ptxas"]["problem"]
compiles = pytest.mark.skipif(WHY is not None, reason=str(WHY))


def compile_all(folder: Path, *arguments: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.resources",
        "--check",
        "--json",
        folder / "found.json",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2400)
    assert (folder / "found.json").exists(), done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    return compile_all(tmp_path_factory.mktemp("compiled"))


@compiles
def test_every_variant_compiles_without_spills_within_shared_memory_and_to_the_instructions_it_wants(
    compiled,
):
    assert not compiled["faults"], "\n".join(f"{n}: {'; '.join(f)}" for n, f in compiled["faults"].items())
    assert {row["arch"] for row in compiled["rows"] if row["backend"] == "triton"} >= set(ARCHS)


@compiles
@pytest.mark.parametrize("backend", resources.BACKENDS)
def test_no_figure_is_worse_than_in_the_table_and_the_table_is_up_to_date(compiled, backend):
    if backend == "cuda" and not resources.LIBRARY.exists():
        pytest.skip(doctor.toolchain()["nvcc"]["problem"] or f"no {resources.LIBRARY.name}; {doctor.REBUILD}")
    if (why := compiled["incomparable"][backend]) is not None:
        pytest.skip(why)
    assert not compiled["wrong"][backend], "\n".join(compiled["wrong"][backend])


@compiles
def test_every_kernel_is_compiled(compiled):
    found = set()
    for path in ROOT.glob("kernels/*/*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(f"{path.parent.name}.{node.name}")
    assert found == {row["kernel"] for row in compiled["rows"] if row["backend"] == "triton"}


@compiles
def test_dequantise_takes_at_most_9_instructions_a_weight_on_sm_90(compiled):
    """The goal of the design, against 23.7 of the bitsandbytes kernel."""
    counts = {
        row["variant"]: row["instructions_per_weight"]
        for row in compiled["rows"]
        if row["kernel"] == "nf4.dequantize_kernel" and row["arch"] == 90
    }
    assert counts["bf16, nested"] <= 9 and counts["fp16, nested"] <= 9


# The table's guard


OLD = Row(
    "op.kernel", "triton", "bf16", 90, 64, 4096, 0, 8.0, 400, "HGMMA", "LDG.128", "STG.128", 4, 3, "triton 1"
)  # fmt: skip


@pytest.mark.parametrize(
    "change,said",
    [
        ({"registers": 65}, "op.kernel [bf16] sm_90: registers grew from 64 to 65; undo it or"),
        ({"spill_bytes": 8}, "spill_bytes grew from 0 to 8"),
        ({"shared_bytes": 4097}, "shared_bytes grew from 4096 to 4097"),
        ({"instructions_per_weight": 8.01}, "instructions_per_weight grew from 8.0 to 8.01"),
        ({"registers": 60, "instructions_per_weight": 9.0}, "instructions_per_weight grew from 8.0 to 9.0"),
        (
            {"registers": 60},
            "registers is 60, was 64; run make resources",
        ),  # better, but not what the table says
        ({"tensor_core": ""}, "tensor_core is , was HGMMA; run make resources"),
        ({"variant": "fp16"}, "op.kernel [fp16] sm_90: not in the table; run make resources"),
    ],
)
def test_what_differs_from_the_table_is_named_with_old_and_new(change, said):
    lines = resources.compare([OLD], [dataclasses.replace(OLD, **change)], "triton")
    assert any(said in line for line in lines) and all("make resources" in line for line in lines), lines


def test_a_kernel_that_is_gone_is_named():
    other = dataclasses.replace(OLD, kernel="op.other")
    assert resources.compare([OLD, other], [OLD], "triton") == [
        "op.other [bf16] sm_90: in the table, but gone; run make resources"
    ]


def test_rows_of_another_compiler_are_not_compared_and_the_reason_is_said():
    new = dataclasses.replace(OLD, registers=255, compiler="triton 2")
    assert resources.compare([OLD], [new], "triton") == []
    assert resources.incomparable([OLD], [new], "triton") == "the table is of triton 1, here is triton 2"
    cuda = dataclasses.replace(OLD, backend="cuda")
    assert "none were compiled here" in resources.incomparable([OLD, cuda], [OLD], "cuda")


@pytest.mark.parametrize("hash", ["0a12b3c4", "12345678"])
def test_a_cuda_kernel_is_named_by_its_file_whatever_the_hash_in_its_name(hash):
    space = f"_GLOBAL__N__{hash}_19_prefix_attention_cu_f3b0c442_1"
    mangled = f"_ZN{len(space)}{space}12merge_kernelI6__halfLi4EEEvPT_"
    assert resources._readable(mangled) == ("prefix_attention.merge_kernel", "__half, 4")


def test_the_table_reads_back_as_it_was_written(tmp_path):
    rows = [
        OLD,
        dataclasses.replace(OLD, kernel="op.b", instructions_per_weight=None, warps=None, stages=None),
    ]
    resources.write_table(tmp_path / "table.csv", rows)
    assert resources.read_table(tmp_path / "table.csv") == sorted(rows, key=lambda row: row.key)


# What architectures share


@dataclasses.dataclass(frozen=True)
class Options:
    arch: str
    num_warps: int = 4
    supported_fp8_dtypes: tuple[str, ...] = ()


def as_triton_runs_it(seen: dict, arch: int, ttgir: str, code: str, warps: int = 4) -> tuple[str, dict, bool]:
    """The PTX and metadata of stages that make `code` of anything, and whether they were asked."""
    asked = []
    stages = {
        "llir": lambda module, metadata: asked.append(module) or metadata.update(shared=len(code)) or "llir",
        "ptx": lambda llir, metadata: f".target sm_{arch}\n{code}",
    }
    ahead.sharing(seen)(None, stages, Options(f"sm{arch}", warps), None, arch)
    metadata = {}
    ptx = stages["ptx"](stages["llir"](ttgir, metadata), metadata)
    return ptx, metadata, bool(asked)


def ttgirs(proved: bool) -> Iterator[str]:
    """One without its architecture, that is proved or not; `{}` stands for that."""
    for n in range(1000):
        text = f'target = "cuda{{}}" {n}'
        if (zlib.crc32(text.replace("{}", "").encode()) % ahead.PROVED == 0) is proved:
            yield text


def test_ptx_is_made_once_for_architectures_of_the_same_ttgir_and_options():
    seen, text = {}, next(ttgirs(proved=False))
    for arch, asked in ((80, True), (86, False), (89, False), (90, True)):
        found = as_triton_runs_it(seen, arch, text.replace("{}", f":{arch}"), "mov")
        assert found == (f".target sm_{arch}\nmov", {"shared": 3}, asked)
    assert as_triton_runs_it(seen, 86, text.replace("{}", ":86") + " other", "add")[2]
    assert as_triton_runs_it(seen, 86, text.replace("{}", ":86"), "add", warps=8)[2]


def test_ptx_that_differs_where_it_is_taken_to_be_the_same_is_found():
    seen, text = {}, next(ttgirs(proved=True))
    for arch, asked in ((80, True), (86, True)):
        assert as_triton_runs_it(seen, arch, text.replace("{}", f":{arch}"), "mov")[2] == asked
    with pytest.raises(RuntimeError, match="PTX for sm_89 is not that of the others"):
        as_triton_runs_it(seen, 89, text.replace("{}", ":89"), "add")


# What is counted


def code(*lines: str) -> list[Instruction]:
    """Instructions 16 bytes apart, each written as `[@predicate] opcode [operands]`."""
    split = [line.split(" ") if line.startswith("@") else ["", *line.split(" ")] for line in lines]
    return [Instruction(16 * n, p, o, " ".join(rest)) for n, (p, o, *rest) in enumerate(split)]


def test_the_way_without_masks_is_counted_and_not_the_longer_one_of_the_tail():
    body = code(
        "ISETP", "@!P0 BRA 0x60", "LDG.E.128", "FMUL", "STG.E.128", "EXIT",
        "@P1 LDG.E.U8", "FMUL", "FMUL", "FMUL", "@P1 STG.E.U8", "EXIT",
    )  # fmt: skip
    assert [i.opcode for i in machine_code.counted(body)] == [
        "ISETP", "BRA", "LDG.E.128", "FMUL", "STG.E.128", "EXIT",
    ]  # fmt: skip
    assert list(machine_code.missing(body, ("LDG.E.128", "LDG.E.U8"))) == ["wants LDG.E.U8, has none"]


def test_a_branch_on_a_uniform_predicate_may_fall_through():
    body = code("ISETP", "BRA.U !UP0, 0x40", "LDG.E", "EXIT", "@P0 LDG.E", "STG.E", "EXIT")
    assert len(machine_code.longest_path(body)) == 4


def test_where_every_way_has_masks_the_longest_is_counted():
    body = code("@P0 BRA 0x30", "@P1 LDG.E", "EXIT", "@P1 LDG.E", "FMUL", "EXIT")
    assert len(machine_code.counted(body)) == 4


def test_of_loops_the_one_with_tensor_cores_is_counted():
    body = code(
        "MOV", "HMMA.16816", "LDS", "@P0 BRA 0x10", "FADD", "FADD", "FADD", "FADD", "@P1 BRA 0x40", "EXIT"
    )
    assert [i.opcode for i in machine_code.counted(body)] == ["HMMA.16816", "LDS", "BRA"]


def test_weights_of_cuda_kernels_are_those_that_are_stored_or_multiplied():
    stores = code("LDG.E.128", "FMUL", "FMUL", "STG.E.128", "STG.E.128", "EXIT")  # 16 results of 16 bits
    assert machine_code.cuda_per_weight("nf4.dequantize_16bit", "__half, true", stores) == 0.38
    assert machine_code.cuda_per_weight("nf4.dequantize_32bit", "true", stores) == 0.75
    turn = (
        "LDG.E.128",
        "FMUL",
        "HMMA.16816.F32",
        "HMMA.16816.F32",
        "@P0 BRA 0x0",
    )  # one operand, two tiles of x
    assert machine_code.cuda_per_weight("lora_linear.kernel", "__half, 2", code(*turn, "EXIT")) == 0.62
    assert machine_code.cuda_per_weight("other.kernel", "", code("FADD", "STG.E", "EXIT")) is None


def test_a_stack_frame_is_a_spill_only_when_it_is_used():
    assert machine_code.spilled(code("FADD", "EXIT"), 64) == 0
    assert machine_code.spilled(code("STL.128", "EXIT"), 64) == 64


# Planted faults


@triton.jit
def copy_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def softmax_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    e = tl.exp(tl.load(x + i))
    tl.store(out + i, e / tl.sum(e))


@triton.jit
def matmul_kernel(a, b, out, k, TILE: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, k, TILE):
        left = tl.load(a + i * k + start + j)
        acc = tl.dot(left, tl.load(b + (start + i) * TILE + j), acc, input_precision=PRECISION)
    tl.store(out + i * TILE + j, acc)


@triton.jit
def refused_kernel(x, N: tl.constexpr):
    tl.static_assert(N > 1)
    tl.store(x, 0.0)


def copied(name: str, divisible: str) -> Variant:
    pointer = "*bf16" + divisible
    wants = ("LDG.E.128", "STG.E.128")
    return Variant(
        name, copy_kernel, {"x": pointer, "out": pointer}, {"N": 2048}, archs=(80, 120), wants=wants
    )


def product(
    name: str, *, dtype: str = "bf16", tile: int = 64, precision: str = "tf32", stages: int = 3
) -> Variant:
    pointers = dict.fromkeys(("a", "b"), f"*{dtype}:16") | {"out": "*fp32:16", "k": "i32:16"}
    constants = {"TILE": tile, "PRECISION": precision}
    return Variant(
        name, matmul_kernel, pointers, constants, num_stages=stages, archs=(80, 90, 120), wants=(TENSOR_CORE,)
    )


def variants() -> Iterator[Variant]:
    """Compiled by test_each_planted_fault_is_found; a name that begins with `good` has none."""
    floats = {"x": "*fp32:16", "out": "*fp32:16"}
    yield Variant("good", softmax_kernel, floats, {"N": 1024}, archs=(80, 120))
    yield Variant("spills", softmax_kernel, floats, {"N": 16384}, num_warps=1, archs=(80, 90, 120))
    yield copied("good", ":16")
    yield copied("misaligned", "")
    yield product("good")
    yield product("shared", tile=128, stages=5)
    yield product("no tensor core", dtype="fp32", precision="ieee", tile=32)
    yield Variant("refused", refused_kernel, {"x": "*fp32"}, {"N": 1}, archs=(80,))
    yield Variant("unnamed", refused_kernel, {"x": "*fp32"}, {}, archs=(80,))


@compiles
def test_each_planted_fault_is_found(tmp_path):
    found = compile_all(tmp_path, "--variants", str(Path(__file__)))["faults"]
    expected = {
        "softmax_kernel [spills]": ("spills: ", (80, 90, 120)),
        "copy_kernel [misaligned]": ("wants LDG.E.128, has none; wants STG.E.128, has none", (80, 120)),
        "matmul_kernel [shared]": ("shared memory: ", (80, 90, 120)),
        "matmul_kernel [no tensor core]": (f"wants {TENSOR_CORE}, has none", (80, 90, 120)),
        "refused_kernel [refused]": ("does not compile: ", (80,)),
        "refused_kernel [unnamed]": ("signature and constexprs must name the arguments x, N", (80,)),
    }
    names = {
        f"test_compile.{name} sm_{arch}": said for name, (said, archs) in expected.items() for arch in archs
    }
    assert found.keys() == names.keys()
    for name, said in names.items():
        assert said in "; ".join(found[name]), (name, found[name])

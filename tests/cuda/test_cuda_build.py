"""csrc/cuda compiled by nvcc: every architecture, no spills, the instructions meant, few for a weight.

Nothing here needs a GPU. How instructions for a weight are counted is told in bench/sass.py.
"""

import contextlib
import ctypes
import functools
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import sass
from peft_engine import dispatch, doctor, native
from peft_engine.ops import nf4

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("csrc/cuda/*.*"), ROOT / "csrc" / "nf4.h"]
ARCHS = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="session")
def library() -> Path:
    """peft_engine/_cuda.so, built anew when a source is newer."""
    if doctor.find_nvcc() is None:
        pytest.skip("no nvcc: csrc/cuda is not compiled")
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump, which comes with CUDA and with triton: the machine code is not read")
    built = native.CUDA_LIBRARY
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in SOURCES):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PEFT_ENGINE_REQUIRE_CUDA": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return built


@functools.cache
def functions(library: Path, arch: int) -> dict[str, list[sass.Instruction]]:
    """Every kernel for an architecture; bench.resources, which a test starts, reads the same listing."""
    return sass.kept_functions(library, arch)


def bodies(library: Path, arch: int, *parts: str) -> dict[str, list[sass.Instruction]]:
    """The kernels whose names have all `parts`; there must be one."""
    found = {
        name: body for name, body in functions(library, arch).items() if all(part in name for part in parts)
    }
    assert found, f"no kernel has {parts} in its name"
    return found


def test_the_library_has_every_architecture_and_ptx_for_those_to_come(library):
    def listed(option: str) -> set[str]:
        done = subprocess.run([sass.cuobjdump(), option, library], capture_output=True, text=True, check=True)
        return set(re.findall(r"sm_(\d+)\.(?:cubin|ptx)", done.stdout))

    assert listed("--list-elf") == {str(arch) for arch in ARCHS}
    assert listed("--list-ptx") == {"120"}


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(library, arch):
    used = sass.usage(library, arch)
    kernels = {
        "dequantize_plain",
        "dequantize_16bit",
        "dequantize_32bit",
        "lora_linear_kernel",
        "few_rows_kernel",
        "prefix_attention_kernel",
        "bottleneck_kernel",
    }
    assert all(any(kernel in name for name in used) for kernel in kernels)
    for name, body in functions(library, arch).items():
        assert used[name].spill_bytes == 0, name
        assert not [i for i in body if i.opcode.startswith(("LDL", "STL"))], name


@pytest.mark.parametrize("arch", ARCHS)
def test_fast_dequantise_loads_and_stores_16_bytes_at_a_time(library, arch):
    for name, body in bodies(library, arch, "bit", "dequantize_").items():
        words = 2 if "32bit" in name else 1  # 16 bytes of packed weight
        stores = words * (8 if "32bit" in name else 4)
        assert sass.count(body, "LDG.128") == words, name
        assert sass.count(body, "STG.128") == sass.count(body, "STG") == stores, name


def test_dequantise_takes_at_most_6_instructions_a_weight(library):
    for name, body in bodies(library, 90, "dequantize_16bit").items():
        assert not sass.loops(body)  # the whole body is counted: addresses, the scale, the table
        assert sass.per_weight_stored(body, 2) <= 6, name


def test_dequantise_to_float32_takes_at_most_6_instructions_a_weight_and_a_few_more_with_a_stride(library):
    for name, body in bodies(library, 90, "dequantize_32bit").items():
        strided = "Lb1EEE" in name
        assert sass.per_weight_stored(body, 4) <= (6.3 if strided else 6), name


@pytest.mark.parametrize("x_tiles, at_most", [(1, 2), (2, 2.7), (4, 3)])
@pytest.mark.parametrize("dtype", ["6__half", "13__nv_bfloat16"])
def test_the_product_takes_few_instructions_a_weight(library, dtype, x_tiles, at_most):
    """5 is what 8 rows may cost. Here: half a PRMT, half a lookup, an eighth of an mma, and the rest."""
    kernel = "few_rows_kernel" if x_tiles <= 2 else "lora_linear_kernel"
    (body,) = bodies(library, 90, kernel, f"{dtype}Li{x_tiles}E").values()
    loop = sass.main_loop(body, "HMMA")
    assert len(loop) < len(body)
    assert sass.per_weight_multiplied(loop, x_tiles) <= at_most
    weights = 8 * sass.count(loop, "HMMA") / x_tiles
    assert sass.count(loop, "PRMT") == weights / 2  # a byte and a lane become an address in one instruction


@pytest.mark.parametrize("arch", ARCHS)
def test_the_product_uses_tensor_cores_wherever_its_dtype_has_them(library, arch):
    for name, body in (
        bodies(library, arch, "lora_linear_kernel") | bodies(library, arch, "few_rows")
    ).items():
        if arch >= 80:
            assert sass.count(body, "HMMA") == sass.count(body, "HMMA.16816") > 0, name
        elif "__half" in name:
            assert sass.count(body, "HMMA") == sass.count(body, "HMMA.1688") > 0, name
        else:  # bfloat16, which the launcher refuses there
            assert sass.count(body, "HMMA") == 0, name


def test_the_product_streams_its_weights_past_l1_and_brings_x_without_registers(library):
    for name, body in bodies(library, 90, "lora_linear_kernel").items():
        assert sass.count(body, "LDG.NA.LTC128B.64") > 0, name
        assert sass.count(body, "LDGSTS.128") > 0, name


def test_few_rows_read_16_bytes_of_their_weights_at_a_time_and_scales_of_four_units_by_one_load(library):
    for name, body in bodies(library, 90, "few_rows_kernel").items():
        loop = sass.main_loop(body, "HMMA")  # 4 units: 2 loads of 4 rows each
        x_tiles = 2 if "Li2E" in name else 1
        assert sass.count(loop, "LDG.NA.LTC128B.128") == 8, name
        assert sass.count(loop, "LDG") == 8 + 8 * x_tiles + 2, name  # and two for the scales


def test_prefix_attention_brings_keys_and_values_without_registers_by_one_loop(library):
    for name, body in bodies(library, 90, "prefix_attention_kernel").items():
        ways = 1 if "Li8EEE" in name else 2  # where the prefix's rows are more than the keys', a loop each
        assert sass.count(body, "LDGSTS.128") == sass.count(body, "LDGSTS") == 8 * ways, name


def test_bottleneck_streams_its_weights_16_bytes_at_a_time(library):
    for name, body in bodies(library, 90, "bottleneck_kernel").items():
        assert sass.count(body, "LDG.NA.LTC128B.128") > 0, name


def test_the_library_loads_beside_a_torch_without_cuda(library):
    script = """
import sys, torch
from peft_engine import native
print(native.cuda().pe_cuda_abi(), native.cuda().pe_cuda_error(1).decode())"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == [str(native.CUDA_ABI), "invalid argument\n"]


def test_python_calls_the_functions_as_they_are_declared():
    types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}
    types |= {"unsigned long long": ctypes.c_uint64, "const char*": ctypes.c_char_p}
    declared = {}
    for path in sorted(ROOT.glob("csrc/cuda/*.cu")):
        for result, name, arguments in re.findall(
            r"PE_API ([\w\s*]+?) ?(pe_\w+)\(([^)]*)\)", path.read_text()
        ):
            listed = [argument.rsplit(maxsplit=1)[0] for argument in arguments.split(",") if argument.strip()]
            pointers = [" ".join(a.split()) for a in listed]
            declared[name] = types[result], [types.get(a, ctypes.c_void_p) for a in pointers]
            assert all(a in types or a.endswith("*") for a in pointers), pointers
    assert declared == native._CUDA_FUNCTIONS


def test_the_tables_are_those_of_ops_nf4_to_the_bit():
    text = (ROOT / "csrc" / "nf4.h").read_text()
    for name, table in (("kNf4Code", nf4.CODE), ("kAbsmaxCode", nf4.ABSMAX_CODE)):
        listed = re.search(rf"{name}\[\d+\] = {{(.*?)}};", text, re.DOTALL).group(1)
        values = [float(value) for value in re.findall(r"(-?[\d.]+(?:e-?\d+)?)f", listed)]
        assert struct.pack(f"{len(values)}f", *values) == table.numpy().tobytes(), name


@pytest.mark.parametrize("name, dtype", [("__nv_bfloat16", torch.bfloat16), ("__half", torch.float16)])
def test_the_factor_of_the_codes_is_the_one_that_rounds_them_best(name, dtype):
    text = (ROOT / "csrc" / "cuda" / "lora_linear_product.cuh").read_text()
    stated = float(re.search(rf"kCodeFactor<{name}> = ([\d.]+)f;", text).group(1))
    factors = 1 + torch.arange(65536, dtype=torch.float64)[:, None] / 65536
    codes = nf4.CODE.double()
    errors = ((codes * factors).to(dtype).double() / factors - codes).square().mean(dim=1).sqrt()
    assert stated == factors[errors.argmin()]
    assert errors.min() < 0.6 * errors[0]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """native as on a machine with a GPU of sm_90 and no CUDA library, `tmp_path` its folder."""
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    for function in (native._load_cuda, native._cuda_error, dispatch._look_for_triton):
        function.cache_clear()
    yield native
    monkeypatch.undo()
    for function in (native._load_cuda, native._cuda_error, dispatch._look_for_triton):
        function.cache_clear()


def test_a_library_that_was_not_built_is_told_with_what_mends_it(fresh):
    assert "not compiled" in fresh.cuda_error()
    assert "cuda-toolkit" in fresh.cuda_error() and "pip install --no-build-isolation" in fresh.cuda_error()
    with pytest.raises(RuntimeError, match="not compiled"):
        fresh.cuda()


def test_a_library_that_does_not_load_is_told_with_its_reason(fresh):
    fresh.CUDA_LIBRARY.write_bytes(b"not a library")
    assert "does not load" in fresh.cuda_error() and "rebuild" in fresh.cuda_error()


def test_a_library_of_another_abi_is_refused(fresh, library, monkeypatch):
    fresh.CUDA_LIBRARY.symlink_to(library)
    built, expected = native.CUDA_ABI, native.CUDA_ABI + 1
    monkeypatch.setattr(native, "CUDA_ABI", expected)
    assert f"has ABI {built}, expected {expected}" in fresh.cuda_error()


class Probed:
    """Stands for the library: its probe returns these codes, by device."""

    def __init__(self, *codes: int):
        self.codes = codes

    def pe_cuda_probe(self, index: int) -> int:
        return self.codes[index]

    def pe_cuda_error(self, code: int) -> bytes:
        return b"words of CUDA"


def test_an_architecture_before_sm_75_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(native, "_load_cuda", functools.cache(lambda: Probed(0)))
    assert fresh.cuda_error() is None
    fresh._cuda_error.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 0))
    assert "7.5" in fresh.cuda_error() and "7.0" in fresh.cuda_error()


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (209, r"no code for this GPU, sm_90 .*rebuild it: PEFT_ENGINE_CUDA_ARCHS=90 pip install "),
        (98, "no code for this GPU"),
        (35, "driver is too old for .*; update the driver"),
        (222, "update the driver"),
        (2, "cannot run on this GPU"),
    ],
)
def test_a_library_that_cannot_run_on_the_gpu_is_told_with_cudas_words_and_the_mend(
    fresh, monkeypatch, code, mend
):
    monkeypatch.setattr(native, "_load_cuda", functools.cache(lambda: Probed(code)))
    why = fresh.cuda_error()
    assert f"CUDA error {code}: words of CUDA" in why and re.search(mend, why)
    assert dispatch.available_backends()["cuda"] == why  # what explain says
    (problem,) = [p for p in doctor.diagnose()["problems"] if "words of CUDA" in p["problem"]]
    assert f"{problem['problem']}; {problem['fix']}" == why


def test_each_gpu_is_probed_by_itself_and_as_the_current_one(fresh, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: current.append(index) or contextlib.nullcontext())
    monkeypatch.setattr(native, "_load_cuda", functools.cache(lambda: Probed(0, 209)))
    assert fresh.cuda_error() is None and "no code" in fresh.cuda_error(1)
    assert fresh.cuda_error(0) is None and current == [1]


def test_the_library_tells_that_there_is_no_driver(library):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert native.cuda().pe_cuda_probe(0) != 0


def test_a_cuda_error_becomes_an_exception_with_cudas_words(library):
    native.cuda_check(0, "nf4_dequantize")
    with pytest.raises(RuntimeError, match="nf4_dequantize: CUDA error 1: invalid argument"):
        native.cuda_check(1, "nf4_dequantize")

"""doctor.diagnose: the state of the machine in plain values, and for each problem one command."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from peft_engine import doctor, native


def test_it_names_backends_versions_processor_and_gpu_in_plain_values():
    found = json.loads(json.dumps(doctor.diagnose()))
    assert set(found) == {"backends", "versions", "cpu", "gpu", "toolchain", "problems"}
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert found["cpu"]["model"] and found["cpu"]["cores"] >= 1
    if native.load_error() is None:
        assert found["cpu"]["isa"] in found["cpu"]["supported_isas"]
    assert all(problem["problem"] and problem["fix"] for problem in found["problems"])


@pytest.fixture
def problems(monkeypatch):
    def of(**patches):
        for name, value in patches.items():
            monkeypatch.setattr(native, name, value)
        return doctor.diagnose()["problems"]

    return of


def test_a_library_that_was_not_compiled_is_mended_by_one_command(problems, monkeypatch):
    why = "the CPU kernels are not compiled; install g++"
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/g++")
    found = problems(load_error=lambda: why)
    assert [p["problem"] for p in found if "not compiled" in p["problem"]] == [
        "the CPU kernels are not compiled"
    ]
    assert any(p["fix"] == doctor.REBUILD for p in found)


def test_without_a_compiler_the_command_installs_one_first(problems, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    fixes = [p["fix"] for p in problems(load_error=lambda: "the CPU kernels are not compiled")]
    assert any("g++" in fix and fix.endswith(doctor.REBUILD) for fix in fixes)


def test_an_instruction_set_the_cpu_has_not_is_told(problems):
    def refuse():
        raise ValueError("PEFT_ENGINE_CPU_ISA: expected one of scalar, avx2, got 'sse9'")

    found = problems(load_error=refuse)
    assert {"problem": str(ValueError("PEFT_ENGINE_CPU_ISA: expected one of scalar, avx2, got 'sse9'")),
            "fix": "unset PEFT_ENGINE_CPU_ISA"} in found  # fmt: skip


def test_who_asks_for_the_instruction_set_first_loads_the_library():
    code = "from peft_engine import native; print(native.isa() in native.supported_isas())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n" or "the CPU kernels cannot be used" in done.stderr


def test_a_pinned_backend_is_told(problems, monkeypatch):
    monkeypatch.setenv("PEFT_ENGINE_BACKEND", "reference")
    assert any(p["fix"] == "unset PEFT_ENGINE_BACKEND" for p in problems())


def test_an_old_or_missing_package_is_told_with_its_install(problems, monkeypatch):
    def version(name):
        if name == "accelerate":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "4.57.1" if name == "transformers" else "99.0"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = {p["problem"]: p["fix"] for p in problems()}
    assert found["transformers 4.57.1 is older than 5.0"] == 'pip install "transformers>=5.0"'
    assert found["accelerate is not installed"] == 'pip install "accelerate>=1.10"'


@pytest.mark.skipif(native.load_error() is not None, reason=f"no library: {native.load_error()}")
def test_a_library_older_than_the_package_is_told(problems, monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_computed_kernel_for_dispatch_key", lambda *_: False)
    assert any(
        "another version" in p["problem"] and "lora_linear_forward" in p["problem"] for p in problems()
    )


@pytest.mark.skipif(native.load_error() is not None, reason=f"no library: {native.load_error()}")
def test_an_op_that_no_cpu_kernel_is_written_for_is_not_missed(problems):
    from peft_engine.ops import lora_groups  # noqa: F401  (declares it)

    assert not any("another version" in p["problem"] for p in problems())


EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


@pytest.fixture
def no_compilers(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)


def test_missing_compilers_are_told_with_what_skips_and_the_command_that_brings_them(no_compilers):
    found = doctor.diagnose()
    problems = {p["problem"]: p["fix"] for p in found["problems"]}
    for name in ("nvcc", "ptxas", "triton"):
        tool = found["toolchain"][name]
        assert tool["path"] is None and problems[tool["problem"]] == tool["fix"]
    assert found["toolchain"]["nvcc"]["fix"] == f"{doctor.NVCC} && {doctor.REBUILD}"


def test_the_commands_install_what_the_extras_name():
    (cuda,) = EXTRAS["cuda"]
    (triton,) = EXTRAS["gpu"]
    assert f'pip install "{cuda.split(";")[0].strip()}"' == doctor.NVCC
    assert f'pip install "{triton}"' == doctor.TRITON


def fake_nvcc(folder, says="Cuda compilation tools, release 13.0, V13.0.88"):
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_found_in_cuda_home_then_on_the_path_then_among_the_packages(
    no_compilers, monkeypatch, tmp_path
):
    packaged = fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin")
    assert doctor.find_nvcc() == packaged
    on_path = fake_nvcc(tmp_path / "path")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert doctor.find_nvcc() == on_path
    at_home = fake_nvcc(tmp_path / "home" / "bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert doctor.find_nvcc() == at_home


def test_a_compiler_says_its_version_or_that_it_does_not_run(no_compilers, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin")
    assert doctor.toolchain()["nvcc"]["version"] == "13.0.88"
    broken = fake_nvcc(tmp_path / "broken" / "bin", "no such file or directory")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "broken"))
    assert doctor.toolchain()["nvcc"]["problem"] == f"{broken} does not run"

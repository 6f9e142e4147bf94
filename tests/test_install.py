"""The build, with and without a compiler. The installs themselves (editable, wheel) are in .ci/imports.sh."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peft_engine import native

ROOT = Path(__file__).resolve().parents[1]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib"]
    env = {k: v for k, v in os.environ.items() if k != "PEFT_ENGINE_REQUIRE_NATIVE"} | environment
    return subprocess.run(
        [*command, "--build-temp", tmp_path / "temp"], cwd=ROOT, env=env, capture_output=True, text=True
    )


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def test_without_a_compiler_the_build_succeeds_and_says_what_it_left_out(tmp_path: Path):
    done = build(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler (/nonexistent/c++ not found)" in done.stderr
    assert not list(tmp_path.glob("**/*.so"))


def test_without_a_compiler_the_build_fails_where_the_library_is_required(tmp_path: Path):
    done = build(tmp_path, **NO_COMPILER, PEFT_ENGINE_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


def test_a_compiler_behind_a_wrapper_and_before_flags_is_looked_for(tmp_path: Path):
    done = build(tmp_path, CC="cc", CXX="env /nonexistent/c++ -m64")
    assert done.returncode == 0 and "no C++ compiler (/nonexistent/c++ not found)" in done.stderr


def test_a_library_built_for_some_architectures_is_not_taken_for_one_of_all(tmp_path: Path):
    compiler = tmp_path / "bin" / "nvcc"  # compiles nothing: what it makes says for which architectures
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/bash\n[ $1 = --list-gpu-code ] && echo sm_80 sm_90\n"
        'for word; do [ "$last" = -o ] && echo "$@" > "$word"; last=$word; done; true\n'
    )
    compiler.chmod(0o755)
    fake = {"CUDA_HOME": str(tmp_path), "CC": str(compiler), "CXX": str(compiler)}
    for archs, wanted in ("90", ["90"]), ("", ["80", "90"]):
        done = build(tmp_path, **fake, PEFT_ENGINE_CUDA_ARCHS=archs)
        assert done.returncode == 0, done.stderr
        built = (tmp_path / "lib" / "peft_engine" / "_cuda.so").read_text()
        assert re.findall(r"code=sm_(\d+)", built) == wanted


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a machine where no compiler ran."""
    native._load.cache_clear()
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    yield
    monkeypatch.undo()
    native._load.cache_clear()


def test_a_missing_library_is_reported_with_the_command_that_mends_it(no_library):
    why = native.load_error()
    assert why is not None
    assert "g++" in why and "pip install" in why


def test_a_library_that_does_not_load_is_reported_with_its_reason(no_library):
    native.LIBRARY.write_bytes(b"not a library")
    why = native.load_error()
    assert why is not None
    assert "does not load" in why and "rebuild" in why


def test_every_kernel_file_is_a_dependency_of_the_build():
    # A change of any of them must compile again; a file setup.py does not list would be left stale.
    text = (ROOT / "setup.py").read_text()
    suffixes = {p.suffix for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert suffixes <= {".cpp", ".h", ".inl", ".cu", ".cuh", ".md"}, suffixes
    assert 'glob("csrc/**/*.cpp")' in text and 'glob("csrc/**/*.[hi]*")' in text

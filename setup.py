"""Builds the CPU library (csrc/cpu, against torch's stable ABI) and the CUDA library (csrc/cuda, by nvcc).

With no torch or no compiler the install goes on without them. Neither is a Python module: they land beside
the package as `peft_engine/_native.so` and `peft_engine/_cuda.so`, and `peft_engine/native.py` loads them.

PEFT_ENGINE_REQUIRE_NATIVE=1, PEFT_ENGINE_REQUIRE_CUDA=1   a library that cannot be built is an error
PEFT_ENGINE_CUDA_ARCHS="80 90"                             for these architectures only
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "120")


class CannotBuild(Exception):
    """Why a library is left out."""


# Extension to what its kernels are called, and what is without them.
KINDS = {
    "peft_engine._native": ("CPU", "the reference backend will run"),
    "peft_engine._cuda": ("CUDA", "Triton's will run"),
}


def programs(compiler):
    """The programs of CXX without their flags: "ccache g++ -m64" has two, and the last compiles."""
    return [word for word in compiler.split() if not word.startswith("-")]


class NativeLibraries(build_ext):
    """Shared libraries without an interpreter in their names: they serve every Python and torch >= 2.11."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        kind, what = KINDS[ext.name]
        try:
            compiler = os.environ.get("CXX", "g++")
            for word in programs(compiler):
                if shutil.which(word) is None:
                    raise CannotBuild(f"no C++ compiler ({word} not found)")
            self.build_cuda(ext, compiler) if kind == "CUDA" else self.build_cpu(ext, compiler)
        except CannotBuild as why:
            if os.environ.get(f"PEFT_ENGINE_REQUIRE_{'CUDA' if kind == 'CUDA' else 'NATIVE'}"):
                raise RuntimeError(str(why)) from why
            print(f"peft-engine: {kind} kernels are not built, {what}: {why}", file=sys.stderr)

    def build_cpu(self, ext, compiler):
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise CannotBuild(
                f"torch is not installed ({error}); install torch first, then --no-build-isolation"
            ) from error
        os.environ.setdefault("CXX", compiler)
        os.environ.setdefault("CC", compiler)
        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        one_by_one = self.compiler.compile

        def at_once(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: one_by_one([source], **options), sources)
                return [one for (one,) in objects]

        self.compiler.compile = at_once
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools raises several kinds for a failed compile or link
            raise CannotBuild(f"compiling csrc/ failed: {error}") from error

    def build_cuda(self, ext, compiler):
        """One call of nvcc for each .cu, all architectures at once, and one that links; no torch in it."""
        library = Path(self.get_ext_fullpath(ext.name))
        folder = Path(self.build_temp, "cuda")
        archs = os.environ.get("PEFT_ENGINE_CUDA_ARCHS", "")
        built_for = folder / "archs"  # a library for others than these is as stale as one of older sources
        same = built_for.exists() and built_for.read_text() == archs
        if same and not (self.force or newer_group([*ext.sources, *ext.depends], str(library), "newer")):
            return
        nvcc = find_nvcc()
        if nvcc is None:
            raise CannotBuild("no nvcc under CUDA_HOME, on PATH or from pip (the extra `cuda`)")
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = [
            "-std=c++17",
            "-O3",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f"-ccbin={programs(compiler)[-1]}",
        ]
        objects = []
        for source in ext.sources:
            objects.append(folder / f"{Path(source).stem}.o")
            self.run_nvcc([nvcc, *flags, *targets(nvcc), "--threads=2", "-c", source, "-o", objects[-1]])
        # PyPI's nvcc looks for lib64, and the package has lib.
        link = [f"-L{nvcc.parents[1] / 'lib'}", "-cudart=static", "-shared"]
        self.run_nvcc([nvcc, *flags, *targets(nvcc), *link, *objects, "-o", library])
        built_for.write_text(archs)

    def run_nvcc(self, command):
        done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise CannotBuild(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")

    def copy_extensions_to_source(self):
        self.extensions = [
            e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()


def find_nvcc():
    """CUDA's compiler: under CUDA_HOME, on PATH, or PyPI's cuda-toolkit among this Python's packages."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    places = [Path(home, "bin", "nvcc")] if home else []
    places += [Path(on_path)] if on_path else []
    places.append(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc"))
    return next((place for place in places if place.is_file()), None)


def targets(nvcc):
    """nvcc's options for the architectures it knows, and code for those to come, from the newest's PTX."""
    wanted = re.findall(r"\d+", os.environ.get("PEFT_ENGINE_CUDA_ARCHS", "")) or CUDA_ARCHS
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    archs = [arch for arch in wanted if f"sm_{arch}" in known]
    if not archs:
        raise CannotBuild(f"{nvcc} knows none of sm_{', sm_'.join(wanted)}")
    newest = archs[-1]
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    ]


class AnyPythonWheel(bdist_wheel):
    """The library has no Python in it: one wheel for every Python 3 of the platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


kernel_packages = [f"peft_engine.kernels.{p.parent.name}" for p in sorted(ROOT.glob("kernels/*/__init__.py"))]

setup(
    packages=[*find_packages(include=["peft_engine", "peft_engine.*"]), *kernel_packages],
    package_dir={name: "kernels/" + name.rsplit(".", 1)[1] for name in kernel_packages},
    ext_modules=[
        Extension(
            "peft_engine._native",
            sources=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.cpp")),
            depends=[
                "setup.py",
                *sorted(
                    str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.[hi]*") if "cuda" not in p.parts
                ),
            ],
            include_dirs=["csrc"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-unknown-pragmas",
                "-Wno-maybe-uninitialized",
                "-Wno-uninitialized",
                "-ffp-contract=off",
            ],
            libraries=["torch", "torch_cpu", "c10"],
            language="c++",
        ),
        Extension(
            "peft_engine._cuda",
            sources=sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu")),
            depends=[
                "setup.py",
                "csrc/nf4.h",
                *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.*h")),
            ],
        ),
    ],
    cmdclass={"build_ext": NativeLibraries, "bdist_wheel": AnyPythonWheel},
)

"""Builds the CPU library (csrc/) against torch's stable ABI; with no torch or compiler, installs without it.

The library registers kernels with torch and is not a Python module: it lands beside the package as
`peft_engine/_native.so`, and `peft_engine/native.py` loads it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class NativeLibrary(build_ext):
    """One shared library without an interpreter in its name: it serves every Python and torch >= 2.11."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            return self.skip(
                f"torch is not installed ({error}); install torch first, then --no-build-isolation"
            )
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            return self.skip(f"no C++ compiler ({compiler} not found)")
        os.environ.setdefault("CXX", compiler)
        os.environ.setdefault("CC", compiler)
        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()
        try:
            super().build_extension(ext)
        except Exception as error:  # setuptools raises several kinds for a failed compile or link
            if os.environ.get("PEFT_ENGINE_REQUIRE_NATIVE"):
                raise
            self.skip(f"compiling csrc/ failed: {error}")

    def skip(self, why):
        if os.environ.get("PEFT_ENGINE_REQUIRE_NATIVE"):
            raise RuntimeError(why)
        print(
            f"peft-engine: CPU kernels are not built, the reference backend will run: {why}", file=sys.stderr
        )

    def copy_extensions_to_source(self):
        self.extensions = [
            e for e in self.extensions if Path(self.build_lib, self.get_ext_filename(e.name)).exists()
        ]
        super().copy_extensions_to_source()


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
            depends=["setup.py", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.[hi]*"))],
            include_dirs=["csrc"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            extra_compile_args=[
                "-O3",
                "-std=c++20",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-unknown-pragmas",
                "-Wno-maybe-uninitialized", "-Wno-uninitialized",
                "-ffp-contract=off",
            ],
            libraries=["torch", "torch_cpu", "c10"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": NativeLibrary, "bdist_wheel": AnyPythonWheel},
)

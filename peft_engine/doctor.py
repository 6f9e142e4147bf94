"""What this machine offers: backends, versions, CPU, GPU, compilers; each problem with what mends it."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import peft_engine
from peft_engine import dispatch, native

Note = Callable[[str, str], None]  # takes a problem and the command that mends it

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "peft", "bitsandbytes", "triton")
# Oldest version that works, and the command that installs one.
NEEDED = {
    "torch": ("2.11", 'pip install "torch>=2.11" --index-url https://download.pytorch.org/whl/cpu'),
    "transformers": ("5.0", 'pip install "transformers>=5.0"'),
    "accelerate": ("1.10", 'pip install "accelerate>=1.10"'),
    "safetensors": ("0.5", 'pip install "safetensors>=0.5"'),
}
# What compiles and checks GPU kernels, by pip: the extras `gpu` and `cuda`.
TRITON = 'pip install "triton>=3.6"'
NVCC = 'pip install "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2"'
OURS = "peft_engine::"
CHECKOUT = Path(__file__).parents[1]
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps " + (
    f"-e {CHECKOUT}" if (CHECKOUT / "setup.py").exists() else "peft-engine"
)


def diagnose() -> dict[str, Any]:
    """The state of this installation, in plain values.

    backends   name to None when usable, else the reason it is not
    versions   of Python, peft-engine and what it works with; None when not installed
    cpu        model, cores (of this process), threads (torch's), isa (in use), supported_isas (lowest first)
    gpu        one entry per device: name, capability, memory_bytes
    toolchain  nvcc, ptxas and triton, which compile GPU kernels: path, version, or problem and fix
    problems   [{"problem": what is wrong, "fix": the one command that mends it}]
    """
    problems: list[dict[str, str]] = []

    def note(problem: str, fix: str) -> None:
        problems.append({"problem": problem, "fix": fix})

    found = {"versions": _versions(note), "cpu": _cpu(note), "backends": _backends(note), "gpu": _gpu(note)}
    tools = toolchain()
    if found["gpu"] or (CHECKOUT / "setup.py").exists():  # where there is something to run or to test
        for tool in tools.values():
            if tool["problem"] and tool["fix"]:
                note(tool["problem"], tool["fix"])
    return {**found, "toolchain": tools, "problems": problems}


def toolchain() -> dict[str, dict[str, str | None]]:
    """The compilers of the GPU kernels, which need no GPU: path and version, or problem and fix."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent if triton and triton.origin else None
    ptxas = folder / "backends" / "nvidia" / "bin" / "ptxas" if folder else None
    if ptxas is not None and not ptxas.exists():
        ptxas = None
    nvcc = find_nvcc()
    return {
        "nvcc": _tool(
            nvcc, "no nvcc: the CUDA kernels are neither built nor checked", f"{NVCC} && {REBUILD}"
        ),
        "ptxas": _tool(ptxas, "no ptxas with triton: its kernels are not compiled ahead of time", TRITON),
        "triton": {
            "path": str(folder) if folder else None,
            "version": _installed("triton"),
            "problem": None if folder else "triton is not installed: its kernels neither run nor compile",
            "fix": None if folder else TRITON,
        },
    }


def find_nvcc() -> Path | None:
    """CUDA's compiler: under CUDA_HOME, on PATH, or PyPI's cuda-toolkit among this Python's packages."""
    home, on_path = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    packages = Path(sysconfig.get_path("purelib"))
    places = [Path(home, "bin", "nvcc")] if home else []
    places += [Path(on_path)] if on_path else []
    return next((p for p in [*places, packages / "nvidia" / "cu13" / "bin" / "nvcc"] if p.is_file()), None)


def _tool(path: Path | None, problem: str, fix: str) -> dict[str, str | None]:
    if path is None:
        return {"path": None, "version": None, "problem": problem, "fix": fix}
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    version = re.search(r"\bV(\d[\d.]*)", said)
    if version is None:
        return {"path": str(path), "version": None, "problem": f"{path} does not run", "fix": fix}
    return {"path": str(path), "version": version[1], "problem": None, "fix": None}


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(note: Note) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "peft-engine": peft_engine.__version__,
    }
    found |= {name: _installed(name) for name in PACKAGES}
    for name, (oldest, fix) in NEEDED.items():
        version = found[name]
        if version is None:
            note(f"{name} is not installed", fix)
        elif _release(version) < _release(oldest):
            note(f"{name} {version} is older than {oldest}", fix)
    return found


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    numbers = version.split("+")[0].split(".")[:2]
    return tuple(int("".join(c for c in number if c.isdigit()) or 0) for number in numbers)


def _cpu(note: Note) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        note(
            f"torch runs {threads} threads on {cores} cores, which makes each step slower",
            f"export OMP_NUM_THREADS={cores}",
        )
    isa, supported = None, []
    if _load_error(note) is None:
        isa, supported = native.isa(), list(native.supported_isas())
        if os.environ.get("PEFT_ENGINE_CPU_ISA") and isa != supported[-1]:
            note(
                f"the kernels are held to {isa}, and this CPU has {supported[-1]}",
                "unset PEFT_ENGINE_CPU_ISA",
            )
    return {
        "model": _cpu_model(),
        "cores": cores,
        "threads": threads,
        "isa": isa,
        "supported_isas": supported,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load_error(note: Note) -> str | None:
    """native.load_error, and as a problem what keeps the library from being used."""
    try:
        why = native.load_error()
    except ValueError as error:  # PEFT_ENGINE_CPU_ISA names what this CPU has not
        note(str(error), "unset PEFT_ENGINE_CPU_ISA")
        return str(error)
    if why is None:
        missing = _missing_kernels()
        if missing:
            note(f"the compiled library is of another version: it lacks {', '.join(missing)}", REBUILD)
        return None
    fix = REBUILD
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        fix = f"apt-get install -y g++ && {REBUILD}"
    note(why.split("; ")[0], fix)
    return why


def _missing_kernels() -> list[str]:
    """The ops declared in Python for which the library registered no CPU kernel."""
    from peft_engine import ops  # noqa: F401  (declares them)

    declared = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith(OURS)}
    return sorted(
        name.removeprefix(OURS)
        for name in declared
        if not name.startswith(f"{OURS}lora_groups_")  # Triton's alone, and declared when a batch needs it
        and not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CPU")
    )


def _backends(note: Note) -> dict[str, str | None]:
    try:
        found = dispatch.available_backends()
    except ValueError as error:  # told among the problems by _cpu
        found = {name: str(error) if name == "cpu" else None for name in ("cpu", "reference")}
    cuda = found.get("cuda") or ""
    if torch.cuda.is_available() and "; " in cuda:
        note(*cuda.rsplit("; ", 1))
    pinned = os.environ.get("PEFT_ENGINE_BACKEND")
    if pinned:
        note(
            f"backend {pinned} is pinned: what it refuses is an error, and no faster one runs",
            "unset PEFT_ENGINE_BACKEND",
        )
    return found


def _gpu(note: Note) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            note(
                f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU",
                "pip install --force-reinstall torch",
            )
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_bytes": d.total_memory}
        for d in devices
    ]

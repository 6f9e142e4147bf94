"""The rules of the house (docs/design.md) that a machine can read."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft_engine as pe
import peft_engine.ops
from peft_engine import dispatch

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_engine"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("*.py") if path.stem != "__init__")

# Imports go one way: a file may import from its own row and rows below it. What is not named here stands with
# methods, swap and checkpoint.
ROWS = (
    ("__main__",),
    ("cli",),
    ("train",),
    ("methods", "swap", "checkpoint"),
    ("nn", "report", "conv1d"),
    ("ops", "dense"),
    ("dispatch", "activations", "recompute"),
    ("native", "kernels"),
)
HEIGHT = {name: len(ROWS) - i for i, row in enumerate(ROWS) for name in row}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in SOURCES}


def _imports(path: Path, *, top_level: bool) -> set[str]:
    """The modules of the package that the file imports, anywhere or at its top level."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "peft_engine"} - {_module(path)}


def _height(module: str) -> int:
    return HEIGHT.get(module.split(".")[1], HEIGHT["methods"])


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_imports_go_downward(path):
    module = _module(path)
    if module == "peft_engine":
        return
    upward = [
        name
        for name in _imports(path, top_level=False)
        if name != "peft_engine" and _height(name) > _height(module)
    ]
    assert not upward, f"{module} imports upward: {upward}"


def test_no_two_modules_import_each_other():
    edges = {_module(path): _imports(path, top_level=True) for path in SOURCES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for name in edges.get(module, ()):
                visit(name, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_no_file_is_a_drawer_for_everything():
    names = {path.stem for path in [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py")]}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_no_two_files_of_tests_have_one_name():
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert len(names) == len(set(names)), "pytest takes one for the other"


def _long(pattern: str, limit: int) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in sorted(ROOT.glob(pattern))}
    return [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > limit]


@pytest.mark.parametrize("folder", ["peft_engine", "csrc", "kernels", "tests", "bench", "examples"])
def test_files_fit_in_one_sitting(folder):
    suffixes = ("py", "cpp", "cu", "cuh", "h", "inl")
    long = [line for suffix in suffixes for line in _long(f"{folder}/**/*.{suffix}", 420)]
    assert not long, f"about 400 lines is the limit: {long}"


@pytest.mark.parametrize("op", OPS)
def test_whoever_knows_an_op_name_knows_its_files(op):
    kernels = [ROOT / "csrc" / "cpu" / f"{op}{suffix}" for suffix in (".cpp", ".inl")]
    kernels.append(ROOT / "kernels" / op / "__init__.py")
    if op == "attention":  # prefix_attention's, without a prefix
        kernels.append(ROOT / "csrc" / "cpu" / "prefix_attention.cpp")
    if op == "experts":  # of each expert lora_linear's, and swiglu's
        kernels.append(ROOT / "csrc" / "cpu" / "lora_linear.cpp")
    # Where plain torch is at the floor, it is all there is.
    plain = op in dispatch.OPS and dispatch.OPS[op].backends() == ("reference",)
    assert plain or any(path.exists() for path in kernels), (
        f"no {kernels[0].relative_to(ROOT)}, no kernels/{op}"
    )
    for path in (ROOT / "tests" / "ops" / f"test_{op}.py", ROOT / "bench" / f"bench_{op}.py"):
        assert path.exists(), f"no {path.relative_to(ROOT)}"


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_opens_with_its_maths(op):
    tree = ast.parse((PACKAGE / "ops" / f"{op}.py").read_text())
    docstring = ast.get_docstring(tree) or ""
    assert "=" in docstring, "the file's docstring gives the maths"
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert any(name.startswith("reference") for name in names)


def test_the_root_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide PyPI's `kernels` from transformers"


def test_the_public_names_all_resolve():
    assert all(getattr(pe, name) is not None for name in pe.__all__)
    assert set(pe.__all__) <= set(dir(pe))
    with pytest.raises(AttributeError, match="'nothing'"):
        pe.nothing  # noqa: B018


def test_import_is_quick_and_leaves_the_rest_unloaded():
    script = """
import sys, time, torch
before = set(sys.modules)
start = time.process_time()
import peft_engine
print(time.process_time() - start)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, loaded = done.stdout.splitlines()
    assert float(seconds) < 0.3
    assert not set(loaded.split()) & {
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "matplotlib",
        "typer",
    }


def test_reaching_for_optimize_does_not_import_transformers():
    script = "import sys, peft_engine; peft_engine.optimize; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_nothing_is_patched_and_nothing_is_generated():
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"(?<![\w.])(exec|eval)\(", text), f"{path}: code from strings"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    parts = ast.unparse(target).split(".")
                    assert parts[0] not in {"transformers", "peft", "torch", "bnb"} or len(parts) == 1, (
                        f"{path}: {ast.unparse(node)}"
                    )


def test_no_raw_op_takes_a_string():
    """torch's stable ABI leaks each that it hands to C++ (torch 2.13): 32 bytes between large blocks."""
    for op in OPS:  # a schema is defined where its op is imported, and the library has names of all
        importlib.import_module(f"peft_engine.ops.{op}")
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("peft_engine::")]
    assert len(names) > 20
    for name in names:
        schema = getattr(torch.ops.peft_engine, name.partition("::")[2]).default._schema
        assert not [a.name for a in schema.arguments if str(a.type) in ("str", "Optional[str]")], name

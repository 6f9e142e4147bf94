"""Kernels with a fault planted: a module's source with one text replaced, imported anew."""

import importlib.util
from pathlib import Path
from types import ModuleType


def plant(module: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """A copy of `module` in which `old`, which must occur, is `new`."""
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} no longer holds {old!r}: the fault is not planted"
    path = folder / f"{module.__name__.replace('.', '_')}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy

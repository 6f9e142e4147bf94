"""Subclasses that are made for a class of transformers, and found again by their names in pickles."""

import importlib
from typing import Any


def subclass(form: type, kind: type, module: str) -> Any:
    """The class of `kind` with the methods of `form` in front; `module` finds it again by `stands_for`."""
    name = f"{kind.__module__}.{kind.__qualname__}".replace(".", "/")
    about = {"__module__": module, "__qualname__": name, "__doc__": form.__doc__}
    return type(kind.__name__, (form, kind), about)


def stands_for(name: str, module: str) -> Any:
    """The class that the one of this name was made for; AttributeError for another name of the module."""
    where, _, kind = name.rpartition("/")
    if not where:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(where.replace("/", ".")), kind)

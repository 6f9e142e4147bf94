"""Tensors that a layer keeps because they are made of its others and take long to make.

Each is kept by the memory and the version of what it is made of, which torch counts for every write but one
through `.data`; a layer's train() forgets those that are an adapter's.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from peft_engine import dispatch

Made = TypeVar("Made")

KEPT = "_peft_engine_derived"  # in a layer's __dict__


class _Kept(dict):
    """By what for: what it was made of, and the value; a copy of the layer starts without."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


def kept(
    layer: Any,
    what: Hashable,
    made_of: tuple[torch.Tensor, ...],
    make: Callable[[], Made],
    settings: Hashable = None,
) -> Made:
    """What `make` gave for these tensors and settings, when neither has changed since; else what it gives."""
    try:
        state = (settings, *((t.data_ptr(), t._version) for t in made_of))
    except RuntimeError:  # an inference tensor, whose versions torch does not count
        return make()
    held = layer.__dict__.setdefault(KEPT, _Kept())
    found = held.get(what)
    if found is None or found[0] != state:
        with dispatch.outside_inference():
            found = held[what] = state, make()
    return found[1]


def found(layer: Any, what: Hashable) -> Any:
    """What was kept last, changed since or not; None for nothing."""
    held = layer.__dict__.get(KEPT, {}).get(what)
    return None if held is None else held[1]


def forget(layer: Any, *, but: Hashable = None) -> None:
    """Drops what is kept, except for `but`."""
    held = layer.__dict__.get(KEPT, {})
    for what in [what for what in held if what != but]:
        del held[what]

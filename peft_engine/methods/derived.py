"""Tensors that a layer keeps because they are made of its others and take long to make.

Each is kept by the tensors that it is made of, their storages and their versions, which torch counts for
every write but one through `.data` and those of fused optimizers, whose steps are counted here. Nothing that
is trained is kept while it is (`learns`), and a layer's train() forgets what is an adapter's.
"""

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from peft_engine import dispatch

Made = TypeVar("Made")

KEPT = "_peft_engine_derived"  # in a layer's __dict__
BASE = "||W||^2"  # what is made of the layer's own weight, which is frozen
_steps = 0  # of all optimizers


class _Kept(dict):
    """By what for: what it was made of (settings, memory and versions; the tensors and their storages), and
    the value. A copy of the layer starts without.
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Kept, ()


class _Reference:
    """To a tensor and its storage, neither of which it keeps alive. Called, it says whether a tensor is that
    one, still in that storage.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.storage = weakref.ref(tensor), StorageWeakRef(tensor.untyped_storage())

    def __call__(self, tensor: torch.Tensor) -> bool:
        # No new storage gets the address of one that a weak reference holds.
        return self.tensor() is tensor and bool(self.storage.cdata == tensor.untyped_storage()._cdata)


def kept(
    layer: Any,
    what: Hashable,
    made_of: tuple[torch.Tensor, ...],
    make: Callable[[], Made],
    settings: Hashable = None,
) -> Made:
    """What `make` gave for these tensors and settings, when neither has changed since; else what it gives."""
    steps = 0
    if not torch.compiler.is_compiling() and any(t.requires_grad for t in made_of):
        _count_steps()
        steps = _steps
    try:
        state = (settings, steps, *((t.data_ptr(), t._version) for t in made_of))
    except RuntimeError:  # an inference tensor, whose versions torch does not count
        return make()
    held = layer.__dict__.setdefault(KEPT, _Kept())
    found = held.get(what)
    if (
        found is None
        or found[0] != state
        # Memory that was given back may be another tensor's now, or this one's after a move, at the same
        # version.
        or any(not ours(t) for ours, t in zip(found[1], made_of, strict=True))
    ):
        with dispatch.outside_inference():
            found = held[what] = state, tuple(_Reference(t) for t in made_of), make()
    return found[2]


@functools.cache
def _count_steps() -> None:
    """From the first call on, once."""

    def count(*_: Any) -> None:
        global _steps
        _steps += 1

    register_optimizer_step_post_hook(count)


def learns(layer: Any, *tensors: torch.Tensor) -> bool:
    """Whether the tensors may be in training: what is made of them then is not kept, and not kept on."""
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return layer.training
    if KEPT in layer.__dict__:
        forget(layer, but=BASE)
    return True


def found(layer: Any, what: Hashable) -> Any:
    """What was kept last, changed since or not; None for nothing."""
    held = layer.__dict__.get(KEPT, {}).get(what)
    return None if held is None else held[2]


def forget(layer: Any, *, but: Hashable = None) -> None:
    """Drops what is kept, except for `but`."""
    held = layer.__dict__.get(KEPT, {})
    for what in [what for what in held if what != but]:
        del held[what]

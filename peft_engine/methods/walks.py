"""What a walk over a model found, kept on the model: a switch of adapters does not walk over it again.

attach, detach, load_adapter, merge_ and optimize let go of all that is kept. Copies and pickles of a model
start without.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

KEPT = "peft_engine_walks"
Found = TypeVar("Found")


class _Kept(dict):
    """By key; empty in a copy, whose modules are others."""

    def __deepcopy__(self, memo: dict) -> "_Kept":
        return _Kept()

    def __reduce__(self) -> tuple:
        return _Kept, ()


def kept(model: nn.Module, key: Hashable, find: Callable[[], Found]) -> Found:
    """What `find` finds on a model with adapters, from its first call on."""
    held: Any = model.__dict__.setdefault(KEPT, _Kept())
    if key not in held:
        held[key] = find()
    return held[key]


def forget(model: nn.Module) -> None:
    """Lets go of all that is kept; to be called whenever modules or adapters come or go."""
    model.__dict__.pop(KEPT, None)


def homes(model: nn.Module, wanted: list[Any]) -> list[tuple[dict[str, Any], str]]:
    """Where parameters lie, as the dict of their module and the key: they may be replaced there (FSDP)."""
    ids = {id(parameter) for parameter in wanted}
    return [
        (module._parameters, name)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in ids
    ]

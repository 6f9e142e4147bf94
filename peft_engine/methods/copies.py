"""Parameters an adapter trains in a copy of its own: biases, and whole modules (`modules_to_save`).

The module stays the object it is. While an adapter is active its Parameters stand in the module's place for
the base's, which wait in a child named CHILD, where `.to`, `deepcopy` and `parameters` reach them.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from peft_engine import dispatch
from peft_engine.methods import sharded
from peft_engine.methods.walks import kept

Name = TypeVar("Name")

OURS = "peft_engine_"  # how the names of the children begin that hold what a method adds
CHILD = f"{OURS}copies"
BASE = "__base__"
LORA_PARTS = {"lora_A", "lora_B", "lora_magnitude_vector"}  # what an adapter adds to a linear layer


def is_ours(path: str) -> bool:
    """Whether a module or parameter is one that a method put there: it lies below a child of our name."""
    return any(part.startswith(OURS) for part in path.split("."))


def root_paths(model: nn.Module, modules_to_save: Iterable[str]) -> dict[str, list[str]]:
    """For each name of modules_to_save, the paths that end with it (PEFT's rule), without what is inside."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path and not is_ours(path)]
    found = {name: [path for path in paths if path.endswith(name)] for name in modules_to_save}
    outer = {path for group in found.values() for path in group}
    return {
        name: [p for p in group if not any(p != o and p.startswith(f"{o}.") for o in outer)]
        for name, group in found.items()
    }


def whole(model: nn.Module, roots: Iterable[str]) -> list[str]:
    """The paths of all parameters in the modules at `roots`; TypeError where one cannot be trained."""
    out: list[str] = []
    for root in roots:
        module = model.get_submodule(root)
        for path, parameter in module.named_parameters(root, remove_duplicate=False):
            if LORA_PARTS & set(path.split(".")):
                raise ValueError(
                    f"attach: modules_to_save: {root} holds the adapter tensor {path}; a module is adapted "
                    "or trained whole, the same for all adapters of a model"
                )
            if is_ours(path):
                continue
            if not parameter.is_floating_point():
                raise TypeError(
                    f"attach: modules_to_save: {path} is quantised ({parameter.dtype}) and cannot be "
                    f"trained; leave the module dense: quantize_(model, skip_modules=[{root!r}])"
                )
            out.append(path)
        state = {key for key in module.state_dict() if not is_ours(key)}
        held = state - {key for key, _ in module.named_parameters(remove_duplicate=False)}
        if held:
            raise TypeError(
                f"attach: modules_to_save: {root} holds buffers ({', '.join(sorted(held)[:3])}), and an "
                "adapter's copy has parameters only; name the parts of it that have none"
            )
    return out


def owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module a parameter's path belongs to, and the parameter's name there."""
    parent, _, leaf = path.rpartition(".")
    return model.get_submodule(parent), leaf


def base_of(module: nn.Module, leaf: str) -> nn.Parameter:
    """The base's parameter, whichever adapter is active."""
    held = module._modules.get(CHILD)
    if held is not None and leaf in held[BASE]:  # type: ignore[operator, index]
        return held[BASE][leaf]  # type: ignore[index]
    return module._parameters[leaf]  # type: ignore[return-value]


def put(
    model: nn.Module, name: str, paths: Iterable[str], values: dict[str, torch.Tensor] | None = None
) -> None:
    """Gives adapter `name` its own copy of each parameter, equal to the base's or to `values`."""
    for path in paths:
        module, leaf = owner(model, path)
        held: Any = module._modules.get(CHILD)
        if held is None:
            held = module._modules[CHILD] = nn.ModuleDict({BASE: nn.ParameterDict()})
            module.register_state_dict_post_hook(_saved)
            module.register_load_state_dict_pre_hook(_loading)
            module.register_load_state_dict_post_hook(_loaded)
        base = base_of(module, leaf)
        held[BASE][leaf] = base
        if name not in held:
            held[name] = nn.ParameterDict()
        value = (
            base.detach().clone() if values is None else values[path].to(base.device, base.dtype, copy=True)
        )
        held[name][leaf] = nn.Parameter(value, requires_grad=False)


def take(model: nn.Module, name: str) -> None:
    """Removes the copies of adapter `name`, which must not be active; a module without any is as it was."""
    for module in owners(model):
        held: Any = module._modules[CHILD]
        if name in held:
            del held[name]
        kept = {leaf for key, copies in held.items() if key != BASE for leaf in copies}
        if not kept:
            del module._modules[CHILD]
            hooks: Any
            loads = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
            for hooks in (module._state_dict_hooks, *loads):
                for key in [k for k, hook in hooks.items() if _is_mine(hook)]:
                    del hooks[key]
            continue
        for leaf in [leaf for leaf in held[BASE] if leaf not in kept]:
            del held[BASE][leaf]


def _saved(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict) -> None:
    """After a module's state_dict: the base's parameters have their names, whichever adapter is active."""
    for leaf in module._modules[CHILD][BASE]:  # type: ignore[index, union-attr]
        key = f"{prefix}{CHILD}.{BASE}.{leaf}"
        if key in state:
            state[prefix + leaf] = state.pop(key)


def _loading(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a module's load_state_dict: the same names mean the base's, and the active adapter keeps its
    own.
    """
    held: Any = module._modules[CHILD]
    held.__dict__["in_place"] = in_place = {}
    for leaf in held[BASE]:
        now = module._parameters[leaf]
        for name in held:
            if leaf in held[name] and held[name][leaf] is now:
                in_place[leaf] = name
        if prefix + leaf not in state:
            continue
        state[f"{prefix}{CHILD}.{BASE}.{leaf}"] = state[prefix + leaf]
        name = in_place.get(leaf, BASE)
        if name != BASE:
            state[prefix + leaf] = state.get(f"{prefix}{CHILD}.{name}.{leaf}", now)


def _loaded(module: nn.Module, keys: Any) -> None:
    """After it: load_state_dict(assign=True) has made two Parameters of the one that is held and in place."""
    held: Any = module._modules[CHILD]
    for leaf, name in held.__dict__.pop("in_place", {}).items():
        module._parameters[leaf] = held[name][leaf]


def _is_mine(hook: Any) -> bool:
    return getattr(hook, "hook", hook) in (_saved, _loading, _loaded)


def owners(model: nn.Module) -> list[nn.Module]:
    """The modules of which some adapter has copies."""
    return [module for module in model.modules() if CHILD in module._modules]


def names(model: nn.Module) -> set[str]:
    """The adapters that have copies."""
    return {name for module in owners(model) for name in module._modules[CHILD] if name != BASE}  # type: ignore[union-attr, misc]


def has(module: nn.Module, name: str | None) -> bool:
    """Whether adapter `name` has a copy of one of the module's own parameters."""
    held = module._modules.get(CHILD)
    return held is not None and name is not None and name in held  # type: ignore[operator]


def value(module: nn.Module, leaf: str, name: str | None) -> torch.Tensor | None:
    """The module's parameter as adapter `name` has it: its copy, or else the base's."""
    held: Any = module._modules.get(CHILD)
    if held is None or leaf not in held[BASE]:
        return getattr(module, leaf)
    return held[name][leaf] if name in held and leaf in held[name] else held[BASE][leaf]


def of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The copies of adapter `name`, by the paths of the parameters they stand for."""
    out: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        held: Any = module._modules.get(CHILD)
        if held is not None and name in held:
            out |= {f"{path}.{leaf}".removeprefix("."): copy for leaf, copy in held[name].items()}
    return out


def install(module: nn.Module, name: str | None, parts: Iterable[nn.Module] | None = None) -> None:
    """Puts the copies of adapter `name`, or the base's parameters where it has none, into the modules."""
    for part in owners(module) if parts is None else parts:
        held: Any = part._modules[CHILD]
        mine = dict(held[name].items()) if name is not None and name in held else {}
        for leaf, base in held[BASE].items():
            part._parameters[leaf] = mine.get(leaf, base)


def activate(model: nn.Module, which: str | tuple[str | None, ...] | None, roots: Iterable[str]) -> None:
    """Puts one adapter's copies in place; for a mixed batch, sets each root to run its rows apart."""
    install(model, None if isinstance(which, tuple) else which, kept(model, "owners", lambda: owners(model)))
    for root in roots:
        module = model.get_submodule(root)
        if runs_apart(module):
            del module.__dict__["forward"]
        if isinstance(which, tuple):
            module.__dict__["forward"] = functools.partial(_mixed_forward, module, which)


def check_apart(model: nn.Module, roots: Iterable[str]) -> None:
    """ValueError when a root cannot run a mixed batch."""
    for root in roots:
        module = model.get_submodule(root)
        if "forward" in module.__dict__ and not runs_apart(module):
            raise ValueError(
                f"active: {root} has its forward replaced and cannot run a mixed batch; activate one adapter"
            )


def runs_apart(module: nn.Module) -> bool:
    """Whether the module runs the rows of a mixed batch one adapter after another, with their copies."""
    return getattr(module.__dict__.get("forward"), "func", None) is _mixed_forward


def thread() -> int:
    """Which thread runs; torch.compile traces in one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def whose(held: Mapping[int, Any]) -> int:
    """The key in `held` of what runs: its thread's.

    Where layers are compiled one by one and the hook that left something is not, or the other way round, it
    is the last thread's, and what compiled code has left.
    """
    here = thread()
    if here in held or not held:
        return here
    return list(held)[-1] if here == 0 else 0


class _Here(threading.local):
    only: int | None = None


_here = _Here()


@contextlib.contextmanager
def only_row(i: int | None) -> Iterator[None]:
    """While it lasts, a mixed batch has the rows of its i-th name only (None: all, as ever)."""
    before, _here.only = _here.only, i
    try:
        yield
    finally:
        _here.only = before


@functools.lru_cache(maxsize=256)
def rows_at(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The rows' numbers on a device: the same tensor for every layer, so that a GPU is sent it once."""
    with dispatch.outside_inference():
        return torch.tensor(rows, dtype=torch.long, device=device)


def back_in_order(parts: Sequence[torch.Tensor], groups: Iterable[Sequence[int]]) -> torch.Tensor:
    """The parts' rows joined, those of each group where they were in the batch."""
    rows = [row for group in groups for row in group]
    places = tuple(sorted(range(len(rows)), key=rows.__getitem__))
    return torch.cat(list(parts)).index_select(0, rows_at(places, parts[0].device))


def row_groups(names: Sequence[Name], rows: int, who: str) -> dict[Name, list[int]]:
    """The rows of each adapter when each of `names` stands for rows / len(names) rows in turn."""
    only = _here.only
    if only is not None:
        return {names[only]: list(range(rows))}
    if rows % len(names):
        raise ValueError(
            f"{who}: {len(names)} adapter names are active, one for each row of the batch, but the input has "
            f"{rows} rows; give one name per row, or one name for all"
        )
    each = rows // len(names)
    groups: dict[Name, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).extend(range(i * each, (i + 1) * each))
    return groups


# Families of transformers, by the folder of their code, in which layers see (tokens, rows, features).
TIME_MAJOR = {
    "bridgetower", "bros", "clipseg", "fsmt", "led", "longformer", "mask2former", "mlcd", "oneformer",
    "xlnet",
}  # fmt: skip
ROUTED = "gets its rows from a router, not in the batch's order"
# Arguments of modules that see the patches of all images in one row, as many as each has.
JOINED = ("cu_seqlens", "grid_thw")


def out_of_order(model: nn.Module, paths: Iterable[str]) -> str | None:
    """Why a mixed batch cannot run through one of the modules at `paths`: its rows are not the batch's."""
    for path in paths:
        why = ROUTED if ".experts." in path else None
        parts = path.split(".")
        for above in (model.get_submodule(".".join(parts[:n])) for n in range(len(parts))):
            kind: Any = sharded.class_of(above)
            where = kind.__module__.split(".")
            if where[:2] == ["transformers", "models"] and where[2] in TIME_MAJOR:
                why = f"sees the tokens of {kind.__name__} in front of the batch's rows"
            elif not set(JOINED).isdisjoint(inspect.signature(kind.forward).parameters):
                why = f"sees the patches of all images as the rows of {kind.__name__}"
        if why is not None:
            return f"{path} {why}; a mixed batch cannot run through it: activate one adapter"
    return None


def _mixed_forward(
    module: nn.Module, names: tuple[str | None, ...], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """The module's forward with the parameters of each adapter in place; of each, the rows that are its own.

    All rows go through each time: torch's product of fewer rows has other bits than that of the batch.
    """
    who = f"active: {type(module).__name__}"
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dim()]
    if not tensors:
        raise TypeError(
            f"{who}: a mixed batch needs a tensor with a row per adapter name; activate one adapter instead"
        )
    rows = tensors[0].shape[0]
    out: torch.Tensor | None = None
    for name, group in row_groups(names, rows, who).items():
        install(module, name)
        try:
            full = type(module).forward(module, *args, **kwargs)
        finally:
            install(module, None)
        if not isinstance(full, torch.Tensor):
            raise TypeError(
                f"{who}: returns {type(full).__name__}, which a mixed batch cannot join; activate one"
            )
        index = rows_at(tuple(group), full.device)
        out = full.new_empty(full.shape) if out is None else out
        out = out.index_copy(0, index, full.index_select(0, index))
    assert out is not None
    return out

"""Puts adapters into a model and takes them out: attach, detach, active.

Nothing is wrapped: each method (registry.py) says what it does to the model it is put on. The model keeps
each adapter's config in `peft_engine_adapters`, the paths of its tensors in `peft_engine_tensors`, and what
is active in `peft_engine_active`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from peft_engine import flops
from peft_engine.heads import unwrap
from peft_engine.methods import copies, lora_layers, sharded, walks
from peft_engine.methods.registry import METHODS, Config, method_of
from peft_engine.methods.target_parameters import with_experts
from peft_engine.methods.targets import with_head

ModelType = TypeVar("ModelType", bound=nn.Module)
Which = str | tuple[str | None, ...] | None


def attach(model: ModelType, config: Config, name: str = "default") -> ModelType:
    """Adds adapter `name` to `model`, in place: everything else is frozen, and the adapter is active.

    config: LoraConfig, PrefixTuningConfig, PromptTuningConfig or BottleneckConfig. A model may hold adapters
    of any of them under different names. The adapter's tensors are float32 on the device of their layer; a
    copied bias or module keeps its dtype.
    With task_type "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" the task's head is trained whole, as PEFT does.
    Raises ValueError or TypeError before anything is changed: for a name that is taken, target modules that
    match nothing or are no linear layers, a rank above the layer's, more virtual tokens than the model has
    positions, a model that has another library's adapters.
    """
    base = unwrap(model)
    method = method_of(config, "attach")
    sharded.refuse(base, "attach")
    check_name(base, name, "attach")
    flops.register()
    config = with_experts(base, with_head(base, config))
    install(base, config, name, method.resolve(base, config, "attach", True))
    return model


def detach(model: ModelType, name: str | None = None) -> ModelType:
    """Takes adapter `name` off, or all (None); without adapters the model is bit for bit as before attach.

    When the adapter was active the base is active afterwards. Raises ValueError for a name that is not
    attached.
    """
    base = unwrap(model)
    adapters = attached(base)
    names = list(adapters) if name is None else [name]
    for name in names:
        require(base, name, "detach")
    if not names:
        return model
    sharded.refuse(base, "detach")
    now: Which = base.peft_engine_active  # type: ignore[assignment]
    paths: Any = base.peft_engine_tensors
    activate(base, None)
    walks.forget(base)
    for name in names:
        method_of(adapters[name], "detach").remove(base, name)
        copies.take(base, name)
        del adapters[name], paths[name]
    walks.forget(base)
    if not adapters:
        trainable = base.peft_engine_trainable
        for path, parameter in base.named_parameters(remove_duplicate=False):
            # quantize_ may have packed it since, and packed bytes take no gradient
            parameter.requires_grad_(path in trainable and parameter.is_floating_point())  # type: ignore[operator]
        _forget_all(base)
    elif not set(_names(now)) & set(names):
        activate(base, now)
    return model


class active:
    """`active(model, which)` switches at once; used with `with`, its end restores what was active before.

    which: the name of an adapter; "a+b" for adapters of different methods one on top of the other; None for
    the base; or, for one mixed batch, a list with one of these per row. A batch of n times as many rows
    (beams, or several samples of a prompt, in `generate`) gives each entry n consecutive rows.
    The adapters named become trainable. None is frozen by a switch, so a backward after it still reaches what
    ran before it; but gradient checkpointing runs the model again in backward, which must happen before.
    Raises ValueError for a name that is not attached, for adapters that cannot stack, and for an empty list,
    TypeError for anything else.
    """

    def __init__(self, model: nn.Module, which: str | Sequence[str | None] | None):
        self._model = unwrap(model)
        self._before: Which = getattr(self._model, "peft_engine_active", None)
        mixed = which is not None and not isinstance(which, str)
        wanted: Which = tuple(which) if mixed and isinstance(which, Iterable) else which  # type: ignore[assignment]
        if mixed and not (
            isinstance(wanted, tuple) and all(isinstance(entry, str | None) for entry in wanted)
        ):
            raise TypeError(
                "active: expected an adapter's name, None for the base, or a list with one of these for each "
                f"row, got {which!r}"
            )
        if wanted == ():
            raise ValueError("active: the list of adapter names is empty; give one name or None per row")
        for name in _names(wanted):
            require(self._model, name, "active")
        for entry in set(wanted) if isinstance(wanted, tuple) else {wanted}:
            _check_stack(self._model, entry)
        if mixed:
            _check_mixed(self._model, _names(wanted))
            copies.check_apart(self._model, _apart(self._model))
        if attached(self._model):
            activate(self._model, wanted)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        adapters = attached(self._model)
        if adapters:  # an adapter that was detached meanwhile leaves the base
            gone = any(name not in adapters for name in _names(self._before))
            activate(self._model, None if gone else self._before)


def adapters_without_gradient(model: nn.Module) -> list[str]:
    """The tensors of the active adapters that backward did not reach, by path; call it after the first step.

    A tensor is listed when it has no gradient, or one that is zero all over; but A's is zero while B is, in
    the first step, and is not listed for that. An empty list means that all of the adapter trains.
    """
    base = unwrap(model)
    out = []
    names = _names(getattr(base, "peft_engine_active", None))
    for name in [name for name in attached(base) if name in names]:
        for path, tensor in tensors(base, name).items():
            reached = tensor.grad is not None and (path.endswith(".lora_A.weight") or bool(tensor.grad.any()))
            if tensor.requires_grad and not reached:
                out.append(f"{path} of {name!r}")
    return out


# --- for the rest of the package ----------------------------------------------------------------------------


def attached(model: nn.Module) -> dict[str, Config]:
    """The configs of the adapters on a model, by name."""
    return getattr(model, "peft_engine_adapters", {})


def require(model: nn.Module, name: str, who: str) -> Config:
    """The config of adapter `name`; ValueError that lists the attached ones when it is not."""
    adapters = attached(model)
    if name not in adapters:
        if getattr(model, "peft_config", None) is not None:
            raise ValueError(f"{who}: the adapters of this model are PEFT's; use its own methods")
        have = ", ".join(map(repr, adapters)) or "none"
        raise ValueError(f"{who}: no adapter {name!r} is attached; attached: {have}")
    return adapters[name]


def check_name(model: nn.Module, name: str, who: str) -> None:
    """ValueError for a name that is taken or no module can hold, and for a model with other adapters."""
    if (
        not isinstance(name, str)
        or not name
        or "." in name
        or "+" in name
        or name == copies.BASE
        or hasattr(nn.ModuleDict(), name)  # of an instance: `training` is an attribute of no class
    ):
        raise ValueError(
            f"{who}: {name!r} cannot be an adapter's name: it must have no dot, no plus, and be no torch word"
        )
    if hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"{who}: {name!r} cannot be an adapter's name: torch's ParameterDict has a method of that name"
        )
    if name in attached(model):
        raise ValueError(f"{who}: an adapter {name!r} is attached already; detach it or give another name")
    for path, module in model.named_modules():
        if path and "peft_engine_adapters" in module.__dict__:
            raise ValueError(
                f"{who}: {path} has adapters of its own ({', '.join(attached(module))}), of which the model "
                "around it does not know; attach there, or detach them from there first"
            )
    foreign = [
        path for path, module in model.named_modules() if type(module).__module__.split(".")[0] == "peft"
    ]
    if foreign or getattr(model, "peft_config", None) is not None:
        raise ValueError(
            f"{who}: the model has PEFT's adapters already{f' (at {foreign[0]!r})' if foreign else ''}; "
            "optimize takes such a model as it is, or unload them first: model = model.unload()"
        )


def install(
    model: nn.Module,
    config: Config,
    name: str,
    plan: Any,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Adds the adapter of a plan and makes it active; `values` by its method's paths, None: fresh ones.

    What it raises (no tokenizer, no memory, a forward that fails) leaves the model as it was.
    """
    first = not attached(model)
    if first:
        floats = (p for p in model.named_parameters(remove_duplicate=False) if p[1].requires_grad)
        model.peft_engine_trainable = frozenset(path for path, _ in floats)  # type: ignore[assignment]
        model.peft_engine_adapters = {}  # type: ignore[assignment]
        model.peft_engine_tensors = {}  # type: ignore[assignment]
        model.peft_engine_active = None  # type: ignore[assignment]
    before: Which = model.peft_engine_active  # type: ignore[assignment]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    activate(model, None)
    walks.forget(model)
    model.requires_grad_(False)
    method = method_of(config, "attach")
    try:
        method.install(model, config, name, plan, values)
        given = None if values is None else {path: values[path] for path in plan.copied}
        copies.put(model, name, plan.copied, given)
    except BaseException:
        method.remove(model, name)
        copies.take(model, name)
        walks.forget(model)
        for parameter in trained:
            parameter.requires_grad_()
        activate(model, before)
        if first:
            _forget_all(model)
        raise
    attached(model)[name] = config
    paths: Any = model.peft_engine_tensors
    paths[name] = frozenset(method.tensors(model, name))
    walks.forget(model)  # what was kept while the adapter was being put there
    activate(model, name)


def activate(model: nn.Module, which: Which) -> None:
    """Switches the adapters; those named become trainable, and none is frozen (see `active`)."""
    adapters = attached(model)
    model.peft_engine_active = which  # type: ignore[assignment]
    for slot in {method.SLOT: method for method in METHODS}.values():
        mine = {name for name, config in adapters.items() if method_of(config).SLOT == slot.SLOT}
        slot.activate(model, _project(which, mine))
    if adapters:
        own = walks.kept(model, "copied", lambda: copies.names(model))
        copies.activate(model, _project(which, own), walks.kept(model, "apart", lambda: _apart(model)))
    named = set(_names(which))
    for name in [name for name in adapters if name in named]:
        for place, leaf in walks.kept(model, ("homes", name), lambda name=name: _homes(model, name)):  # type: ignore[misc]
            if not place[leaf].requires_grad:
                place[leaf].requires_grad_()


def tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The trained tensors of adapter `name` by path: those of its method, and its copies."""
    own = method_of(attached(model)[name]).tensors(model, name)
    return {**own, **copies.of(model, name)}


def _homes(model: nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    return walks.homes(model, list(tensors(model, name).values()))


# --- parts --------------------------------------------------------------------------------------------------


def _forget_all(model: nn.Module) -> None:
    """Takes off what a model with adapters says of them, when the last has gone."""
    for attribute in ("adapters", "tensors", "active", "trainable"):
        delattr(model, f"peft_engine_{attribute}")
    walks.forget(model)


def _names(which: Which) -> tuple[str, ...]:
    """The adapters that `which` names, each once."""
    entries = which if isinstance(which, tuple) else (which,)
    return tuple(dict.fromkeys(name for entry in entries if entry is not None for name in entry.split("+")))


def _project(which: Which, mine: set[str]) -> Which:
    """`which` with those adapters alone that are `mine`: at most one of each entry."""
    if isinstance(which, tuple):
        out = tuple(_project(entry, mine) for entry in which)
        return None if set(out) == {None} else out  # type: ignore[return-value]
    return None if which is None else next((name for name in which.split("+") if name in mine), None)


def _check_stack(model: nn.Module, entry: str | None) -> None:
    """ValueError for adapters that cannot run on top of each other, with the reason."""
    names = [] if entry is None else entry.split("+")
    if len(names) < 2:
        return
    held: dict[str, str] = {}
    for name in names:
        method = method_of(attached(model)[name])
        if method.SLOT in held:
            raise ValueError(
                f"active: {entry!r} cannot stack: {held[method.SLOT]!r} and {name!r} both {method.DOES}, "
                "where there is room for one; merge one into the base, or train them as one adapter"
            )
        held[method.SLOT] = name
    copied = [name for name in names if name in copies.names(model)]
    if len(copied) > 1:
        raise ValueError(
            f"active: {entry!r} cannot stack: {copied[0]!r} and {copied[1]!r} each have a module or bias of "
            "their own in the base's place (modules_to_save, bias), and only one can stand there"
        )


def _apart(model: nn.Module) -> list[str]:
    """Modules that must run a mixed batch's rows apart: those with copies (adapted layers do it alone)."""
    roots = {
        path
        for config in attached(model).values()
        for group in copies.root_paths(model, getattr(config, "modules_to_save", None) or ()).values()
        for path in group
    }
    for path, module in model.named_modules():
        inside = any(path == root or path.startswith(f"{root}.") for root in roots)
        if copies.CHILD in module._modules and not lora_layers.is_adapted(module) and not inside:
            roots.add(path)
    return sorted(roots)


def _check_mixed(model: nn.Module, names: Sequence[str]) -> None:
    """ValueError when a method cannot run the rows of a batch under different adapters."""
    for name in names:

        def why_not(name: str = name) -> str | None:
            why = method_of(attached(model)[name]).refuse_mixed(model, name)
            return why or copies.out_of_order(model, copies.of(model, name))

        why = walks.kept(model, ("mixed", name), why_not)
        if why is not None:
            raise ValueError(f"active: {why}")

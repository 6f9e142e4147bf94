"""Puts adapters into a model and takes them out: attach, detach, active.

Nothing is wrapped. An adapted layer is the same object with its class set to LoraLinear or LoraNF4Linear, and
the model keeps each adapter's config in `peft_engine_adapters` and what is active in `peft_engine_active`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from peft_engine.methods import copies
from peft_engine.methods.lora import BASES, LAYERS, LoraConfig, initial
from peft_engine.methods.targets import Plan, resolve, with_head

ModelType = TypeVar("ModelType", bound=nn.Module)
Which = str | tuple[str | None, ...] | None


def attach(model: ModelType, config: LoraConfig, name: str = "default") -> ModelType:
    """Adds adapter `name` to `model`, in place: everything else is frozen, and the adapter is active.

    The adapter's tensors are float32 on the device of their layer; a copied bias or module keeps its dtype.
    With task_type "SEQ_CLS" or "TOKEN_CLS" the classifier's head is trained whole, as PEFT does.
    Raises ValueError or TypeError before anything is changed: for a name that is taken, target modules that
    match nothing or are no linear layers, a rank above the layer's, a model that has another library's
    adapters.
    """
    base = unwrap(model)
    if not isinstance(config, LoraConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(
            f"attach: config must be a peft_engine.LoraConfig (its fields have PEFT's names), got {kind}"
        )
    check_name(base, name, "attach")
    config = with_head(base, config)
    install(base, config, name, resolve(base, config))
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
    now: Which = base.peft_engine_active  # type: ignore[assignment]
    activate(base, None)
    for name in names:
        for layer in [m for m in base.modules() if type(m) in BASES and name in m.lora]:  # type: ignore[operator]
            remove_from_layer(layer, name)
        copies.take(base, name)
        del adapters[name]
    if not adapters:
        trainable = base.peft_engine_trainable
        for path, parameter in base.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(path in trainable)  # type: ignore[operator]
        for attribute in ("peft_engine_adapters", "peft_engine_active", "peft_engine_trainable"):
            delattr(base, attribute)
    elif not set(_names(now)) & set(names):
        activate(base, now)
    return model


class active:
    """`active(model, which)` switches at once; used with `with`, its end restores what was active before.

    which: the name of an adapter; None for the base; or, for one mixed batch, a list with one name or None
    per row. A batch of n times as many rows (beams, or several samples of a prompt, in `generate`) gives each
    name n consecutive rows.
    The adapters named become trainable. None is frozen by a switch, so a backward after it still reaches what
    ran before it; but gradient checkpointing runs the model again in backward, which must happen before.
    Raises ValueError for a name that is not attached, and for an empty list.
    """

    def __init__(self, model: nn.Module, which: str | Sequence[str | None] | None):
        self._model = unwrap(model)
        self._before: Which = getattr(self._model, "peft_engine_active", None)
        mixed = which is not None and not isinstance(which, str)
        wanted: Which = tuple(which) if mixed else which  # type: ignore[arg-type, assignment]
        if wanted == ():
            raise ValueError("active: the list of adapter names is empty; give one name or None per row")
        for name in _names(wanted):
            if name is not None:
                require(self._model, name, "active")
        if mixed:
            _refuse_routed(self._model)
            copies.check_apart(self._model, _apart(self._model))
        if attached(self._model):
            activate(self._model, wanted)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        adapters = attached(self._model)
        if adapters:  # an adapter that was detached meanwhile leaves the base
            gone = any(name is not None and name not in adapters for name in _names(self._before))
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


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def attached(model: nn.Module) -> dict[str, LoraConfig]:
    """The configs of the adapters on a model, by name."""
    return getattr(model, "peft_engine_adapters", {})


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapted layers with their paths."""
    return ((path, module) for path, module in model.named_modules() if type(module) in BASES)


def require(model: nn.Module, name: str, who: str) -> LoraConfig:
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
        or name == copies.BASE
        or hasattr(nn.ModuleDict, name)
    ):
        raise ValueError(
            f"{who}: {name!r} cannot be an adapter's name: it must have no dot and not be a torch word"
        )
    if hasattr(nn.ParameterDict, name):
        raise ValueError(
            f"{who}: {name!r} cannot be an adapter's name: torch's ParameterDict has a method of that name"
        )
    if name in attached(model):
        raise ValueError(f"{who}: an adapter {name!r} is attached already; detach it or give another name")
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
    config: LoraConfig,
    name: str,
    plan: Plan,
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Adds the adapter of a plan and makes it active; `values` as `tensors` gives them, None: fresh ones."""
    if not attached(model):
        floats = (p for p in model.named_parameters(remove_duplicate=False) if p[1].requires_grad)
        model.peft_engine_trainable = frozenset(path for path, _ in floats)  # type: ignore[assignment]
        model.peft_engine_adapters = {}  # type: ignore[assignment]
        model.peft_engine_active = None  # type: ignore[assignment]
    activate(model, None)
    model.requires_grad_(False)
    for path, settings in plan.layers.items():
        layer: Any = model.get_submodule(path)
        if values is None:
            a, b = initial(layer.in_features, layer.out_features, settings.r, config.init_lora_weights)
        else:
            a, b = values[f"{path}.lora_A.weight"].float(), values[f"{path}.lora_B.weight"].float()
        if type(layer) in LAYERS:
            layer.__class__ = LAYERS[type(layer)]
            layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
            layer.lora, layer.active_adapter = {}, None
        device = layer.weight.device
        layer.lora_A[name] = nn.Parameter(a.to(device))
        layer.lora_B[name] = nn.Parameter(b.to(device))
        layer.lora[name] = settings
    given = None if values is None else {path: values[path] for path in plan.copied}
    copies.put(model, name, plan.copied, given)
    attached(model)[name] = config
    activate(model, name)


def activate(model: nn.Module, which: Which) -> None:
    """Switches the adapters; those named become trainable, and none is frozen (see `active`)."""
    names = set(_names(which))
    for _, layer in lora_layers(model):
        layer.active_adapter = which
    copies.activate(model, which, _apart(model))
    for name in [name for name in attached(model) if name in names]:
        for tensor in tensors(model, name).values():
            tensor.requires_grad_()
    model.peft_engine_active = which  # type: ignore[assignment]


def tensors(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of adapter `name`: `<layer>.lora_A.weight`, `<layer>.lora_B.weight`, paths of copies."""
    out: dict[str, torch.Tensor] = {}
    for path, layer in lora_layers(model):
        if name in layer.lora:
            out[f"{path}.lora_A.weight"] = layer.lora_A[name]
            out[f"{path}.lora_B.weight"] = layer.lora_B[name]
    return out | copies.of(model, name)


def remove_from_layer(layer: Any, name: str) -> None:
    """Takes one adapter's A and B out of a layer; without any left it is of the base's class again."""
    del layer.lora_A[name], layer.lora_B[name], layer.lora[name]
    if not layer.lora:
        del layer.lora_A, layer.lora_B, layer.lora, layer.active_adapter
        layer.__class__ = BASES[type(layer)]


# --- parts --------------------------------------------------------------------------------------------------


def _names(which: Which) -> tuple[str | None, ...]:
    return which if isinstance(which, tuple) else (which,)


def _apart(model: nn.Module) -> list[str]:
    """Modules that must run a mixed batch's rows apart: those with copies (adapted layers do it alone)."""
    roots = {
        path
        for config in attached(model).values()
        for group in copies.root_paths(model, config.modules_to_save or ()).values()
        for path in group
    }
    for path, module in model.named_modules():
        inside = any(path == root or path.startswith(f"{root}.") for root in roots)
        if copies.CHILD in module._modules and type(module) not in BASES and not inside:
            roots.add(path)
    return sorted(roots)


def _refuse_routed(model: nn.Module) -> None:
    """ValueError when an adapted layer sees tokens out of the batch's order, as an expert does."""
    for path, _ in lora_layers(model):
        if ".experts." in path:
            raise ValueError(
                f"active: {path} gets its rows from a router, not in the batch's order; a mixed batch cannot "
                "run through it: activate one adapter"
            )

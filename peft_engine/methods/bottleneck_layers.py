"""The modules of bottleneck adapters, and the hooks by which a layer runs them.

At a site (bottleneck_sites.py) lives a Bottlenecks module with one Adapter per name, and a forward hook puts
its output in the place of the sublayer's. Where an adapter needs the state s that the sublayer read, a
forward pre-hook on the module that reads it, a Catch, keeps it until then.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_engine import dispatch
from peft_engine.methods import copies
from peft_engine.methods.bottleneck_config import BottleneckConfig
from peft_engine.methods.bottleneck_sites import Site
from peft_engine.methods.walks import kept
from peft_engine.ops.bottleneck import FEW_ROWS, bottleneck

CHILD = f"{copies.OURS}bottleneck"


class Adapter(nn.Module):
    """One adapter at one site."""

    def __init__(self, config: BottleneckConfig, hidden: int, width: int):
        super().__init__()
        self.config = config
        self.started: float | None = None  # a fingerprint; None for what was loaded
        # The library's draws, in its order: a seed gives its adapter.
        down, up = (
            nn.Linear(hidden, width, dtype=torch.float32),
            nn.Linear(width, hidden, dtype=torch.float32),
        )
        start(down, up, config.init_weights)
        self.down_weight, self.down_bias = down.weight, down.bias
        self.up_weight, self.up_bias = up.weight, up.bias
        if config.ln_before:
            self.norm_before = nn.LayerNorm(hidden, dtype=torch.float32)
        if config.ln_after:
            self.norm_after = nn.LayerNorm(hidden, dtype=torch.float32)

    def forward(self, h: torch.Tensor, s: torch.Tensor | None, norm: nn.Module | None) -> torch.Tensor:
        """What stands for h, the sublayer's output, in the layer's sum. norm: that of the layer's sum."""
        config, modules = self.config, self._modules
        before: Any = modules.get("norm_before")
        x = residual = h
        if config.is_parallel:
            assert s is not None
            x = s.to(h.dtype)
        elif config.original_ln_before:
            assert s is not None
            x = (h + s).to(h.dtype)
            if norm is not None and (before is not None or not config.residual_before_ln):
                x = norm(x)
            elif norm is not None:
                before = norm
            if config.residual_before_ln is not True:
                residual = x
        after, drops = modules.get("norm_after"), self.training and config.dropout > 0.0
        if after is None and not drops:
            return self._op(x, before, residual)
        added = self._op(x, before, torch.zeros_like(x))
        if drops:
            added = F.dropout(added, config.dropout)
        if after is None:
            return residual + added
        if config.adapter_residual_before_ln and not config.is_parallel:
            return _normed(after, residual + added)
        return residual + _normed(after, added)

    def leaves(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that the `adapters` library has for them."""
        names = leaf_names(self.config)
        return {names[path]: parameter for path, parameter in self.named_parameters()}

    def _op(self, x: torch.Tensor, norm: Any, residual: torch.Tensor) -> torch.Tensor:
        p: Any = self._parameters
        return bottleneck(
            x, p["down_weight"], p["up_weight"], down_bias=p["down_bias"], up_bias=p["up_bias"],
            activation=self.config.non_linearity, scaling=float(self.config.scaling), norm=norm,
            residual=None if residual is x else residual,
        )  # fmt: skip


def leaf_names(config: BottleneckConfig) -> dict[str, str]:
    """The `adapters` library's name of each parameter of an Adapter: there, down is a Sequential of its norm,
    the linear layer and the non-linearity.
    """
    down = f"adapter_down.{int(config.ln_before)}"
    names = {
        "down_weight": f"{down}.weight",
        "down_bias": f"{down}.bias",
        "up_weight": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }
    for norm, wanted in (("norm_before", config.ln_before), ("norm_after", config.ln_after)):
        if wanted:
            names |= {f"{norm}.{leaf}": f"adapter_{norm}.{leaf}" for leaf in ("weight", "bias")}
    return names


def start(down: nn.Linear, up: nn.Linear, init: str) -> None:
    """Sets the weights that an adapter starts from; biases are zero."""
    with torch.no_grad():
        if init == "bert":
            nn.init.normal_(down.weight, std=0.02)
            nn.init.normal_(up.weight, std=0.02)
        elif init == "mam_adapter":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        else:
            nn.init.trunc_normal_(down.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.trunc_normal_(up.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.to(norm.weight.dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(
        x.dtype
    )


class Catch:
    """A forward pre-hook that keeps what a module is given, for the site behind it."""

    def __init__(self, argument: int):
        self.argument = argument
        self.wanted = False
        self.held: dict[int, torch.Tensor] = {}  # by thread: others may be in the middle of a forward

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.wanted:
            s = args[self.argument] if len(args) > self.argument else kwargs["hidden_states"]
            self.held[copies.thread()] = s

    def take(self) -> torch.Tensor | None:
        """What was kept, which is then let go."""
        return self.held.pop(copies.whose(self.held), None)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "held": {}}  # a copy starts empty


def _sums_alike(h: torch.Tensor, rows: int) -> bool:
    """Whether `rows` of h have the bits of the whole batch by themselves. On a GPU, and for a few rows of
    more, the path depends on their number: there an adapter runs over the whole batch, and gives its rows.
    """
    tokens = math.prod(h.shape[1:-1])
    return not dispatch.on_gpu(h) and not rows * tokens <= FEW_ROWS < h.shape[0] * tokens


class Bottlenecks(nn.Module):
    """The adapters of a site by name, and what its hook needs."""

    def __init__(self, site: Site, norm: nn.Module | None):
        super().__init__()
        self.site = site
        self.adapters = nn.ModuleDict()
        self.active: str | tuple[str | None, ...] | None = None
        self.catch: Catch | None = None
        self.norm = (norm,)  # in a tuple: it is the layer's, and no child of this module

    def run(self, h: torch.Tensor, s: torch.Tensor | None) -> torch.Tensor:
        """h as the active adapters change it."""
        active, norm = self.active, self.norm[0]
        adapters: Any = self._modules["adapters"]._modules  # type: ignore[union-attr]
        if not isinstance(active, tuple):
            return adapters[active](h, s, norm) if active in adapters else h
        known: dict[str | None, list[int]] = {}
        for name, rows in copies.row_groups(active, h.shape[0], "active").items():
            known.setdefault(name if name in adapters else None, []).extend(rows)
        if len(known) == 1:
            name = next(iter(known))
            return h if name is None else adapters[name](h, s, norm)
        parts = []
        for name, rows in known.items():
            index = copies.rows_at(tuple(rows), h.device)
            if name is not None and not _sums_alike(h, len(rows)):
                parts.append(adapters[name](h, s, norm).index_select(0, index))
                continue
            part = h.index_select(0, index)
            if name is not None:
                part = adapters[name](part, None if s is None else s.index_select(0, index), norm)
            parts.append(part)
        return copies.back_in_order(parts, known.values())


def after_site(module: nn.Module, args: tuple, output: Any) -> Any:
    """A site's forward hook: its output, or the first of several, as the active adapters change it."""
    held: Any = module._modules[CHILD]
    if held.active is None:
        return None
    s = None if held.catch is None else held.catch.take()
    if isinstance(output, tuple):
        return (held.run(output[0], s), *output[1:])
    return held.run(output, s)


# --- putting in and taking out ------------------------------------------------------------------------------


def put(model: nn.Module, site: Site, name: str, adapter: Adapter, source: str | None) -> None:
    """Gives a site the adapter of `name`. source: the path of the module whose input it needs, or None."""
    module = model.get_submodule(site.path)
    held: Any = module._modules.get(CHILD)
    if held is None:
        norm = None if site.norm is None else model.get_submodule(site.norm)
        held = module._modules[CHILD] = Bottlenecks(site, norm)
        held.train(module.training)
        module.register_forward_hook(after_site)
    if source is not None and held.catch is None:
        held.catch = Catch(site.argument)
        model.get_submodule(source).register_forward_pre_hook(held.catch, with_kwargs=True)
    held.adapters[name] = adapter.train(module.training)


def take(model: nn.Module, name: str) -> None:
    """Removes the adapters of `name`, which must not be active; a site without any is as it was."""
    catches: list[Catch] = []
    for module in [m for m in model.modules() if CHILD in m._modules]:
        held: Any = module._modules[CHILD]
        if name in held.adapters:
            del held.adapters[name]
        if not held.adapters:
            catches += [] if held.catch is None else [held.catch]
            del module._modules[CHILD]
            _unhook(module._forward_hooks, lambda hook: hook is after_site)
    for module in model.modules():
        for key in _unhook(module._forward_pre_hooks, lambda hook: any(hook is catch for catch in catches)):
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _unhook(hooks: Any, mine: Any) -> list[int]:
    keys = [key for key, hook in hooks.items() if mine(hook)]
    for key in keys:
        del hooks[key]
    return keys


def of(model: nn.Module) -> dict[str, Bottlenecks]:
    """What the model's sites hold, by path."""
    return {
        path.removesuffix(f".{CHILD}"): module
        for path, module in model.named_modules()
        if isinstance(module, Bottlenecks)
    }


def activate(model: nn.Module, which: str | tuple[str | None, ...] | None) -> None:
    """Sets whose adapters run: a name's, one's per row, or none's."""
    names = which if isinstance(which, tuple) else (which,)
    for held in kept(model, "bottleneck", lambda: list(of(model).values())):
        held.__dict__["active"] = which
        if held.catch is not None:
            held.catch.wanted = any(name is not None and name in held.adapters for name in names)
            held.catch.held.clear()


def tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of adapter `name`: `<site>.peft_engine_bottleneck.adapter_down.0.weight` and so on."""
    return {
        f"{path}.{CHILD}.{leaf}": parameter
        for path, held in of(model).items()
        if name in held.adapters
        for leaf, parameter in held.adapters[name].leaves().items()  # type: ignore[operator]
    }

"""The GPU suite's bottleneck adapter: forward, and forward with backward, against the same in eager torch.

bf16 activations, biases and relu; weights bf16, or float32 where a case says so. Gradients are those of x,
weights and biases. A figure is a replay: the kernels alone.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from bench import peers
from bench.gpu_sections import Sizes, off
from bench.gpu_timing import Call, Section, flat
from peft_engine import ops
from peft_engine.ops.bottleneck import Norm, reference

EAGER = "torch, eager"
PATHS = ("fused", "split")  # kernels/bottleneck/tiles.py


class Adapter(NamedTuple):
    """x and dy (M, H), and the parameters in the reference's order: down, its bias, up, its bias."""

    x: torch.Tensor
    dy: torch.Tensor
    parameters: tuple[torch.Tensor, ...]
    norm: Norm | None

    def leaves(self) -> tuple[torch.Tensor, ...]:
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        return self.x, *self.parameters, *norm


def bottleneck(section: Section, sizes: Sizes) -> None:
    shapes = itertools.product(sizes.bottleneck_rows, sizes.bottlenecks, (torch.bfloat16, torch.float32))
    for rows, (features, width, with_norm), weight in shapes:
        norm = ", LayerNorm" if with_norm else ""
        kind = "float32 weights, " if weight == torch.float32 else ""
        if not section.begin(f"H {features}, R {width}{norm}, {kind}{rows} rows"):
            continue
        given = adapter(rows, features, width, with_norm, weight, section.device)
        for what, call_of in (("forward", forward_of), ("forward and backward", step_of)):
            measure_calls(section, given, what, call_of)


def adapter(rows: int, features: int, width: int, norm: bool, weight, device: torch.device) -> Adapter:
    def leaf(*shape: int, over: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) / over).to(weight).requires_grad_()

    x, dy = (torch.randn(rows, features, dtype=torch.bfloat16, device=device) for _ in range(2))
    parameters = (
        leaf(width, features, over=features**0.5), leaf(width), leaf(features, width, over=width**0.5),
        leaf(features),
    )  # fmt: skip
    return Adapter(
        x.requires_grad_(), dy, parameters, Norm(leaf(features), leaf(features), 1e-5) if norm else None
    )


def measure_calls(section: Section, given: Adapter, what: str, call_of: Callable) -> None:
    exact = call_of(widened(given), by_reference)()
    errors: dict[str, float] = {}

    def check(name: str, call: Call) -> None:
        errors[name] = max(off(got, right) for got, right in zip(call(), exact, strict=True))

    makers = {
        peers.OURS: partial(call_of, given, by_ours),
        **{f"{peers.OURS}, {path}": partial(call_of, given, partial(by_ours, path=path)) for path in PATHS},
        EAGER: partial(call_of, given, by_reference),
    }
    replays = section.capture(section.make(makers, check))
    for name, rounds in section.interleave(replays, turn_seconds=0.005).items():
        section.add(name, what, "us", (s * 1e6 for s in flat(rounds)), f"error {errors[name]:.1e}")


def widened(given: Adapter) -> Adapter:
    x, *parameters = (t.detach().float().requires_grad_() for t in (given.x, *given.parameters))
    norm = given.norm and Norm(*(t.detach().float().requires_grad_() for t in given.norm[:2]), given.norm.eps)
    return Adapter(x, given.dy.float(), tuple(parameters), norm)


def by_ours(given: Adapter, path: str | None = None) -> torch.Tensor:
    down, down_bias, up, up_bias = given.parameters
    with pinned_path(path):
        return ops.bottleneck(given.x, down, up, down_bias=down_bias, up_bias=up_bias, norm=given.norm)


def by_reference(given: Adapter) -> torch.Tensor:
    """As people write it: the norm in x's dtype where its weights are."""
    if given.norm is None or given.norm.weight.dtype != given.x.dtype:
        return reference(given.x, None, *given.parameters, given.norm, "relu", 1.0)
    z = F.layer_norm(given.x, given.x.shape[-1:], *given.norm)
    return reference(z, given.x, *given.parameters, None, "relu", 1.0)


def pinned_path(path: str | None) -> Any:
    """The context in which the op takes this path (None: the one it chooses)."""
    if path is None:
        return nullcontext()
    from peft_engine.kernels.bottleneck import tiles

    return tiles.pinned(path)


def forward_of(given: Adapter, run: Callable[[Adapter], torch.Tensor]) -> Call:
    @torch.no_grad()
    def call() -> tuple[torch.Tensor]:
        return (run(given),)

    return call


def step_of(given: Adapter, run: Callable[[Adapter], torch.Tensor]) -> Call:
    """y and the gradients; the backward takes the path inside which its forward was made, or its own."""

    def call() -> tuple[torch.Tensor, ...]:
        path = getattr(run, "keywords", {}).get("path")
        with pinned_path(path):
            y = run(given)
            return y.detach(), *torch.autograd.grad(y, given.leaves(), given.dy)

    return call

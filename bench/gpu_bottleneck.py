"""The GPU suite's bottleneck adapter: forward, and forward with backward, against the same in eager torch.

bf16 activations, biases and relu; weights bf16, or float32 where a case says so. Gradients are those of x,
weights and biases. A figure is a call's share of a replay, the kernels alone, of a graph that goes through
copies of all tensors, as a model goes through its layers: four times the L2, but MOST at most, which leaves
what few rows read of small adapters in the L2.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from bench import peers
from bench.gpu_sections import Sizes, off, pinned_backend, rotated, rotation
from bench.gpu_timing import Call, Missing, Section, flat
from peft_engine import ops
from peft_engine.ops.bottleneck import Norm, reference

EAGER = "torch, eager"
PATHS = ("fused", "split")  # kernels/bottleneck/tiles.py
FEW = "few rows"  # kernels/bottleneck/few_rows.py
MOST = 48


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
    both = torch.bfloat16, torch.float32
    many = itertools.product(sizes.bottleneck_rows, sizes.bottlenecks, both)
    few = itertools.product(sizes.bottleneck_few_rows, sizes.bottlenecks, both[:1])
    for rows, (features, width, with_norm), weight in (*few, *many):
        norm = ", LayerNorm" if with_norm else ""
        kind = "float32 weights, " if weight == torch.float32 else ""
        if not section.begin(f"H {features}, R {width}{norm}, {kind}{rows} rows"):
            continue
        first = adapter(rows, features, width, with_norm, weight, section.device)
        copies = min(MOST, rotation(sum(t.nbytes for t in (first.dy, *first.leaves())), section.device))
        given = [first, *(copy_of(first) for _ in range(copies - 1))]
        measure_calls(section, given, "forward", forward_of)
        if rows not in sizes.bottleneck_few_rows:
            measure_calls(section, given, "forward and backward", step_of)


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


def copy_of(given: Adapter) -> Adapter:
    x, *parameters = (t.detach().clone().requires_grad_() for t in (given.x, *given.parameters))
    norm = given.norm and Norm(*(t.detach().clone().requires_grad_() for t in given.norm[:2]), given.norm.eps)
    return Adapter(x, given.dy.clone(), tuple(parameters), norm)


def measure_calls(section: Section, given: list[Adapter], what: str, call_of: Callable) -> None:
    exact = call_of(widened(given[0]), by_reference)()
    errors: dict[str, float] = {}

    def check(name: str, call: Call) -> None:
        errors[name] = max(off(got, right) for got, right in zip(call()[0], exact, strict=True))

    def each(run: Callable[[Adapter], torch.Tensor]) -> Call:
        return rotated([call_of(one, run) for one in given])

    makers: dict[str, Callable[[], Call]] = {
        peers.OURS: partial(each, by_ours),
        **{f"{peers.OURS}, {path}": partial(each, partial(by_ours, path=path)) for path in PATHS},
        EAGER: partial(each, by_reference),
    }
    if call_of is forward_of and given[0].x.shape[0] <= 16:  # it has no backward
        makers[f"{peers.OURS}, {FEW}"] = lambda: (pinned_few(given[0]), each(partial(by_ours, path=FEW)))[1]
    replays = section.capture(section.make(makers, check))
    for name, rounds in section.interleave(replays, turn_seconds=0.005).items():
        seconds = (s * 1e6 / len(given) for s in flat(rounds))
        section.add(name, what, "us", seconds, f"error {errors[name]:.1e}")


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
    if path == FEW:
        return pinned_backend("cuda")
    from peft_engine.kernels.bottleneck import tiles

    return tiles.pinned(path)


def pinned_few(given: Adapter) -> None:
    """Missing where the CUDA kernel of few rows would not run: backend "cuda" has Triton's for the rest."""
    pinned_backend("cuda")
    from peft_engine.kernels.bottleneck import few_rows

    why = few_rows.refuse_sizes(*given.x.shape, given.parameters[0].shape[0])
    if why is not None:
        raise Missing(f"refused: {why}")


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

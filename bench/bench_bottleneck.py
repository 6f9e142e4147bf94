"""bottleneck against the eager composition, and against its six products alone: the floor.

python -m bench.runner bottleneck
python -m pytest bench/bench_bottleneck.py --benchmark-only
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional as F

from bench import measure
from peft_engine import native
from peft_engine.ops import bottleneck
from peft_engine.ops.bottleneck import ACTIVATIONS

WIDTH = 64
Contenders = dict[str, Callable[[], object]]


def eager(x, down, up, down_bias, up_bias) -> torch.Tensor:
    """As `adapters` has it, for Pfeiffer's configuration."""
    return x + F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)


def ours(x, down, up, down_bias, up_bias) -> torch.Tensor:
    return bottleneck(x, down, up, down_bias=down_bias, up_bias=up_bias)


def inputs(rows: int, features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x and the adapter's parameters, all of which get gradients."""
    shapes = ((rows, features), (WIDTH, features), (features, WIDTH), (WIDTH,), (features,))
    factors = (1.0, features**-0.5, WIDTH**-0.5, 1.0, 1.0)
    pairs = zip(shapes, factors, strict=True)
    return [(torch.randn(shape) * factor).to(dtype).requires_grad_() for shape, factor in pairs]


def products(tensors: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], object]:
    """The six matrix products of a forward and backward, and nothing else."""
    x, down, up = (t.detach() for t in tensors[:3])
    a = torch.randn(x.shape[0], WIDTH).to(x.dtype)
    return lambda: (x @ down.t(), a @ up.t(), dy @ up, dy.t() @ a, a @ down, a.t() @ x)


def kernels(tensors: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], object]:
    """The op's two calls of its kernels without autograd: like for like with the products alone."""
    x, down, up, down_bias, up_bias = (t.detach() for t in tensors)
    relu = list(ACTIVATIONS).index("relu")
    settings = (down, down_bias, up, up_bias, None, None, relu, 1.0)
    wanted = [True] * 5 + [False] * 2

    def call() -> object:
        _, middle, stats = torch.ops.peft_engine.bottleneck_forward(x, None, *settings, 0.0)
        return torch.ops.peft_engine.bottleneck_backward(dy, x, middle, stats, *settings, True, wanted)

    return call


def step(
    op: Callable[..., torch.Tensor], tensors: list[torch.Tensor], dy: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(op(*tensors), tensors, dy)


def contenders(rows: int, features: int, dtype: torch.dtype) -> Contenders:
    tensors = inputs(rows, features, dtype)
    dy = torch.randn(rows, features).to(dtype)
    calls = {"peft-engine": step(ours, tensors, dy), "eager": step(eager, tensors, dy)}
    if native.load_error() is None:
        calls["peft-engine, kernels alone"] = kernels(tensors, dy)
    return calls | {"products alone": products(tensors, dy)}


def forwards(features: int, dtype: torch.dtype, adapter_dtype: torch.dtype) -> Contenders:
    """A row without gradients, as in decoding, through an adapter of x's dtype or float32."""
    x, *adapter = (t.detach() for t in inputs(1, features, dtype))
    adapter = [t.to(adapter_dtype) for t in adapter]

    def without_gradient(op: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return op(x, *adapter)

        return call

    def eager_of(x: torch.Tensor, *adapter: torch.Tensor) -> torch.Tensor:
        return eager(x.to(adapter_dtype), *adapter).to(dtype)

    return {"peft-engine": without_gradient(ours), "eager": without_gradient(eager_of)}


def layer(settings: measure.Settings) -> Iterator[measure.Row]:
    """Forward and backward, every gradient, and a row's forward alone; width 64."""
    few = (64,) if settings.quick else (576, 1024, 2048, 4096)
    half, full = torch.bfloat16, torch.float32
    for features in few:
        for dtype, adapter_dtype in ((full, full), (half, full), (half, half)):
            calls = forwards(features, dtype, adapter_dtype)
            case = f"{_name(dtype)}, adapter in {_name(adapter_dtype)}, {features} features, 1 row"
            for name, seconds in measure.interleave(calls, settings.rounds).items():
                yield measure.row(case, name, "forward", "us", (s * 1e6 for s in seconds))
    for dtype in (torch.float32, torch.bfloat16):
        for features in (64,) if settings.quick else (576, 1024, 2048, 4096):
            for rows in (16,) if settings.quick else (1, 16, 512):
                calls = contenders(rows, features, dtype)
                # Where torch has no bf16 product, its calls take seconds: turns enough for a median.
                rounds = settings.rounds if dtype == torch.float32 else min(settings.rounds, 5)
                for name, seconds in measure.interleave(calls, rounds).items():
                    case = f"{_name(dtype)}, {features} features, {rows} rows"
                    yield measure.row(case, name, "forward and backward", "ms", (s * 1e3 for s in seconds))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("side", ["peft-engine", "eager", "products alone"])
@pytest.mark.parametrize("rows", [16, 512])
def test_bottleneck(benchmark, rows, side):
    benchmark(contenders(rows, 576, torch.float32)[side])

"""experts over the Triton kernels of its parts, one expert after another, by the rule of twice."""

import pytest
import torch
from accuracy import assert_twice_as_good

from peft_engine import dispatch
from peft_engine.ops.experts import Lora, _kernels, reference
from peft_engine.ops.nf4 import NF4Tensor, nf4_quantize

INDEX = torch.rand(31, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :2]


def run(function, x, weights, up, down, adapters, dy):
    x, weights, *adapters = (t.detach().requires_grad_() for t in (x, weights, *adapters))
    loras = Lora(*adapters[:2], 2.0), Lora(*adapters[2:], 2.0)
    y = function(x, INDEX.to(x.device), weights, up, down, "silu", *loras)
    return (y.detach(), *torch.autograd.grad(y, (x, weights, *adapters), dy))


def double(weight):
    exact = weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else weight
    return exact.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_output_and_gradients_are_within_twice_the_reference_error(device, monkeypatch, base, dtype):
    x, weights, dy = torch.randn(31, 64).to(dtype), torch.rand(31, 2).to(dtype), torch.randn(31, 64).to(dtype)
    up, down = ((torch.randn(shape) / 8).to(dtype) for shape in ((4, 64, 64), (4, 64, 32)))
    if base == "nf4":
        up, down = nf4_quantize(up), nf4_quantize(down)
    shapes = (4, 3, 64), (4, 64, 3), (4, 3, 32), (4, 64, 3)
    adapters = [torch.randn(shape) / shape[2] ** 0.5 / 2 for shape in shapes]
    plain = run(reference, x, weights, up, down, adapters, dy)
    wide = [t.double() for t in adapters]
    exact = run(reference, x.double(), weights.double(), double(up), double(down), wide, dy.double())
    if device == "cpu":
        monkeypatch.setattr(dispatch, "on_gpu", lambda t: True)
    moved = [t.to(device) for t in (x, weights, up, down)]
    got = run(_kernels, *moved, [t.to(device) for t in adapters], dy.to(device))
    for results in zip(got, plain, exact, strict=True):
        assert_twice_as_good(results[0].cpu(), *results[1:], what=f"{base} {dtype}")

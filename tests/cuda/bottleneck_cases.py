"""Calls of pe_bottleneck_forward, checked by the accuracy rule; its counters, and what it does twice."""

import functools

import cuda_on_cpu
import torch
from accuracy import assert_twice_as_good
from cuda_cases import TYPE_CODES, blank, same_bits
from peft_engine.kernels.bottleneck.few_rows import ACTIVATION_CODES
from torch.nn import functional as F

from peft_engine.ops.bottleneck import Norm, reference

WORDS = (64 + 16 * 512 * 4) // 4  # kWorkspaceBytes in bottleneck.cu
COUNTERS = 3
EPS = 1e-5


@functools.cache
def kernels() -> cuda_on_cpu.Library:
    """Of csrc/cuda only this op."""
    sources = [path for path in cuda_on_cpu.sources() if path.stem == "bottleneck"]
    return cuda_on_cpu.Library(cuda_on_cpu.build(sources, "library", level="-O1"))


def workspace() -> torch.Tensor:
    """Scratch of the size that is asked for: counters, and NaN."""
    scratch = blank(WORDS)
    scratch[:16] = 0
    return scratch


def operands(
    rows, features, width, dtype, *, weight=None, norm=None, norm_bias=True, biases=True, residual=False,
    magnitude=1.0, shift=0,
):  # fmt: skip
    """x, residual, the weights and biases and the norm's, in the op's order, `shift` elements before each."""
    weight = weight or dtype

    def made(*shape: int, over: float = 1.0, times: float = 1.0, dtype=weight) -> torch.Tensor:
        values = torch.randn(*shape) * times / over
        memory = blank(shift + values.numel(), dtype=dtype)
        return memory[shift:].copy_(values.flatten()).view(shape)

    return (
        made(rows, features, times=magnitude, dtype=dtype),
        made(rows, features, times=magnitude, dtype=dtype) if residual else None,
        made(width, features, over=features**0.5),
        made(width) if biases else None,
        made(features, width, over=width**0.5),
        made(features) if biases else None,
        made(features, dtype=norm) if norm else None,
        made(features, dtype=norm) if norm and norm_bias else None,
    )


def call_of(given, activation, scaling, y, middle, stats, scratch) -> tuple:
    x, residual, down, down_bias, up, up_bias, norm_weight, norm_bias = given
    norm_code = 0 if norm_weight is None else TYPE_CODES[norm_weight.dtype]
    return (
        "pe_bottleneck_forward", x, x if residual is None else residual, *x.shape, down, down_bias, up,
        up_bias, down.shape[0], norm_weight, norm_bias, EPS, ACTIVATION_CODES[activation], float(scaling),
        TYPE_CODES[x.dtype], TYPE_CODES[down.dtype], norm_code, y, middle, stats, scratch, 0, 0,
    )  # fmt: skip


def expected(given, activation, scaling):
    """y, the middle and the statistics, in the operands' dtype."""
    x, residual, down, down_bias, up, up_bias, norm_weight, norm_bias = given
    norm = None if norm_weight is None else Norm(norm_weight, norm_bias, EPS)
    y = reference(x, residual, down, down_bias, up, up_bias, norm, activation, scaling)
    z, wide = x, x if x.dtype == torch.float64 else x.float()
    if norm is not None:
        parameters = (t if t is None else t.to(wide.dtype) for t in norm[:2])
        z = F.layer_norm(wide, wide.shape[-1:], *parameters, EPS)
    stats = (wide.mean(-1), ((wide - wide.mean(-1, keepdim=True)).square().mean(-1) + EPS).rsqrt())
    return y, F.linear(z.to(down.dtype), down, down_bias), torch.stack(stats, 1)


def check(
    target, rows, features, width, dtype, *, activation="gelu", scaling=0.7, times=1, given=None, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the middle of one call, or of `times` with one workspace."""
    names = ("weight", "norm", "norm_bias", "biases", "residual", "magnitude", "shift")
    options = {name: settings.pop(name) for name in names if name in settings}
    given = given or operands(rows, features, width, dtype, **options)
    x, down, normed = given[0], given[2], given[6] is not None
    y, middle = blank(rows, features, dtype=dtype), blank(rows, width, dtype=down.dtype)
    stats, scratch = blank(rows if normed else 0, 2), workspace()
    call = call_of(given, activation, scaling, y, middle, stats, scratch)
    what = (rows, features, width, dtype, activation, options, settings)
    before = None
    for _ in range(times):
        y.fill_(float("nan"))
        target.run(call, **settings)
        assert not scratch[:COUNTERS].view(torch.int32).any(), f"counters are not as they were found: {what}"
        assert before is None or same_bits(y, before), f"another result the second time: {what}"
        before = y.clone()
    exact = expected([None if t is None else t.double() for t in given], activation, scaling)
    plain = expected(given, activation, scaling)
    terms = F.linear(x.double().abs(), down.double().abs())
    assert_twice_as_good(middle, plain[1], exact[1], None if normed else terms, f"middle of {what}")
    assert_twice_as_good(y, plain[0], exact[0], what=f"y of {what}")
    if normed:
        assert_twice_as_good(stats, plain[2], exact[2], what=f"statistics of {what}")
    return y, middle

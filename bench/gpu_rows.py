"""The GPU suite's ops of one pass over rows: rms_norm, swiglu, rotary; forward and backward against peers.

bf16, frozen norm weights, as training an adapter has them. A figure is a replay: the kernels alone. The bytes
are those that must move: each input read and each result written once.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from bench import gpu_peers, peers
from bench.gpu_sections import Sizes, off
from bench.gpu_timing import Call, Missing, Section, flat
from peft_engine.ops.rms_norm import rms_norm
from peft_engine.ops.rotary import rotary
from peft_engine.ops.swiglu import swiglu

EAGER, COMPILED = "torch, eager", "torch.compile"
EPS = 1e-6
REFERENCES: dict[str, Callable] = {
    name: importlib.import_module(f"peft_engine.ops.{name}").reference
    for name in ("rms_norm", "swiglu", "rotary")
}


class Case(NamedTuple):
    """An op's inputs, which of them ask for gradients, the gradients of its outputs, and the bytes moved."""

    op: str
    inputs: tuple[torch.Tensor, ...]
    leaves: tuple[torch.Tensor, ...]
    douts: tuple[torch.Tensor, ...]
    nbytes: int


def row_ops(section: Section, sizes: Sizes) -> None:
    """Each op at the sizes of a model's layer."""
    for rows in sizes.row_ops:
        for name, make in (("rms_norm", norm_case), ("swiglu", swiglu_case), ("rotary", rotary_case)):
            what, given = make(rows, sizes, section.device)
            if section.begin(f"{name}, {what}"):
                measure_op(section, given)
            del given


def norm_case(rows: int, sizes: Sizes, device: torch.device) -> tuple[str, Case]:
    n = sizes.row_hidden
    x, dy, weight = (
        torch.randn(s, dtype=torch.bfloat16, device=device) for s in ((rows, n), (rows, n), (n,))
    )
    x.requires_grad_()
    return f"{rows}x{n}", Case("rms_norm", (x, weight), (x,), (dy,), 5 * x.nbytes)


def swiglu_case(rows: int, sizes: Sizes, device: torch.device) -> tuple[str, Case]:
    n = sizes.row_intermediate
    gate, up, dy = (torch.randn(rows, n, dtype=torch.bfloat16, device=device) for _ in range(3))
    leaves = gate.requires_grad_(), up.requires_grad_()
    return f"{rows}x{n}", Case("swiglu", leaves, leaves, (dy,), 8 * gate.nbytes)


def rotary_case(rows: int, sizes: Sizes, device: torch.device) -> tuple[str, Case]:
    heads_q, heads_k, head_dim = sizes.prefix_heads

    def by_token(heads: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, head_dim, dtype=torch.bfloat16, device=device)

    q, k, dq, dk = (by_token(heads) for heads in (heads_q, heads_k, heads_q, heads_k))
    cos, sin = (torch.randn(1, rows, head_dim, dtype=torch.bfloat16, device=device) for _ in range(2))
    leaves = q.requires_grad_(), k.requires_grad_()
    given = tuple(t.transpose(1, 2) for t in leaves)
    douts = dq.transpose(1, 2), dk.transpose(1, 2)
    what = f"{rows} tokens, {heads_q} and {heads_k} heads of {head_dim}"
    return what, Case("rotary", (*given, cos, sin), leaves, douts, 4 * (q.nbytes + k.nbytes))


def ours(op: str) -> Callable:
    return {"rms_norm": partial(rms_norm, eps=EPS), "swiglu": swiglu, "rotary": rotary}[op]


def in_torch(op: str) -> Callable:
    return partial(REFERENCES[op], eps=EPS, offset=0.0) if op == "rms_norm" else REFERENCES[op]


def compiled(given: Case) -> Callable:
    """torch.compile of the same lines, for the sizes that come."""
    if not given.inputs[0].is_cuda:
        raise Missing("compiled on a GPU only")
    return torch.compile(in_torch(given.op), dynamic=False)


def liger(given: Case) -> Callable:
    """Liger's autograd function; of swiglu and rotary it writes gradients in place of what it was given."""
    gpu_peers.need("liger_kernel")
    file, name = {
        "rms_norm": ("rms_norm", "LigerRMSNormFunction"), "swiglu": ("swiglu", "LigerSiLUMulFunction"),
        "rotary": ("rope", "LigerRopeFunction"),
    }[given.op]  # fmt: skip
    run: Any = getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name).apply
    return (lambda x, w: run(x, w, EPS, 0.0, "llama", False)) if given.op == "rms_norm" else run


def step_of(given: Case, make: Callable[[], Callable]) -> Call:
    run = make()

    def step() -> tuple[torch.Tensor, ...]:
        out = run(*given.inputs)
        outs = out if isinstance(out, tuple) else (out,)
        return *(t.detach() for t in outs), *torch.autograd.grad(outs, given.leaves, given.douts)

    return step


def exact_step(given: Case) -> tuple[torch.Tensor, ...]:
    """The results in float32."""
    inputs = tuple(t.detach().float().requires_grad_() for t in given.inputs)
    out = in_torch(given.op)(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    grads = torch.autograd.grad(outs, inputs[: len(given.leaves)], tuple(t.float() for t in given.douts))
    if given.op == "rotary":  # of the tensors by token
        grads = tuple(g.transpose(1, 2) for g in grads)
    return *(t.detach() for t in outs), *grads


def measure_op(section: Section, given: Case) -> None:
    exact = exact_step(given)

    def check(name: str, call: Call) -> None:
        if name != gpu_peers.LIGER:  # whose second call has other inputs
            for got, right in zip(call(), exact, strict=True):
                off(got, right)

    makers = {
        peers.OURS: partial(step_of, given, partial(ours, given.op)),
        EAGER: partial(step_of, given, partial(in_torch, given.op)),
        COMPILED: partial(step_of, given, partial(compiled, given)),
        gpu_peers.LIGER: partial(step_of, given, partial(liger, given)),
    }
    replays = section.capture(section.make(makers, check))
    for name, rounds in section.interleave(replays, turn_seconds=0.005).items():
        seconds = flat(rounds)
        section.add(name, "forward and backward", "us", (s * 1e6 for s in seconds))
        section.add(
            name, "of the copy", "%", (100 * given.nbytes / s / section.copy_bandwidth for s in seconds)
        )

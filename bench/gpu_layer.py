"""The GPU suite's QLoRA layer: forward and backward at training sizes, r=16, ours against the peers' best.

Two times: `eager`, calls one after another as a training loop makes them (with few rows that is the time
Python takes), and `graph`, the replay of the same call, which is the kernels alone. Gradients are those of
x, A and B, handed over, not added up. NF4 with double quantisation, bf16 activations, float32 masters
unless a name says otherwise. "padded input": x and dy have spare columns, given by whoever writes them;
"plain input": the copy they cost otherwise is counted.
"""

import itertools
import statistics
from functools import partial

import torch

from bench import gpu_peers, measure, peers
from bench.gpu_peers import Layer, Step
from bench.gpu_sections import Sizes, off, peak_bytes, pinned_path
from bench.gpu_timing import Call, Rounds, Section, flat, ratios
from peft_engine import ops
from peft_engine.ops.nf4 import reference_dequantize

PADDED, PLAIN = f"{peers.OURS}, padded input", f"{peers.OURS}, plain input"
PADDED_BF16 = f"{peers.OURS}, padded input, bf16 adapters"
SINGLE = f"{peers.OURS}, single kernel"
OURS = (PADDED, PLAIN, PADDED_BF16)
# What ours is compared with: the fastest of each group.
PEERS = {
    peers.PEFT_BNB: tuple(gpu_peers.PEFT.values()),
    gpu_peers.BY_HAND: (gpu_peers.BY_HAND, gpu_peers.BY_HAND_H_KEPT, gpu_peers.UNSLOTH),
}


def layer(section: Section, sizes: Sizes) -> None:
    device, rank = section.device, peers.RANK
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=device)
    for rows, (n, k) in itertools.product(sizes.layer_rows, sizes.layers):
        case = f"{n}x{k}, r={rank}, {rows} rows"
        if not section.begin(case):
            continue
        given = Layer(
            weight=bf16(n, k) / k**0.5, x=bf16(rows, k).requires_grad_(), dy=bf16(rows, n),
            lora_a=torch.randn(rank, k, device=device) / k**0.5,
            lora_b=torch.randn(n, rank, device=device) / 8, scaling=peers.ALPHA / rank,
        )  # fmt: skip
        measure_layer(section, given)


def makers_of(given: Layer) -> dict[str, partial[Step]]:
    kinds = {name: partial(gpu_peers.peft_step, given, kind) for kind, name in gpu_peers.PEFT.items()}
    return {
        PADDED: partial(our_step, given, padded=True),
        PLAIN: partial(our_step, given, padded=False),
        PADDED_BF16: partial(our_step, given, padded=True, adapter=torch.bfloat16),
        SINGLE: partial(our_step, given, padded=False, path="single"),
        **kinds,
        gpu_peers.BY_HAND: partial(gpu_peers.hand_written_step, given, keep_h=False),
        gpu_peers.BY_HAND_H_KEPT: partial(gpu_peers.hand_written_step, given, keep_h=True),
        gpu_peers.UNSLOTH: partial(gpu_peers.unsloth_step, given),
    }


def our_step(
    given: Layer, *, padded: bool, path: str | None = None, adapter: torch.dtype = torch.float32
) -> Step:
    """lora_linear by this path (None: the one it chooses), on x and dy with spare columns or without."""
    q = ops.nf4_quantize(given.weight, double_quant=True)
    a, b = (t.to(adapter, copy=True).requires_grad_() for t in (given.lora_a, given.lora_b))
    x, dy = given.x, given.dy
    if padded:
        from peft_engine.activations import padded_empty

        def room(like: torch.Tensor) -> torch.Tensor:
            made = padded_empty(*like.shape, a.shape[0], like.dtype, like.device, adapter_dtype=adapter)
            return made.copy_(like.detach())

        x, dy = room(x).requires_grad_(), room(dy)

    def step() -> tuple[torch.Tensor, ...]:
        with pinned_path(path):
            y = ops.lora_linear(x, q, a, b, given.scaling)
            return y.detach(), *torch.autograd.grad(y, (x, a, b), dy)

    return step


def exact_step(given: Layer) -> tuple[torch.Tensor, ...]:
    """y, dx, dA and dB in float32, from the weight that the 4 bits stand for."""
    w = reference_dequantize(ops.nf4_quantize(given.weight, double_quant=True), torch.float32)
    x, dy, a, b, s = given.x.detach().float(), given.dy.float(), given.lora_a, given.lora_b, given.scaling
    h, dh = x @ a.t(), s * dy @ b
    return x @ w.t() + s * h @ b.t(), dy @ w + dh @ a, dh.t() @ x, s * dy.t() @ h


def check(exact: tuple[torch.Tensor, ...], errors: dict[str, float], name: str, call: Call) -> None:
    """The largest of the errors of y, dx, dA and dB, kept; ValueError where one is no rounding."""
    errors[name] = max(off(got, right) for got, right in zip(call(), exact, strict=True))


def measure_layer(section: Section, given: Layer) -> None:
    errors: dict[str, float] = {}
    calls = section.make(makers_of(given), partial(check, exact_step(given), errors))
    if section.device.type == "cuda":
        for name, call in calls.items():
            # the buffer by hand is there before the call; the others ask for theirs within it
            held = given.weight.nbytes if name in (gpu_peers.BY_HAND, gpu_peers.BY_HAND_H_KEPT) else 0
            section.add(name, "peak over inputs", "MiB", [(peak_bytes(call, section.device) + held) / 2**20])
    for mode in ("eager", "graph"):
        timed = calls if mode == "eager" else section.capture(calls)
        samples = section.interleave(timed, turn_seconds=0.01)
        for name, rounds in samples.items():
            micros = (s * 1e6 for s in flat(rounds))
            section.add(name, f"forward and backward, {mode}", "us", micros, f"error {errors[name]:.1e}")
        section.rows += speedups(section.case, mode, samples)


def speedups(case: str, mode: str, samples: dict[str, Rounds]) -> list[measure.Row]:
    """How many times faster ours is than the fastest of each group of peers."""
    rows = []
    for group, members in PEERS.items():
        there = {name: statistics.median(flat(samples[name])) for name in members if name in samples}
        if not there:
            continue
        best = min(there, key=lambda name: there[name])
        for name in OURS:
            if name in samples:
                times = ratios(samples[best], samples[name])
                rows.append(measure.row(case, name, f"over {group}, {mode}", "x", times, f"its best: {best}"))
    return rows

"""The GPU suite's sections but layer and prefix: ceilings, dequantise, few rows, linear cross-entropy.

Weights are rotated: a graph goes through as many copies as are four times the L2, so that each call reads its
bytes from memory, as the layers of a model do. A figure is one call's share of a replay.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from bench import gpu_peers, measure, peers
from bench.gpu_timing import Call, Missing, Section, flat, synchronize
from peft_engine import dispatch, ops
from peft_engine.ops.nf4 import reference_dequantize

OURS = peers.OURS
COPY = "copy of as many bytes"
# A result further from float32's than this is wrong: rounding leaves bf16 products of any size near 0.003.
WRONG = 0.02


@dataclass(frozen=True)
class Sizes:
    """What is measured; the tests take tiny ones."""

    copied_bytes: tuple[int, ...] = (1_000_000_000, 2_000_000_000, 4_000_000_000, 8_000_000_000)
    product: int = 8192
    dequantise: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336))
    products: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
    few_rows: tuple[int, ...] = (1, 8, 2, 4, 16, 32, 64, 128, 256)
    layers: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))  # (N, K)
    layer_rows: tuple[int, ...] = (2048, 8192, 512)
    head: tuple[int, int, int] = (4096, 128_256, 4096)  # rows, vocabulary, hidden
    prefix_heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, head_dim
    prefix_training: tuple[tuple[int, int, int], ...] = (
        (8, 2048, 32),
        (2, 8192, 128),
    )  # batch, tokens, prefix
    capped_heads: tuple[int, int, int] = (16, 8, 256)  # Gemma 2 (9B)
    capped_training: tuple[tuple[int, int, int], ...] = ((1, 4096, 32),)
    bottlenecks: tuple[tuple[int, int, bool], ...] = (
        (4096, 64, False), (4096, 64, True), (576, 64, False), (2048, 128, False), (4096, 256, False),
    )  # features, width, LayerNorm  # fmt: skip
    bottleneck_rows: tuple[int, ...] = (2048, 8192, 512)
    bottleneck_few_rows: tuple[int, ...] = (1, 4, 16)
    decode_heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, head_dim
    decode_batch: tuple[int, ...] = (1, 8, 32)
    decode_keys: tuple[int, ...] = (512, 2048, 8192)
    decode_prefix: tuple[int, ...] = (32, 128)
    row_ops: tuple[int, ...] = (8192, 2048)  # rows
    row_hidden: int = 4096
    row_intermediate: int = 14336
    step_layers: int = 4
    step_tokens: tuple[tuple[int, int], ...] = ((1, 2048), (4, 2048))  # batch, tokens of each


# --- ceilings --------------------------------------------------------------------------------------------


def ceilings(section: Section, sizes: Sizes) -> None:
    """What this GPU reaches with one plain copy, and with one large product on random data."""
    device = section.device
    for total in sizes.copied_bytes:
        case = f"{total / 1e9:g} GB read and written"
        if not section.begin(case):
            break
        calls = section.make({"torch copy": partial(copier, total, device)})
        for name, rounds in section.interleave(calls, turn_seconds=0.01).items():
            section.add(name, "bandwidth", "GB/s", (total / s / 1e9 for s in flat(rounds)))
    n = sizes.product
    case = f"{n}x{n}x{n} bf16"
    if section.begin(case):
        calls = section.make({"torch product": partial(dense_product, n, device)})
        for name, rounds in section.interleave(calls, turn_seconds=0.02).items():
            section.add(name, "rate", "TFLOP/s", (2 * n**3 / s / 1e12 for s in flat(rounds)))


def copier(total: int, device: torch.device) -> Call:
    """A copy that reads and writes `total` bytes together."""
    source = torch.randint(0, 256, (total // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copiers(count: int, total: int, device: torch.device) -> Call:
    return rotated([copier(total, device) for _ in range(count)])


def dense_product(n: int, device: torch.device) -> Call:
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def copy_bandwidth(section: Section, sizes: Sizes) -> float:
    """Bytes a second of the best copy, as the section `ceilings` wrote it, or measured now."""
    path = section.folder / "gpu_ceilings.csv"
    if not path.exists():
        ceilings(found := Section("gpu_ceilings", section.device, section.folder), sizes)
        found.finish()
    rates = (r.median * 1e9 for r in measure.read_csv(path) if r.metric == "bandwidth" and r.samples)
    return max(rates, default=float("nan"))


# --- dequantise ------------------------------------------------------------------------------------------


def rotation(size: int, device: torch.device) -> int:
    """How many copies of `size` bytes are four times the L2."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return max(2, math.ceil(4 * l2 / size))


def clones(q: ops.NF4Tensor, count: int) -> list[ops.NF4Tensor]:
    return [q, *(q.to(q.device) for _ in range(count - 1))]


def pinned_backend(name: str) -> Any:
    """force_backend(name); Missing where it cannot run here."""
    why = dispatch.available_backends()[name]
    if why is not None:
        raise Missing(f"not available: {why}")
    return dispatch.force_backend(name)


def dequantise(section: Section, sizes: Sizes) -> None:
    """NF4 with double quantisation to bf16, GB/s in bytes moved, and that as a share of the copy's."""
    device = section.device
    for n, k in sizes.dequantise:
        case = f"{n}x{k}, double quantisation"
        if not section.begin(case):
            continue
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
        q = ops.nf4_quantize(weight, double_quant=True)
        total = q.nbytes + 2 * n * k
        qs = clones(q, rotation(total, device))
        outs = [torch.full_like(weight, float("nan")) for _ in qs]
        exact = reference_dequantize(q, torch.bfloat16)
        makers = {
            OURS: partial(our_dequantise, None, qs, outs),
            f"{OURS}, Triton": partial(our_dequantise, "triton", qs, outs),
            f"{OURS}, CUDA": partial(our_dequantise, "cuda", qs, outs),
            "bitsandbytes": partial(bnb_dequantise, qs, outs),
            COPY: partial(copiers, len(qs), total, device),
        }

        def check(name: str, call: Call, outs=outs, exact=exact) -> None:
            wrong = [i for i, out in enumerate(outs) if name != COPY and not torch.equal(out, exact)]
            for out in outs:
                out.fill_(float("nan"))
            if wrong:
                raise ValueError("the weight is not the reference's, bit for bit")

        replays = section.capture(section.make(makers, check))
        for name, rounds in section.interleave(replays).items():
            seconds = [s / len(qs) for s in flat(rounds)]
            section.add(name, "bytes moved", "GB/s", (total / s / 1e9 for s in seconds))
            section.add(name, "of the copy", "%", (100 * total / s / section.copy_bandwidth for s in seconds))
            section.add(name, "time", "us", (s * 1e6 for s in seconds))


def rotated(calls: list[Call]) -> Call:
    return lambda: [call() for call in calls]


def our_dequantise(backend: str | None, qs: list[ops.NF4Tensor], outs: list[torch.Tensor]) -> Call:
    if backend is not None:
        pinned_backend(backend)

    def call() -> None:
        with nullcontext() if backend is None else dispatch.force_backend(backend):
            for q, out in zip(qs, outs, strict=True):
                ops.nf4_dequantize(q, out=out)

    return call


def bnb_dequantise(qs: list[ops.NF4Tensor], outs: list[torch.Tensor]) -> Call:
    writers = [gpu_peers.dequantizer(q) for q in qs]
    return lambda: [write(out) for write, out in zip(writers, outs, strict=True)]


# --- few rows --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewRows:
    """Copies of one weight, in NF4 and dense, with an adapter each or none; the input of one product."""

    x: torch.Tensor
    nf4: list[ops.NF4Tensor]
    dense: list[torch.Tensor]
    adapters: list[tuple[torch.Tensor, torch.Tensor]]
    scaling: float = 2.0

    def adapter(self, i: int) -> tuple:
        return self.adapters[i] if self.adapters else (None, None)

    @property
    def nbytes(self) -> int:
        """What a product must move: packed weight and scales, adapter, x and y."""
        parts = [self.x, *(t for t in self.adapter(0) if t is not None)]
        y = self.x.shape[0] * self.nf4[0].shape[0] * self.x.element_size()
        return self.nf4[0].nbytes + sum(t.numel() * t.element_size() for t in parts) + y


def few_rows_cases(section: Section, sizes: Sizes) -> Iterator[tuple[FewRows, torch.Tensor]]:
    """The tensors of each case, and what y should be, in float32; what matters most comes first."""
    device = section.device
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=device)
    weights = {}
    for n, k in sizes.products:
        weight = bf16(n, k) / k**0.5
        nf4 = ops.nf4_quantize(weight, double_quant=True)
        copies = clones(nf4, rotation(nf4.nbytes, device))
        dense = [weight, *(weight.clone() for _ in range(rotation(2 * n * k, device) - 1))]
        a, b = bf16(peers.RANK, k) / k**0.5, bf16(n, peers.RANK)
        weights[n, k] = copies, dense, [(a.clone(), b.clone()) for _ in copies]
    for rows, rank, (n, k) in itertools.product(sizes.few_rows, (0, peers.RANK), weights):
        case = f"{n}x{k}, {f'r={rank}' if rank else 'no adapter'}, {rows} rows"
        if not section.begin(case):
            continue
        copies, dense, adapters = weights[n, k]
        given = FewRows(bf16(rows, k), copies, dense, adapters if rank else [])
        x = given.x.float()
        y = x @ reference_dequantize(copies[0], torch.float32).t()
        if rank:
            a, b = (t.float() for t in adapters[0])
            y += given.scaling * (x @ a.t()) @ b.t()
        yield given, y


def few_rows(section: Section, sizes: Sizes) -> None:
    """y = x W^T (+ s (x A^T) B^T) by each of our paths, dense, and bitsandbytes: time, share of the copy."""
    for given, exact in few_rows_cases(section, sizes):
        makers = {
            OURS: partial(our_product, given, None),
            **{f"{OURS}, {p.replace('_', ' ')}": partial(our_product, given, p) for p in PATHS},
            "dense bf16": partial(dense_few_rows, given),
            "bitsandbytes": partial(bnb_product, given),
        }
        errors: dict[str, float] = {}

        def check(name: str, call: Any, exact=exact, errors=errors) -> None:
            # dense holds the weight before it was rounded to 4 bits
            errors[name] = 0.0 if name == "dense bf16" else off(call()[0], exact)

        with torch.no_grad():
            calls = section.make(makers, check)
            replays = section.capture(calls)
        for name, rounds in section.interleave(replays, turn_seconds=0.005).items():
            copies = len(given.dense if name == "dense bf16" else given.nf4)
            seconds = [s / copies for s in flat(rounds)]
            note = f"error {errors[name]:.1e}" if errors[name] else ""
            section.add(name, "time", "us", (s * 1e6 for s in seconds), note)
            if name != "dense bf16":
                share = (100 * given.nbytes / s / section.copy_bandwidth for s in seconds)
                section.add(name, "of the copy", "%", share)


PATHS = ("few_rows", "single", "workspace")


def pinned_path(path: str | None) -> Any:
    """The context in which lora_linear takes this path (None: the one it chooses)."""
    if path is None:
        return nullcontext()
    from peft_engine.kernels.lora_linear import paths

    return paths.pinned(path)


def our_product(given: FewRows, path: str | None) -> Call:
    def call() -> list[torch.Tensor]:
        with pinned_path(path):
            return [
                ops.lora_linear(given.x, q, *given.adapter(i), given.scaling) for i, q in enumerate(given.nf4)
            ]

    return call


def dense_few_rows(given: FewRows) -> Call:
    def product(weight: torch.Tensor, i: int) -> torch.Tensor:
        a, b = given.adapter(i)
        y = F.linear(given.x, weight)
        return y if a is None else y.addmm_(given.x @ a.t(), b.t(), alpha=given.scaling)

    return lambda: [product(weight, i) for i, weight in enumerate(given.dense)]


def bnb_product(given: FewRows) -> Call:
    states = [gpu_peers.quant_state(q) for q in given.nf4]
    return lambda: [
        gpu_peers.product(given.x, q.packed, state, *given.adapter(i), given.scaling)
        for i, (q, state) in enumerate(zip(given.nf4, states, strict=True))
    ]


def off(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The error's norm over the result's; ValueError when it is too large to be rounding."""
    error = float((got.float() - exact).norm() / exact.norm())
    if not error < WRONG:
        raise ValueError(f"wrong result: it is off by {error:.2g} of its norm")
    return error


# --- linear cross-entropy ---------------------------------------------------------------------------------


def linear_cross_entropy(section: Section, sizes: Sizes) -> None:
    """Loss and the gradient of x, every row labelled, bf16: peak memory over the inputs, and time."""
    rows, vocabulary, hidden = sizes.head
    case = f"{rows} rows, vocabulary {vocabulary}, hidden {hidden}"
    if not section.begin(case):
        return
    bf16 = partial(torch.randn, dtype=torch.bfloat16, device=section.device)
    x, weight = bf16(rows, hidden).requires_grad_(), bf16(vocabulary, hidden) / hidden**0.5
    labels = torch.randint(0, vocabulary, (rows,), device=section.device)
    dense = lambda x, w, y: F.cross_entropy(F.linear(x, w).float(), y)  # noqa: E731
    losses: dict[str, Callable[[], Callable]] = {
        OURS: lambda: ops.linear_cross_entropy,
        "torch, dense logits": lambda: dense,
        gpu_peers.LIGER: gpu_peers.liger_loss,
    }
    exact = torch.autograd.grad(dense(x, weight, labels), x)[0].float()

    def maker(make: Callable[[], Callable]) -> Call:
        loss = make()

        def step() -> tuple[torch.Tensor, ...]:
            value = loss(x, weight, labels)
            return value.detach(), *torch.autograd.grad(value, x)

        return step

    makers = {name: partial(maker, make) for name, make in losses.items()}
    calls = section.make(makers, lambda name, call: off(call()[1], exact))
    note = "backend " + ops_backend("linear_cross_entropy", section.device.type, torch.bfloat16)
    for name, call in calls.items():
        if section.device.type == "cuda":
            said = note if name == OURS else ""
            section.add(name, "peak over inputs", "MiB", [peak_bytes(call, section.device) / 2**20], said)
    for name, rounds in section.interleave(calls, turn_seconds=0.1).items():
        section.add(name, "forward and backward", "ms", (s * 1e3 for s in flat(rounds)))


def ops_backend(op: str, *call: Any) -> str:
    from peft_engine.ops.linear_cross_entropy import LinearCrossEntropyCall

    return dispatch.OPS[op].choose(LinearCrossEntropyCall(*call)).backend


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most device memory allocated during a call, over what was allocated before it."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before

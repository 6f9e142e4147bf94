"""The GPU suite's section of one decoded token: attention over a shared prefix and a cache of keys.

Caches are rotated as weights are in gpu_sections.py; a time is one call's share of a replay of a graph.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch.nn import functional as F

from bench.gpu_sections import OURS, Sizes, off, pinned_backend, rotation
from bench.gpu_timing import Call, Section, flat
from peft_engine import ops
from peft_engine.ops.prefix_attention import reference

CAT = "cat, then SDPA"
HELD = "SDPA, the prefix held in each cache"


class Decode(NamedTuple):
    """One query of each row, a shared prefix, and as many caches as do not fit the L2."""

    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    prefix: tuple[torch.Tensor, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """What a call must move: a cache, the prefix once, q and the result."""
        read = (*self.caches[0], *self.prefix, self.q, self.q)
        return sum(t.numel() * t.element_size() for t in read)


def decode(section: Section, sizes: Sizes) -> None:
    """A token of each row of the batch, bf16: time, and the bytes' rate as a share of the copy's."""
    heads, kv_heads, d = sizes.decode_heads
    for batch, keys, prefix in product(sizes.decode_batch, sizes.decode_keys, sizes.decode_prefix):
        case = f"batch {batch}, {keys} keys, prefix {prefix}, {heads} / {kv_heads} heads of {d}"
        if not section.begin(case):
            continue
        normal = partial(torch.randn, dtype=torch.bfloat16, device=section.device)
        copies = rotation(4 * batch * kv_heads * keys * d, section.device)
        given = Decode(
            normal(batch, heads, 1, d),
            [(normal(batch, kv_heads, keys, d), normal(batch, kv_heads, keys, d)) for _ in range(copies)],
            (normal(kv_heads, prefix, d), normal(kv_heads, prefix, d)),
        )
        exact = _exact(given)
        makers: dict[str, Callable[[], Call]] = {
            OURS: partial(our_decode, given, None),
            f"{OURS}, Triton": partial(our_decode, given, "triton"),
            f"{OURS}, CUDA": partial(our_decode, given, "cuda"),
            CAT: partial(cat_decode, given),
            HELD: partial(held_decode, given),
        }
        with torch.no_grad():
            replays = section.capture(section.make(makers, partial(_check, exact)))
        for name, rounds in section.interleave(replays, turn_seconds=0.005).items():
            seconds = [s / copies for s in flat(rounds)]
            section.add(name, "time", "us", (s * 1e6 for s in seconds))
            section.add(
                name, "of the copy", "%", (100 * given.nbytes / s / section.copy_bandwidth for s in seconds)
            )


def _check(exact: torch.Tensor, name: str, call: Call) -> None:
    off(call()[0], exact)


def _exact(given: Decode) -> torch.Tensor:
    wide = [t.float() for t in (given.q, *given.caches[0], *(p[None] for p in given.prefix))]
    return reference(*wide, None, None, None, False, given.q.shape[3] ** -0.5)


def our_decode(given: Decode, backend: str | None) -> Call:
    if backend is None:
        return lambda: [ops.prefix_attention(given.q, k, v, *given.prefix) for k, v in given.caches]

    def call() -> list[torch.Tensor]:
        with pinned_backend(backend):
            return [ops.prefix_attention(given.q, k, v, *given.prefix) for k, v in given.caches]

    pinned_backend(backend)  # Missing where it cannot run
    return call


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def _with_prefix(given: Decode, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    rows = (k.shape[0], -1, -1, -1)
    return [torch.cat((p.expand(rows), t), 2) for p, t in zip(given.prefix, (k, v), strict=True)]


def cat_decode(given: Decode) -> Call:
    """Prefix and cache put together at each token."""
    return lambda: [_sdpa(given.q, *_with_prefix(given, k, v)) for k, v in given.caches]


def held_decode(given: Decode) -> Call:
    """What a cache that PEFT filled costs: a copy of the prefix in every row of the batch."""
    caches = [_with_prefix(given, k, v) for k, v in given.caches]
    return lambda: [_sdpa(given.q, k, v) for k, v in caches]

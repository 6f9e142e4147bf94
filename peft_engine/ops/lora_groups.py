"""The LoRA product of a batch whose rows have adapters of their own, over one frozen weight.

    y[m] = W x[m] + bias + B[g] A[g] x[m],   g the adapter of row m; rows without one are the base's product

A (G, R, K) and B (G, N, R) hold the adapters stacked, each B already times its scaling, smaller ranks padded
with zeros. Rows are sorted by adapter once for a batch (`sort_rows`), and each product runs over the sorted
rows, with those of no adapter left out (S-LoRA, Sheng et al. 2023, arXiv 2311.03285, does so in inference;
here dA, dB and dx are grouped the same way).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft_engine import dispatch, native, recompute
from peft_engine.kernels import scratch
from peft_engine.ops.lora_linear import BASE, LoraLinearCall, flat_base, refuse_unless_triton
from peft_engine.ops.lora_linear import reference as reference_alone
from peft_engine.ops.nf4 import NF4Tensor

LORA_GROUPS = dispatch.Op("lora_groups")


class SortedRows(NamedTuple):
    """The rows with an adapter, sorted by it: those of adapter g are order[bounds[g]] to order[bounds[g + 1]
    - 1].

    order   int64 (M',), row numbers; bounds  int32 (G + 1,)
    """

    order: torch.Tensor
    bounds: torch.Tensor


@functools.lru_cache(maxsize=32)
def sort_rows(adapters: Sequence[int], each: int, groups: int, device: torch.device) -> SortedRows:
    """For a batch in which adapters[i] (-1: none) has the rows i * each to (i + 1) * each - 1."""
    places: list[list[int]] = [[] for _ in range(groups)]
    for i, adapter in enumerate(adapters):
        if adapter >= groups:
            raise ValueError(f"sort_rows: there are {groups} adapters, got number {adapter} for entry {i}")
        if adapter >= 0:
            places[adapter].append(i)
    with dispatch.outside_inference():
        entries = [i * each for group in places for i in group]
        first = torch.tensor(entries, dtype=torch.int64, device="cpu")
        order = (first[:, None] + torch.arange(each, device="cpu")).reshape(-1)
        sizes = torch.tensor([0, *(len(group) * each for group in places)], device="cpu")
        return SortedRows(order.to(device), sizes.cumsum(0).to(device, torch.int32))


def lora_groups(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    rows: SortedRows,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., N) of x (..., K): the base's product, and for each row its own adapter's.

    weight (N, K) of x's dtype, or an NF4Tensor; lora_a (G, R, K) and lora_b (G, N, R), of x's dtype or
    float32. Gradients flow to x, lora_a, lora_b and bias. Raises ValueError that says which argument does not
    fit.
    """
    if dispatch.in_autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight = weight if isinstance(weight, NF4Tensor) else weight.to(dtype)
    n, k = weight.shape
    groups, rank = lora_a.shape[:2] if lora_a.dim() == 3 else (0, 0)
    if lora_a.shape != (groups, rank, k) or lora_b.shape != (groups, n, rank):
        raise ValueError(
            f"lora_groups: A must be (adapters, r, in_features)=(G, R, {k}) and B "
            f"(adapters, out_features, r)=(G, {n}, R), got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    if rows.bounds.shape != (groups + 1,):
        raise ValueError(
            f"lora_groups: rows are sorted for {rows.bounds.numel() - 1} adapters, but A and B hold {groups}"
        )
    if rows.order.numel() > x.numel() // max(1, k):
        raise ValueError(
            f"lora_groups: {rows.order.numel()} rows are sorted, but x has {x.numel() // max(1, k)}"
        )
    if isinstance(weight, NF4Tensor):
        weight.require_one_device("lora_groups")
    base = "nf4" if isinstance(weight, NF4Tensor) else weight.dtype
    call = LoraLinearCall(x.device.type, x.dtype, base, lora_a.dtype, k, rank)
    return LORA_GROUPS.choose(call, x, weight, lora_a, lora_b, bias).run(
        x, weight, lora_a, lora_b, rows, bias
    )


def reference(x, weight, lora_a, lora_b, rows, bias=None) -> torch.Tensor:
    """lora_groups in plain torch: the base for all rows, then one adapter after the other."""
    y = reference_alone(x, weight, None, None, 1.0, bias)
    flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    for g, (start, end) in enumerate(zip(rows.bounds[:-1].tolist(), rows.bounds[1:].tolist(), strict=True)):
        at = rows.order[start:end]
        part = flat[at].to(lora_a.dtype) @ lora_a[g].t() @ lora_b[g].t()
        out = out.index_copy(0, at, (out[at] + part).to(out.dtype))
    return out.view(y.shape)


# --- Triton -------------------------------------------------------------------------------------------------

native.library.define(
    f"lora_groups_forward(Tensor x, {BASE}, int out_features, Tensor lora_a, Tensor lora_b, Tensor order,"
    " Tensor bounds, Tensor? bias) -> (Tensor, Tensor)"
)
native.library.define(
    f"lora_groups_backward(Tensor dy, Tensor x, {BASE}, Tensor lora_a, Tensor lora_b, Tensor h, Tensor order,"
    " Tensor bounds, bool need_dx) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("peft_engine::lora_groups_forward")
def _(
    x, weight, absmax, nested_absmax, offset, blocksize, out_features, lora_a, lora_b, order, bounds, bias
):  # fmt: skip
    h = x.new_empty(order.shape[0], lora_a.shape[1], dtype=torch.float32)
    return x.new_empty(*x.shape[:-1], out_features), h


@torch.library.register_fake("peft_engine::lora_groups_backward")
def _(
    dy, x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, order, bounds, need_dx
):  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, x.new_empty(lora_a.shape, dtype=lora_a.dtype), x.new_empty(lora_b.shape, dtype=lora_b.dtype)


# Triton is imported when the first tensor on a GPU asks for it.
def _forward_on_gpu(*arguments):
    from peft_engine.kernels.lora_groups.groups import forward

    return forward(*arguments)


@torch.library.impl(native.library, "lora_groups_forward", "CUDA")
def _(*arguments):
    with scratch.fresh():
        return _forward_on_gpu(*arguments)


@torch.library.impl(native.library, "lora_groups_backward", "CUDA")
def _backward_on_gpu(*arguments):
    from peft_engine.kernels.lora_groups.groups import backward

    return backward(*arguments)


class _LoraGroups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, weight, absmax, nested_absmax, offset, blocksize, n, lora_a, lora_b, order, bounds, bias
    ):  # fmt: skip
        run = _forward_on_gpu if dispatch.direct(x) else torch.ops.peft_engine.lora_groups_forward
        y, h = run(
            x, weight, absmax, nested_absmax, offset, blocksize, n, lora_a, lora_b, order, bounds, bias
        )
        again, kept = recompute.instead_of(x)
        ctx.save_for_backward(weight, absmax, nested_absmax, offset, lora_a, lora_b, h, order, bounds, *kept)
        ctx.settings = blocksize, None if bias is None else bias.dtype, x.shape, again
        return y

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        weight, absmax, nested_absmax, offset, lora_a, lora_b, h, order, bounds, *kept = ctx.saved_tensors
        blocksize, bias_dtype, shape, again = ctx.settings
        x = kept[0] if again is None else again(*kept).view(shape)
        need = ctx.needs_input_grad
        run = _backward_on_gpu if dispatch.direct(dy) else torch.ops.peft_engine.lora_groups_backward
        dx, da, db = run(
            dy, x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, order, bounds, need[0]
        )
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(bias_dtype) if need[11] else None
        return (
            dx if need[0] else None, None, None, None, None, None, None, da if need[7] else None,
            db if need[8] else None, None, None, dbias,
        )  # fmt: skip


def _triton(x, weight, lora_a, lora_b, rows, bias) -> torch.Tensor:
    return _LoraGroups.apply(x, *flat_base(weight), weight.shape[0], lora_a, lora_b, *rows, bias)


LORA_GROUPS.register("triton", _triton, refuse_unless_triton)
LORA_GROUPS.register("reference", reference)

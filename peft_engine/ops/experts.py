"""A mixture of experts: gated MLPs, of which a router gives each token its few (Shazeer et al. 2017,
arXiv 1701.06538), with LoRA on every expert's weights.

    y[t] = sum_j w[t, j] D_e(act(g) * u)       [g; u] = U_e(x[t]), e = index[t, j]
    U_e(x) = x W_e^T + s (x A_e^T) B_e^T       D_e alike, of its own weights

    d = dy[t] in D_e's backward                dw[t, j] = d . D_e(a) = D_e^T(d) . a, a = act(g) * u
    da = w[t, j] D_e^T(d)                      dA, dB of D_e: those of rows w a and w h

x (M, H), index and weights (M, J), U (E, 2 I, H), D (E, H, I), both frozen, dense or NF4; A (E, R, K) and
B (E, N, R). Rows are sorted by expert once; one expert runs after another, so that of the gathered rows, of
the products and of decoded weights one expert's are held. Saved for the backward: x, [g; u] (M J x 2 I), and
h (M J x R) where an adapter learns. Results are summed in float32 and rounded once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from peft_engine import dispatch, native
from peft_engine.ops.lora_linear import flat_base, refuse_unless_triton
from peft_engine.ops.lora_linear import raw_ops as lora_linear_ops
from peft_engine.ops.nf4 import DTYPES, NESTED_BLOCKSIZE, NF4Tensor, refuse_unless_cpu
from peft_engine.ops.swiglu import ACTIVATIONS
from peft_engine.ops.swiglu import raw_ops as swiglu_ops


class ExpertsCall(NamedTuple):
    """What dispatch needs to know of a call."""

    device: str
    dtype: torch.dtype
    base: torch.dtype | str  # the dtype of dense weights, or "nf4"
    rank: int = 0


class Lora(NamedTuple):
    """An adapter on all experts' weights of one kind: A (E, R, K) and B (E, N, R), and the factor s."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


EXPERTS = dispatch.Op("experts")
_NAMES = tuple(ACTIVATIONS)


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor | NF4Tensor,
    down: torch.Tensor | NF4Tensor,
    activation: str = "silu",
    *,
    gate_up_lora: Lora | None = None,
    down_lora: Lora | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, (M, H), of x's dtype.

    x (M, H) float32, bfloat16 or float16; index (M, J) int64, the experts of each token, a number that none
    of them has standing for none; weights (M, J), of a floating-point dtype; gate_up (E, 2 I, H), the gates'
    rows before the ups', and down (E, H, I), of x's dtype or NF4Tensors, each expert's values a whole number
    of blocks. activation: as swiglu has them. The adapters are of x's dtype or float32.
    Gradients flow to x, weights and the adapters; gate_up and down are frozen.
    Raises ValueError or TypeError that says which argument does not fit.
    """
    if dispatch.in_autocast(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        gate_up, down = (w if isinstance(w, NF4Tensor) else w.to(dtype) for w in (gate_up, down))
    _check(x, index, weights, gate_up, down, activation, gate_up_lora, down_lora)
    nf4 = any(isinstance(w, NF4Tensor) for w in (gate_up, down))
    rank = max(0 if lora is None else lora.a.shape[1] for lora in (gate_up_lora, down_lora))
    call = ExpertsCall(x.device.type, x.dtype, "nf4" if nf4 else x.dtype, rank)
    adapters = [t for lora in (gate_up_lora, down_lora) if lora is not None for t in (lora.a, lora.b)]
    run = EXPERTS.choose(call, x, weights, *adapters).run
    return run(x, index, weights, gate_up, down, activation, gate_up_lora, down_lora)


def _check(x, index, weights, gate_up, down, activation, gate_up_lora, down_lora) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES:
        raise TypeError(
            "experts: x must be (tokens, features) in float32, bfloat16 or float16, got "
            f"{tuple(x.shape)} {x.dtype}"
        )
    if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise TypeError(
            f"experts: index must be int64 of shape (tokens, experts a token)=({x.shape[0]}, j), got "
            f"{tuple(index.shape)} {index.dtype}"
        )
    if weights.shape != index.shape or not weights.is_floating_point():
        raise ValueError(
            f"experts: weights must be floating-point of index's shape {tuple(index.shape)}, got "
            f"{tuple(weights.shape)} {weights.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, w in (("gate_up", gate_up), ("down", down)):
        if len(w.shape) != 3:
            raise ValueError(f"experts: {name} must have three dimensions, got {tuple(w.shape)}")
    e, n, k = gate_up.shape
    if k != x.shape[1] or n % 2 or tuple(down.shape) != (e, k, n // 2):
        raise ValueError(
            "experts: gate_up must be (experts, 2 width, features) and down (experts, features, width), with "
            f"{x.shape[1]} features as x has, got {tuple(gate_up.shape)} and {tuple(down.shape)}"
        )
    for name, w, lora in (("gate_up", gate_up, gate_up_lora), ("down", down, down_lora)):
        if isinstance(w, NF4Tensor):
            w.require_one_device("experts")
            if (why := not_sliced(w.shape, w.blocksize, w.nested_absmax is not None)) is not None:
                raise ValueError(f"experts: {name}: {why}")
        elif w.dtype != x.dtype:
            raise TypeError(f"experts: x is {x.dtype} and {name} {w.dtype}; cast one of them")
        elif w.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"experts: {name} must be frozen (it gets no gradient here)")
        if lora is not None:
            _check_lora(name, w.shape, lora, x)
    here = {t.device for t in (x, index, weights)} | {gate_up.device, down.device}
    here |= {t.device for lora in (gate_up_lora, down_lora) if lora is not None for t in lora[:2]}
    if len(here) > 1:
        raise ValueError(f"experts: its tensors are on {', '.join(map(str, here))}; move them to one device")


def _check_lora(name: str, shape: tuple[int, ...], lora: Lora, x: torch.Tensor) -> None:
    (e, n, k), a, b = shape, lora.a, lora.b
    r = a.shape[1] if a.dim() == 3 else 0
    if a.shape != (e, r, k) or b.shape != (e, n, r):
        raise ValueError(
            f"experts: {name}: A must be (experts, r, in_features)=({e}, {r}, {k}) and B (experts, "
            f"out_features, r)=({e}, {n}, {r}), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.dtype != b.dtype or a.dtype not in (torch.float32, x.dtype):
        raise TypeError(
            f"experts: {name}: A and B must both be float32 or both {x.dtype} as x, got {a.dtype} and "
            f"{b.dtype}"
        )


def not_sliced(shape: tuple[int, ...], blocksize: int, nested: bool) -> str | None:
    """Why the bytes of one expert cannot be read apart from those of the others."""
    each = shape[1] * shape[2]
    whole = blocksize * NESTED_BLOCKSIZE if nested else blocksize
    if each % whole == 0:
        return None
    return f"an expert's {shape[1]} x {shape[2]} values are no whole number of the {whole} that share a scale"


# --- reference ----------------------------------------------------------------------------------------------


def reference(
    x, index, weights, gate_up, down, activation="silu", gate_up_lora=None, down_lora=None
) -> torch.Tensor:
    """experts in plain torch: the base in x's dtype, the adapters in their own."""
    up, back = (w.dequantize(x.dtype) if isinstance(w, NF4Tensor) else w for w in (gate_up, down))
    y = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in range(up.shape[0]):
        token, place = torch.where(index == e)
        gate, value = _linear(x[token], up[e], gate_up_lora, e).chunk(2, dim=-1)
        out = _linear(ACTIVATIONS[activation](gate) * value, back[e], down_lora, e)
        y = y.index_add(0, token, (out * weights[token, place, None]).to(y.dtype))
    return y.to(x.dtype)


def _linear(x: torch.Tensor, weight: torch.Tensor, lora: Lora | None, e: int) -> torch.Tensor:
    y = F.linear(x, weight)
    if lora is None:
        return y
    return (y + F.linear(F.linear(x.to(lora.a.dtype), lora.a[e]), lora.b[e]) * lora.scaling).to(x.dtype)


# --- backends -----------------------------------------------------------------------------------------------

_WEIGHT = (
    "Tensor {0}, Tensor? {0}_absmax, Tensor? {0}_nested_absmax, Tensor? {0}_offset, int {0}_blocksize, "
    "Tensor? {0}_a, Tensor? {0}_b, float {0}_scaling"
)
_HELD = 19  # the arguments that _WEIGHTS stands for
_WEIGHTS = f"{_WEIGHT.format('gate_up')}, {_WEIGHT.format('down')}, int experts, int width, int activation"
native.library.define(
    f"experts_forward(Tensor x, Tensor index, Tensor weights, {_WEIGHTS}, bool keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
native.library.define(
    f"experts_backward(Tensor dy, Tensor x, Tensor weights, {_WEIGHTS}, Tensor rows, Tensor h_up,"
    " Tensor h_down, Tensor order, Tensor ends, bool need_dx, bool need_da)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Weight(NamedTuple):
    """One of the two weights of all experts, as the raw ops take it, with its adapter."""

    weight: torch.Tensor
    absmax: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    blocksize: int
    a: torch.Tensor | None
    b: torch.Tensor | None
    scaling: float
    n: int
    k: int

    @property
    def rank(self) -> int:
        return 0 if self.a is None else self.a.shape[1]

    def base(self, e: int) -> tuple[Any, ...]:
        """Expert e's weight as lora_linear's raw ops take it: views."""
        if not self.blocksize:
            return self.weight[e], None, None, None, 0
        values = self.n * self.k
        blocks = values // self.blocksize
        packed = self.weight.view(-1).narrow(0, e * values // 2, values // 2)
        absmax = self.absmax.narrow(0, e * blocks, blocks)  # type: ignore[union-attr]
        nested = self.nested_absmax
        if nested is not None:
            nested = nested.narrow(0, e * blocks // NESTED_BLOCKSIZE, blocks // NESTED_BLOCKSIZE)
        return packed, absmax, nested, self.offset, self.blocksize

    def adapter(self, e: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (None, None) if self.a is None or self.b is None else (self.a[e], self.b[e])

    def forward(self, x: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert e's product, and x A^T."""
        run, _ = lora_linear_ops(x)
        return run(x, *self.base(e), self.n, *self.adapter(e), self.scaling, None, 0.0, None)

    def backward(
        self, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor | None, e: int, need_dx: bool, need_da: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """dx, dA and dB of expert e's product."""
        _, run = lora_linear_ops(dy)
        a, b = self.adapter(e)
        return run(dy, x, *self.base(e), a, b, h, self.scaling, 0.0, None, need_dx, need_da)


def _both(x: torch.Tensor, arguments: tuple[Any, ...]) -> tuple[_Weight, _Weight, int, int]:
    """gate_up, down, the number of experts and the activation, of what the raw ops are given for _WEIGHTS."""
    count, width, activation = arguments[16:]
    up, down = (*arguments[:8], 2 * width, x.shape[1]), (*arguments[8:16], x.shape[1], width)
    return _Weight._make(up), _Weight._make(down), count, activation


def _spans(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that has rows, with the first of them and the one behind the last."""
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, start, end
        start = end


def _forward(x, index, weights, *arguments):
    up, down, count, activation = _both(x, arguments[:_HELD])
    keep = arguments[-1]
    flat = index.reshape(-1)
    flat = torch.where((flat < 0) | (flat > count), count, flat)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=count + 1)[:count].cumsum(0).cpu()
    token, share = order // index.shape[1], weights.reshape(-1)[order].float()
    saved = flat.shape[0] if keep else 0
    gate_up = x.new_empty(saved, up.n)
    h_up, h_down = (
        x.new_empty(saved if part.rank else 0, part.rank, dtype=torch.float32) for part in (up, down)
    )
    y = x.new_zeros(x.shape, dtype=torch.float32)
    gated, _ = swiglu_ops(x)
    for e, start, end in _spans(ends):
        here = token[start:end]
        rows, h = up.forward(x.index_select(0, here), e)
        gate, value = rows.chunk(2, dim=-1)
        between = gated(gate, value, activation)
        if keep:
            gate_up[start:end] = rows
            if up.rank:
                h_up[start:end] = h
        out, h = down.forward(between, e)
        if keep and down.rank:
            h_down[start:end] = h
        y.index_add_(0, here, out.float() * share[start:end, None])
    return y.to(x.dtype), gate_up, h_up, h_down, order, ends


def _backward(dy, x, weights, *arguments):
    gate_up, h_up, h_down, order, ends, need_dx, need_da = arguments[_HELD:]
    up, down, _, activation = _both(dy, arguments[:_HELD])
    token, share = order // weights.shape[1], weights.reshape(-1)[order].float()
    dx = dy.new_zeros(dy.shape if need_dx else (0,), dtype=torch.float32)
    dshare = torch.zeros_like(share)
    gated, gated_back = swiglu_ops(dy)
    da_up, db_up, da_down, db_down = (
        dy.new_empty(0) if t is None or not need_da else torch.zeros_like(t)
        for t in (up.a, up.b, down.a, down.b)
    )
    for e, start, end in _spans(ends):
        here, mine = token[start:end], share[start:end, None]
        d = dy.index_select(0, here)
        gate, value = gate_up[start:end].chunk(2, dim=-1)
        # In float32, for w a is rounded once, as a was in the forward.
        between = gated(gate.float(), value.float(), activation)
        h = h_down[start:end] * mine if down.rank else None
        dbetween, da, db = down.backward(d, (between * mine).to(d.dtype), h, e, True, need_da)
        if need_da and down.rank:
            da_down[e], db_down[e] = da, db
        dshare[start:end] = torch.linalg.vecdot(dbetween.float(), between)
        if not need_dx and not up.rank:
            continue
        dbetween = (dbetween * mine).to(d.dtype)
        d = torch.cat(gated_back(dbetween, gate, value, activation), 1)
        h = h_up[start:end] if up.rank else None
        d, da, db = up.backward(d, x.index_select(0, here), h, e, need_dx, need_da)
        if need_da and up.rank:
            da_up[e], db_up[e] = da, db
        if need_dx:
            dx.index_add_(0, here, d.float())
    dweights = torch.empty_like(share).index_copy_(0, order, dshare).view(weights.shape).to(weights.dtype)
    return dx.to(dy.dtype), dweights, da_up, db_up, da_down, db_down


for _device in ("CPU", "CUDA"):
    torch.library.impl(native.library, "experts_forward", _device)(_forward)
    torch.library.impl(native.library, "experts_backward", _device)(_backward)


@torch.library.register_fake("peft_engine::experts_forward")
def _(x, index, weights, *arguments):
    up, down, count, _ = _both(x, arguments[:_HELD])
    pairs = index.numel()
    saved = pairs if arguments[-1] else 0
    h = [x.new_empty(saved if part.rank else 0, part.rank, dtype=torch.float32) for part in (up, down)]
    order, ends = index.new_empty(pairs), torch.empty(count, dtype=torch.int64, device="cpu")
    return torch.empty_like(x), x.new_empty(saved, up.n), *h, order, ends


@torch.library.register_fake("peft_engine::experts_backward")
def _(dy, x, weights, *arguments):
    need_dx, need_da = arguments[-2:]
    up, down, _, _ = _both(dy, arguments[:_HELD])
    adapters = [
        dy.new_empty(0) if t is None or not need_da else torch.empty_like(t)
        for t in (up.a, up.b, down.a, down.b)
    ]
    return dy.new_empty(dy.shape if need_dx else (0,)), torch.empty_like(weights), *adapters


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, index, weights, up_a, up_b, down_a, down_b, settings, up, down):
        up_scaling, down_scaling, *shape = settings
        held = (*up, up_a, up_b, up_scaling, *down, down_a, down_b, down_scaling, *shape)
        y, *saved = torch.ops.peft_engine.experts_forward(x, index, weights, *held, True)
        tensors = [t for t in held if isinstance(t, torch.Tensor)]
        ctx.save_for_backward(x, weights, *saved, *tensors)
        ctx.places = [i for i, t in enumerate(held) if isinstance(t, torch.Tensor)]
        ctx.held = [None if isinstance(t, torch.Tensor) else t for t in held]
        return y

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, dy):
        x, weights, gate_up, h_up, h_down, order, ends, *tensors = ctx.saved_tensors
        held = list(ctx.held)
        for place, tensor in zip(ctx.places, tensors, strict=True):
            held[place] = tensor
        need = ctx.needs_input_grad
        dx, dweights, *adapters = torch.ops.peft_engine.experts_backward(
            dy.contiguous(), x, weights, *held, gate_up, h_up, h_down, order, ends, need[0], any(need[3:7])
        )
        adapters = [d if wanted else None for d, wanted in zip(adapters, need[3:7], strict=True)]
        return dx if need[0] else None, None, dweights if need[2] else None, *adapters, None, None, None


def _kernels(x, index, weights, gate_up, down, activation, gate_up_lora, down_lora):
    x, index, weights = x.contiguous(), index.contiguous(), weights.contiguous()
    (up_a, up_b, up_scaling), (down_a, down_b, down_scaling) = (
        (None, None, 1.0) if lora is None else (lora.a.contiguous(), lora.b.contiguous(), float(lora.scaling))
        for lora in (gate_up_lora, down_lora)
    )
    count, _, width = down.shape
    shape = count, width, _NAMES.index(activation)
    learning = (x, weights, up_a, up_b, down_a, down_b)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learning):
        settings = (up_scaling, down_scaling, *shape)
        return _Experts.apply(
            x, index, weights, up_a, up_b, down_a, down_b, settings, flat_base(gate_up), flat_base(down)
        )
    up = (*flat_base(gate_up), up_a, up_b, up_scaling)
    held = (*up, *flat_base(down), down_a, down_b, down_scaling, *shape)
    return torch.ops.peft_engine.experts_forward.default(x, index, weights, *held, False)[0]


def _refuse_unless_triton(call: ExpertsCall) -> str | None:
    from peft_engine.ops.lora_linear import LoraLinearCall

    return refuse_unless_triton(LoraLinearCall(call.device, call.dtype, call.base, None, 0, call.rank))


EXPERTS.register("triton", _kernels, _refuse_unless_triton)
EXPERTS.register("cpu", _kernels, refuse_unless_cpu)
EXPERTS.register("reference", reference)

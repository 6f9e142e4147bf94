"""Logits that are not there yet: a tensor of their shape and dtype that keeps hidden states and head instead.

The first operation on it forms them (once: all copies share the result) and runs on an ordinary tensor, which
stays that object's memory: what is written to it is there at the next reading. Two ways lead here: torch's
Python functions arrive at __torch_function__, before autograd, and get logits that autograd knows; C++ and
autograd.Functions see a tensor whose grad_fn is _Deferred, and arrive at __torch_dispatch__ below autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from peft_engine import dense, dispatch
from peft_engine.ops.linear_cross_entropy import linear_cross_entropy
from peft_engine.ops.nf4 import DTYPES


class Source:
    """hidden (..., K), weight (N, K), bias (N,) or None, and the dtype of their product; and how far the
    model has come with softcap * tanh(logits / softcap): 0 none of it, 1 the division, 2 the tanh, 3 all.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        softcap: float = 1.0,
        stage: int = 0,
    ):
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self.softcap, self.stage = softcap, stage
        self._versions = self._version()
        self._value: torch.Tensor | None = None
        self._formed_at = 0

    def _version(self) -> tuple[int, ...]:
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return tuple(0 if t.is_inference() else t._version for t in tensors)

    def _refuse_changed(self) -> None:
        if self._version() != self._versions:
            raise RuntimeError(
                "logits: the head's weight or input was changed in place (an optimizer step?) between the "
                "model's run and the reading of its logits; read outputs.logits before that"
            )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden, weight and bias in the product's dtype (autocast's, where it was on)."""
        self._refuse_changed()
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.hidden.to(self.dtype), self.weight.to(self.dtype), bias

    def plus(self, bias: torch.Tensor) -> "Source":
        """The source of these logits with bias (N,) added; for a source without a bias."""
        self._refuse_changed()  # what is seen from now on is the new source's
        return Source(self.hidden, self.weight, bias, self.dtype)

    def capped(self, softcap: float, stage: int) -> "Source":
        """The source of these logits a stage further."""
        self._refuse_changed()
        return Source(self.hidden, self.weight, self.bias, self.dtype, softcap, stage)

    def wants_graph(self) -> bool:
        """Whether autograd would record the product now: never of what inference mode has made."""
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        if not torch.is_grad_enabled() or any(t.is_inference() for t in tensors):
            return False
        return any(t.requires_grad for t in tensors)

    def grad_mode(self) -> Any:
        """A context in which autograd is on where it may record the product."""
        return torch.set_grad_enabled(self.wants_graph())

    def value(self) -> torch.Tensor:
        """The logits, formed at the first call; known to autograd where it is on."""
        value = self._value
        if value is None or _version_of(value) != self._formed_at or self._lacks_graph(value):
            with self.grad_mode(), torch.autocast(self.hidden.device.type, enabled=False):
                value = self._value = _at_stage(dense.linear(*self.inputs()), self.softcap, self.stage)
            self._formed_at = _version_of(value)
        return value

    @property
    def formed(self) -> bool:
        return self._value is not None

    def _lacks_graph(self, value: torch.Tensor) -> bool:
        return self.wants_graph() and not value.requires_grad


def _at_stage(logits: torch.Tensor, softcap: float, stage: int) -> torch.Tensor:
    """What a stage of a Source makes of the product."""
    if stage > 0:
        logits = logits / softcap
    if stage > 1:
        logits = torch.tanh(logits)
    return logits * softcap if stage > 2 else logits


class Memory:
    """The logits in a dtype, once they are formed: what a tensor and its aliases share."""

    def __init__(self, source: Source, dtype: torch.dtype, copy: bool):
        self.source, self.dtype, self.copy = source, dtype, copy
        self.tensor: torch.Tensor | None = None
        self._formed_at = 0

    @property
    def written(self) -> bool:
        """Whether the logits were changed in place; unknown of what inference mode has made."""
        return self.tensor is not None and _version_of(self.tensor) != self._formed_at

    def read(self, graph: bool) -> torch.Tensor:
        """The tensor; with graph one that autograd knows, which may have to be formed again."""
        if self.tensor is None or (graph and not self.tensor.requires_grad and not self.written):
            self.tensor = self.source.value().to(self.dtype, copy=self.copy)
            self._formed_at = _version_of(self.tensor)
        return self.tensor


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class LazyLogits(torch.Tensor):
    """Stands for a Memory, in a shape whose last dimension is the vocabulary; without its graph unless
    requires_grad.
    """

    memory: Memory

    @staticmethod
    def __new__(cls, memory: Memory, shape: Sequence[int]) -> "LazyLogits":
        device = memory.source.hidden.device
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=memory.dtype, device=device)
        self.memory = memory
        return self

    def __init__(self, memory: Memory, shape: Sequence[int]):
        pass

    @property
    def source(self) -> Source | None:
        """What the logits are made of; None where they were changed in place."""
        return None if self.memory.written or _version_of(self) else self.memory.source

    @property
    def live(self) -> Source | None:
        """The source, where autograd sees it from here too: None as well behind a detach."""
        source = self.source
        cut_off = source is not None and source.wants_graph() and not self.requires_grad
        return None if cut_off else source

    @staticmethod
    def of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> "LazyLogits":
        """What F.linear(hidden, weight, bias) would be, autocast included."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if dispatch.in_autocast(kind) else hidden.dtype
        return _Deferred.apply(hidden, weight, bias, Source(hidden, weight, bias, dtype))

    def materialize(self) -> torch.Tensor:
        """The logits as an ordinary tensor, the same memory at each call."""
        if not self.requires_grad:
            return self._read(False).detach()
        with torch.enable_grad():  # they have a graph, also where they are only written to
            return self._read(self.memory.source.wants_graph())

    def _read(self, graph: bool) -> torch.Tensor:
        value = self.memory.read(graph)
        return value if value.shape == self.shape else value.view(self.shape)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _STAND_INS:
            result = _STAND_INS[func](*args, **kwargs)
            if result is not None:
                return result
        # Autograd must know whose a part is, so that the logits are formed above it.
        part = (func is _T.__getitem__ and not _everything(args[1])) or (
            func in (_T.view, _T.reshape) and not _keeps_rows(*args, **kwargs)
        )
        if func not in _NEEDS_NO_VALUE or part:
            args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        same = _still_lazy(func, args, kwargs)
        if same is not None:
            return same
        with torch.no_grad():
            args, kwargs = tree_map_only(LazyLogits, lambda lazy: lazy._read(False), (args, kwargs))
            return func(*args, **kwargs)


class _Deferred(torch.autograd.Function):
    """hidden W^T + b as far as autograd knows; the backward is the product's."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, source: Source):
        ctx.save_for_backward(hidden, weight, bias if source.stage else None)
        ctx.dtype, ctx.softcap, ctx.stage = source.dtype, source.softcap, source.stage
        ctx.bias_dtype = None if bias is None else bias.dtype
        shape = (*hidden.shape[:-1], weight.shape[0])
        return LazyLogits(Memory(source, source.dtype, copy=False), shape)

    @staticmethod
    @dispatch.first_order
    def backward(ctx: Any, grad):
        hidden, weight, bias = ctx.saved_tensors
        if ctx.stage:  # the product's gradient, of that of what the stage makes of it
            bias = None if bias is None else bias.to(ctx.dtype)
            logits = dense.product(hidden.to(ctx.dtype), weight.to(ctx.dtype), bias).requires_grad_()
            with torch.enable_grad():
                grad = torch.autograd.grad(_at_stage(logits, ctx.softcap, ctx.stage), logits, grad)[0]
        rows = grad.reshape(-1, grad.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = dense.product_back(grad, weight.to(ctx.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            x = hidden.reshape(-1, hidden.shape[-1]).to(ctx.dtype)
            dw = dense.weight_gradient(rows, x).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, dw, db, None


_T = torch.Tensor
# Functions that read no value, or that __torch_dispatch__ may keep lazy. All others form the logits.
_NEEDS_NO_VALUE = {
    *(getattr(_T, name).__get__ for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "itemsize",
        "nbytes", "is_sparse", "is_quantized", "is_nested", "is_meta", "is_mkldnn", "is_cuda", "is_cpu",
        "is_mps", "is_xla", "_version", "output_nr", "_backward_hooks",
    )),
    _T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.element_size, _T.stride, _T.is_contiguous,
    _T.is_floating_point, _T.is_complex, _T.is_inference, _T.__len__, _T.get_device, _T.storage_offset,
    _T.float, _T.to, _T.cpu, _T.contiguous, _T.detach, _T.__getitem__, _T.type, _T.view, _T.reshape,
    torch.is_floating_point, torch.numel, torch.detach,
}  # fmt: skip


def _everything(index: Any) -> bool:
    """Whether an index takes all there is."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(p is Ellipsis or (isinstance(p, slice) and p in (slice(None), slice(0, None))) for p in parts)


def _keeps_rows(logits: Any, *shape: Any, **kwargs: Any) -> bool:
    """Whether view(shape) or reshape(shape) leaves the vocabulary the last dimension."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
    whole = isinstance(logits, LazyLogits) and not kwargs and all(isinstance(size, int) for size in sizes)
    return whole and len(sizes) > 0 and sizes[-1] == logits.shape[-1]


def _still_lazy(func: Any, args: tuple, kwargs: dict) -> LazyLogits | None:
    """A cast, a detach, a view of whole rows, or a slice of everything, as LazyLogits; None for what needs
    the values.
    """
    aten, lazy = torch.ops.aten, args[0] if args else None
    if not isinstance(lazy, LazyLogits):
        return None
    if func in (aten.detach.default, aten.alias.default):
        return LazyLogits(lazy.memory, lazy.shape)
    if func is aten.view.default and _keeps_rows(*args, **kwargs):
        return LazyLogits(lazy.memory, torch.empty(lazy.shape, device="meta").view(args[1]).shape)
    source = lazy.source
    if func is aten.to.dtype and len(args) == 2 and not kwargs:  # as inference mode hands it on
        if args[1] == lazy.dtype:
            return lazy
        func, kwargs = aten._to_copy.default, {"dtype": args[1]}
    if func is aten._to_copy.default:
        dtype, device = kwargs.get("dtype", lazy.dtype), kwargs.get("device", lazy.device)
        others = set(kwargs) - {"dtype", "device", "memory_format", "non_blocking", "layout", "pin_memory"}
        plain = device == lazy.device and not others and not kwargs.get("pin_memory")
        if plain and dtype.is_floating_point and dtype != lazy.dtype and source is not None:
            return LazyLogits(Memory(source, dtype, copy=True), lazy.shape)
    if func is aten.slice.Tensor:
        dim, start, end, step = (*args[1:], *(None,) * 4)[:4]
        if not start and (end is None or end >= lazy.shape[dim or 0]) and step in (None, 1):
            return LazyLogits(lazy.memory, lazy.shape)
    return None


# --- what is computed without the values --------------------------------------------------------------------


def lazy_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str
) -> torch.Tensor | None:
    """F.cross_entropy(logits.float(), labels) over all rows, of float32; None where it needs the values.

    logits (..., N); labels (...), as many as rows, on any device. It needs them for tensors of another kind,
    and for logits written to or cut off by a detach.
    """
    source = logits.live if isinstance(logits, LazyLogits) else None
    if source is None or source.stage in (1, 2):
        return None
    hidden, weight, bias = source.inputs()
    hidden = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.to(hidden.device).reshape(-1)
    # They have the dtype that autocast asks for.
    with source.grad_mode(), torch.autocast(hidden.device.type, enabled=False):
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, ignore_index=ignore_index, reduction=reduction,
            softcap=source.softcap if source.stage else None,
        )  # fmt: skip


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor | None:
    """torch's cross_entropy of logits (rows, N) and class indices (rows,); None for what the op has not."""
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    if not plain or reduction not in ("mean", "sum") or not isinstance(input, LazyLogits) or input.dim() != 2:
        return None
    if input.memory.source.formed:  # somebody has read them: their product need not run again
        return None
    indices = isinstance(target, torch.Tensor) and target.dtype == torch.int64
    if not indices or target.shape != input.shape[:1] or target.device != input.device:
        return None
    loss = lazy_cross_entropy(input, target, ignore_index, reduction)
    if loss is None or dispatch.in_autocast(input.device.type):  # which computes losses in float32
        return loss
    return loss.to(input.dtype)


def _plus_bias(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """logits + bias, for a bias (1, N) or (N,) that all rows share; None for every other sum."""
    if len(args) != 2 or kwargs or not isinstance(args[0], LazyLogits):
        return None
    logits, bias = args
    source = logits.live
    if source is None or source.bias is not None or source.stage or logits.dtype != source.dtype:
        return None
    if not isinstance(bias, torch.Tensor) or bias.device != logits.device or bias.dtype not in DTYPES:
        return None
    if not 0 < bias.dim() <= logits.dim() or not bias.shape[-1] == bias.numel() == logits.shape[-1]:
        return None
    result = _deferred(source.plus(bias.reshape(-1)))
    return result.to(torch.promote_types(logits.dtype, bias.dtype)).view(logits.shape)


def _deferred(source: Source) -> LazyLogits:
    with source.grad_mode():
        return _Deferred.apply(source.hidden, source.weight, source.bias, source)


def _divided(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """logits / softcap, a softcap's first step; None for every other quotient."""
    return _step(1, *args) if len(args) == 2 and not kwargs else None


def _tanh(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """tanh(logits / softcap)."""
    return _step(2, *args, None) if len(args) == 1 and not kwargs else None


def _multiplied(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """softcap * tanh(logits / softcap)."""
    return _step(3, *args) if len(args) == 2 and not kwargs else None


def _step(stage: int, logits: Any, number: Any) -> torch.Tensor | None:
    source = logits.live if isinstance(logits, LazyLogits) else None
    if source is None or source.stage != stage - 1 or logits.dtype != source.dtype or source.formed:
        return None
    if stage == 2:
        number = source.softcap
    elif type(number) not in (int, float) or not 0 < number < float("inf"):
        return None
    if stage == 3 and number != source.softcap:
        return None
    return _deferred(source.capped(number, stage)).view(logits.shape)


# Called in place of torch's; where they give None, the logits are formed for torch's.
_STAND_INS = {
    F.cross_entropy: _cross_entropy,
    **dict.fromkeys((_T.__add__, _T.add, torch.add), _plus_bias),
    **dict.fromkeys((_T.__truediv__, _T.div, torch.div), _divided),
    **dict.fromkeys((_T.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_T.__mul__, _T.mul, torch.mul), _multiplied),
}

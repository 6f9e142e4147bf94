"""Which backend runs an op for these arguments, and why not a faster one.

An op registers backends in the order of preference. Each has `refuse(call) -> str | None`, the reason it will
not take this call, and an implementation. `call` is a small hashable description (device, dtypes, layout), so
the answer is looked up, not worked out, from the second time on.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from peft_engine import native

BACKENDS = ("cuda", "triton", "cpu", "reference")
GPU_BACKENDS = ("cuda", "triton")


class BackendError(RuntimeError):
    """A pinned backend refused a call; the message carries its reason."""


@dataclass(frozen=True)
class Choice:
    """The backend chosen, its implementation, and what each faster one said."""

    backend: str
    run: Any
    refused: dict[str, str]

    @property
    def reason(self) -> str:
        """Why no faster backend runs; empty when the fastest does."""
        return "; ".join(f"{name}: {why}" for name, why in self.refused.items())


@dataclass(frozen=True)
class _Entry:
    name: str
    refuse: Callable[[Any], str | None]
    run: Any


class Op:
    """The backends of one op, in order of preference (the first registered is asked first)."""

    def __init__(self, name: str):
        self.name = name
        self._entries: list[_Entry] = []
        self._cache: dict[Hashable, Choice] = {}
        OPS[name] = self

    def register(
        self, backend: str, run: Any, refuse: Callable[[Any], str | None] = lambda call: None
    ) -> None:
        self._entries.append(_Entry(backend, refuse, run))

    def backends(self) -> tuple[str, ...]:
        """The names of what was registered, the preferred first."""
        return tuple(entry.name for entry in self._entries)

    def choose(self, call: Hashable, *tensors: Any) -> Choice:
        """The first backend that does not refuse `call`, which is about to be made with `tensors`.

        Raises BackendError when `force_backend` or PEFT_ENGINE_BACKEND pins one that refuses.
        """
        key = (_forced, call)
        choice = self._cache.get(key)
        if choice is None:
            choice = self._cache[key] = self._choose(call)
        if forward_ad._current_level >= 0 and choice.backend != "reference" and has_tangents(*tensors):
            raise BackendError(
                f"{self.name}: its kernels have no forward-mode derivatives (torch.func.jvp, dual tensors); "
                'plain torch has: with peft_engine.force_backend("reference")'
            )
        return choice

    def _choose(self, call: Any) -> Choice:
        refused: dict[str, str] = {}
        for entry in self._entries:
            if _forced is not None and entry.name != _forced:
                continue
            if _forced is None and entry.name in GPU_BACKENDS and getattr(call, "device", "") == "cpu":
                continue  # nobody with a tensor on the CPU asks why no GPU runs
            why = available_backends().get(entry.name) or entry.refuse(call)
            if why is None:
                return Choice(entry.name, entry.run, refused)
            refused[entry.name] = why
        if _forced is not None:
            why = refused.get(_forced, "it has no kernel for this op")
            raise BackendError(f"{self.name}: backend {_forced!r} is pinned but cannot run this call: {why}")
        raise BackendError(f"{self.name}: no backend takes this call: {refused}")


OPS: dict[str, Op] = {}
_forced: str | None = None
_notes: dict[str, str] = {}


def on_gpu(x: torch.Tensor) -> bool:
    """Whether the GPU's kernels take x; the tests answer for it, to run them on the CPU."""
    return x.is_cuda


def in_autocast(device: str) -> bool:
    """Whether autocast is on for a kind of device; of the meta device torch does not say."""
    return device != "meta" and torch.is_autocast_enabled(device)


def direct(x: torch.Tensor) -> bool:
    """Whether to pass a raw op by: on a GPU, where nothing traces, its dispatcher costs 20 us a call."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return on_gpu(x) and plain and not torch.compiler.is_compiling()


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((type(None), int, float, bool))


def at_once(op: Any, x: torch.Tensor, *arguments: Any, strided: bool = False) -> Any:
    """What a raw op of the CPU gives for x and the rest, by the shortest way there is; None where the careful
    way has to look at them: where something is recorded, cast, pinned, transformed or traced, on another
    device, and where the op itself refuses what does not fit. strided: x may lie in any strides.

    A token that is decoded meets some 400 ops, whose checks in Python took half as long as all they compute.
    """
    if (
        torch.is_grad_enabled()
        or type(x) is not torch.Tensor
        or not (x.is_cpu and (strided or x.is_contiguous()))
        or _forced not in (None, "cpu")
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or on_gpu(x)
        or native.load_error() is not None
    ):
        return None
    for t in arguments:
        kind = type(t)
        if kind in _TENSORS:
            if not t.is_cpu:
                return None
        elif kind not in _NUMBERS:
            return None
    try:
        return op(x, *arguments)
    except Exception:  # the careful way says what it is
        return None


def has_tangents(*tensors: Any) -> bool:
    """Whether forward-mode derivatives are taken of one of these, which kernels would drop."""
    if forward_ad._current_level < 0:
        return False
    # The level is the process's: it is also set while another thread is in torch.func.jvp.
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(
        wrapped(t) or forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
        if isinstance(t, torch.Tensor)
    )


def is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, during which the host cannot read values of x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def outside_inference() -> contextlib.AbstractContextManager:
    """For tensors that are kept from call to call: what is made inside may be saved for a backward later."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's backward that has no derivative itself, and raises where one is asked for.

    torch's once_differentiable alone is silent where the incoming gradient needs none: that of a loss.
    """
    once = torch.autograd.function.once_differentiable(backward)
    who = backward.__module__.rsplit(".", 1)[-1]

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{who}: second derivatives are asked for (create_graph=True), which its kernels have not; "
                "take them of the model as it was: peft_engine.unoptimize(model)"
            )
        return once(ctx, *gradients)

    return run


def forced() -> str | None:
    """The backend that is pinned, or None."""
    return _forced


def note(op: str, what: str) -> None:
    """Keeps what an op did otherwise than it was chosen to, for `explain`; the last of each op."""
    _notes[op] = what


def noted(op: str) -> str:
    """What was noted of an op in this process; empty when nothing was."""
    return _notes.get(op, "")


def available_backends() -> dict[str, str | None]:
    """Backend name to None when usable on this machine, else the reason it is not."""
    return {
        "cuda": native.cuda_error(),
        "triton": _triton_error(),
        "cpu": native.load_error(),
        "reference": None,
    }


@torch.compiler.assume_constant_result  # asked while torch.compile traces, which cannot trace the looking
def _triton_error() -> str | None:
    return _look_for_triton()


@functools.cache
def _look_for_triton() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run: pip install peft-engine[gpu]"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"its kernels need compute capability 8.0 (sm_80), this GPU has {major}.{minor}"
    return None


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class force_backend:
    """`force_backend(name)` pins a backend at once; used with `with`, its end restores what was before.

    A call that it refuses raises BackendError with the reason. Raises ValueError for a name that is none.
    """

    def __init__(self, name: str):
        global _forced
        self._before, _forced = _forced, _check(name, "force_backend")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        global _forced
        _forced = self._before


if os.environ.get("PEFT_ENGINE_BACKEND"):
    _forced = _check(os.environ["PEFT_ENGINE_BACKEND"], "PEFT_ENGINE_BACKEND")

"""Triton's interpreter, mended for kernel tests: bfloat16 arithmetic, bounds, races, any order of programs.

The stock interpreter (triton 3.6, 3.7) holds bfloat16 as raw 16-bit integers and adds them as such; it reads
and writes wherever a pointer leads; it runs programs one after another, so a race never shows. Here bfloat16
is ml_dtypes' numpy type, rounded after each operation as a GPU does it. Each tensor given to a kernel lies in
an address range of its own, 2^44 bytes from the next, so a pointer that leaves its tensor is found wherever
it leads. Two programs of one launch that touch an element, one of them writing, without an atomic, are found
whatever their order, unless the first released what it did by an atomic and the second acquired it by one on
the same address. An atomic is one thread's: it releases what lies before the program's last barrier.
"""

import contextlib
import functools
import inspect
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

SPACE = 44  # bits of the address range of one argument
MANY = -1  # read by several programs
ATOMIC = -2  # written by atomics
RELEASES, ACQUIRES = ("RELEASE", "ACQUIRE_RELEASE"), ("ACQUIRE", "ACQUIRE_RELEASE")


class OutOfBounds(IndexError):
    """A lane that is not masked reads or writes outside of the tensor its pointer was made from."""


class Race(RuntimeError):
    """Two programs of one launch touch one element, at least one of them writes, and not by an atomic."""


@dataclass
class _Argument:
    name: str
    real: int  # address of the first element
    nbytes: int  # up to the end of the last element
    storage: int
    writer: np.ndarray  # by byte of the storage: the epoch (from 1) that wrote it, 0 for none
    reader: np.ndarray


class _Memory:
    """The tensors of one launch, and who touched them.

    An epoch is what a program does from one barrier to the next. What an epoch touched is `known` to a
    program, so that it may touch it too, when the epoch is its own or was acquired.
    """

    def __init__(self, kernel: str):
        self.kernel = kernel
        self.arguments: list[_Argument] = []
        self.touched: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.program = 0
        self.epoch = 0
        self.known = np.zeros(1024, bool)  # by epoch; MANY and ATOMIC, at its end, never are
        self.mine: list[int] = []  # the epochs that are known
        self.released: dict[int, set[int]] = {}  # by the address of an atomic

    def start(self, program: int) -> None:
        """The next program; nothing of the others is known to it."""
        self.program = program
        self.known[self.mine] = False
        self.mine = []
        self.known[0] = True
        self.barrier()

    def barrier(self) -> None:
        """Ends an epoch."""
        self.epoch += 1
        if self.epoch >= self.known.size - 2:
            self.known = np.concatenate([self.known[:-2], np.zeros_like(self.known)])
        self._know([self.epoch])

    def _know(self, epochs: Sequence[int]) -> None:
        self.mine += [epoch for epoch in epochs if not self.known[epoch]]
        self.known[epochs] = True

    def synchronise(self, addresses: np.ndarray, mask: np.ndarray, sem: str) -> None:
        """An atomic on these addresses: what was released there becomes known, and what is known released."""
        for address in addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].reshape(-1).tolist():
            if sem in ACQUIRES:
                self._know(sorted(self.released.get(address, ())))
            if sem in RELEASES:
                self.released.setdefault(address, set()).update(e for e in self.mine if e != self.epoch)

    def address_of(self, name: str, tensor: torch.Tensor) -> int:
        """The address under which the kernel sees the tensor."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.touched:
            # zeros are not backed by memory until touched; only whoever runs all programs looks for races
            size = 0 if _only is not None else storage.nbytes()
            self.touched[storage.data_ptr()] = np.zeros(size, np.int32), np.zeros(size, np.int32)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = (last + 1) * tensor.element_size() if tensor.numel() else 0
        real = tensor.data_ptr() if tensor.numel() else 0
        writer, reader = self.touched[storage.data_ptr()]
        self.arguments.append(_Argument(name, real, nbytes, storage.data_ptr(), writer, reader))
        # the low bits are kept, so that alignment is what it is
        return (len(self.arguments) << SPACE) + real % 4096

    def _bounds_error(self, which: int, offset: int, what: str) -> OutOfBounds:
        if not 0 <= which < len(self.arguments):
            # an offset that wrapped far below zero leaves the range of its argument altogether
            return OutOfBounds(
                f"{self.kernel}: program {self.program - 1} {what} far outside of every argument"
            )
        a = self.arguments[which]
        where = f"{a.name} at byte {offset}, which has {a.nbytes}"
        return OutOfBounds(f"{self.kernel}: program {self.program - 1} {what} {where}")

    def real(self, pointers: np.ndarray, mask: np.ndarray, size: int, what: str, atomic: bool) -> np.ndarray:
        """The real addresses behind `pointers`; raises for lanes out of bounds and for races."""
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)  # a scalar's turned block is of int32
        out = np.zeros(pointers.shape, np.uint64)
        seen = pointers[mask].astype(np.uint64)
        if seen.size == 0:
            return out
        which = (seen >> np.uint64(SPACE)).astype(np.int64) - 1
        moved = np.empty(seen.shape, np.uint64)
        alone = which[:1] if (which == which[0]).all() else np.unique(which)  # most often one tensor
        for w in alone:
            lanes = which == w
            if not 0 <= w < len(self.arguments):
                raise self._bounds_error(int(w), 0, what)
            a = self.arguments[w]
            offset = (seen[lanes] - np.uint64(((int(w) + 1) << SPACE) + a.real % 4096)).astype(np.int64)
            wrong = (offset < 0) | (offset + size > a.nbytes)
            if wrong.any():
                raise self._bounds_error(int(w), int(offset[wrong][0]), what)
            self._note(a, np.unique(offset) + (a.real - a.storage), size, what, atomic)
            moved[lanes] = offset.astype(np.uint64) + np.uint64(a.real)
        out[mask] = moved
        return out

    def _note(self, a: _Argument, start: np.ndarray, size: int, what: str, atomic: bool) -> None:
        if not a.writer.size:
            return
        for byte in range(0, size, max(1, size // 2)):
            at = start + byte
            writer, reader = a.writer[at], a.reader[at]
            if atomic:
                clash = (writer != 0) & (writer != ATOMIC) | (reader != 0)
                a.writer[at] = ATOMIC
            elif what == "writes":
                clash = ~self.known[writer] | ~self.known[reader]
                a.writer[at] = self.epoch
            else:
                clash = ~self.known[writer]
                a.reader[at] = np.where(self.known[reader], self.epoch, MANY)
            if clash.any():
                raise Race(
                    f"{self.kernel}: program {self.program - 1} {what} {a.name} at byte "
                    f"{start[clash][0] + byte} of its storage, which another program of the launch touches"
                )


_memory: _Memory | None = None
_patched: set[int] = set()  # modules, by their globals, that were patched in this launch
_shuffle: random.Random | None = None
_only: Sequence[int] | None = None


def _np_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _np_dtype_of(scalar)


@functools.cache
def _np_dtype_of(scalar: tl.dtype) -> np.dtype:
    """Kept: the stock one makes its table anew for each of an operation's operands."""
    return np.dtype(ml_dtypes.bfloat16) if scalar == tl.bfloat16 else _stock_np_dtype(scalar)


_stock_np_dtype = interpreter._get_np_dtype


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    """A scalar is an array of one: from numpy 2.4 on, int() of it raises (Triton 3.6 calls that)."""
    _stock_patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


_stock_patch_lang_tensor = interpreter._patch_lang_tensor


class _Executor(interpreter.GridExecutor):
    """Runs the programs of a launch, in a shuffled order where asked."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        global _memory
        names = inspect.getfullargspec(self.fn).args
        kwargs = {k: v for k, v in kwargs.items() if k in names}
        memory = _memory = _Memory(self.fn.__name__)
        scope = interpreter._patch_lang(self.fn)
        _patched.clear()
        _patched.add(id(self.fn.__globals__))
        try:
            arguments = inspect.getcallargs(self.fn, *args, **kwargs)
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    kind = tl.str_to_ty(interpreter.triton.runtime.jit.mangle_type(value), None)
                    address = np.array([memory.address_of(name, value)], np.uint64)
                    arguments[name] = tl.tensor(interpreter.TensorHandle(address, kind), kind)
                elif name not in self.constexprs:
                    arguments[name] = interpreter._implicit_cvt(value)
            grid = self.grid(arguments) if callable(self.grid) else self.grid
            grid = (*grid, *(1,) * (3 - len(grid)))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            programs = (
                list(np.ndindex(*grid)) if _only is None else [np.unravel_index(p, grid) for p in _only]
            )
            if _shuffle is not None:
                _shuffle.shuffle(programs)
            for program, index in enumerate(programs, start=1):
                memory.start(program)
                interpreter.interpreter_builder.set_grid_idx(*index)
                self.fn(**arguments)
        except interpreter.InterpreterError as error:
            # what a device function raises comes wrapped
            cause: BaseException = error
            while isinstance(cause, interpreter.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None
        finally:
            scope.restore()
            _memory = None


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    """As InterpretedFunction.__call__, which patches the language anew for each: a third of the time."""
    if id(function.fn.__globals__) not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(id(function.fn.__globals__))
    try:
        return function.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


class _Builder(interpreter.InterpreterBuilder):
    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        dtype = ptrs.get_element_ty()
        np_dtype = _np_dtype(dtype)
        raw = np.dtype(np.uint16) if dtype == tl.bfloat16 else np_dtype
        real = _memory.real(ptrs.data, mask.data, np_dtype.itemsize, "reads", atomic=False)
        if other is None:
            fill = np.zeros(ptrs.data.shape, raw)
        else:
            fill = np.broadcast_to(other.data, ptrs.data.shape).astype(np_dtype).view(raw)
        keep = np.ascontiguousarray(np.broadcast_to(mask.data, ptrs.data.shape).astype(bool))
        loaded = interpreter._interpreter.load(real, keep, np.ascontiguousarray(fill), raw)
        return interpreter.TensorHandle(loaded.view(np_dtype), dtype)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        np_dtype = _np_dtype(ptrs.get_element_ty())
        raw = np.dtype(np.uint16) if np_dtype == ml_dtypes.bfloat16 else np_dtype
        real = _memory.real(ptrs.data, mask.data, np_dtype.itemsize, "writes", atomic=False)
        data = np.ascontiguousarray(np.broadcast_to(value.data, ptrs.data.shape).astype(np_dtype)).view(raw)
        keep = np.ascontiguousarray(np.broadcast_to(mask.data, ptrs.data.shape).astype(bool))
        return interpreter._interpreter.store(real, data, keep)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        itemsize = _np_dtype(ptr.get_element_ty()).itemsize
        real = _memory.real(ptr.data, mask.data, itemsize, "writes", atomic=True)
        _memory.synchronise(real, mask.data, sem.name)
        return super().create_atomic_rmw(
            rmwOp, interpreter.TensorHandle(real, ptr.dtype), val, mask, sem, scope
        )

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        itemsize = _np_dtype(ptr.get_element_ty()).itemsize
        everywhere = np.ones(ptr.data.shape, bool)
        real = _memory.real(ptr.data, everywhere, itemsize, "writes", atomic=True)
        _memory.synchronise(real, everywhere, sem.name)
        return super().create_atomic_cas(interpreter.TensorHandle(real, ptr.dtype), cmp, val, sem, scope)

    def create_barrier(self):
        _memory.barrier()

    def cast_impl(self, src, dst_type):
        return interpreter.TensorHandle(src.data.astype(_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = cast_impl
    create_fp_ext = create_fp_trunc = cast_impl

    def create_int_cast(self, src, dst_type, is_signed):
        return self.cast_impl(src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # A tensor core multiplies exactly and adds in float32; float64 stays.
        wide = np.float64 if d.data.dtype == np.float64 else np.float32
        product = np.matmul(a.data.astype(wide), b.data.astype(wide))
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


@contextlib.contextmanager
def mended(shuffle: int | None = None, only: Sequence[int] | None = None) -> Iterator[None]:
    """Inside, kernels are interpreted as described above.

    With `shuffle`, a seed, programs run in any order. With `only`, just these programs of a launch run (over
    tensors of gigabytes, say), and races are not looked for.
    """
    global _shuffle, _only
    builder = interpreter.interpreter_builder
    function = interpreter.InterpretedFunction
    before = interpreter.GridExecutor, interpreter._get_np_dtype, builder.__class__, _shuffle, _only
    call, interpreter._patch_lang_tensor = function.__call__, _patch_lang_tensor
    function.__call__ = _call_device_function
    interpreter.GridExecutor, interpreter._get_np_dtype = _Executor, _np_dtype
    builder.__class__ = _Builder
    _shuffle, _only = None if shuffle is None else random.Random(shuffle), only
    try:
        yield
    finally:
        interpreter.GridExecutor, interpreter._get_np_dtype, builder.__class__, _shuffle, _only = before
        function.__call__, interpreter._patch_lang_tensor = call, _stock_patch_lang_tensor

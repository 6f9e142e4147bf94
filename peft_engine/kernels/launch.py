"""Launches a Triton kernel with less of Triton's own work for each call.

Triton binds and specialises all arguments anew at every launch, 30 us for a kernel of 25 (measured, triton
3.6, one core); a layer's forward and backward are a dozen launches. Here a compiled kernel is found by the
arguments themselves, and for values that are new by what Triton specialises on: the types, the pointers'
alignment, integers that are 1, divisible by 16, or 64 bits wide; of integers that a kernel's decorator names
in do_not_specialize, as what changes with the length of a batch, only the last.
"""

from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}  # by what Triton specialises on
_seen: dict[tuple[Any, ...], Any] = {}  # by the values, for tensors at multiples of 16 bytes
_MOST_SEEN = 4096  # batches of many lengths leave that many behind
_FREED = (
    "the memory of a tensor {} was freed. Under fully_shard a weight is there while its module runs, forward "
    "or backward: run whole modules"
)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own can be called in kernels, too, and takes 3 us; a layer calls it 28
    times.)
    """
    return -(-a // b)


_MOST = 65535  # programs along a grid's second or third dimension


def folded(programs: int) -> tuple[int, int]:
    """The second and third dimension of a grid of as many programs, or a few more that find nothing to do.

    Program program_id(2) * num_programs(1) + program_id(1) of them.
    """
    deep = cdiv(programs, _MOST)
    return cdiv(programs, max(deep, 1)), max(deep, 1)


def _none(who: str, x: torch.Tensor) -> int:
    """0, for a tensor that has no address because it is empty; RuntimeError where its memory was freed."""
    if x.numel() and x.device.type != "meta":
        raise RuntimeError(f"{who}: {_FREED.format(tuple(x.shape))}")
    return 0


def addresses(who: str, *tensors: torch.Tensor | None) -> list[int | None]:
    """Of each tensor its address, None where there is none; RuntimeError where its memory was freed."""
    return [None if x is None else x.data_ptr() or _none(who, x) for x in tensors]


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], **options
):
    """Runs `kernel` on the device of its first tensor, on that device's current stream.

    arguments: all that are no tl.constexpr, in the kernel's order; constants: the tl.constexpr ones, which
    the kernel names last, in its order; options: num_warps, num_stages, enable_fp_fusion.
    """
    device, bits = None, 0
    key: list[Any] = [id(kernel), *constants.values(), *options.values()]
    raw: list[Any] = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            device = device or a.device
            at = a.data_ptr() or _none(kernel.__name__, a)
            bits |= at
            key.append(a.dtype)
            raw.append(at)  # an address as it is: for a tensor Triton asks the driver whether it is the GPU's
        else:
            key.append(type(a))  # 1 and 1.0 are one to a dict
            key.append(a)
            raw.append(a)
    assert device is not None
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, **options)
    key.append(device)
    seen = None if bits % 16 else tuple(key)
    compiled = None if seen is None else _seen.get(seen)
    if compiled is None:
        special = _specialised(kernel, device, arguments, constants, options)
        compiled = _compiled.get(special)
        if compiled is None:
            names = kernel.arg_names[len(arguments) :]
            if tuple(names) != tuple(constants):
                raise TypeError(
                    f"launch: {kernel.__name__} ends with the constants {names}, got {list(constants)}"
                )
            compiled = kernel[grid](*arguments, **constants, **options)
            if device.type == "cuda" and compiled is not None:
                _compiled[special] = compiled
            return None
        if seen is not None:
            if len(_seen) >= _MOST_SEEN:
                _seen.clear()
            _seen[seen] = compiled
    compiled[(*grid, 1, 1)[:3]](*raw, *constants.values())
    return None


def _specialised(kernel, device, arguments, constants, options) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for."""
    key: list[Any] = [id(kernel), device, *constants.values(), *options.values()]
    alike = getattr(kernel, "do_not_specialize", ())
    for name, a in zip(kernel.arg_names, arguments, strict=False):  # the constants come last
        if isinstance(a, torch.Tensor):
            key += a.dtype, a.data_ptr() % 16 == 0
        elif isinstance(a, int):
            narrow = -(2**31) <= a < 2**31
            key.append(narrow if name in alike else (a == 1, a % 16 == 0, narrow))
    return tuple(key)

"""Launches a Triton kernel with less of Triton's own work for each call.

Triton binds and specialises all arguments anew at every launch, 30 us for a kernel of 25 (measured, triton
3.6, one core); a layer's forward and backward are a dozen launches. Here a compiled kernel is found by what
Triton specialises on, in 8 us: the types, the pointers' alignment, integers that are 1, divisible by 16, or
64 bits wide.
"""

from typing import Any

import torch

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], **options
):
    """Runs `kernel` on the device of its first tensor, on that device's current stream.

    arguments: all that are no tl.constexpr, in the kernel's order; constants: the tl.constexpr ones, which
    the kernel names last, in its order; options: num_warps, num_stages, enable_fp_fusion.
    """
    device = next(a for a in arguments if isinstance(a, torch.Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, arguments, constants, **options)
    key: list[Any] = [id(kernel), device.index, *constants.values(), *options.values()]
    raw: list[Any] = []
    for a in arguments:
        if isinstance(a, torch.Tensor):
            at = a.data_ptr()
            key += a.dtype, at % 16 == 0
            raw.append(at)  # an address as it is: for a tensor Triton asks the driver whether it is the GPU's
        elif isinstance(a, int):
            key.append((a == 1, a % 16 == 0, -(2**31) <= a < 2**31))
            raw.append(a)
        else:
            raw.append(a)
    found = tuple(key)
    compiled = _compiled.get(found)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*raw, *constants.values())
        return None
    names = kernel.arg_names[len(arguments) :]
    if tuple(names) != tuple(constants):
        raise TypeError(f"launch: {kernel.__name__} ends with the constants {names}, got {list(constants)}")
    compiled = kernel[grid](*arguments, **constants, **options)
    if device.type == "cuda" and compiled is not None:
        _compiled[found] = compiled
    return None

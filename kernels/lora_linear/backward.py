"""lora_linear's backward on a GPU: dx along a path as the forward's, dA and dB by the skinny product."""

import torch
from peft_engine.kernels.lora_linear import paths, single, workspace
from peft_engine.kernels.lora_linear.down import down
from peft_engine.kernels.lora_linear.forward import rows_of
from peft_engine.kernels.lora_linear.outer import outer


def backward(
    dy, x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, scaling, dropout_p, seed,
    need_dx, need_da
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx, dA and dB; the arguments of the raw op lora_linear_backward. h None: B is frozen.

    What is not asked for is empty memory: dx of no element, dA and dB of their shapes.
    """
    flat = rows_of(dy)
    columns = x.shape[-1]
    base = weight, absmax, nested_absmax, offset, blocksize
    dx, dh, arrivals = dy.new_empty(0), None, None
    if need_dx:
        arguments = flat, base, columns, lora_a, lora_b, scaling, dropout_p, seed
        path = paths.choose("backward", flat, base, columns, lora_a, dropout_p)
        if path == "workspace":
            try:
                dx, dh, arrivals = workspace.backward(*arguments)
            except torch.OutOfMemoryError as error:
                paths.out_of_memory("backward", flat, base, columns, lora_a, error)
                path = "single"  # after the handler: what was raised holds the workspace
        if path == "single":
            dx, dh = single.backward(*arguments)
        dx = dx.view(x.shape)
    if lora_a is None:
        return dx, dy.new_empty(0), dy.new_empty(0)
    da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
    if not need_da and h is None:
        return dx, da, db
    if need_da and dh is None:
        dh = down(flat, lora_b.t(), scaling)
    nothing = flat[:, :0]  # in the place of what is not asked for: a product without tiles
    found = outer(
        dh if need_da else h, rows_of(x) if need_da else nothing, dh if h is None else h,
        nothing if h is None else flat, lora_a.dtype, scaling=scaling, dropout_p=dropout_p, seed=seed,
        arrivals=arrivals,
    )  # fmt: skip
    return dx, found[0] if need_da else da, db if h is None else found[1]

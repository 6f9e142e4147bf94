"""lora_linear's forward on a GPU: the path for these rows, and what it gives."""

import torch
from peft_engine.kernels.lora_linear import paths, single, workspace


def forward(
    x, weight, absmax, nested_absmax, offset, blocksize, out_features, lora_a, lora_b, scaling, bias,
    dropout_p, seed,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y (..., N) and h (M, R) float32; the arguments of the raw op lora_linear_forward."""
    flat = rows_of(x)
    base = weight, absmax, nested_absmax, offset, blocksize
    bias = None if bias is None else bias.to(x.dtype)
    path = paths.choose("forward", flat, base, out_features, lora_a, dropout_p)
    arguments = flat, base, out_features, lora_a, lora_b, scaling, bias, dropout_p, seed
    if path == "few_rows":
        from peft_engine.kernels.lora_linear import few_rows

        y, h = few_rows.forward(*arguments)
    if path == "workspace":
        try:
            y, h = workspace.forward(*arguments)
        except torch.OutOfMemoryError as error:
            paths.out_of_memory("forward", flat, base, out_features, lora_a, error)
            path = "single"  # after the handler: what was raised holds the workspace
    if path == "single":
        y, h = single.forward(*arguments)
    return y.view(*x.shape[:-1], out_features), h


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as (M, K) with its columns together, in its own memory where that is possible."""
    flat = x.reshape(-1, x.shape[-1])
    # An expanded row has stride 0: the kernels read it well, the library products do not.
    return flat if flat.stride(-1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()

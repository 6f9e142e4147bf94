"""Many adapters in one batch: the base's product along its own path, then the adapters over sorted rows."""

import torch
from peft_engine.kernels.lora_linear import forward as alone
from peft_engine.kernels.lora_linear.backward import backward as backward_alone
from peft_engine.kernels.lora_linear.down import down
from peft_engine.kernels.lora_linear.outer import outer
from peft_engine.kernels.lora_linear.up import up_


def forward(
    x, weight, absmax, nested_absmax, offset, blocksize, out_features, lora_a, lora_b, order, bounds, bias
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y (..., N), and h (M', R) float32 of the rows with an adapter, in sorted order."""
    y, _ = alone.forward(
        x, weight, absmax, nested_absmax, offset, blocksize, out_features, None, None, 1.0, bias, 0.0, None
    )
    h = down(alone.rows_of(x), lora_a, 1.0, order=order, bounds=bounds)
    up_(y.view(-1, out_features), h, lora_b, 1.0, order=order, bounds=bounds)
    return y, h


def backward(
    dy, x, weight, absmax, nested_absmax, offset, blocksize, lora_a, lora_b, h, order, bounds, need_dx
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx (or nothing), dA (G, R, K) and dB (G, N, R); an adapter without rows gets zeros."""
    flat = alone.rows_of(dy)
    base = weight, absmax, nested_absmax, offset, blocksize
    dx, _, _ = backward_alone(dy, x, *base, None, None, None, 1.0, 0.0, None, need_dx, False)
    dh = down(flat, lora_b.transpose(1, 2), 1.0, order=order, bounds=bounds)
    if need_dx:
        up_(dx.view(-1, x.shape[-1]), dh, lora_a.transpose(1, 2), 1.0, order=order, bounds=bounds)
    da, db = outer(dh, alone.rows_of(x), h, flat, lora_a.dtype, order=order, bounds=bounds)
    return dx, da, db

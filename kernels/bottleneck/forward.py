"""bottleneck's forward on a GPU: in one launch, or in several where that fills it better."""

import torch
from peft_engine.kernels.bottleneck import fused, split, tiles
from peft_engine.kernels.bottleneck.call import Call


def forward(
    x, residual, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, scaling, eps
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y (M, H), the middle (M, R), stats (M, 2) or (0, 2); the arguments of the raw op bottleneck_forward."""
    call = Call(
        down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, scaling, eps
    )  # fmt: skip
    rows = x.shape[0]
    y = torch.empty_like(x)
    middle = down_weight.new_empty(rows, call.width)
    stats = x.new_empty(0 if norm_weight is None else rows, 2, dtype=torch.float32)
    if rows:
        path = split if tiles.choose(rows, call, x.device) == "split" else fused
        path.forward(call, x, x if residual is None else residual, y, middle, stats)
    return y, middle, stats

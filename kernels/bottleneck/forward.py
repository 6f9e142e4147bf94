"""bottleneck's forward on a GPU: in CUDA for few rows, else in Triton, in one launch or several."""

import torch
from peft_engine.kernels.bottleneck import few_rows, fused, split, tiles
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
        path = {"few_rows": few_rows, "split": split, "fused": fused}[choose(call, x)]
        path.forward(call, x, x if residual is None else residual, y, middle, stats)
    return y, middle, stats


def choose(call: Call, x: torch.Tensor) -> str:
    """The path: few_rows, or one of tiles.PATHS."""
    return "few_rows" if few_rows.refuse(call, x) is None else tiles.choose(x.shape[0], call, x.device)

"""bottleneck's backward on a GPU: dm and dx along the forward's paths, then the sums over the rows."""

import torch
from peft_engine.kernels.bottleneck import fused, outer, split, tiles
from peft_engine.kernels.bottleneck.call import Call


def backward(
    dy, x, middle, stats, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation,
    scaling, residual_is_x, wanted,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dx, dWd, dbd, dWu, dbu and the norm's two; the arguments of the raw op bottleneck_backward.

    What is not wanted has no element; x is read where there is a norm or dWd is wanted.
    """
    call = Call(down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias, activation, scaling)
    dy = dy.contiguous()
    rows = dy.shape[0]
    dx = torch.empty_like(dy) if wanted[0] else None
    of_down = wanted[1] or wanted[2] or wanted[5] or wanted[6]
    dm = None
    if dx is not None or of_down:
        dm = torch.empty_like(middle)
        if rows:
            path = split if tiles.choose(rows, call, dy.device) == "split" else fused
            path.backward(call, dy, x, middle, stats, dm, dx, residual_is_x=residual_is_x)
    down, up = [dy] * 4, [dy] * 2
    if of_down:
        # dbd alone needs no x, and may be asked for where x was not kept
        down = outer.of_down(call, dm, x if wanted[1] or norm_weight is not None else dy, stats)
    if wanted[3] or wanted[4]:
        up = outer.of_up(call, middle, dy, stats)
    grads = dx, *down[:2], *up, *down[2:]
    return tuple(
        g if want and g is not None else dy.new_empty(0) for g, want in zip(grads, wanted, strict=True)
    )

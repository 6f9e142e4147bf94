"""The training path: the weight dequantised beside the adapter, so that one library product does both.

With h = drop(x) A^T in spare columns behind x and dh = s dy B behind dy,

    y = [x | h] [W | s B]^T                dx = [dy | dh] [W ; A]

are one product each, and the adapter costs no pass over x, y or dy beyond those that form h and dh. The
workspace, [W | s B] or [W ; A], is asked for in every call: torch's allocator hands the same memory from
layer to layer, and on each stream and in each graph its own, which a buffer kept here would have to imitate.
Terms: half precision h and B would lose what a float32 adapter keeps, so h = h1 + h2, s B = w1 + w2 in x's
dtype and [h1 | h2 | h1] [w1 | w1 | w2]^T = h1 w1 + h2 w1 + h1 w2; an adapter of x's own dtype has one term.
"""

import torch
from peft_engine.kernels.lora_linear import fill
from peft_engine.kernels.lora_linear.down import down
from peft_engine.kernels.lora_linear.up import up_
from torch.nn import functional as F

from peft_engine.activations import row_stride, spare_width, with_spare


def widened(
    x: torch.Tensor, a: torch.Tensor, split, scaling: float, dropout_p: float, seed, width: int, arrivals
) -> tuple:
    """[x | h] with h = scaling drop(x) a^T behind x in its terms, and h in float32.

    In x's own memory when it has spare columns; else x is copied in the pass that forms h.
    """
    buffer = with_spare(x, width)
    copy = buffer is None
    if buffer is None:
        buffer = x.new_empty(x.shape[0], row_stride(x.shape[1], width))[:, : x.shape[1] + width]
    h = down(
        x, a, scaling, buffer=buffer, copy=copy, terms=1 if split is None else 3, dropout_p=dropout_p,
        seed=seed, split=split, arrivals=arrivals,
    )  # fmt: skip
    return buffer, h


def forward(x, base, out_features, a, b, scaling, bias, dropout_p, seed):
    """y (M, N) and h (M, R) float32, for x (M, K) and base = (weight, absmax, nested_absmax, offset,
    blocksize).
    """
    columns = x.shape[1]
    if a is None:
        y = F.linear(x, fill.weight(base, out_features, columns, x), bias)
        return y, x.new_empty(0, 0, dtype=torch.float32)
    if not augments(x, base, out_features, columns, a):
        h = down(x, a, 1.0, dropout_p=dropout_p, seed=seed)
        y = F.linear(x, fill.weight(base, out_features, columns, x), bias)
        up_(y, h, b, scaling)
        return y, h
    width = spare_width(a.shape[0], a.dtype, x.dtype)
    both, split, arrivals = fill.forward(base, out_features, a, b, scaling, x, width)
    buffer, h = widened(x, a, split, 1.0, dropout_p, seed, width, arrivals)
    return F.linear(buffer, both, bias), h


def backward(dy, base, columns, a, b, scaling, dropout_p, seed):
    """dx (M, K) and dh (M, R) float32, scaled, for dy (M, N); and counters at 0 for `outer`, or None."""
    out_features = dy.shape[1]
    if a is None:
        return dy @ fill.weight(base, out_features, columns, dy), None, None
    if dropout_p > 0.0 or not augments(dy, base, columns, out_features, a):
        # What the forward dropped gets no gradient through the adapter, and all of it through the base.
        dh = down(dy, b.t(), scaling)
        dx = dy @ fill.weight(base, out_features, columns, dy)
        up_(dx, dh, a.t(), 1.0, dropout_p=dropout_p, seed=seed)
        return dx, dh, None
    width = spare_width(a.shape[0], a.dtype, dy.dtype)
    both, split, arrivals = fill.backward(base, out_features, a, b, scaling, dy, width)
    # the terms are of scaling * B^T already
    buffer, dh = widened(dy, b.t(), split, scaling if split is None else 1.0, 0.0, None, width, arrivals)
    return buffer @ both, dh, arrivals


def augments(x, base, gives: int, takes: int, a) -> bool:
    """Whether one product with the adapter inside moves fewer bytes than two and a pass over the result.

    Counted in elements: x written once where it has no spare columns, and a dense weight copied, against a
    result of `gives` columns read and written once more.
    """
    rows = x.shape[0]
    room = with_spare(x, spare_width(a.shape[0], a.dtype, x.dtype)) is not None
    extra = 0 if room else rows * x.shape[1]
    if base[1] is None:
        extra += 2 * gives * takes
    return extra <= 2 * rows * gives

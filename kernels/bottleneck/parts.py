"""What the bottleneck's kernels are made of: mixed products, activations, the norm, row blocks."""

import triton
import triton.language as tl
from peft_engine.kernels.lora_linear.parts import wide_dot


@triton.jit
def product(a, b, acc):
    """acc + a b in float32, exact to float32 where one of them is float32.

    wide_dot splits a float32 a beside bfloat16; a float32 b (the weight) is split here, in the same way.
    """
    if a.dtype == tl.bfloat16:
        if b.dtype == tl.float32:
            first = b.to(tl.bfloat16)
            rest = b - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            third = (rest - second.to(tl.float32)).to(tl.bfloat16)
            small = tl.dot(a, second, tl.dot(a, third))
            acc = tl.dot(a, first, acc) + small
        else:
            acc = wide_dot(a, b, acc)
    else:
        acc = wide_dot(a, b, acc)
    return acc


@triton.jit
def activated(m, ACTIVATION: tl.constexpr):
    """act(m) of float32 values."""
    if ACTIVATION == "relu":
        a = tl.where(m <= 0.0, 0.0, m)  # not maximum: a NaN stays one
    elif ACTIVATION == "gelu":
        a = 0.5 * m * (1.0 + tl.erf(m * 0.7071067811865476))
    elif ACTIVATION == "silu":
        a = m / (1.0 + tl.exp(-m))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        a = tanh(m)
    return a


@triton.jit
def tanh(m):
    """Without libdevice. Small m by Cephes' polynomial (tanhf): 1 - e^-2m would cancel there."""
    size = tl.abs(m)
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    z = m * m
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(size < 0.625, m + m * z * p, tl.where(m < 0.0, -large, large))


@triton.jit
def slope(m, ACTIVATION: tl.constexpr):
    """act'(m) of float32 values; relu's at 0 is 0, as torch has it."""
    if ACTIVATION == "relu":
        d = tl.where(m <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        d = 0.5 * (1.0 + tl.erf(m * 0.7071067811865476)) + m * 0.3989422804014327 * tl.exp(-0.5 * m * m)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-m))
        d = s * (1.0 + m * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "tanh")
        e = tl.exp(-2.0 * tl.abs(m))
        d = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2 without the cancellation
    return d


# --- the norm -----------------------------------------------------------------------------------------------


@triton.jit
def statistics(x, row, inside, columns, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of rows, in one pass.

    Blocks' means and squares about them are merged (Chan et al.): E[x^2] - E[x]^2 would cancel.
    """
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = k < columns
        tile = tl.load(x + row[:, None] * columns + k[None, :], inside[:, None] & there[None, :], other=0)
        tile = tile.to(tl.float32)
        before = tl.cast(start, tl.float32)
        count = tl.minimum(columns - start, BLOCK_K).to(tl.float32)
        here = tl.sum(tile, 1) / count
        off = tl.where(there[None, :], tile - here[:, None], 0.0)
        apart = here - mean
        share = count / (before + count)
        mean += apart * share
        squares += tl.sum(off * off, 1) + apart * apart * before * share
    return mean, tl.rsqrt(squares / columns + eps)


@triton.jit
def saved_statistics(stats, row, inside):
    """Mean and rstd of rows; 0 of those outside, whose normalised values are then 0."""
    return tl.load(stats + 2 * row, inside, other=0.0), tl.load(stats + 2 * row + 1, inside, other=0.0)


@triton.jit
def norm_gradient(dz, tile, mean, rstd, norm_weight, n, there):
    """The gradient of the normalised values, and these: g = dz w and (x - mean) rstd."""
    weight = tl.load(norm_weight + n, there, other=0).to(tl.float32)
    return dz * weight[None, :], (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]


# --- a row block's two products -----------------------------------------------------------------------------


@triton.jit
def contracted(
    x, weight, norm_weight, norm_bias, mean, rstd, row, inside, r, first, last, columns, width, stride_wr,
    stride_wk,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum over the columns k from first to last of z[m, k] weight[r, k]; z is LN(x) if NORM, else x."""
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = k < columns
        tile = tl.load(x + row[:, None] * columns + k[None, :], inside[:, None] & there[None, :], other=0)
        if NORM:
            scale = tl.load(norm_weight + k, there, other=0).to(tl.float32)
            z = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None] * scale[None, :]
            if NORM_BIAS:
                z += tl.load(norm_bias + k, there, other=0).to(tl.float32)[None, :]
            tile = z.to(weight.dtype.element_ty)
        at = weight + k[:, None].to(tl.int64) * stride_wk + r[None, :].to(tl.int64) * stride_wr
        acc = product(tile, tl.load(at, there[:, None] & (r < width)[None, :], other=0), acc)
    return acc


@triton.jit
def weight_tile(weight, r, n, there, width, stride_wr, stride_wn):
    """weight[r, n], 0 outside."""
    at = weight + r[:, None].to(tl.int64) * stride_wr + n[None, :].to(tl.int64) * stride_wn
    return tl.load(at, (r < width)[:, None] & there[None, :], other=0)


@triton.jit
def middle_of(acc, down_bias, r, width, DOWN_BIAS: tl.constexpr):
    """m in float32: the sums and the bias."""
    if DOWN_BIAS:
        acc += tl.load(down_bias + r, r < width, other=0).to(tl.float32)[None, :]
    return acc


@triton.jit
def gradient_of_middle(acc, middle, row, inside, r, width, scaling, ACTIVATION: tl.constexpr):
    """dm = scaling (dy Wu) act'(m) in float32, of the sums dy Wu."""
    m = tl.load(middle + row[:, None] * width + r[None, :], inside[:, None] & (r < width)[None, :], other=0)
    return acc * scaling * slope(m.to(tl.float32), ACTIVATION)


@triton.jit
def store_result(
    raised, residual, up_bias, y, row, inside, n, there, columns, scaling, UP_BIAS: tl.constexpr
):  # fmt: skip
    """y = residual + scaling (raised + bias), one rounding."""
    if UP_BIAS:
        raised += tl.load(up_bias + n, there, other=0).to(tl.float32)[None, :]
    at = row[:, None] * columns + n[None, :]
    both = inside[:, None] & there[None, :]
    base = tl.load(residual + at, both, other=0).to(tl.float32)
    tl.store(y + at, (base + scaling * raised).to(y.dtype.element_ty), both)

"""q and k turned by their angles in one launch: a program has all heads of a token and reads its angles once.

Floor: bytes, q and k read and written.
"""

import torch
import triton
import triton.language as tl

from peft_engine.kernels.launch import launch

PAIRS = 2048  # elements of a tile of heads. Not timed on a GPU.


@triton.jit
def turn(
    x, y, stride_xh, stride_yh, c1, c2, s1, s2, d,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """The heads of one token; what lies behind the rotated part is copied."""
    for start in tl.static_range(0, HEADS, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        both = (h < HEADS)[:, None] & (d < HALF)[None, :]
        at = x + h[:, None].to(tl.int64) * stride_xh + d[None, :]
        to = y + h[:, None].to(tl.int64) * stride_yh + d[None, :]
        x1 = tl.load(at, both, other=0).to(tl.float32)
        x2 = tl.load(at + HALF, both, other=0).to(tl.float32)
        if BACK:
            y1 = x1 * c1 + x2 * s2
            y2 = x2 * c2 - x1 * s1
        else:
            y1 = x1 * c1 - x2 * s1
            y2 = x2 * c2 + x1 * s2
        tl.store(to, y1.to(y.dtype.element_ty), both)
        tl.store(to + HALF, y2.to(y.dtype.element_ty), both)
        if REST > 0:
            e = 2 * HALF + tl.arange(0, REST)
            both = (h < HEADS)[:, None] & (e < HEAD_DIM)[None, :]
            rest = tl.load(x + h[:, None].to(tl.int64) * stride_xh + e[None, :], both, other=0)
            tl.store(y + h[:, None].to(tl.int64) * stride_yh + e[None, :], rest, both)


@triton.jit
def rotate_kernel(
    q, k, cos, sin, out_q, out_k, tokens, stride_cb,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_oqb, stride_oqt, stride_oqh,
    stride_okb, stride_okt, stride_okh,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    BACK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """out_q and out_k (B, T, H, D) of a token; cos and sin (B or 1, T, 2 HALF). BACK: the turn transposed."""
    b = (tl.program_id(0) // tokens).to(tl.int64)
    t = (tl.program_id(0) % tokens).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    at = b * stride_cb + t * (2 * HALF) + d
    c1 = tl.load(cos + at, d < HALF, other=0).to(tl.float32)[None, :]
    c2 = tl.load(cos + at + HALF, d < HALF, other=0).to(tl.float32)[None, :]
    s1 = tl.load(sin + at, d < HALF, other=0).to(tl.float32)[None, :]
    s2 = tl.load(sin + at + HALF, d < HALF, other=0).to(tl.float32)[None, :]
    turn(
        q + b * stride_qb + t * stride_qt, out_q + b * stride_oqb + t * stride_oqt, stride_qh, stride_oqh,
        c1, c2, s1, s2, d, HEADS_Q, HEAD_DIM, HALF, BACK, BLOCK_Q, REST,
    )  # fmt: skip
    turn(
        k + b * stride_kb + t * stride_kt, out_k + b * stride_okb + t * stride_okt, stride_kh, stride_okh,
        c1, c2, s1, s2, d, HEADS_K, HEAD_DIM, HALF, BACK, BLOCK_K, REST,
    )  # fmt: skip


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, T, Hq, D) and k (B, T, Hk, D), their last dimension dense; the arguments of the raw op rotary."""
    out_q, out_k = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    batch, tokens, heads_q, head_dim = q.shape
    heads_k, half = k.shape[2], cos.shape[2] // 2
    if not batch * tokens * head_dim:
        return out_q, out_k
    block_d = triton.next_power_of_2(max(half, 1))
    most = max(1, PAIRS // block_d)
    rest = head_dim - 2 * half
    launch(
        rotate_kernel, (batch * tokens,),
        (
            q, k, cos, sin, out_q, out_k, tokens, 0 if cos.shape[0] == 1 else cos.stride(0),
            *q.stride()[:3], *k.stride()[:3], *out_q.stride()[:3], *out_k.stride()[:3],
        ),
        {
            "HEADS_Q": heads_q, "HEADS_K": heads_k, "HEAD_DIM": head_dim, "HALF": half, "BACK": transposed,
            "BLOCK_Q": min(most, triton.next_power_of_2(heads_q)),
            "BLOCK_K": min(most, triton.next_power_of_2(heads_k)),
            "BLOCK_D": block_d, "REST": triton.next_power_of_2(rest) if rest else 0,
        },
        num_warps=4,
    )  # fmt: skip
    return out_q, out_k

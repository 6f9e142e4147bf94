"""out and lse of prefix_attention (Dao 2023, arXiv 2307.08691): one pass over the keys, the softmax online.

Floor at training: operations, 4 B Hq T (P + S) D (half of the real keys' when causal); the prefix is read
from its one copy, in the loop before the real keys'. Floor at decode: bytes, keys and values read once; there
are then too few rows for a GPU, so the keys are split and a second kernel merges the chunks by their lse.
"""

import torch
import triton
import triton.language as tl
from peft_engine.kernels.prefix_attention import tiles
from peft_engine.kernels.prefix_attention.call import Call
from peft_engine.kernels.prefix_attention.parts import (
    LENGTHS,
    LN_2,
    at_rows,
    block,
    blocks_of,
    kept,
    packed,
    power,
    product,
    program,
    row_keys,
    rows_anew,
    scores,
    seen_by,
    sum_product,
    units,
)

from peft_engine.kernels.launch import cdiv, launch
from peft_engine.ops.attention import by_token


@triton.jit
def attend(
    acc, top, total, q, k, v, stride_k, stride_v, start, end, blocks, lead, free, a, z, bias_at, unit, cap,
    d, row_key, column, threshold, MASKED: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    CAPPED: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax carried on over blocks of keys from `start`; `free` blocks after `lead` left out.

    column: of key 0 in [prefix ; keys]. total is of all keys, also of those that dropout takes.
    """
    for i in tl.range(blocks, num_stages=STAGES):
        at = start + i * BLOCK_N
        if MASKED:
            at += tl.where(i < lead, 0, free * BLOCK_N)
        n = at + tl.arange(0, BLOCK_N)
        place = tl.minimum(n, end - 1) if MASKED else n
        keys = block(k, stride_k, place, d, HEAD_DIM, D, q.dtype)
        s = product(q, tl.trans(keys))
        s, _ = scores(
            s, n[None, :], a[:, None], z[:, None], bias_at[:, None], unit, cap, MASKED, BIAS, CAPPED, EXACT
        )
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        p = power(s - base[:, None], EXACT)
        fade = power(top - base, EXACT)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(row_key[:, None], (column + n)[None, :], threshold), p, 0.0)
        values = block(v, stride_v, place, d, HEAD_DIM, D, q.dtype)
        acc = sum_product(p, values, acc * fade[:, None])
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, prefix_k, prefix_v, first, last, bias, out, lse, queries, keys, prefix, kv_heads, tiles, chunk,
    scale, softcap, seed, threshold, inverse_keep,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp, stride_bb, stride_bh, stride_bt,
    stride_oc, stride_ob, stride_oh, stride_ot, stride_lc, stride_lb,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PREFIX_STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of packed rows, over the chunk's part of [prefix; keys].

    out (chunks, B, Hq, T, D) by its strides, lse (chunks, B, Hq, T) with T and Hq together.
    """
    tile, head, batch = program(tiles, kv_heads)
    tile = tiles - 1 - tile  # causal: those with most keys first
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = packed(m, head, queries, GROUP)
    d = tl.arange(0, D)
    q_tile = tl.load(
        at_rows(q + batch * stride_qb, h, t, stride_qh, stride_qt)[:, None] + d[None, :],
        (d < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    bias_at = at_rows(bias + batch * stride_bb, h, t, stride_bh, stride_bt)
    unit, cap = units(scale, softcap, CAPPED, EXACT)
    ONE_LOOP: tl.constexpr = EXACT or BIAS or DROPOUT or CAPPED
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = total - float("inf")

    begin = tl.program_id(1) * chunk
    start = tl.minimum(begin, prefix)
    end = tl.minimum(begin + chunk, prefix)
    none = tl.zeros((BLOCK_M,), tl.int32)
    row_key = none
    if DROPOUT:
        row_key = row_keys(seed, batch * stride_lb + h * queries + t)
    acc, top, total = attend(
        acc, top, total, q_tile, prefix_k + batch * stride_pkb + head * stride_pkh,
        prefix_v + batch * stride_pvb + head * stride_pvh, stride_pkp, stride_pvp,
        start, end, tl.cdiv(end - start, BLOCK_N), 0, 0, none, none + end, bias_at, unit, cap, d, row_key,
        0, threshold, True, False, DROPOUT, CAPPED, EXACT, HEAD_DIM, D, BLOCK_N, PREFIX_STAGES,
    )  # fmt: skip

    a, z = seen_by(first, last, batch, t, queries, keys, CAUSAL, INTERVALS)
    start = tl.maximum(tl.min(a, 0), begin - prefix)
    end = tl.minimum(tl.max(z, 0), begin + chunk - prefix)
    masked, lead, free = blocks_of(start, end, tl.max(a, 0), tl.min(z, 0), ONE_LOOP, BLOCK_N)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    if not ONE_LOOP:
        acc, top, total = attend(
            acc, top, total, q_tile, k, v, stride_ks, stride_vs, start + lead * BLOCK_N, end, free, 0, 0, a,
            z, bias_at, unit, cap, d, row_key, prefix, threshold, False, BIAS, DROPOUT, CAPPED, EXACT,
            HEAD_DIM, D, BLOCK_N, STAGES,
        )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q_tile, k, v, stride_ks, stride_vs, start, end, masked, lead, free, a,
        tl.minimum(z, end), bias_at, unit, cap, d, row_key, prefix, threshold, True, BIAS, DROPOUT, CAPPED,
        EXACT, HEAD_DIM, D, BLOCK_N, STAGES,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if DROPOUT:
        acc *= inverse_keep
    natural = (top if EXACT else top * LN_2) + tl.log(total)
    m = rows_anew(tile, masked, BLOCK_M)
    t, h = packed(m, head, queries, GROUP)
    there = m < queries * GROUP
    out += tl.program_id(1).to(tl.int64) * stride_oc + batch * stride_ob
    tl.store(
        at_rows(out, h, t, stride_oh, stride_ot)[:, None] + d[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty), there[:, None] & (d < HEAD_DIM)[None, :],
    )  # fmt: skip
    lse += tl.program_id(1).to(tl.int64) * stride_lc + batch * stride_lb
    tl.store(lse + h * queries + t, tl.where(empty, float("-inf"), natural), there)


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(
    partial, lse_of, out, lse, rows, chunks, queries, heads, stride_ob, stride_oh, stride_ot,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out and lse of one row (b, h, t) from its chunks', (chunks, rows, D) and (chunks, rows)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    acc = tl.zeros((D,), tl.float32)
    total = tl.zeros((), tl.float32)
    top = total - float("inf")
    for start in range(0, chunks, CHUNKS):
        c = start + tl.arange(0, CHUNKS)
        of = tl.load(lse_of + c.to(tl.int64) * rows + row, c < chunks, other=float("-inf"))
        higher = tl.maximum(top, tl.max(of, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(of - base)
        fade = tl.exp(top - base)
        part = tl.load(
            partial + (c.to(tl.int64) * rows + row)[:, None] * HEAD_DIM + d[None, :],
            (c < chunks)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = acc * fade + tl.sum(weight[:, None] * part, 0)
        total = total * fade + tl.sum(weight, 0)
        top = higher
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    b, h, t = row // queries // heads, row // queries % heads, row % queries
    at = out + b * stride_ob + h * stride_oh + t * stride_ot + d
    tl.store(at, (acc / total).to(out.dtype.element_ty), d < HEAD_DIM)
    tl.store(lse + row, tl.where(empty, float("-inf"), top + tl.log(total)))


def forward(
    q, k, v, prefix_k, prefix_v, first, last, bias, causal: bool, scale: float, dropout_p=0.0, seed=None,
    softcap=0.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (B, Hq, T, D) and lse (B, Hq, T) float32; the arguments of the raw op prefix_attention_forward."""
    out = by_token(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse
    call = Call(q, k, v, prefix_k, prefix_v, first, last, bias, causal, dropout_p, seed, softcap)
    block_m, block_n, warps, stages = tiles.tile("attend", call)
    chunk, chunks = tiles.chunks(call.rows, prefix_k.shape[2] + k.shape[2])
    programs = cdiv(call.rows, block_m)
    to, to_lse = out, lse
    if chunks > 1:
        to = torch.empty(chunks, *q.shape, dtype=torch.float32, device=q.device)
        to_lse = torch.empty(chunks, *lse.shape, dtype=torch.float32, device=q.device)
    launch(
        forward_kernel, (programs * call.heads, chunks),
        (
            *call.inputs, to, to_lse, *call.sizes, programs, chunk, scale, call.cap, *call.dropout,
            *call.strides, to.stride(0) if chunks > 1 else 0, *to.stride()[-4:-1], lse.numel(), lse.stride(0),
        ),
        {
            **call.constants, "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages,
            "PREFIX_STAGES": tiles.prefix_stages(call, block_m, stages),
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if chunks > 1:
        launch(
            merge_kernel, (lse.numel(),),
            (to, to_lse, out, lse, lse.numel(), chunks, q.shape[2], q.shape[1], *out.stride()[:3]),
            {"HEAD_DIM": q.shape[3], "D": call.constants["D"], "CHUNKS": 16}, num_warps=4,
        )  # fmt: skip
    return out, lse

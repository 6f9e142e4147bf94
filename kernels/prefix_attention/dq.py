"""dq of prefix_attention: a tile of packed rows over all its keys; and delta = sum(dout out), on the way."""

import triton
import triton.language as tl
from peft_engine.kernels.prefix_attention import tiles
from peft_engine.kernels.prefix_attention.call import Call
from peft_engine.kernels.prefix_attention.parts import (
    LENGTHS,
    at_rows,
    block,
    blocks_of,
    kept,
    packed,
    probabilities,
    product,
    program,
    row_keys,
    rows_anew,
    scores,
    seen_by,
    sum_product,
    units,
    unless_empty,
)

from peft_engine.kernels.launch import cdiv, launch


@triton.jit
def gradient_of_rows(
    dq, q, dout, q_at, g_at, inside, lse, delta, k, v, stride_k, stride_v, start, end, blocks, lead, free, a,
    z, bias_at, unit, cap, d, row_key, column, threshold, inverse_keep,
    MASKED: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq / scale, added up over blocks of keys from `start`; `free` blocks after `lead` left out."""
    for i in tl.range(blocks, num_stages=STAGES):
        at = start + i * BLOCK_N
        if MASKED:
            at += tl.where(i < lead, 0, free * BLOCK_N)
        n = at + tl.arange(0, BLOCK_N)
        place = tl.minimum(n, end - 1) if MASKED else n
        if EXACT:  # volatile, or the registers of both q and dout would be held through the loop, and spill
            q = tl.load(q_at, inside, other=0.0, volatile=True)
        keys = block(k, stride_k, place, d, HEAD_DIM, D, q.dtype)
        s = product(q, tl.trans(keys))
        s, slope = scores(
            s, n[None, :], a[:, None], z[:, None], bias_at[:, None], unit, cap, MASKED, BIAS, CAPPED, EXACT
        )
        if EXACT:
            dout = tl.load(g_at, inside, other=0.0, volatile=True)
        p = probabilities(s, lse[:, None], EXACT)
        dp = product(dout, tl.trans(block(v, stride_v, place, d, HEAD_DIM, D, q.dtype)))
        if DROPOUT:
            keep = kept(row_key[:, None], (column + n)[None, :], threshold)
            dp = tl.where(keep, dp * inverse_keep, 0.0)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds *= slope
        dq = sum_product(ds, keys, dq)
    return dq


@triton.jit
def row_sums(a_at, b_at, columns, ROWS: tl.constexpr, STEP: tl.constexpr):
    """sum(a b) of each row, a few columns at a time: both whole are more registers than the loops take."""
    acc = tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, STEP):
        c = start + tl.arange(0, STEP)[None, :]
        a = tl.load(a_at + c, c < columns, other=0.0).to(tl.float32)
        acc += tl.sum(a * tl.load(b_at + c, c < columns, other=0.0).to(tl.float32), 1)
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, prefix_k, prefix_v, first, last, bias, dout, out, lse, delta, dq,
    queries, keys, prefix, kv_heads, tiles, scale, softcap, seed, threshold, inverse_keep,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pkb, stride_pkh, stride_pkp, stride_pvb, stride_pvh, stride_pvp, stride_bb, stride_bh, stride_bt,
    stride_gb, stride_gh, stride_gt, stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    stride_lb,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PREFIX_STAGES: tl.constexpr,
):  # fmt: skip
    """dq and delta (B, Hq, T) of a tile of packed rows."""
    tile, head, batch = program(tiles, kv_heads)
    tile = tiles - 1 - tile  # causal: those with most keys first
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = packed(m, head, queries, GROUP)
    d = tl.arange(0, D)
    inside = (d < HEAD_DIM)[None, :]
    q_at = at_rows(q + batch * stride_qb, h, t, stride_qh, stride_qt)[:, None] + d[None, :]
    q_tile = tl.load(q_at, inside, other=0.0)
    g_at = at_rows(dout + batch * stride_gb, h, t, stride_gh, stride_gt)[:, None] + d[None, :]
    g_tile = tl.load(g_at, inside, other=0.0)
    delta_of = row_sums(
        at_rows(dout + batch * stride_gb, h, t, stride_gh, stride_gt)[:, None],
        at_rows(out + batch * stride_ob, h, t, stride_oh, stride_ot)[:, None],
        HEAD_DIM, BLOCK_M, D if D < 64 else 64,
    )  # fmt: skip
    at = batch * stride_lb + h * queries + t
    tl.store(delta + at, delta_of, m < queries * GROUP)
    lse_of = unless_empty(tl.load(lse + at), EXACT)
    bias_at = at_rows(bias + batch * stride_bb, h, t, stride_bh, stride_bt)
    unit, cap = units(scale, softcap, CAPPED, EXACT)
    ONE_LOOP: tl.constexpr = EXACT or BIAS or DROPOUT or CAPPED

    none = tl.zeros((BLOCK_M,), tl.int32)
    row_key = none
    if DROPOUT:
        row_key = row_keys(seed, at)
    acc = gradient_of_rows(
        tl.zeros((BLOCK_M, D), tl.float32), q_tile, g_tile, q_at, g_at, inside, lse_of, delta_of,
        prefix_k + batch * stride_pkb + head * stride_pkh, prefix_v + batch * stride_pvb + head * stride_pvh,
        stride_pkp, stride_pvp, 0, prefix, tl.cdiv(prefix, BLOCK_N), 0, 0, none, none + prefix, bias_at, unit,
        cap, d, row_key, 0, threshold, inverse_keep, True, False, DROPOUT, CAPPED, EXACT, HEAD_DIM, D,
        BLOCK_N, PREFIX_STAGES,
    )  # fmt: skip
    a, z = seen_by(first, last, batch, t, queries, keys, CAUSAL, INTERVALS)
    start, end = tl.min(a, 0), tl.max(z, 0)
    masked, lead, free = blocks_of(start, end, tl.max(a, 0), tl.min(z, 0), ONE_LOOP, BLOCK_N)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    if not ONE_LOOP:
        acc = gradient_of_rows(
            acc, q_tile, g_tile, q_at, g_at, inside, lse_of, delta_of, k, v, stride_ks, stride_vs,
            start + lead * BLOCK_N, end, free, 0, 0, a, z, bias_at, unit, cap, d, row_key, prefix,
            threshold, inverse_keep, False, BIAS, DROPOUT, CAPPED, EXACT, HEAD_DIM, D, BLOCK_N, STAGES,
        )  # fmt: skip
    acc = gradient_of_rows(
        acc, q_tile, g_tile, q_at, g_at, inside, lse_of, delta_of, k, v, stride_ks, stride_vs, start,
        end, masked, lead, free, a, z, bias_at, unit, cap, d, row_key, prefix, threshold, inverse_keep, True,
        BIAS, DROPOUT, CAPPED, EXACT, HEAD_DIM, D, BLOCK_N, STAGES,
    )  # fmt: skip
    m = rows_anew(tile, masked, BLOCK_M)
    t, h = packed(m, head, queries, GROUP)
    dq_at = at_rows(dq + batch * stride_dqb, h, t, stride_dqh, stride_dqt)[:, None] + d[None, :]
    tl.store(dq_at, (acc * scale).to(dq.dtype.element_ty), (m < queries * GROUP)[:, None] & inside)


def gradient_of_queries(call: Call, dout, out, lse, delta, dq, scale: float) -> None:
    """Fills dq and delta."""
    block_m, block_n, warps, stages = tiles.tile("dq", call)
    programs = cdiv(call.rows, block_m)
    launch(
        dq_kernel, (programs * call.heads,),
        (
            *call.inputs, dout, out, lse, delta, dq, *call.sizes, programs, scale, call.cap, *call.dropout,
            *call.strides, *dout.stride()[:3], *out.stride()[:3], *dq.stride()[:3], lse.stride(0),
        ),
        {
            **call.constants, "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages,
            "PREFIX_STAGES": tiles.prefix_stages(call, block_m, stages),
        },
        num_warps=warps, num_stages=stages,
    )  # fmt: skip

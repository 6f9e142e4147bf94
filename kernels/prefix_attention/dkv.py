"""dk and dv of prefix_attention, of real keys and of the prefix: a block of keys over the rows that see it.

A block belongs to one program, or to one for each share of the rows, and the shares are added up in order: no
atomics, and the same bits in every run.
"""

import torch
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

SCANNED = tl.constexpr(1024)  # queries in a turn of `queries_that_see`


@triton.jit
def gradient_of_keys(
    dk, dv, keys, values, k_at, v_at, q_at, g_at, lse, delta, s_bias, n, a, z, unit, cap, inside,
    row_key, column, threshold, inverse_keep,
    MASKED: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of a block of keys (n, D), with what a tile of rows adds to them.

    q_at and g_at: pointers to the rows of q and dout; lse inf for rows that are none. With EXACT keys and
    values are read at k_at and v_at anew.
    """
    if EXACT:  # volatile, or the registers of both keys and values would be held through the loop, and spill
        keys = tl.load(k_at, inside, other=0.0, volatile=True)
    q = tl.load(q_at, inside, other=0.0)
    s = product(keys, tl.trans(q))  # transposed, (n, m), so that p is in place for its product
    s, slope = scores(
        s, n[:, None], a[None, :], z[None, :], s_bias[None, :], unit, cap, MASKED, BIAS, CAPPED, EXACT
    )
    p = probabilities(s, lse[None, :], EXACT)
    g = tl.load(g_at, inside, other=0.0)
    if EXACT:
        values = tl.load(v_at, inside, other=0.0, volatile=True)
    if DROPOUT:
        keep = kept(row_key[None, :], column[:, None], threshold)
        dv = sum_product(tl.where(keep, p * inverse_keep, 0.0), g, dv)
        dp = tl.where(keep, product(values, tl.trans(g)) * inverse_keep, 0.0)
    else:
        dv = sum_product(p, g, dv)
        dp = product(values, tl.trans(g))
    ds = p * (dp - delta[None, :])
    if CAPPED:
        ds *= slope
    dk = sum_product(ds, q, dk)
    return dk, dv


@triton.jit
def over_rows(
    dk, dv, keys, values, k_at, v_at, q, dout, lse, delta, first, last, bias, batch, head, n, queries,
    key_count, start, blocks, lead, free, unit, cap, d, seed, row0, column, threshold, inverse_keep,
    stride_qh, stride_qt, stride_gh, stride_gt, stride_bh, stride_bt,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr,
    MASKED: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`gradient_of_keys` over tiles of packed rows from `start`; `free` tiles after `lead` left out."""
    for i in range(blocks):
        at = start + i * BLOCK_M
        if MASKED:
            at += tl.where(i < lead, 0, free * BLOCK_M)
        m = at + tl.arange(0, BLOCK_M)
        t, h = packed(m, head, queries, GROUP)
        row = h * queries + t
        lse_of = unless_empty(tl.load(lse + row), EXACT)
        a, z = t, t
        row_key = t
        if DROPOUT:
            row_key = row_keys(seed, row0 + row)
        if MASKED:
            lse_of = tl.where(m < queries * GROUP, lse_of, float("inf"))
            a, z = seen_by(first, last, batch, t, queries, key_count, CAUSAL, INTERVALS)
        dk, dv = gradient_of_keys(
            dk, dv, keys, values, k_at, v_at, at_rows(q, h, t, stride_qh, stride_qt)[:, None] + d[None, :],
            at_rows(dout, h, t, stride_gh, stride_gt)[:, None] + d[None, :], lse_of, tl.load(delta + row),
            at_rows(bias, h, t, stride_bh, stride_bt), n, a, z, unit, cap, (d < HEAD_DIM)[None, :],
            row_key, column, threshold, inverse_keep, MASKED, BIAS, DROPOUT, CAPPED, EXACT,
        )  # fmt: skip
    return dk, dv


@triton.jit
def queries_that_see(first, last, queries, start, end, STEP: tl.constexpr):
    """The queries from the first to the last that see a key of [start, end), and those among them that see
    all of these keys, where they lie together (else none).
    """
    # Of each of STEP lanes, and reduced once, all ends together: a reduction has barriers, and each block of
    # keys runs the loop, whose turns wait for memory. No load is wider: rows of any length are not aligned.
    some_from = queries + tl.zeros((STEP,), tl.int32)
    all_from = some_from
    some_to = tl.zeros((STEP,), tl.int32)
    all_to = some_to
    number = some_to
    for at in range(0, queries, STEP):
        t = at + tl.arange(0, STEP)
        a = tl.load(first + t, t < queries, other=end)
        z = tl.load(last + t, t < queries, other=0)
        sees = (a < end) & (z > start) & (a < z)
        whole = (a <= start) & (z >= end)
        some_from = tl.minimum(some_from, tl.where(sees, t, queries))
        some_to = tl.maximum(some_to, tl.where(sees, t + 1, 0))
        all_from = tl.minimum(all_from, tl.where(whole, t, queries))
        all_to = tl.maximum(all_to, tl.where(whole, t + 1, 0))
        number += whole.to(tl.int32)
    ends = tl.join(tl.join(some_from, -some_to), tl.join(all_from, -all_to))
    some, every = tl.split(tl.min(ends, 0))
    some_from, some_to = tl.split(some)
    all_from, all_to = tl.split(every)
    some_to, all_to = -some_to, -all_to
    together = tl.sum(number, 0) == all_to - all_from
    return some_from, some_to, tl.where(together, all_from, some_to), tl.where(together, all_to, some_to)


@triton.jit(do_not_specialize=LENGTHS)
def dkv_kernel(
    q, k, v, first, last, bias, dout, lse, delta, dk, dv, queries, keys, kv_heads, tiles, scale,
    prefix, softcap, seed, threshold, inverse_keep,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_bb, stride_bh, stride_bt, stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dks,
    stride_dvb, stride_dvh, stride_dvs, stride_lb,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, INTERVALS: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, HEAD_DIM: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of real keys."""
    tile, head, batch = program(tiles, kv_heads)
    d = tl.arange(0, D)
    start = tile * BLOCK_N
    end = tl.minimum(start + BLOCK_N, keys)
    n = start + tl.arange(0, BLOCK_N)
    place = tl.minimum(n, keys - 1)
    k += batch * stride_kb + head * stride_kh
    v += batch * stride_vb + head * stride_vh
    key = block(k, stride_ks, place, d, HEAD_DIM, D, q.dtype.element_ty)
    value = block(v, stride_vs, place, d, HEAD_DIM, D, q.dtype.element_ty)
    key_at = k + place.to(tl.int64)[:, None] * stride_ks + d[None, :]
    value_at = v + place.to(tl.int64)[:, None] * stride_vs + d[None, :]
    q += batch * stride_qb
    dout += batch * stride_gb
    bias += batch * stride_bb
    lse += batch * stride_lb
    delta += batch * stride_lb
    some_to = tl.zeros((), tl.int32) + queries
    all_to = some_to
    if INTERVALS:
        some_from, some_to, all_from, all_to = queries_that_see(
            first + batch * queries, last + batch * queries, queries, start, end, SCANNED
        )
    elif CAUSAL:
        some_from = tl.maximum(start - (keys - queries), 0)
        all_from = tl.maximum(end - 1 - (keys - queries), 0)
    else:
        some_from = some_to * 0
        all_from = some_from
    some_from, some_to = some_from * GROUP, some_to * GROUP
    ONE_LOOP: tl.constexpr = EXACT or BIAS or DROPOUT or CAPPED
    masked, lead, free = blocks_of(some_from, some_to, all_from * GROUP, all_to * GROUP, ONE_LOOP, BLOCK_M)
    unit, cap = units(scale, softcap, CAPPED, EXACT)
    dk_sum = tl.zeros((BLOCK_N, D), tl.float32)
    dv_sum = dk_sum
    column = n
    if DROPOUT:
        column = prefix + n
    if not ONE_LOOP:
        dk_sum, dv_sum = over_rows(
            dk_sum, dv_sum, key, value, key_at, value_at, q, dout, lse, delta, first, last, bias, batch, head,
            place, queries, keys, some_from + lead * BLOCK_M, free, 0, 0, unit, cap, d, seed,
            batch * stride_lb, column, threshold, inverse_keep,
            stride_qh, stride_qt, stride_gh, stride_gt, stride_bh, stride_bt,
            GROUP, CAUSAL, INTERVALS, False, BIAS, DROPOUT, CAPPED, EXACT, HEAD_DIM, BLOCK_M,
        )  # fmt: skip
    dk_sum, dv_sum = over_rows(
        dk_sum, dv_sum, key, value, key_at, value_at, q, dout, lse, delta, first, last, bias, batch, head,
        place, queries, keys, some_from, masked, lead, free, unit, cap, d, seed, batch * stride_lb, column,
        threshold, inverse_keep,
        stride_qh, stride_qt, stride_gh, stride_gt, stride_bh, stride_bt,
        GROUP, CAUSAL, INTERVALS, True, BIAS, DROPOUT, CAPPED, EXACT, HEAD_DIM, BLOCK_M,
    )  # fmt: skip
    n = rows_anew(tile, masked, BLOCK_N)
    stored = (n < keys)[:, None] & (d < HEAD_DIM)[None, :]
    row = n.to(tl.int64)
    dk_at = (dk + batch * stride_dkb + head * stride_dkh + row * stride_dks)[:, None] + d[None, :]
    tl.store(dk_at, (dk_sum * scale).to(dk.dtype.element_ty), stored)
    dv_at = (dv + batch * stride_dvb + head * stride_dvh + row * stride_dvs)[:, None] + d[None, :]
    tl.store(dv_at, dv_sum.to(dv.dtype.element_ty), stored)


@triton.jit(do_not_specialize=LENGTHS)
def prefix_kernel(
    q, prefix_k, prefix_v, dout, lse, delta, dk, dv, queries, prefix, kv_heads, blocks, per_copy, share,
    scale, softcap, seed, threshold, inverse_keep, stride_qb, stride_qh, stride_qt, stride_pkb, stride_pkh,
    stride_pkp, stride_pvb, stride_pvh, stride_pvp, stride_gb, stride_gh, stride_gt, stride_lb, stride_s,
    GROUP: tl.constexpr, DROPOUT: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of the prefix, from `share` tiles of the packed rows of `per_copy` batch rows.

    A tile is of one batch row: to find that of each packed row would take a division for each.
    dk and dv (shares, G, Hkv, P, D), contiguous. Every row sees every key: no mask, no bias.
    """
    pid = tl.program_id(0)  # no tile is heavier than another: as they lie, which takes fewer registers
    tile, of = pid % blocks, pid // blocks
    head, copy = (of % kv_heads).to(tl.int64), (of // kv_heads).to(tl.int64)
    d = tl.arange(0, D)
    inside = (d < HEAD_DIM)[None, :]
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.minimum(n, prefix - 1)
    prefix_k += copy * stride_pkb + head * stride_pkh
    prefix_v += copy * stride_pvb + head * stride_pvh
    key = block(prefix_k, stride_pkp, place, d, HEAD_DIM, D, q.dtype.element_ty)
    value = block(prefix_v, stride_pvp, place, d, HEAD_DIM, D, q.dtype.element_ty)
    key_at = prefix_k + place.to(tl.int64)[:, None] * stride_pkp + d[None, :]
    value_at = prefix_v + place.to(tl.int64)[:, None] * stride_pvp + d[None, :]
    unit, cap = units(scale, softcap, CAPPED, EXACT)
    dk_sum = tl.zeros((BLOCK_N, D), tl.float32)
    dv_sum = dk_sum
    each = tl.cdiv(queries * GROUP, BLOCK_M)
    begin = tl.program_id(1) * share
    for i in range(begin, tl.minimum(begin + share, per_copy * each)):
        batch = copy * per_copy + i // each
        m = i % each * BLOCK_M + tl.arange(0, BLOCK_M)
        t, h = packed(m, head, queries, GROUP)
        row = batch * stride_lb + h * queries + t
        lse_of = tl.where(m < queries * GROUP, unless_empty(tl.load(lse + row), EXACT), float("inf"))
        q_at = at_rows(q + batch * stride_qb, h, t, stride_qh, stride_qt)
        g_at = at_rows(dout + batch * stride_gb, h, t, stride_gh, stride_gt)
        row_key = t
        if DROPOUT:
            row_key = row_keys(seed, row)
        dk_sum, dv_sum = gradient_of_keys(
            dk_sum, dv_sum, key, value, key_at, value_at, q_at[:, None] + d[None, :],
            g_at[:, None] + d[None, :], lse_of, tl.load(delta + row), q_at, n, t, t, unit, cap, inside,
            row_key, n, threshold, inverse_keep, False, False, DROPOUT, CAPPED, EXACT,
        )  # fmt: skip
    n = rows_anew(tile, share, BLOCK_N)
    stored = (n < prefix)[:, None] & inside
    row = of.to(tl.int64) * prefix + n
    at = tl.program_id(1).to(tl.int64) * stride_s + row[:, None] * HEAD_DIM + d[None, :]
    tl.store(dk + at, (dk_sum * scale).to(dk.dtype.element_ty), stored)
    tl.store(dv + at, dv_sum.to(dv.dtype.element_ty), stored)


@triton.jit(do_not_specialize=LENGTHS)
def sum_kernel(parts_k, parts_v, dk, dv, numel, parts, BLOCK: tl.constexpr):
    """dk and dv from their shares (parts, numel), added up in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sum_k = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    for p in range(parts):
        at = tl.cast(p, tl.int64) * numel + i
        sum_k += tl.load(parts_k + at, i < numel, other=0.0)
        sum_v += tl.load(parts_v + at, i < numel, other=0.0)
    tl.store(dk + i, sum_k.to(dk.dtype.element_ty), i < numel)
    tl.store(dv + i, sum_v.to(dv.dtype.element_ty), i < numel)


def gradient_of_real(call: Call, dout, lse, delta, dk, dv, scale: float) -> None:
    """Fills dk and dv."""
    q, k, v = call.q, call.k, call.v
    block_n, block_m, warps, stages = tiles.tile("dkv", call)
    programs = cdiv(k.shape[2], block_n)
    launch(
        dkv_kernel, (programs * call.heads,),
        (
            q, k, v, *call.inputs[-3:], dout, lse, delta, dk, dv, q.shape[2], k.shape[2], k.shape[1],
            programs, scale, call.prefix_k.shape[2] if call.dropout_p else None, call.cap,
            *call.dropout,
            *call.strides[:9], *call.strides[-3:], *dout.stride()[:3], *dk.stride()[:3],
            *dv.stride()[:3], lse.stride(0),
        ),
        {**call.constants, "BLOCK_N": block_n, "BLOCK_M": block_m},
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def gradient_of_prefix(call: Call, dout, lse, delta, dk, dv, scale: float) -> None:
    """Fills dk and dv of the prefix."""
    q, prefix_k = call.q, call.prefix_k
    copies, kv_heads, prefix, _ = prefix_k.shape
    block_n, block_m, warps, stages = tiles.tile("prefix", call)
    programs, per_copy = cdiv(prefix, block_n), q.shape[0] // copies
    share, shares = tiles.shares(per_copy * cdiv(call.rows, block_m), programs * kv_heads)
    parts = dk, dv
    if shares > 1:
        parts = tuple(torch.empty(shares, *t.shape, dtype=torch.float32, device=t.device) for t in parts)
    constants = {n: call.constants[n] for n in ("GROUP", "DROPOUT", "CAPPED", "EXACT", "HEAD_DIM", "D")}
    launch(
        prefix_kernel, (programs * kv_heads * copies, shares),
        (
            q, prefix_k, call.prefix_v, dout, lse, delta, *parts, q.shape[2], prefix, kv_heads, programs,
            per_copy, share, scale, call.cap, *call.dropout, *call.strides[:3], *call.strides[9:15],
            *dout.stride()[:3], lse.stride(0), dk.numel(),
        ),
        {**constants, "BLOCK_N": block_n, "BLOCK_M": block_m},
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if shares > 1:
        launch(
            sum_kernel, (cdiv(dk.numel(), 512),), (*parts, dk, dv, dk.numel(), shares), {"BLOCK": 512},
            num_warps=4,
        )  # fmt: skip

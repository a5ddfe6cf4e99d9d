"""Attention backward: recomputes the scores tile by tile; no atomics, so gradients are bit-identical run to run.

Three kernels: `attention_delta_kernel` (row sums of dO * O, and the sink's gradient), `attention_backward_kv_kernel`
(one program per tile of BN keys) and `attention_backward_q_kernel` (one program per tile of BM queries, which also owns
the slopes' gradient and the far ends of the distance table's).  With p = softmax weights, and in natural units:

    dP = dO V^T (kept and rescaled by dropout);  dS = p * (dP - delta);  delta_i = sum_d dO_id O_id - dlse_i
    dV = dropout(p)^T dO;  dQ = scale * dS' K;  dK = scale * dS'^T Q,  with dS' = dS * (1 - tanh^2) under a softcap
"""

from __future__ import annotations

import triton
import triton.language as tl

from .content_tables import store_ends, store_near
from .ranges import split
from .scores import (
    FAR_LEFT,
    FAR_RIGHT,
    LOG2E,
    NEAR,
    finite_or_zero,
    keep_tile,
    keys_of_queries,
    queries_of_keys,
    query_offset,
    scores,
    table_reach,
)
from .spans import narrowed


@triton.jit
def attention_delta_kernel(
    o, do, p_statistics, p_grad_lse, p_delta, extra, p_dsink, HEADS, TILES, query_length,
    DV: tl.constexpr, BM: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """delta (B, Hq, Sq), and one partial sum of the sink's gradient per program."""
    pid = tl.program_id(0)
    bh = pid // TILES
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    i = (pid % TILES) * BM + tl.arange(0, BM)
    row = i.to(tl.int64)
    o_dv = tl.arange(0, BDV)
    inside = (i < query_length)[:, None] & (o_dv < DV)[None, :]
    # [BM, BDV]
    b_o = tl.load(o.ptr + b * o.sb + h * o.sh + row[:, None] * o.si + o_dv[None, :], mask=inside, other=0.0)
    b_do = tl.load(do.ptr + b * do.sb + h * do.sh + row[:, None] * do.si + o_dv[None, :], mask=inside, other=0.0)
    at = bh.to(tl.int64) * query_length + i
    delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), axis=1)
    if p_grad_lse is not None:
        delta -= tl.load(p_grad_lse + at, mask=i < query_length, other=0.0)
    largest = tl.load(p_statistics + 2 * at, mask=i < query_length, other=0.0)
    log_sum = tl.load(p_statistics + 2 * at + 1, mask=i < query_length, other=float("inf"))
    # a row without any visible key has no gradient, whatever came in
    delta = tl.where(log_sum == float("inf"), 0.0, delta)
    tl.store(p_delta + at, delta, mask=i < query_length)
    if p_dsink is not None:
        sink = tl.load(extra.sink + b * extra.sink_sb + h).to(tl.float32) * LOG2E
        tl.store(p_dsink + pid, -tl.sum(tl.exp2(sink - largest - log_sum) * delta, axis=0))


@triton.jit
def weights_and_gradient(
    product, dw, largest, log_sum, delta, keep, i, j, p, mask, bias, interval, numbers, b, h,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GENERAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """From raw products q k^T and dO V^T of a tile: dropped-out weights, dS (with respect to score + bias), and dS'
    (with respect to scale * q k^T)."""
    s, capped = scores(
        product, i, j, p, mask, bias, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, GENERAL, SIDE
    )
    w = tl.exp2(s - largest - log_sum)
    if HAS_DROPOUT:
        dropped = tl.where(keep, w * numbers.keep_scale, 0.0)
        dw = tl.where(keep, dw * numbers.keep_scale, 0.0)
    else:
        dropped = w
    ds = w * (dw - delta)
    if GENERAL or bias.dense is not None:
        # A NaN of a row or key that is masked here must not pass through 0 * NaN; one that is seen must come back.  A
        # dense bias masks in every tile, where it is -inf.
        ds = tl.where(w == 0, 0.0, ds)
        dropped = tl.where(w == 0, 0.0, dropped + delta * 0.0)
    ds_product = ds
    if HAS_SOFTCAP:
        ds_product = ds * (1.0 - capped * capped)
    return dropped, ds, ds_product


@triton.jit
def _beyond(ds, distance, left_sum, right_sum, content, SIDE: tl.constexpr):
    """Row sums of dS at distances beyond the reach of row and column tables, and which pairs lie within it."""
    near = True
    if SIDE == FAR_LEFT:
        left_sum += tl.sum(ds, axis=1)
    elif SIDE == FAR_RIGHT:
        right_sum += tl.sum(ds, axis=1)
    else:
        beyond_left = distance <= -content.left
        beyond_right = (distance >= content.right) & ~beyond_left
        left_sum += tl.sum(tl.where(beyond_left, ds, 0.0), axis=1)
        right_sum += tl.sum(tl.where(beyond_right, ds, 0.0), axis=1)
        near = ~(beyond_left | beyond_right)
    return left_sum, right_sum, near


@triton.jit
def _query_tiles(
    b_dk, b_dv, left_sum, right_sum, b_k, b_v, lo, hi, j, n0, offset, bh, h, b, q, do, p_q, p_do, p_statistics,
    p_delta, p_dcols,
    mask, bias, extra, interval, numbers,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GENERAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add the query rows lo ... hi - 1 of one head to dK and dV.  Tiles are held transposed, [BN, BM], so that both
    products take their left operand from registers."""
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    HAS_TABLE: tl.constexpr = bias.table is not None or bias.content is not None
    STAGES: tl.constexpr = 1 if GENERAL and HAS_TABLE and BD <= 64 else None  # as in the forward
    for m0 in tl.range(lo, hi, BM, num_stages=STAGES):
        i = m0 + o_m
        row = tl.cast(m0, tl.int64)
        at_q = p_q + row * q.si + (o_m[:, None] * q.si + o_d[None, :])
        at_do = p_do + row * do.si + (o_m[:, None] * do.si + o_dv[None, :])
        if GENERAL:
            # [BM, BD], [BM, BDV]
            b_q = tl.load(at_q, mask=(i < numbers.query_length)[:, None] & (o_d < D)[None, :], other=0.0)
            b_do = tl.load(at_do, mask=(i < numbers.query_length)[:, None] & (o_dv < DV)[None, :], other=0.0)
            b_q = finite_or_zero(b_q)
            b_do = finite_or_zero(b_do)
            largest = tl.load(p_statistics + 2 * i, mask=i < numbers.query_length, other=0.0)
            log_sum = tl.load(p_statistics + 2 * i + 1, mask=i < numbers.query_length, other=float("inf"))
            delta = tl.load(p_delta + i, mask=i < numbers.query_length, other=0.0)
        else:
            b_q = tl.load(at_q) if BD == D else tl.load(at_q, mask=(o_d < D)[None, :], other=0.0)
            b_do = tl.load(at_do) if BDV == DV else tl.load(at_do, mask=(o_dv < DV)[None, :], other=0.0)
            if bias.dense is not None:
                b_q = finite_or_zero(b_q)
                b_do = finite_or_zero(b_do)
            largest = tl.load(p_statistics + 2 * i)
            log_sum = tl.load(p_statistics + 2 * i + 1)
            delta = tl.load(p_delta + i)
        # [BN, BM]
        product = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        dw = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        keep = None
        if HAS_DROPOUT:
            keep = tl.trans(keep_tile(m0, n0, bh, extra.seed, numbers, BM, BN))
        dropped, ds_bias, ds = weights_and_gradient(
            product, dw, largest[None, :], log_sum[None, :], delta[None, :], keep,
            i[None, :], j[:, None], (i + offset)[None, :],
            mask, bias, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, GENERAL, SIDE,
        )  # fmt: skip
        if p_dcols is not None:
            distance = j[:, None] - (i + offset)[None, :]
            left_sum, right_sum, near = _beyond(ds_bias, distance, left_sum, right_sum, bias.content, SIDE)
            if SIDE == NEAR:
                near = near & (j < numbers.key_length)[:, None] & (i < numbers.query_length)[None, :]
                store_near(p_dcols, distance + bias.content.left, j[:, None], ds_bias, near, numbers.key_length, 1)
        b_dv = tl.dot(dropped.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv, left_sum, right_sum


@triton.jit
def attention_backward_kv_kernel(
    q, k, v, do, dk, dv, p_statistics, p_delta, p_dcols, mask, bias, extra, interval, numbers, HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_n = pid % TILES
    kv_heads = HEADS // GROUP
    b = ((pid // TILES) // kv_heads).to(tl.int64)
    h_kv = ((pid // TILES) % kv_heads).to(tl.int64)
    n0 = i_n * BN
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    j = n0 + o_n
    row = j.to(tl.int64)
    in_k = (j < numbers.key_length)[:, None] & (o_d < D)[None, :]
    in_v = (j < numbers.key_length)[:, None] & (o_dv < DV)[None, :]
    # [BN, BD], [BN, BDV]
    b_k = tl.load(k.ptr + b * k.sb + h_kv * k.sh + row[:, None] * k.si + o_d[None, :], mask=in_k, other=0.0)
    b_v = tl.load(v.ptr + b * v.sb + h_kv * v.sh + row[:, None] * v.si + o_dv[None, :], mask=in_v, other=0.0)
    # Rows that saw a bad key have a NaN lse or delta already; the others must not meet it again.
    b_k = finite_or_zero(b_k)
    b_v = finite_or_zero(b_v)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BDV], dtype=tl.float32)
    left_sum = tl.zeros([BN], dtype=tl.float32)
    right_sum = tl.zeros([BN], dtype=tl.float32)

    HAS_TABLE: tl.constexpr = bias.table is not None or bias.content is not None
    MASKED: tl.constexpr = mask.query_ids is not None or mask.dense is not None
    STARTS_GENERAL: tl.constexpr = HAS_RIGHT or interval.prefix_lengths is not None or MASKED
    ALWAYS_GENERAL: tl.constexpr = MASKED and mask.query_spans is None
    offset = query_offset(interval, numbers, b)
    last = n0 + BN - 1
    rows = queries_of_keys(n0, last, offset, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    reach_left, reach_right = table_reach(bias, numbers)

    entries = 0
    if p_dcols is not None:
        entries = bias.content.left + bias.content.right + 1
    for g in range(GROUP):
        h = h_kv * GROUP + g
        lo, hi, full_lo, full_hi = rows
        lo, hi, full_lo, full_hi = narrowed(
            lo, hi, full_lo, full_hi, mask.query_spans, b, h, n0, numbers.key_length, BN
        )
        start = tl.maximum(lo, 0) // BM * BM
        full = tl.maximum((tl.maximum(full_lo, 0) + BM - 1) // BM * BM, start)
        full_end = tl.maximum(tl.maximum(full_hi, 0) // BM * BM, full)
        if HAS_TABLE:
            # rows from `left` on have the whole tile beyond the table's left reach; those before `right`, its right
            left = (tl.maximum(last + reach_left - offset, 0) + BM - 1) // BM * BM
            left = tl.minimum(tl.maximum(left, full), full_end)
            right = tl.maximum(n0 - reach_right - offset + 1, 0) // BM * BM
            right = tl.minimum(tl.maximum(right, full), left)
        bh = b * HEADS + h
        p_q = q.ptr + b * q.sb + h * q.sh
        p_do = do.ptr + b * do.sb + h * do.sh
        p_rows = p_statistics + 2 * bh * numbers.query_length
        p_deltas = p_delta + bh * numbers.query_length
        p_dcol = None
        if p_dcols is not None:
            p_dcol = p_dcols + bh * (tl.cast(entries, tl.int64) * numbers.key_length)
        if ALWAYS_GENERAL:
            b_dk, b_dv, left_sum, right_sum = _query_tiles(
                b_dk, b_dv, left_sum, right_sum, b_k, b_v, start, hi,
                j, n0, offset, bh, h, b, q, do, p_q, p_do, p_rows, p_deltas, p_dcol,
                mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
            )  # fmt: skip
        else:
            near = full
            if HAS_TABLE:
                near = left
            if HAS_TABLE and not STARTS_GENERAL:
                b_dk, b_dv, left_sum, right_sum = _query_tiles(
                    b_dk, b_dv, left_sum, right_sum, b_k, b_v, full, right,
                    j, n0, offset, bh, h, b, q, do, p_q, p_do, p_rows, p_deltas, p_dcol,
                    mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False, FAR_RIGHT,
                )  # fmt: skip
            if HAS_TABLE or STARTS_GENERAL:
                b_dk, b_dv, left_sum, right_sum = _query_tiles(
                    b_dk, b_dv, left_sum, right_sum, b_k, b_v,
                    right if HAS_TABLE and not STARTS_GENERAL else start, tl.minimum(near, hi),
                    j, n0, offset, bh, h, b, q, do, p_q, p_do, p_rows, p_deltas, p_dcol,
                    mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
                )  # fmt: skip
            b_dk, b_dv, left_sum, right_sum = _query_tiles(
                b_dk, b_dv, left_sum, right_sum, b_k, b_v, near, full_end,
                j, n0, offset, bh, h, b, q, do, p_q, p_do, p_rows, p_deltas, p_dcol,
                mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False, FAR_LEFT if HAS_TABLE else NEAR,
            )  # fmt: skip
            b_dk, b_dv, left_sum, right_sum = _query_tiles(
                b_dk, b_dv, left_sum, right_sum, b_k, b_v, full_end, hi,
                j, n0, offset, bh, h, b, q, do, p_q, p_do, p_rows, p_deltas, p_dcol,
                mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
            )  # fmt: skip

    if p_dcols is not None:
        # of all heads of the group, at the first
        p_dcol = p_dcols + (b * HEADS + h_kv * GROUP) * (tl.cast(entries, tl.int64) * numbers.key_length)
        store_ends(p_dcol, j, left_sum, right_sum, j < numbers.key_length, entries - 1, numbers.key_length, 1)
    at_dk = dk.ptr + b * dk.sb + h_kv * dk.sh + row[:, None] * dk.si + o_d[None, :]
    at_dv = dv.ptr + b * dv.sb + h_kv * dv.sh + row[:, None] * dv.si + o_dv[None, :]
    tl.store(at_dk, (b_dk * numbers.scale).to(dk.ptr.dtype.element_ty), mask=in_k)
    tl.store(at_dv, b_dv.to(dv.ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _key_tiles(
    b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
    lo, hi,
    i, p, m0, bh, h, b, k, v, p_k, p_v, p_drows, mask, bias, extra, interval, numbers,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr,
    GENERAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Add the keys lo ... hi - 1 to dQ and to the row sums of the parameter gradients."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    HAS_TABLE: tl.constexpr = bias.table is not None or bias.content is not None
    STAGES: tl.constexpr = 1 if GENERAL and HAS_TABLE and BD <= 64 else None
    for n0 in tl.range(lo, hi, BN, num_stages=STAGES):
        j = n0 + o_n
        row = tl.cast(n0, tl.int64)
        at_k = p_k + row * k.si + (o_n[None, :] * k.si + o_d[:, None])
        at_v = p_v + row * v.si + (o_n[None, :] * v.si + o_dv[:, None])
        if GENERAL:
            # [BD, BN], [BDV, BN]
            b_k = tl.load(at_k, mask=(j < numbers.key_length)[None, :] & (o_d < D)[:, None], other=0.0)
            b_v = tl.load(at_v, mask=(j < numbers.key_length)[None, :] & (o_dv < DV)[:, None], other=0.0)
            b_k = finite_or_zero(b_k)
            b_v = finite_or_zero(b_v)
        else:
            b_k = tl.load(at_k) if BD == D else tl.load(at_k, mask=(o_d < D)[:, None], other=0.0)
            b_v = tl.load(at_v) if BDV == DV else tl.load(at_v, mask=(o_dv < DV)[:, None], other=0.0)
            if bias.dense is not None:
                b_k = finite_or_zero(b_k)
                b_v = finite_or_zero(b_v)
        # [BM, BN]
        product = tl.dot(b_q, b_k, input_precision=PRECISION)
        dw = tl.dot(b_do, b_v, input_precision=PRECISION)
        keep = None
        if HAS_DROPOUT:
            keep = keep_tile(m0, n0, bh, extra.seed, numbers, BM, BN)
        _, ds, ds_product = weights_and_gradient(
            product, dw, largest[:, None], log_sum[:, None], delta[:, None], keep, i[:, None], j[None, :], p[:, None],
            mask, bias, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, GENERAL, SIDE,
        )  # fmt: skip
        distance = j[None, :] - p[:, None]
        if NEEDS_SLOPES:
            slope_sum -= tl.sum(ds * tl.abs(distance).to(tl.float32), axis=1)
        if NEEDS_TABLE:
            if SIDE == FAR_LEFT:
                left_sum += tl.sum(ds, axis=1)
            elif SIDE == FAR_RIGHT:
                right_sum += tl.sum(ds, axis=1)
            else:
                beyond_left = distance <= -numbers.table_left
                left_sum += tl.sum(tl.where(beyond_left, ds, 0.0), axis=1)
                right_sum += tl.sum(tl.where((distance >= numbers.table_right) & ~beyond_left, ds, 0.0), axis=1)
        if p_drows is not None:
            row_left, row_right, near = _beyond(ds, distance, row_left, row_right, bias.content, SIDE)
            if SIDE == NEAR:
                near = near & (i < numbers.query_length)[:, None] & (j < numbers.key_length)[None, :]
                entries = bias.content.left + bias.content.right + 1
                store_near(p_drows, distance + bias.content.left, i[:, None], ds, near, 1, entries)
        # [BM, BD]
        b_dq = tl.dot(ds_product.to(b_k.dtype), tl.trans(b_k), b_dq, input_precision=PRECISION)
    return b_dq, slope_sum, left_sum, right_sum, row_left, row_right


@triton.jit
def attention_backward_q_kernel(
    q, k, v, do, dq, p_statistics, p_delta, p_dslopes, p_dtable_ends, p_drows, mask, bias, extra, interval, numbers,
    HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ; per program one partial sum of dslopes and two of dtable: distances beyond its left and its right end."""
    pid = tl.program_id(0)
    bh = pid // TILES
    i_m = pid % TILES
    if HAS_RIGHT:
        i_m = TILES - 1 - i_m
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    m0 = i_m * BM
    i = m0 + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    row = i.to(tl.int64)
    offset = query_offset(interval, numbers, b)
    p = i + offset
    first = m0 + offset
    last = tl.minimum(m0 + BM, numbers.query_length) - 1 + offset
    lo, hi, full_lo, full_hi = keys_of_queries(first, last, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    lo, hi, full_lo, full_hi = narrowed(lo, hi, full_lo, full_hi, mask.key_spans, b, h, m0, numbers.query_length, BM)
    HAS_TABLE: tl.constexpr = bias.table is not None or bias.content is not None
    STARTS_GENERAL: tl.constexpr = HAS_LEFT or mask.query_ids is not None or mask.dense is not None
    ALWAYS_GENERAL: tl.constexpr = (mask.query_ids is not None or mask.dense is not None) and mask.key_spans is None
    NEEDS_SLOPES: tl.constexpr = p_dslopes is not None
    NEEDS_TABLE: tl.constexpr = p_dtable_ends is not None
    reach_left, reach_right = table_reach(bias, numbers)
    start, full, near, far, full_end = split(
        first, last, lo, hi, full_lo, full_hi, reach_left, reach_right, BN, ALWAYS_GENERAL, HAS_TABLE, HAS_RIGHT
    )

    in_q = (i < numbers.query_length)[:, None] & (o_d < D)[None, :]
    in_do = (i < numbers.query_length)[:, None] & (o_dv < DV)[None, :]
    # [BM, BD], [BM, BDV]
    b_q = tl.load(q.ptr + b * q.sb + h * q.sh + row[:, None] * q.si + o_d[None, :], mask=in_q, other=0.0)
    b_do = tl.load(do.ptr + b * do.sb + h * do.sh + row[:, None] * do.si + o_dv[None, :], mask=in_do, other=0.0)
    at = bh.to(tl.int64) * numbers.query_length + i
    largest = tl.load(p_statistics + 2 * at, mask=i < numbers.query_length, other=0.0)
    log_sum = tl.load(p_statistics + 2 * at + 1, mask=i < numbers.query_length, other=float("inf"))
    delta = tl.load(p_delta + at, mask=i < numbers.query_length, other=0.0)
    p_k = k.ptr + b * k.sb + (h // GROUP) * k.sh
    p_v = v.ptr + b * v.sb + (h // GROUP) * v.sh
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    slope_sum = tl.zeros([BM], dtype=tl.float32)
    left_sum = tl.zeros([BM], dtype=tl.float32)
    right_sum = tl.zeros([BM], dtype=tl.float32)
    row_left = tl.zeros([BM], dtype=tl.float32)
    row_right = tl.zeros([BM], dtype=tl.float32)
    p_drow = None
    entries = 0
    if p_drows is not None:
        entries = bias.content.left + bias.content.right + 1
        p_drow = p_drows + bh.to(tl.int64) * numbers.query_length * entries

    if STARTS_GENERAL:
        b_dq, slope_sum, left_sum, right_sum, row_left, row_right = _key_tiles(
            b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
            start, tl.minimum(full, hi),
            i, p, m0, bh, h, b, k, v, p_k, p_v, p_drow, mask, bias, extra, interval, numbers,
            D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, NEEDS_SLOPES, NEEDS_TABLE, True, NEAR,
        )  # fmt: skip
    if not ALWAYS_GENERAL:
        b_dq, slope_sum, left_sum, right_sum, row_left, row_right = _key_tiles(
            b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
            full, near,
            i, p, m0, bh, h, b, k, v, p_k, p_v, p_drow, mask, bias, extra, interval, numbers,
            D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, NEEDS_SLOPES, NEEDS_TABLE,
            False, FAR_LEFT if HAS_TABLE else NEAR,
        )  # fmt: skip
        tail = full_end
        if HAS_TABLE:
            if HAS_RIGHT:
                tail = near
            else:
                b_dq, slope_sum, left_sum, right_sum, row_left, row_right = _key_tiles(
                    b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
                    near, far,
                    i, p, m0, bh, h, b, k, v, p_k, p_v, p_drow, mask, bias, extra, interval, numbers,
                    D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, NEEDS_SLOPES, NEEDS_TABLE, True, NEAR,
                )  # fmt: skip
                b_dq, slope_sum, left_sum, right_sum, row_left, row_right = _key_tiles(
                    b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
                    far, full_end,
                    i, p, m0, bh, h, b, k, v, p_k, p_v, p_drow, mask, bias, extra, interval, numbers,
                    D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, NEEDS_SLOPES, NEEDS_TABLE,
                    False, FAR_RIGHT,
                )  # fmt: skip
        b_dq, slope_sum, left_sum, right_sum, row_left, row_right = _key_tiles(
            b_dq, slope_sum, left_sum, right_sum, row_left, row_right, b_q, b_do, largest, log_sum, delta,
            tail, hi,
            i, p, m0, bh, h, b, k, v, p_k, p_v, p_drow, mask, bias, extra, interval, numbers,
            D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, NEEDS_SLOPES, NEEDS_TABLE, True, NEAR,
        )  # fmt: skip

    if NEEDS_SLOPES:
        tl.store(p_dslopes + pid, tl.sum(slope_sum, axis=0))
    if NEEDS_TABLE:
        tl.store(p_dtable_ends + 2 * pid, tl.sum(left_sum, axis=0))
        tl.store(p_dtable_ends + 2 * pid + 1, tl.sum(right_sum, axis=0))
    if p_drows is not None:
        store_ends(p_drow, i, row_left, row_right, i < numbers.query_length, entries - 1, 1, entries)
    at_dq = dq.ptr + b * dq.sb + h * dq.sh + row[:, None] * dq.si + o_d[None, :]
    tl.store(at_dq, (b_dq * numbers.scale).to(dq.ptr.dtype.element_ty), mask=in_q)

"""Additive attention backward: recomputes scores and tanh tile by tile; no atomics.  With t = tanh(q_id + k_jd) and dS
as in attention:

    dq_id = w_d sum_j dS_ij (1 - t^2);   dk_jd = w_d sum_i dS_ij (1 - t^2);   dw_d = sum_ij dS_ij t

`additive_backward_kv_kernel` has one program per tile of keys, `additive_backward_q_kernel` one per tile of queries, as
attention's; the sums over a tile are those of one d at a time and are put into column d of the program's own result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_scores import additive_products, columns_of, tanh_tile
from .attention_backward import weights_and_gradient
from .bias_gradient import any_visible, store_bias_tile
from .scores import NEAR, finite_or_zero, keep_tile, keys_of_queries, queries_of_keys, query_offset
from .spans import narrowed


@triton.jit
def tile_gradient(
    b, h, m0, n0, columns, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers, HEADS, GROUP,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the tile at rows m0 ... and keys n0 ...: weights after dropout and dS, zero where masked, [BM, BN] float32,
    and the output's gradient [BM, BDV]."""
    i = m0 + tl.arange(0, BM)
    j = n0 + tl.arange(0, BN)
    o_dv = tl.arange(0, BDV)
    in_i = i < numbers.query_length
    in_j = j < numbers.key_length
    p_do = do.ptr + b * do.sb + h * do.sh + i.to(tl.int64)[:, None] * do.si + o_dv[None, :]
    p_v = v.ptr + b * v.sb + (h // GROUP) * v.sh + j.to(tl.int64)[None, :] * v.si + o_dv[:, None]
    # Rows that saw a bad key have NaN statistics or a NaN delta already; the others must not meet it again.
    b_do = finite_or_zero(tl.load(p_do, mask=in_i[:, None] & (o_dv < DV)[None, :], other=0.0))
    b_v = finite_or_zero(tl.load(p_v, mask=in_j[None, :] & (o_dv < DV)[:, None], other=0.0))
    at = (b * HEADS + h) * numbers.query_length + i
    largest = tl.load(p_statistics + 2 * at, mask=in_i, other=0.0)
    log_sum = tl.load(p_statistics + 2 * at + 1, mask=in_i, other=float("inf"))
    delta = tl.load(p_delta + at, mask=in_i, other=0.0)
    dw = tl.dot(b_do, b_v, input_precision=PRECISION)
    keep = None
    if HAS_DROPOUT:
        keep = keep_tile(m0, n0, b * HEADS + h, extra.seed, numbers, BM, BN)
    p = i + query_offset(interval, numbers, b)
    p_q, p_k, p_w = columns_of(columns, b, h, numbers, HEADS, GROUP, D)
    product = additive_products(p_q, p_k, p_w, i, j, numbers, D, BM, BN)
    dropped, ds, _ = weights_and_gradient(
        product, dw, largest[:, None], log_sum[:, None], delta[:, None], keep, i[:, None], j[None, :], p[:, None],
        mask, bias, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT, False, HAS_DROPOUT, True, NEAR,
    )  # fmt: skip
    return dropped, ds, b_do


@triton.jit
def _weighted(total, weight):
    """total * weight; what saw nothing is 0 whatever the weight is."""
    return tl.where(total == 0, 0.0, total * weight)


@triton.jit
def additive_backward_kv_kernel(
    columns, v, do, dk, dv, p_statistics, p_delta, mask, bias, extra, interval, numbers, HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    kv_heads = HEADS // GROUP
    b = ((pid // TILES) // kv_heads).to(tl.int64)
    h_kv = ((pid // TILES) % kv_heads).to(tl.int64)
    n0 = (pid % TILES) * BN
    j = n0 + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BDV], dtype=tl.float32)
    offset = query_offset(interval, numbers, b)
    rows = queries_of_keys(n0, n0 + BN - 1, offset, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    for g in range(GROUP):
        h = h_kv * GROUP + g
        p_q, p_k, p_w = columns_of(columns, b, h, numbers, HEADS, GROUP, D)
        lo, hi, full_lo, full_hi = rows
        lo, hi, _, _ = narrowed(lo, hi, full_lo, full_hi, mask.query_spans, b, h, n0, numbers.key_length, BN)
        for m0 in range(tl.maximum(lo, 0) // BM * BM, hi, BM):
            dropped, ds, b_do = tile_gradient(
                b, h, m0, n0, columns, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers,
                HEADS, GROUP, D, DV, BM, BN, BDV, HAS_LEFT, HAS_RIGHT, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
            b_dv = tl.dot(tl.trans(dropped).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
            i = m0 + tl.arange(0, BM)
            for d in range(D):
                t = tanh_tile(p_q, p_k, d, i, j, numbers)
                column = _weighted(tl.sum(ds * (1.0 - t * t), axis=0), tl.load(p_w + d))
                b_dk += tl.where((o_d == d)[None, :], column[:, None], 0.0)
    row = j.to(tl.int64)[:, None]
    in_j = (j < numbers.key_length)[:, None]
    at_dk = dk.ptr + b * dk.sb + h_kv * dk.sh + row * dk.si + o_d[None, :]
    at_dv = dv.ptr + b * dv.sb + h_kv * dv.sh + row * dv.si + o_dv[None, :]
    tl.store(at_dk, (b_dk * numbers.scale).to(dk.ptr.dtype.element_ty), mask=in_j & (o_d < D)[None, :])
    tl.store(at_dv, b_dv.to(dv.ptr.dtype.element_ty), mask=in_j & (o_dv < DV)[None, :])


@triton.jit
def additive_backward_q_kernel(
    columns, v, do, dq, p_statistics, p_delta, p_dweight, p_dslopes, p_dtable_ends,
    mask, bias, extra, interval, numbers, HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ; per program one partial sum of dweight (programs, D), one of dslopes and two of dtable: distances beyond its
    left and its right end."""
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
    offset = query_offset(interval, numbers, b)
    p = i + offset
    last = tl.minimum(m0 + BM, numbers.query_length) - 1 + offset
    lo, hi, full_lo, full_hi = keys_of_queries(m0 + offset, last, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    lo, hi, _, _ = narrowed(lo, hi, full_lo, full_hi, mask.key_spans, b, h, m0, numbers.query_length, BM)
    p_q, p_k, p_w = columns_of(columns, b, h, numbers, HEADS, GROUP, D)
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    b_dw = tl.zeros([BD], dtype=tl.float32)
    slope_sum = tl.zeros([BM], dtype=tl.float32)
    left_sum = tl.zeros([BM], dtype=tl.float32)
    right_sum = tl.zeros([BM], dtype=tl.float32)
    for n0 in range(lo // BN * BN, hi, BN):
        j = n0 + tl.arange(0, BN)
        _dropped, ds, _b_do = tile_gradient(
            b, h, m0, n0, columns, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers,
            HEADS, GROUP, D, DV, BM, BN, BDV, HAS_LEFT, HAS_RIGHT, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        distance = j[None, :] - p[:, None]
        if p_dslopes is not None:
            slope_sum -= tl.sum(ds * tl.abs(distance).to(tl.float32), axis=1)
        if p_dtable_ends is not None:
            beyond_left = distance <= -numbers.table_left
            left_sum += tl.sum(tl.where(beyond_left, ds, 0.0), axis=1)
            right_sum += tl.sum(tl.where((distance >= numbers.table_right) & ~beyond_left, ds, 0.0), axis=1)
        for d in range(D):
            t = tanh_tile(p_q, p_k, d, i, j, numbers)
            through = ds * t
            row = _weighted(tl.sum(ds - through * t, axis=1), tl.load(p_w + d))
            b_dq += tl.where((o_d == d)[None, :], row[:, None], 0.0)
            b_dw += tl.where(o_d == d, tl.sum(tl.sum(through, axis=1), axis=0), 0.0)
    tl.store(p_dweight + pid.to(tl.int64) * D + o_d, b_dw * numbers.scale, mask=o_d < D)
    if p_dslopes is not None:
        tl.store(p_dslopes + pid, tl.sum(slope_sum, axis=0))
    if p_dtable_ends is not None:
        tl.store(p_dtable_ends + 2 * pid, tl.sum(left_sum, axis=0))
        tl.store(p_dtable_ends + 2 * pid + 1, tl.sum(right_sum, axis=0))
    in_q = (i < numbers.query_length)[:, None] & (o_d < D)[None, :]
    at_dq = dq.ptr + b * dq.sb + h * dq.sh + i.to(tl.int64)[:, None] * dq.si + o_d[None, :]
    tl.store(at_dq, (b_dq * numbers.scale).to(dq.ptr.dtype.element_ty), mask=in_q)


@triton.jit
def additive_bias_gradient_kernel(
    columns, v, do, p_statistics, p_delta, p_grad, mask, bias, extra, interval, numbers, HEADS, GROUP,
    GRAD_B, GRAD_H, GRAD_M, GRAD_N, SUM_B, SUM_H, SUM_M, SUM_N,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
):  # fmt: skip
    """The twin of `dense_bias_gradient_kernel`."""
    pid = tl.program_id(0)
    i_n = pid % GRAD_N
    i_m = (pid // GRAD_N) % GRAD_M
    i_h = (pid // (GRAD_N * GRAD_M)) % GRAD_H
    i_b = pid // (GRAD_N * GRAD_M * GRAD_H)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r in range(SUM_B * SUM_H * SUM_M * SUM_N):
        n0 = (i_n + r % SUM_N) * BN
        m0 = (i_m + (r // SUM_N) % SUM_M) * BM
        h = tl.cast(i_h + (r // (SUM_N * SUM_M)) % SUM_H, tl.int64)
        b = tl.cast(i_b + r // (SUM_N * SUM_M * SUM_H), tl.int64)
        if any_visible(b, h, m0, n0, mask.key_spans, interval, numbers, BM, BN, HAS_LEFT, HAS_RIGHT):
            _dropped, ds, _b_do = tile_gradient(
                b, h, m0, n0, columns, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers,
                HEADS, GROUP, D, DV, BM, BN, BDV, HAS_LEFT, HAS_RIGHT, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
            acc += ds
    store_bias_tile(p_grad, acc, i_b * GRAD_H + i_h, i_m, i_n, numbers, BM, BN, ONE_ROW, ONE_COL)


@triton.jit
def additive_table_gradient_kernel(
    columns, v, do, p_statistics, p_delta, p_partial, mask, bias, extra, interval, numbers, HEADS, GROUP,
    FIRST_DIAGONAL, DIAGONALS, SPLITS, SUM_B, TILES_M, TILES_N,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The twin of `table_gradient_kernel`."""
    pid = tl.program_id(0)
    i_s = pid % SPLITS
    i_k = (pid // SPLITS) % DIAGONALS
    h = ((pid // (SPLITS * DIAGONALS)) % HEADS).to(tl.int64)
    i_b = pid // (SPLITS * DIAGONALS * HEADS)
    diagonal = FIRST_DIAGONAL + i_k
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r in range(SUM_B):
        b = tl.cast(i_b + r, tl.int64)
        for i_m in range(tl.maximum(0, -diagonal) + i_s, tl.minimum(TILES_M, TILES_N - diagonal), SPLITS):
            m0 = i_m * BM
            n0 = (i_m + diagonal) * BN
            if any_visible(b, h, m0, n0, mask.key_spans, interval, numbers, BM, BN, HAS_LEFT, HAS_RIGHT):
                _dropped, ds, _b_do = tile_gradient(
                    b, h, m0, n0, columns, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers,
                    HEADS, GROUP, D, DV, BM, BN, BDV, HAS_LEFT, HAS_RIGHT, HAS_DROPOUT, PRECISION,
                )  # fmt: skip
                acc += ds
    p_tile = p_partial + pid.to(tl.int64) * (BM * BN)
    tl.store(p_tile + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)

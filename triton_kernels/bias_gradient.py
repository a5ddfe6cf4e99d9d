"""Gradients of the dense bias and of the distance table: sums of dS over everything the parameter broadcasts over.

Each program owns one tile of the result and loops over what is summed, so there are no atomics and the memory is that
of the result.  A table's entries belong to diagonals of the score matrix; all tiles on one block diagonal share their
pattern of distances, so a program adds them up in registers and the diagonals are summed once at the end, on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import weights_and_gradient
from .scores import NEAR, finite_or_zero, keep_tile, keys_of_queries, query_offset
from .spans import narrowed


@triton.jit
def _score_gradient(
    b, h, m0, n0, q, k, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers, HEADS, GROUP,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of the tile at rows m0 ... and keys n0 ..., zero where masked: [BM, BN] float32."""
    i = m0 + tl.arange(0, BM)
    j = n0 + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    row = i.to(tl.int64)
    col = j.to(tl.int64)
    inside_i = i < numbers.query_length
    inside_j = j < numbers.key_length
    p_q = q.ptr + b * q.sb + h * q.sh
    p_do = do.ptr + b * do.sb + h * do.sh
    p_k = k.ptr + b * k.sb + (h // GROUP) * k.sh
    p_v = v.ptr + b * v.sb + (h // GROUP) * v.sh
    b_q = tl.load(p_q + row[:, None] * q.si + o_d[None, :], mask=inside_i[:, None] & (o_d < D)[None, :], other=0.0)
    b_do = tl.load(
        p_do + row[:, None] * do.si + o_dv[None, :], mask=inside_i[:, None] & (o_dv < DV)[None, :], other=0.0
    )
    b_k = tl.load(p_k + col[None, :] * k.si + o_d[:, None], mask=inside_j[None, :] & (o_d < D)[:, None], other=0.0)
    b_v = tl.load(p_v + col[None, :] * v.si + o_dv[:, None], mask=inside_j[None, :] & (o_dv < DV)[:, None], other=0.0)
    bh = b * HEADS + h
    at = bh * numbers.query_length + i
    largest = tl.load(p_statistics + 2 * at, mask=inside_i, other=0.0)
    log_sum = tl.load(p_statistics + 2 * at + 1, mask=inside_i, other=float("inf"))
    delta = tl.load(p_delta + at, mask=inside_i, other=0.0)
    product = tl.dot(b_q, finite_or_zero(b_k), input_precision=PRECISION)
    dw = tl.dot(b_do, finite_or_zero(b_v), input_precision=PRECISION)
    keep = None
    if HAS_DROPOUT:
        keep = keep_tile(m0, n0, bh, extra.seed, numbers, BM, BN)
    p = i + query_offset(interval, numbers, b)
    _, ds, _ = weights_and_gradient(
        product, dw, largest[:, None], log_sum[:, None], delta[:, None], keep, i[:, None], j[None, :], p[:, None],
        mask, bias, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, NEAR,
    )  # fmt: skip
    return ds


@triton.jit
def any_visible(
    b, h, m0, n0, spans, interval, numbers,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Whether the interval masks and the spans leave anything of the tile."""
    offset = query_offset(interval, numbers, b)
    last = tl.minimum(m0 + BM, numbers.query_length) - 1 + offset
    lo, hi, full_lo, full_hi = keys_of_queries(m0 + offset, last, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    lo, hi, _, _ = narrowed(lo, hi, full_lo, full_hi, spans, b, h, m0, numbers.query_length, BM)
    return (n0 < hi) & (n0 + BN > lo)


@triton.jit
def store_bias_tile(
    p_grad, acc, bh, i_m, i_n, numbers, BM: tl.constexpr, BN: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr
):
    """Write a tile's sum into the gradient of batch and head bh, summed up along dimensions of length 1."""
    i = i_m * BM + tl.arange(0, BM)
    j = i_n * BN + tl.arange(0, BN)
    rows = 1 if ONE_ROW else numbers.query_length
    cols = 1 if ONE_COL else numbers.key_length
    p_tile = p_grad + bh.to(tl.int64) * rows * cols
    if ONE_ROW and ONE_COL:
        tl.store(p_tile, tl.sum(tl.sum(acc, axis=1), axis=0).to(p_grad.dtype.element_ty))
    elif ONE_ROW:
        tl.store(p_tile + j, tl.sum(acc, axis=0).to(p_grad.dtype.element_ty), mask=j < cols)
    elif ONE_COL:
        tl.store(p_tile + i, tl.sum(acc, axis=1).to(p_grad.dtype.element_ty), mask=i < rows)
    else:
        at = i.to(tl.int64)[:, None] * cols + j[None, :]
        tl.store(p_tile + at, acc.to(p_grad.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols)[None, :])


@triton.jit
def dense_bias_gradient_kernel(
    q, k, v, do, p_statistics, p_delta, p_grad, mask, bias, extra, interval, numbers, HEADS, GROUP,
    GRAD_B, GRAD_H, GRAD_M, GRAD_N, SUM_B, SUM_H, SUM_M, SUM_N,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
):  # fmt: skip
    """Gradient of a (GRAD_B, GRAD_H, 1|Sq, 1|Sk) bias.  GRAD_M x GRAD_N tiles of it exist per batch and head; a program
    sums the SUM_B x SUM_H x SUM_M x SUM_N score tiles that broadcast onto its own."""
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
            acc += _score_gradient(
                b, h, m0, n0, q, k, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers, HEADS, GROUP,
                D, DV, BM, BN, BD, BDV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
    store_bias_tile(p_grad, acc, i_b * GRAD_H + i_h, i_m, i_n, numbers, BM, BN, ONE_ROW, ONE_COL)


@triton.jit
def table_gradient_kernel(
    q, k, v, do, p_statistics, p_delta, p_partial, mask, bias, extra, interval, numbers, HEADS, GROUP,
    FIRST_DIAGONAL, DIAGONALS, SPLITS, SUM_B, TILES_M, TILES_N,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of the dS tiles of one block diagonal (key tile - query tile = FIRST_DIAGONAL + i_k) of one head, over the
    batches and every SPLITS-th row: p_partial (programs, BM, BN)."""
    pid = tl.program_id(0)
    i_s = pid % SPLITS
    i_k = (pid // SPLITS) % DIAGONALS
    h = ((pid // (SPLITS * DIAGONALS)) % HEADS).to(tl.int64)
    i_b = pid // (SPLITS * DIAGONALS * HEADS)
    diagonal = FIRST_DIAGONAL + i_k
    lo = tl.maximum(0, -diagonal)
    hi = tl.minimum(TILES_M, TILES_N - diagonal)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r in range(SUM_B):
        b = tl.cast(i_b + r, tl.int64)
        for i_m in range(lo + i_s, hi, SPLITS):
            m0 = i_m * BM
            n0 = (i_m + diagonal) * BN
            if any_visible(b, h, m0, n0, mask.key_spans, interval, numbers, BM, BN, HAS_LEFT, HAS_RIGHT):
                acc += _score_gradient(
                    b, h, m0, n0, q, k, v, do, p_statistics, p_delta, mask, bias, extra, interval, numbers,
                    HEADS, GROUP, D, DV, BM, BN, BD, BDV, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION,
                )  # fmt: skip
    p_tile = p_partial + pid.to(tl.int64) * (BM * BN)
    tl.store(p_tile + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)

"""Additive attention forward: one program per tile of BM queries of one head, online softmax over tiles of BN keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .additive_scores import additive_products, columns_of
from .scores import LN2, NEAR, NEG_INF, keep_tile, keys_of_queries, query_offset, scores
from .spans import narrowed


@triton.jit
def additive_forward_kernel(
    columns, v, o, p_lse, p_statistics, mask, bias, extra, interval, numbers, HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // TILES
    i_m = pid % TILES
    if HAS_RIGHT:
        i_m = TILES - 1 - i_m  # the longest rows of a causal mask start first
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    m0 = i_m * BM
    i = m0 + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_dv = tl.arange(0, BDV)
    offset = query_offset(interval, numbers, b)
    p = i + offset
    last = tl.minimum(m0 + BM, numbers.query_length) - 1 + offset
    lo, hi, full_lo, full_hi = keys_of_queries(m0 + offset, last, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    lo, hi, _, _ = narrowed(lo, hi, full_lo, full_hi, mask.key_spans, b, h, m0, numbers.query_length, BM)
    p_q, p_k, p_w = columns_of(columns, b, h, numbers, HEADS, GROUP, D)
    p_v = v.ptr + b * v.sb + (h // GROUP) * v.sh
    acc = tl.zeros([BM, BDV], dtype=tl.float32)
    m_i = tl.full([BM], NEG_INF, dtype=tl.float32)
    l_i = tl.zeros([BM], dtype=tl.float32)
    # Every tile checks every mask: that is little beside D hyperbolic tangents an element.
    for n0 in range(lo // BN * BN, hi, BN):
        j = n0 + o_n
        product = additive_products(p_q, p_k, p_w, i, j, numbers, D, BM, BN)
        s, _capped = scores(
            product, i[:, None], j[None, :], p[:, None], mask, bias, interval, numbers, b, h,
            HAS_LEFT, HAS_RIGHT, False, True, NEAR,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, axis=1))
        # a row that has seen nothing yet keeps a finite pivot, so that -inf - -inf never happens
        pivot = tl.where(m_new == NEG_INF, 0.0, m_new)
        w = tl.exp2(s - pivot[:, None])
        alpha = tl.exp2(m_i - pivot)
        l_i = l_i * alpha + tl.sum(w, axis=1)
        m_i = m_new
        if HAS_DROPOUT:
            w = tl.where(keep_tile(m0, n0, bh, extra.seed, numbers, BM, BN), w, 0.0)
        acc = acc * alpha[:, None]
        # [BN, BDV]
        at_v = p_v + j.to(tl.int64)[:, None] * v.si + o_dv[None, :]
        b_v = tl.load(at_v, mask=(j < numbers.key_length)[:, None] & (o_dv < DV)[None, :], other=0.0)
        # A masked key must not reach the row through 0 * NaN; a row that does see a bad value becomes NaN.
        bad = tl.max((tl.abs(b_v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, axis=1)
        if tl.max(bad, axis=0) > 0:
            b_v = tl.where((bad == 0)[:, None], b_v, tl.zeros_like(b_v))
            sees = tl.max(tl.where((s != NEG_INF) & (bad > 0)[None, :], 1, 0), axis=1)
            acc = tl.where((sees > 0)[:, None], float("nan"), acc)
        acc = tl.dot(w.to(b_v.dtype), b_v, acc, input_precision=PRECISION)

    empty = l_i == 0
    total = tl.where(empty, 1.0, l_i)
    out = acc / total[:, None]
    if HAS_DROPOUT:
        out *= numbers.keep_scale
    at = bh.to(tl.int64) * numbers.query_length + i
    inside = i < numbers.query_length
    tl.store(p_lse + at, tl.where(empty, float("inf"), m_i * LN2 + tl.log(total)), mask=inside)
    # the two terms of lse apart, as in attention: beside large biases the logarithm would be lost in their sum
    tl.store(p_statistics + 2 * at, tl.where(empty, 0.0, m_i), mask=inside)
    tl.store(p_statistics + 2 * at + 1, tl.where(empty, float("inf"), tl.log2(total)), mask=inside)
    at_o = o.ptr + b * o.sb + h * o.sh + i.to(tl.int64)[:, None] * o.si + o_dv[None, :]
    tl.store(at_o, out.to(o.ptr.dtype.element_ty), mask=inside[:, None] & (o_dv < DV)[None, :])

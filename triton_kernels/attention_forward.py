"""Attention forward: one program per tile of BM queries of one head, online softmax over tiles of BN keys."""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import split
from .scores import (
    FAR_LEFT,
    FAR_RIGHT,
    LN2,
    LOG2E,
    NEAR,
    NEG_INF,
    keep_tile,
    keys_of_queries,
    query_offset,
    scores,
    table_reach,
)
from .spans import narrowed


@triton.jit
def _tiles(
    acc, l_i, m_i, b_q, lo, hi, i, p, m0, bh, h, b, k, v, p_k, p_v, mask, bias, extra, interval, numbers,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, GENERAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo ... hi - 1 into the running output, denominator and maximum."""
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_dv = tl.arange(0, BDV)
    # Table look-ups of near tiles are not worth staging in shared memory, where they would take more than K and V.
    HAS_TABLE: tl.constexpr = bias.table is not None or bias.content is not None
    STAGES: tl.constexpr = 1 if GENERAL and HAS_TABLE and BD <= 64 else None
    for n0 in tl.range(lo, hi, BN, num_stages=STAGES):
        j = n0 + o_n
        # 64 bits for where the tile starts, the stride's own width inside it (half the address registers)
        row = tl.cast(n0, tl.int64)
        # [BD, BN]
        at_k = p_k + row * k.si + (o_n[None, :] * k.si + o_d[:, None])
        # [BN, BDV]
        at_v = p_v + row * v.si + (o_n[:, None] * v.si + o_dv[None, :])
        if GENERAL:
            b_k = tl.load(at_k, mask=(j < numbers.key_length)[None, :] & (o_d < D)[:, None], other=0.0)
        elif BD == D:
            b_k = tl.load(at_k)
        else:
            b_k = tl.load(at_k, mask=(o_d < D)[:, None], other=0.0)
        # [BM, BN]
        product = tl.dot(b_q, b_k, input_precision=PRECISION)
        s, _ = scores(
            product, i[:, None], j[None, :], p[:, None], mask, bias, interval, numbers, b, h,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, GENERAL, SIDE,
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
        # [BM, BDV]
        acc = acc * alpha[:, None]
        if GENERAL:
            b_v = tl.load(at_v, mask=(j < numbers.key_length)[:, None] & (o_dv < DV)[None, :], other=0.0)
        elif BDV == DV:
            b_v = tl.load(at_v)
        else:
            b_v = tl.load(at_v, mask=(o_dv < DV)[None, :], other=0.0)
        if GENERAL or bias.dense is not None:
            # A masked key must not reach the row through 0 * NaN; a row that does see a bad value becomes NaN.  A dense
            # bias masks in every tile, where it is -inf.
            bad = tl.max((tl.abs(b_v.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, axis=1)
            if tl.max(bad, axis=0) > 0:
                b_v = tl.where((bad == 0)[:, None], b_v, tl.zeros_like(b_v))
                sees = tl.max(tl.where((s != NEG_INF) & (bad > 0)[None, :], 1, 0), axis=1)
                acc = tl.where((sees > 0)[:, None], float("nan"), acc)
        acc = tl.dot(w.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
    return acc, l_i, m_i


@triton.jit
def attention_forward_kernel(
    q, k, v, o, p_lse, p_statistics, mask, bias, extra, interval, numbers, HEADS, GROUP, TILES,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
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
    reach_left, reach_right = table_reach(bias, numbers)
    start, full, near, far, full_end = split(
        first, last, lo, hi, full_lo, full_hi, reach_left, reach_right, BN, ALWAYS_GENERAL, HAS_TABLE, HAS_RIGHT
    )

    # [BM, BD]
    in_q = (i < numbers.query_length)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q.ptr + b * q.sb + h * q.sh + row[:, None] * q.si + o_d[None, :], mask=in_q, other=0.0)
    p_k = k.ptr + b * k.sb + (h // GROUP) * k.sh
    p_v = v.ptr + b * v.sb + (h // GROUP) * v.sh
    acc = tl.zeros([BM, BDV], dtype=tl.float32)
    if extra.sink is not None:
        # the sink is one logit seen before every key
        sink = tl.load(extra.sink + b * extra.sink_sb + h).to(tl.float32) * LOG2E
        m_i = tl.zeros([BM], dtype=tl.float32) + sink
        l_i = tl.zeros([BM], dtype=tl.float32) + 1.0
    else:
        m_i = tl.full([BM], NEG_INF, dtype=tl.float32)
        l_i = tl.zeros([BM], dtype=tl.float32)

    if STARTS_GENERAL:
        acc, l_i, m_i = _tiles(
            acc, l_i, m_i, b_q, start, tl.minimum(full, hi), i, p, m0, bh, h, b, k, v, p_k, p_v,
            mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
        )  # fmt: skip
    if not ALWAYS_GENERAL:
        acc, l_i, m_i = _tiles(
            acc, l_i, m_i, b_q, full, near, i, p, m0, bh, h, b, k, v, p_k, p_v,
            mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False, FAR_LEFT if HAS_TABLE else NEAR,
        )  # fmt: skip
        tail = full_end
        if HAS_TABLE:
            if HAS_RIGHT:
                tail = near
            else:
                acc, l_i, m_i = _tiles(
                    acc, l_i, m_i, b_q, near, far, i, p, m0, bh, h, b, k, v, p_k, p_v,
                    mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
                )  # fmt: skip
                acc, l_i, m_i = _tiles(
                    acc, l_i, m_i, b_q, far, full_end, i, p, m0, bh, h, b, k, v, p_k, p_v,
                    mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, False, FAR_RIGHT,
                )  # fmt: skip
        acc, l_i, m_i = _tiles(
            acc, l_i, m_i, b_q, tail, hi, i, p, m0, bh, h, b, k, v, p_k, p_v,
            mask, bias, extra, interval, numbers, D, DV, BM, BN, BD, BDV,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, PRECISION, True, NEAR,
        )  # fmt: skip

    empty = l_i == 0
    total = tl.where(empty, 1.0, l_i)
    out = acc / total[:, None]
    if HAS_DROPOUT:
        out *= numbers.keep_scale
    lse = tl.where(empty, float("inf"), m_i * LN2 + tl.log(total))
    at = bh.to(tl.int64) * numbers.query_length + i
    tl.store(p_lse + at, lse, mask=i < numbers.query_length)
    # The backward takes the two terms of lse apart: beside scores of 1e9 the logarithm would be lost in their sum.
    tl.store(p_statistics + 2 * at, tl.where(empty, 0.0, m_i), mask=i < numbers.query_length)
    tl.store(p_statistics + 2 * at + 1, tl.where(empty, float("inf"), tl.log2(total)), mask=i < numbers.query_length)
    in_o = (i < numbers.query_length)[:, None] & (o_dv < DV)[None, :]
    at_o = o.ptr + b * o.sb + h * o.sh + row[:, None] * o.si + o_dv[None, :]
    tl.store(at_o, out.to(o.ptr.dtype.element_ty), mask=in_o)

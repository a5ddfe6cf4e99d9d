"""From raw products to masked scores in the log2 domain: the part the forward and all backward kernels share.

Everything works on index tensors that broadcast, so a kernel may hold its tile as [BM, BN] or transposed.  Scores are
kept times log2(e), so that the softmax needs exp2 alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .content_tables import content_value

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# A finite bias as low as finfo.min would become -inf times log2(e); torch treats it as a number, so it stops here.
LOWEST_BIAS = tl.constexpr(-1e30)

# Where a tile lies relative to the distance table's reach and the diagonal.
NEAR = tl.constexpr(0)
FAR_LEFT = tl.constexpr(-1)
FAR_RIGHT = tl.constexpr(1)


@triton.jit
def tanh(x):
    # 1 - 2 / (e^2x + 1) loses all relative accuracy near 0, where scores live under a large cap: a series there.
    e = tl.exp2(tl.minimum(tl.abs(x), 10.0) * (2.0 * LOG2E))
    large = 1.0 - 2.0 / (e + 1.0)
    large = tl.where(x < 0, -large, large)
    x2 = x * x
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, small, large)


@triton.jit
def query_offset(interval, numbers, b):
    """Position of query 0 of batch b among the keys."""
    if interval.offsets is not None:
        # far beyond every length, and far from the end of 32 bits
        offset = tl.load(interval.offsets + b * interval.offsets_sb).to(tl.int64)
        return tl.minimum(tl.maximum(offset, -1073741824), 1073741824).to(tl.int32)
    return numbers.query_offset


@triton.jit
def key_limit(interval, numbers, b):
    """One past the last key that batch b may see at all."""
    limit = numbers.key_length
    if interval.key_lengths is not None:
        length = tl.load(interval.key_lengths + b * interval.key_lengths_sb).to(tl.int64)
        limit = tl.minimum(limit, tl.minimum(tl.maximum(length, 0), 2147483647).to(tl.int32))
    return limit


@triton.jit
def prefix_length(interval, b):
    length = tl.load(interval.prefix_lengths + b * interval.prefix_lengths_sb)
    return tl.minimum(tl.maximum(length, 0), 2147483647).to(tl.int32)


@triton.jit
def keys_of_queries(first, last, interval, numbers, b, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Key ranges of the queries at positions first ... last: [lo, hi) holds every key one of them sees, and
    [full_lo, full_hi) only keys that all of them see."""
    limit = key_limit(interval, numbers, b)
    lo = 0
    full_lo = 0
    hi = limit
    full_hi = limit
    if HAS_LEFT:
        lo = tl.maximum(lo, first - numbers.window_left)
        full_lo = tl.maximum(full_lo, last - numbers.window_left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, last + numbers.window_right + 1)
        full_hi = tl.minimum(full_hi, first + numbers.window_right + 1)
    if interval.prefix_lengths is not None:
        prefix = prefix_length(interval, b)
        hi = tl.minimum(hi, tl.maximum(last + 1, prefix))
        full_hi = tl.minimum(full_hi, tl.maximum(first + 1, prefix))
    return lo, hi, full_lo, full_hi


@triton.jit
def queries_of_keys(first, last, offset, interval, numbers, b, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """The mirror of `keys_of_queries`: query row ranges [lo, hi) and [full_lo, full_hi) of the keys first ... last."""
    limit = key_limit(interval, numbers, b)
    lo = 0
    full_lo = 0
    hi = numbers.query_length
    full_hi = numbers.query_length
    if HAS_LEFT:
        hi = tl.minimum(hi, last + numbers.window_left - offset + 1)
        full_hi = tl.minimum(full_hi, first + numbers.window_left - offset + 1)
    if HAS_RIGHT:
        lo = tl.maximum(lo, first - numbers.window_right - offset)
        full_lo = tl.maximum(full_lo, last - numbers.window_right - offset)
    if interval.prefix_lengths is not None:
        prefix = prefix_length(interval, b)
        lo = tl.where(first < prefix, lo, tl.maximum(lo, first - offset))
        full_lo = tl.where(last < prefix, full_lo, tl.maximum(full_lo, last - offset))
    hi = tl.where(first < limit, hi, 0)
    full_hi = tl.where(last < limit, full_hi, 0)
    return lo, hi, full_lo, full_hi


@triton.jit
def visible(i, j, p, mask, interval, numbers, b, h, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether query row i at position p may attend to key j, before any dense bias of -inf."""
    limit = key_limit(interval, numbers, b)
    inside = (i < numbers.query_length) & (j < numbers.key_length)
    seen = (j < limit) & (i < numbers.query_length)
    if HAS_LEFT:
        seen = seen & (j >= p - numbers.window_left)
    if HAS_RIGHT:
        seen = seen & (j <= p + numbers.window_right)
    if interval.prefix_lengths is not None:
        seen = seen & ((j <= p) | (j < prefix_length(interval, b)))
    if mask.query_ids is not None:
        q_id = tl.load(mask.query_ids + b * mask.query_ids_sb + i, mask=i < numbers.query_length, other=0)
        k_id = tl.load(mask.key_ids + b * mask.key_ids_sb + j, mask=j < numbers.key_length, other=0)
        seen = seen & (q_id == k_id)
    if mask.dense is not None:
        at = b * mask.dense_sb + h * mask.dense_sh + i.to(tl.int64) * mask.dense_si + j.to(tl.int64) * mask.dense_sj
        seen = seen & (tl.load(mask.dense + at, mask=inside, other=0) != 0)
    return seen


@triton.jit
def table_value(bias, b, h, index):
    return tl.load(bias.table + b * bias.table_sb + h * bias.table_sh + index).to(tl.float32)


@triton.jit
def table_reach(bias, numbers):
    """Distances to the left and to the right from which on the tables have one value each."""
    left = numbers.table_left
    right = numbers.table_right
    if bias.content is not None:
        left = tl.maximum(left, bias.content.left)
        right = tl.maximum(right, bias.content.right)
    return left, right


@triton.jit
def add_bias(s, i, j, p, bias, numbers, b, h, SIDE: tl.constexpr):
    """s + bias, in the log2 domain.  SIDE says that the whole tile lies beyond the table's reach on one side."""
    delta = j - p
    if bias.slopes is not None:
        slope = tl.load(bias.slopes + b * bias.slopes_sb + h).to(tl.float32) * LOG2E
        s -= slope * tl.abs(delta).to(tl.float32)
    if bias.table is not None:
        if SIDE == FAR_LEFT:
            s += table_value(bias, b, h, 0) * LOG2E
        elif SIDE == FAR_RIGHT:
            s += table_value(bias, b, h, numbers.table_left + numbers.table_right) * LOG2E
        else:
            clamped = tl.minimum(tl.maximum(delta, -numbers.table_left), numbers.table_right)
            s += table_value(bias, b, h, clamped + numbers.table_left) * LOG2E
    if bias.content is not None:
        s += content_value(bias.content, i, j, delta, numbers, b, h, SIDE) * LOG2E
    if bias.dense is not None:
        at = b * bias.dense_sb + h * bias.dense_sh + i.to(tl.int64) * bias.dense_si + j.to(tl.int64) * bias.dense_sj
        inside = (i < numbers.query_length) & (j < numbers.key_length)
        added = tl.load(bias.dense + at, mask=inside, other=0.0).to(tl.float32)
        # not maximum(), which would drop a NaN on a GPU
        raised = tl.where(added < LOWEST_BIAS, LOWEST_BIAS, added)
        s = tl.where(added == NEG_INF, NEG_INF, s + raised * LOG2E)
    return s


@triton.jit
def scores(
    product, i, j, p, mask, bias, interval, numbers, b, h,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GENERAL: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Scores times log2(e) of a tile of raw products, -inf where masked; and tanh of the capped score (or 0).

    i, j are row and key indices and p the rows' positions, shaped to broadcast over the tile.  GENERAL tiles check
    every mask; others are known to be visible throughout.
    """
    if HAS_SOFTCAP:
        capped = tanh(product * (numbers.scale / numbers.softcap))
        s = capped * (numbers.softcap * LOG2E)
    else:
        capped = 0.0
        s = product * (numbers.scale * LOG2E)
    s = add_bias(s, i, j, p, bias, numbers, b, h, SIDE)
    if GENERAL:
        s = tl.where(visible(i, j, p, mask, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT), s, NEG_INF)
    return s, capped


@triton.jit
def finite_or_zero(x):
    """x with NaN and infinities zeroed: 0 * NaN must not leak through a masked place."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, tl.zeros_like(x))


@triton.jit
def keep_tile(i0, j0, bh, seed, numbers, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] dropout mask of rows i0 ... and keys j0 ... (j0 a multiple of 4): the function of fastattn/philox.py."""
    key = tl.load(seed).to(tl.uint64)
    counter3 = tl.load(seed + 1).to(tl.uint32)
    i = (i0 + tl.arange(0, BM))[:, None].to(tl.uint32)
    group = (j0 // 4 + tl.arange(0, BN // 4))[None, :].to(tl.uint32)
    zero = tl.zeros([BM, BN // 4], dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, zero + group, zero + i, zero + bh.to(tl.uint32), zero + counter3)
    # join puts its operands last: [.., 2, 2] read in memory order is w0, w1, w2, w3
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BM, BN])
    return words.to(tl.int64) >= numbers.drop_threshold

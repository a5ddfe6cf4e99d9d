"""Masked softmax of scores that are already there, forward and backward.

One program per few rows.  Rows of up to 16384 columns stay in registers between their one read and their one write;
longer ones take two passes, the first of which keeps a running maximum and sum.  Interval masks give each row's bounds
by arithmetic: what lies outside is written as 0 without being read.  The backward reads the output y and its gradient:

    dS = y * (dy - delta), delta = sum(y * dy);  dscores = scale * dS

and sees nothing of either where y is 0, which holds for every masked place.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastattn.softmax_problem import SoftmaxProblem

from . import tiles
from .features import Features, operand
from .launcher import constants, launch
from .layout import dense
from .scores import LOG2E, LOWEST_BIAS, NEAR, NEG_INF, add_bias, keys_of_queries, query_offset, visible


@triton.jit
def row_bounds(p, interval, numbers, b, BM: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """[BM] bounds lo, hi of the columns that the rows at positions p may see."""
    lo, hi, _, _ = keys_of_queries(p, p, interval, numbers, b, HAS_LEFT, HAS_RIGHT)
    zero = tl.zeros([BM], dtype=tl.int32)
    return zero + lo, zero + hi


@triton.jit
def _scores(
    x, i, j, p, lo, hi, b, h, mask, bias, interval, numbers, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """[BM, BN] scores times log2(e), -inf where masked."""
    inside = (i < numbers.query_length)[:, None] & (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    at = x.ptr + b * x.sb + h * x.sh + i.to(tl.int64)[:, None] * x.si + j[None, :]
    s = tl.load(at, mask=inside, other=0.0).to(tl.float32) * numbers.scale
    # a finite score stays finite: finfo.min times log2(e) would be -inf, which masks
    s = tl.where(tl.abs(s) < float("inf"), tl.minimum(tl.maximum(s, LOWEST_BIAS), -LOWEST_BIAS), s) * LOG2E
    s = add_bias(s, i[:, None], j[None, :], p[:, None], bias, numbers, b, h, NEAR)
    seen = visible(i[:, None], j[None, :], p[:, None], mask, interval, numbers, b, h, HAS_LEFT, HAS_RIGHT)
    return tl.where(inside & seen, s, NEG_INF)


@triton.jit
def _pivot(top):
    """What to subtract from the scores of rows whose largest is `top`."""
    return tl.where(top == NEG_INF, 0.0, top)


@triton.jit
def _weights(s, pivot, total):
    w = tl.exp2(s - pivot[:, None]) * (1.0 / tl.where(total == 0, 1.0, total))[:, None]
    # also in a row that sees NaN, where every visible weight is one
    return tl.where(s == NEG_INF, 0.0, w)


@triton.jit
def _store(y, tile, i, j, b, h, numbers):
    at = y.ptr + b * y.sb + h * y.sh + i.to(tl.int64)[:, None] * y.si + j[None, :]
    inside = (i < numbers.query_length)[:, None] & (j < numbers.key_length)[None, :]
    tl.store(at, tile.to(y.ptr.dtype.element_ty), mask=inside)


@triton.jit
def softmax_forward_kernel(
    x, y, mask, bias, interval, numbers, HEADS, TILES,
    BM: tl.constexpr, BN: tl.constexpr, ONE_PASS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh = pid // TILES
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    i = (pid % TILES) * BM + tl.arange(0, BM)
    p = i + query_offset(interval, numbers, b)
    lo, hi = row_bounds(p, interval, numbers, b, BM, HAS_LEFT, HAS_RIGHT)
    o_n = tl.arange(0, BN)
    if ONE_PASS:
        s = _scores(x, i, o_n, p, lo, hi, b, h, mask, bias, interval, numbers, HAS_LEFT, HAS_RIGHT)
        pivot = _pivot(tl.max(s, axis=1))
        total = tl.sum(tl.exp2(s - pivot[:, None]), axis=1)
        _store(y, _weights(s, pivot, total), i, o_n, b, h, numbers)
    else:
        start = tl.maximum(tl.min(lo, axis=0), 0) // BN * BN
        end = tl.max(hi, axis=0)
        top = tl.full([BM], NEG_INF, dtype=tl.float32)
        total = tl.zeros([BM], dtype=tl.float32)
        for n0 in range(start, end, BN):
            s = _scores(x, i, n0 + o_n, p, lo, hi, b, h, mask, bias, interval, numbers, HAS_LEFT, HAS_RIGHT)
            higher = tl.maximum(top, tl.max(s, axis=1))
            pivot = _pivot(higher)
            total = total * tl.exp2(top - pivot) + tl.sum(tl.exp2(s - pivot[:, None]), axis=1)
            top = higher
        pivot = _pivot(top)
        for n0 in range(0, numbers.key_length, BN):
            j = n0 + o_n
            if (n0 < end) & (n0 + BN > start):
                s = _scores(x, i, j, p, lo, hi, b, h, mask, bias, interval, numbers, HAS_LEFT, HAS_RIGHT)
                _store(y, _weights(s, pivot, total), i, j, b, h, numbers)
            else:
                _store(y, tl.zeros([BM, BN], dtype=tl.float32), i, j, b, h, numbers)


@triton.jit
def _output_and_gradient(y, dy, i, j, lo, hi, b, h, numbers):
    """[BM, BN] of y and dy, both 0 where y is."""
    inside = (i < numbers.query_length)[:, None] & (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    row = i.to(tl.int64)[:, None]
    b_y = tl.load(y.ptr + b * y.sb + h * y.sh + row * y.si + j[None, :], mask=inside, other=0.0).to(tl.float32)
    b_dy = tl.load(dy.ptr + b * dy.sb + h * dy.sh + row * dy.si + j[None, :], mask=inside, other=0.0).to(tl.float32)
    return b_y, tl.where(b_y == 0, 0.0, b_dy)


@triton.jit
def _parameter_sums(
    slope_sum, left_sum, right_sum, ds, j, p, numbers, NEEDS_SLOPES: tl.constexpr, NEEDS_TABLE: tl.constexpr
):  # fmt: skip
    """Add a tile's share of the slopes' gradient and of those of the table's two ends, row by row."""
    distance = j[None, :] - p[:, None]
    if NEEDS_SLOPES:
        slope_sum -= tl.sum(ds * tl.abs(distance).to(tl.float32), axis=1)
    if NEEDS_TABLE:
        beyond_left = distance <= -numbers.table_left
        left_sum += tl.sum(tl.where(beyond_left, ds, 0.0), axis=1)
        right_sum += tl.sum(tl.where((distance >= numbers.table_right) & ~beyond_left, ds, 0.0), axis=1)
    return slope_sum, left_sum, right_sum


@triton.jit
def softmax_backward_kernel(
    y, dy, dx, p_delta, p_dslopes, p_dtable_ends, interval, numbers, HEADS, TILES,
    BM: tl.constexpr, BN: tl.constexpr, ONE_PASS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """dscores, and what is asked for of: delta (B, H, Sq), and per program one partial sum of the slopes' gradient and
    two of the table's, for distances at or beyond its left and its right end."""
    pid = tl.program_id(0)
    bh = pid // TILES
    b = (bh // HEADS).to(tl.int64)
    h = (bh % HEADS).to(tl.int64)
    i = (pid % TILES) * BM + tl.arange(0, BM)
    p = i + query_offset(interval, numbers, b)
    lo, hi = row_bounds(p, interval, numbers, b, BM, HAS_LEFT, HAS_RIGHT)
    o_n = tl.arange(0, BN)
    NEEDS_SCORES: tl.constexpr = dx is not None
    NEEDS_SLOPES: tl.constexpr = p_dslopes is not None
    NEEDS_TABLE: tl.constexpr = p_dtable_ends is not None
    slope_sum = tl.zeros([BM], dtype=tl.float32)
    left_sum = tl.zeros([BM], dtype=tl.float32)
    right_sum = tl.zeros([BM], dtype=tl.float32)
    if ONE_PASS:
        b_y, b_dy = _output_and_gradient(y, dy, i, o_n, lo, hi, b, h, numbers)
        delta = tl.sum(b_y * b_dy, axis=1)
        ds = tl.where(b_y == 0, 0.0, b_y * (b_dy - delta[:, None]))
        slope_sum, left_sum, right_sum = _parameter_sums(
            slope_sum, left_sum, right_sum, ds, o_n, p, numbers, NEEDS_SLOPES, NEEDS_TABLE
        )
        if NEEDS_SCORES:
            _store(dx, ds * numbers.scale, i, o_n, b, h, numbers)
    else:
        start = tl.maximum(tl.min(lo, axis=0), 0) // BN * BN
        end = tl.max(hi, axis=0)
        delta = tl.zeros([BM], dtype=tl.float32)
        for n0 in range(start, end, BN):
            b_y, b_dy = _output_and_gradient(y, dy, i, n0 + o_n, lo, hi, b, h, numbers)
            delta += tl.sum(b_y * b_dy, axis=1)
        for n0 in range(0, numbers.key_length, BN):
            j = n0 + o_n
            if (n0 < end) & (n0 + BN > start):
                b_y, b_dy = _output_and_gradient(y, dy, i, j, lo, hi, b, h, numbers)
                ds = tl.where(b_y == 0, 0.0, b_y * (b_dy - delta[:, None]))
                slope_sum, left_sum, right_sum = _parameter_sums(
                    slope_sum, left_sum, right_sum, ds, j, p, numbers, NEEDS_SLOPES, NEEDS_TABLE
                )
                if NEEDS_SCORES:
                    _store(dx, ds * numbers.scale, i, j, b, h, numbers)
            elif NEEDS_SCORES:
                _store(dx, tl.zeros([BM, BN], dtype=tl.float32), i, j, b, h, numbers)
    if p_delta is not None:
        tl.store(p_delta + bh.to(tl.int64) * numbers.query_length + i, delta, mask=i < numbers.query_length)
    if NEEDS_SLOPES:
        tl.store(p_dslopes + pid, tl.sum(slope_sum, axis=0))
    if NEEDS_TABLE:
        tl.store(p_dtable_ends + 2 * pid, tl.sum(left_sum, axis=0))
        tl.store(p_dtable_ends + 2 * pid + 1, tl.sum(right_sum, axis=0))


class Rows(Features):
    """A softmax problem in the form the kernels take, and how its rows are dealt out."""

    def __init__(self, problem: SoftmaxProblem) -> None:
        super().__init__(problem.attention())
        self.tile = tiles.row_tile(self.problem.key_length)
        self.tiles = tiles.cdiv(self.problem.query_length, self.tile.BM)
        self.programs = self.problem.batch_size * self.problem.num_heads * self.tiles
        has_left, has_right = self.window_flags
        self.constants = constants(
            BM=self.tile.BM, BN=self.tile.BN, ONE_PASS=self.problem.key_length <= self.tile.BN,
            HAS_LEFT=has_left, HAS_RIGHT=has_right, **tiles.launch_options(self.tile),
        )  # fmt: skip


def softmax_forward(problem: SoftmaxProblem) -> Tensor:
    """Masked softmax (B, H, Sq, Sk), contiguous, in the dtype of the scores."""
    scores = dense(problem.scores)
    out = scores.new_empty(scores.shape)
    rows = Rows(problem)
    if rows.programs and out.numel():
        launch(
            softmax_forward_kernel, rows.programs,
            (operand(scores), operand(out), rows.mask, rows.bias, rows.interval, rows.numbers), rows.constants,
            HEADS=rows.problem.num_heads, TILES=rows.tiles,
        )  # fmt: skip
    return out

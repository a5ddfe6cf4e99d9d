"""What blocks of rows see by ids and dense masks: tiles outside of it are not computed, those inside not masked.

A block's span is four numbers: [lo, hi) holds everything that one of its rows sees, and [full_lo, full_hi) only what
all of them see, where none of them has a hole.  Rows are queries and columns keys, or the other way round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastattn.problem import Problem

from .arguments import Mask, Spans
from .launcher import constants, launch
from .tiles import cdiv

# Queries and keys from which on masks are read once more, for their spans: fewer have few tiles to pass over.
LEAST_LENGTH = 256
BLOCK = tl.constexpr(16)  # rows; divides the tiles of every kernel


@triton.jit
def spans_kernel(
    p_spans, row_ids, row_ids_sb, col_ids, col_ids_sb, dense, dense_sb, dense_sh, dense_sr, dense_sc,
    HEADS, BLOCKS, ROWS, COLS, BN: tl.constexpr,
):  # fmt: skip
    """p_spans (B, HEADS, BLOCKS, 4) int32, one block a program."""
    pid = tl.program_id(0)
    b = (pid // BLOCKS // HEADS).to(tl.int64)
    h = (pid // BLOCKS % HEADS).to(tl.int64)
    i = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    within = i < ROWS
    # [rows, BN], each place for one column of every tile: put together at the end
    first = tl.zeros([BLOCK, BN], dtype=tl.int32) + COLS
    end = tl.zeros([BLOCK, BN], dtype=tl.int32)
    count = tl.zeros([BLOCK, BN], dtype=tl.int32)
    if row_ids is not None:
        row_id = tl.load(row_ids + b * row_ids_sb + i, mask=within, other=0)
    for n0 in range(0, COLS, BN):
        j = n0 + tl.arange(0, BN)
        inside = within[:, None] & (j < COLS)[None, :]
        seen = inside
        if row_ids is not None:
            col_id = tl.load(col_ids + b * col_ids_sb + j, mask=j < COLS, other=0)
            seen = seen & (row_id[:, None] == col_id[None, :])
        if dense is not None:
            at = (
                b * dense_sb
                + h * dense_sh
                + (i.to(tl.int64) * dense_sr)[:, None]
                + (j.to(tl.int64) * dense_sc)[None, :]
            )
            seen = seen & (tl.load(dense + at, mask=inside, other=0) != 0)
        first = tl.where(seen, tl.minimum(first, j[None, :]), first)
        end = tl.where(seen, j[None, :] + 1, end)
        count += seen.to(tl.int32)
    row_lo = tl.min(first, axis=1)
    row_hi = tl.max(end, axis=1)
    unbroken = (row_hi - row_lo == tl.sum(count, axis=1)) & (row_hi > 0)
    # rows beyond the last have no say
    full_lo = tl.where(within, tl.where(unbroken, row_lo, COLS), 0)
    full_hi = tl.where(within, tl.where(unbroken, row_hi, 0), COLS)
    p_own = p_spans + pid.to(tl.int64) * 4
    tl.store(p_own, tl.min(row_lo, axis=0))
    tl.store(p_own + 1, tl.max(row_hi, axis=0))
    tl.store(p_own + 2, tl.max(full_lo, axis=0))
    tl.store(p_own + 3, tl.min(full_hi, axis=0))


@triton.jit
def narrowed(
    lo, hi, full_lo, full_hi, spans, b, h, first, length,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The ranges that `keys_of_queries` or `queries_of_keys` gave of rows first ... first + ROWS - 1 of `length`,
    narrowed to the rows' spans, if there are any."""
    if spans is not None:
        o = first // BLOCK + tl.arange(0, ROWS // BLOCK)
        there = o * BLOCK < length
        at = spans.ptr + b * spans.sb + h * spans.sh + o * 4
        lo = tl.maximum(lo, tl.min(tl.load(at, mask=there, other=2147483647), axis=0))
        hi = tl.minimum(hi, tl.max(tl.load(at + 1, mask=there, other=0), axis=0))
        full_lo = tl.maximum(full_lo, tl.max(tl.load(at + 2, mask=there, other=0), axis=0))
        full_hi = tl.minimum(full_hi, tl.min(tl.load(at + 3, mask=there, other=2147483647), axis=0))
    return lo, hi, full_lo, full_hi


def with_spans(mask: Mask, problem: Problem, *, of_queries: bool = True, of_keys: bool = False) -> Mask:
    """The mask, and what blocks of queries (of keys) see by it, where that is worth a look at every element."""
    if (mask.query_ids is None and mask.dense is None) or min(problem.query_length, problem.key_length) < LEAST_LENGTH:
        return mask
    turned = mask._replace(
        query_ids=mask.key_ids, query_ids_sb=mask.key_ids_sb, key_ids=mask.query_ids, key_ids_sb=mask.query_ids_sb,
        dense_si=mask.dense_sj, dense_sj=mask.dense_si,
    )  # fmt: skip
    return mask._replace(
        key_spans=_spans(mask, problem, problem.query_length, problem.key_length) if of_queries else None,
        query_spans=_spans(turned, problem, problem.key_length, problem.query_length) if of_keys else None,
    )


def _spans(mask: Mask, problem: Problem, rows: int, columns: int) -> Spans:
    masks = [x for x in (problem.query_ids, problem.key_ids, problem.dense_mask) if x is not None]
    batch = max(x.shape[0] for x in masks)
    heads = 1 if problem.dense_mask is None else problem.dense_mask.shape[1]
    blocks = cdiv(rows, BLOCK.value)
    spans = torch.empty((batch, heads, blocks, 4), dtype=torch.int32, device=problem.device)
    launch(
        spans_kernel, blocks * batch * heads, (spans, *mask[:9]), constants(BN=128, num_warps=4),
        HEADS=heads, BLOCKS=blocks, ROWS=rows, COLS=columns,
    )  # fmt: skip
    return Spans(spans, spans.stride(0) if batch > 1 else 0, spans.stride(1) if heads > 1 else 0)

"""Row and column tables (`Problem.row_table`, `col_table`): reading them, and their gradients.

Gradients come in two steps, without atomics.  The backward kernels write dS to a place of its own for each query (key)
and distance within the tables' reach, and the sums beyond the reach to the first and the last place.
`table_gradient_fold_kernel` adds up the distances that share a column, and the query heads that share a key head.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def content_value(content, i, j, delta, numbers, b, h, FAR: tl.constexpr):
    """What the tables add to rows i and keys j at the distances delta.

    FAR < 0 says that every distance is beyond the left end of the tables, FAR > 0 beyond the right one: one column for
    all, whose value depends on the row or on the key alone.
    """
    if FAR < 0:
        entry = 0
    elif FAR > 0:
        entry = content.left + content.right
    else:
        entry = tl.minimum(tl.maximum(delta, -content.left), content.right) + content.left
    if content.columns is not None:
        column = tl.minimum(tl.maximum(tl.load(content.columns + entry), 0), content.last)
    else:
        column = entry
    inside = (i < numbers.query_length) & (j < numbers.key_length)
    value = 0.0
    if content.rows is not None:
        # 64 bits for where the row starts, 32 inside it
        p_row = content.rows + (b * content.rows_sb + h * content.rows_sh + i.to(tl.int64) * content.rows_si)
        known = i < numbers.query_length if FAR else inside
        value += tl.load(p_row + column, mask=known, other=0.0).to(tl.float32)
    if content.cols is not None:
        at = b * content.cols_sb + (h // content.group) * content.cols_sh + tl.cast(column, tl.int64) * content.cols_sc
        known = j < numbers.key_length if FAR else inside
        value += tl.load(content.cols + (at + j), mask=known, other=0.0).to(tl.float32)
    return value


@triton.jit
def store_near(p_grad, entry, row, ds, near, stride_entry, stride_row):
    """dS of the pairs within reach, each at its own place."""
    tl.store(p_grad + (tl.cast(entry, tl.int64) * stride_entry + tl.cast(row, tl.int64) * stride_row), ds, mask=near)


@triton.jit
def store_ends(p_grad, row, left_sum, right_sum, inside, last, stride_entry, stride_row):
    """The sums beyond the reach, at the entries 0 and `last` of each row, which are one when there is one entry."""
    at = p_grad + tl.cast(row, tl.int64) * stride_row
    one = last == 0
    tl.store(at, tl.where(one, left_sum + right_sum, left_sum), mask=inside)
    tl.store(at + tl.cast(last, tl.int64) * stride_entry, right_sum, mask=inside & (last > 0))


@triton.jit
def table_gradient_fold_kernel(
    p_wide, p_grad, p_begin, GROUP, ENTRIES, COLUMNS, LENGTH, TILES_C, TILES_X,
    wide_st, wide_sx, grad_sc, grad_sx, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grad (B, H, C, X) from wide (B, H * GROUP, T, X), in any order of their last two dimensions.

    A program owns BC columns of BX rows or keys, and adds up for each the entries p_begin[c] ... p_begin[c + 1] - 1.
    """
    pid = tl.program_id(0)
    i_x = pid % TILES_X
    i_c = (pid // TILES_X) % TILES_C
    bh = (pid // (TILES_X * TILES_C)).to(tl.int64)
    x = i_x * BX + tl.arange(0, BX)
    c = i_c * BC + tl.arange(0, BC)
    if p_begin is not None:
        begin = tl.load(p_begin + c, mask=c < COLUMNS, other=0)
        end = tl.load(p_begin + c + 1, mask=c < COLUMNS, other=0)
    else:
        begin = c
        end = c + 1
    most = tl.max(end - begin, axis=0)
    acc = tl.zeros([BX, BC], dtype=tl.float32)
    for g in range(GROUP):
        p_head = p_wide + (bh * GROUP + g) * (tl.cast(ENTRIES, tl.int64) * LENGTH)
        for n in range(most):
            entry = begin + n
            inside = (x < LENGTH)[:, None] & ((entry < end) & (c < COLUMNS))[None, :]
            at = x.to(tl.int64)[:, None] * wide_sx + entry.to(tl.int64)[None, :] * wide_st
            acc += tl.load(p_head + at, mask=inside, other=0.0)
    p_out = p_grad + bh * (tl.cast(COLUMNS, tl.int64) * LENGTH)
    at = x.to(tl.int64)[:, None] * grad_sx + c.to(tl.int64)[None, :] * grad_sc
    tl.store(p_out + at, acc, mask=(x < LENGTH)[:, None] & (c < COLUMNS)[None, :])

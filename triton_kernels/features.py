"""A problem's masks, biases and numbers in the form the kernels take."""

from __future__ import annotations

from torch import Tensor, uint8

from fastattn.problem import Problem

from .arguments import NO_BIAS, NO_INTERVAL, NO_MASK, Bias, Content, Extra, Interval, Mask, Numbers, Operand
from .layout import dense


def operand(x: Tensor) -> Operand:
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def _vector(x: Tensor | None) -> tuple[Tensor | None, int]:
    """A (B|1, ...) tensor with a dense last dimension, and its batch stride (0 where it broadcasts)."""
    if x is None:
        return None, 0
    if x.dim() > 1:
        x = dense(x)
    return x, x.stride(0) if x.shape[0] > 1 else 0


def _dense4(x: Tensor | None) -> tuple[Tensor | None, int, int, int, int]:
    """A (B|1, H|1, Sq|1, Sk|1) tensor and its strides, 0 where it broadcasts."""
    if x is None:
        return None, 0, 0, 0, 0
    strides = [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]
    return x, *strides  # type: ignore[return-value]


def _interval(problem: Problem) -> Interval:
    vectors = problem.query_offsets, problem.key_lengths, problem.prefix_lengths
    if all(x is None for x in vectors):
        return NO_INTERVAL
    offsets, lengths, prefixes = map(_vector, vectors)
    return Interval(*offsets, *lengths, *prefixes)


def _mask(problem: Problem) -> Mask:
    if problem.dense_mask is None and problem.query_ids is None:
        return NO_MASK
    bits = None if problem.dense_mask is None else problem.dense_mask.view(uint8)
    return Mask(*_vector(problem.query_ids), *_vector(problem.key_ids), *_dense4(bits), None, None)


def _bias(problem: Problem) -> Bias:
    content = _content(problem)
    if content is None and problem.slopes is None and problem.table is None and problem.dense_bias is None:
        return NO_BIAS
    table = None if problem.table is None else dense(problem.table)
    slopes = None if problem.slopes is None else dense(problem.slopes)
    return Bias(
        *_vector(slopes),
        table,
        0 if table is None or table.shape[0] == 1 else table.stride(0),
        0 if table is None else table.stride(1),
        *_dense4(problem.dense_bias),
        content,
    )


def _content(problem: Problem) -> Content | None:
    rows, cols = problem.row_table, problem.col_table
    if rows is None and cols is None:
        return None
    width = rows.shape[3] if rows is not None else cols.shape[2]  # type: ignore[union-attr]
    return Content(
        *((None, 0, 0, 0) if rows is None else operand(dense(rows))),
        *((None, 0, 0, 0) if cols is None else operand(dense(cols))),
        problem.columns,
        problem.columns_left,
        problem.column_entries - 1 - problem.columns_left,
        width - 1,
        problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1,
    )


class Features:
    """Everything of a problem but its operands."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.interval, self.mask, self.bias = _interval(problem), _mask(problem), _bias(problem)
        self.extra = Extra(*_vector(problem.sink), problem.dropout_seed)
        self.numbers = Numbers(
            # a float even where an integer came, which Triton would take for another kind of argument
            scale=float(problem.scale),
            softcap=float(problem.softcap),
            query_offset=problem.query_offset,
            window_left=problem.window_left,
            window_right=problem.window_right,
            table_left=problem.table_left,
            table_right=0 if problem.table is None else problem.table.shape[-1] - 1 - problem.table_left,
            drop_threshold=int(problem.dropout_p * 2**32),
            keep_scale=1.0 / (1.0 - problem.dropout_p),
            query_length=problem.query_length,
            key_length=problem.key_length,
        )
        self.window_flags = problem.window_left >= 0, problem.window_right >= 0

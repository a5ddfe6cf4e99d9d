"""A problem's masks, biases and numbers in the form the kernels take."""

from __future__ import annotations

from torch import Tensor, uint8

from fastattn.problem import Problem

from .arguments import Bias, Extra, Interval, Mask, Numbers, Operand
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


class Features:
    """Everything of a problem but its operands."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.interval = Interval(
            *_vector(problem.query_offsets), *_vector(problem.key_lengths), *_vector(problem.prefix_lengths)
        )
        bits = None if problem.dense_mask is None else problem.dense_mask.view(uint8)
        self.mask = Mask(*_vector(problem.query_ids), *_vector(problem.key_ids), *_dense4(bits))
        table = None if problem.table is None else dense(problem.table)
        slopes = None if problem.slopes is None else dense(problem.slopes)
        self.bias = Bias(
            *_vector(slopes),
            table,
            0 if table is None or table.shape[0] == 1 else table.stride(0),
            0 if table is None else table.stride(1),
            *_dense4(problem.dense_bias),
        )
        self.extra = Extra(*_vector(problem.sink), problem.dropout_seed)
        self.numbers = Numbers(
            scale=problem.scale,
            softcap=problem.softcap,
            query_offset=problem.query_offset,
            window_left=problem.window_left,
            window_right=problem.window_right,
            table_left=problem.table_left,
            table_right=0 if table is None else table.shape[-1] - 1 - problem.table_left,
            drop_threshold=int(problem.dropout_p * 2**32),
            keep_scale=1.0 / (1.0 - problem.dropout_p),
            query_length=problem.query_length,
            key_length=problem.key_length,
        )
        self.window_flags = {"HAS_LEFT": problem.window_left >= 0, "HAS_RIGHT": problem.window_right >= 0}

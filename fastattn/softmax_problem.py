"""One masked softmax as plain data: what of `Problem` is left when the scores are already there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fastattn.problem import Problem


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class SoftmaxProblem:
    """softmax(scale * scores + bias), masked, over the last dimension of scores (B, H, Sq, Sk).

    Every field but `scores` means what it means in `Problem`.  Field order is the argument order of the operators.
    """

    scores: Tensor
    scale: float = 1.0
    query_offset: int = 0
    query_offsets: Tensor | None = None
    window_left: int = -1
    window_right: int = -1
    key_lengths: Tensor | None = None
    prefix_lengths: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    dense_mask: Tensor | None = None
    slopes: Tensor | None = None
    table: Tensor | None = None
    table_left: int = 0
    dense_bias: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.scores.device

    @property
    def dtype(self) -> torch.dtype:
        return self.scores.dtype

    def arguments(self) -> tuple[object, ...]:
        """All fields, in order: the argument tuple of the operators."""
        return tuple([getattr(self, name) for name in SOFTMAX_FIELDS])

    def attention(self) -> Problem:
        """The attention call with these scores, masks and biases whose operands have no width.

        What asks about masks, biases, positions or the parameter dtype of a `Problem` then answers for this one too.
        """
        batch, heads, rows, columns = self.scores.shape
        return Problem(
            query=self.scores.new_empty((batch, heads, rows, 0)),
            key=self.scores.new_empty((batch, heads, columns, 0)),
            value=self.scores.new_empty((batch, heads, columns, 0)),
            **{name: getattr(self, name) for name in SOFTMAX_FIELDS[1:]},  # type: ignore[arg-type]
        )

    def features(self) -> list[str]:
        """Names of the masks and biases this problem uses."""
        return self.attention().features()


SOFTMAX_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(SoftmaxProblem))
# Fields a backend returns a gradient for, in the order of the backward operator's outputs.
SOFTMAX_GRADIENT_FIELDS: tuple[str, ...] = ("scores", "slopes", "table", "dense_bias")

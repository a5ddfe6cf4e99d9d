"""What biases that depend on the contents share: the operands they read, and tables by row or column.

No kernel has row or column tables yet.  The routes there are now: the bias written out, as a dense bias of
(B, Hq, Sq, Sk) in float32 (float64 for float64 queries); or, where the bias is a product of low rank, columns appended
to the head dimension of queries and keys, in memory that grows with the length only.  `fastattn.explain` names the one
taken; objects and gradients are the same either way.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from fastattn.biases import Bias, add_dense
from fastattn.lowering import Draft
from fastattn.validation import fail

Route = Literal["auto", "columns", "dense"]
# The widest head dimension that the C++ and Triton kernels take, a multiple of 8.
WIDEST_HEAD = 256


class ContentBias(Bias):
    """Base of biases that are computed from queries or keys, as they came: before any rotation.

    For `fastattn.attention` only; added after the softcap, like every bias.
    """

    @abstractmethod
    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        """The bias written out, (B, Hq, Sq, Sk) in the dtype of the operands, differentiable in everything.

        Args:
            query, key: (B, Hq, Sq, D) and (B, Hk, Sk, D).
            positions: (B|1, Sq) integer, of the queries among the keys.
            scale: of the scores.
        """

    def lower(self, draft: Draft) -> None:
        query, key = self._operands(draft)
        if not query.shape[2] or not key.shape[2]:
            return
        dense = self.dense(
            query.to(draft.parameter_dtype), key.to(draft.parameter_dtype), draft.positions(), draft.scale
        )  # fmt: skip
        draft.note_dense(f"{type(self).__name__} written out", dense)
        add_dense(draft, dense)

    def _operands(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """The query and key of the call, as they came."""
        if draft.operands is None:
            fail(NotImplementedError, type(self).__name__, "a call of fastattn.attention", "one without query and key")
        return draft.operands

    def materialize(self, query_length: int, key_length: int, query_offset: int | Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} depends on queries and keys: use its `dense`")

    def _sizes(self) -> tuple[int, int, torch.device]:
        raise NotImplementedError

    def _dtype(self) -> torch.dtype:
        raise NotImplementedError


def takes_columns(route: Route, draft: Draft, columns: int) -> bool:
    """Whether `columns` more are appended to the head dimension, which "auto" does as long as the kernels take it."""
    if route == "auto":
        assert draft.query is not None
        return draft.query.shape[-1] + columns <= WIDEST_HEAD
    return route == "columns"


def check_route(name: str, route: object) -> None:
    if route not in ("auto", "columns", "dense"):
        fail(ValueError, f"{name}.route", "'auto', 'columns' or 'dense'", repr(route))


def per_head(x: Tensor) -> Tensor:
    """(C, D) shared by all heads, or (H, C, D), as something that a (B, H, S, D) tensor multiplies."""
    return x if x.dim() == 3 else x[None]


def pick_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows (B, H, Sq, C) at index (B|1, Sq, Sk): a row table, read."""
    return rows.gather(-1, index[:, None].expand(rows.shape[0], rows.shape[1], -1, -1))


def pick_columns(columns: Tensor, index: Tensor) -> Tensor:
    """columns (B, H, Sk, C) at index (B|1, Sq, Sk): a column table, read, as (B, H, Sq, Sk)."""
    index = index.transpose(-1, -2)[:, None].expand(columns.shape[0], columns.shape[1], -1, -1)
    return columns.gather(-1, index).transpose(-1, -2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hk, ...) of grouped key heads as (B, Hq, ...)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)

"""What biases that depend on the contents share: the operands they read, and tables by row or column.

There are three routes into the kernel.  Where the bias depends on a query (or a key) and on the distance, tables of
each query's (each key's) own, read inside the kernel: (B, Hq, Sq, C) and (B, Hk, C, Sk) numbers, with C columns for the
distances that are told apart and seen.  Where it is a product of low rank, columns appended to the head dimension of
queries and keys.  Columns, and tables of clamped distances, take memory that grows with the length only.  Everything
else is written out, as a dense bias of (B, Hq, Sq, Sk).  Tables and dense biases are float32
(float64 for float64 queries).  `fastattn.explain` names the route taken, with its memory; objects and gradients are the
same either way.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastattn.biases import Bias, add_dense
from fastattn.lowering import Draft
from fastattn.reference import are_finite, finite_rows
from fastattn.validation import fail, is_readable

Route = Literal["auto", "table", "columns", "dense"]
# The widest head dimension that the C++ and Triton kernels take, a multiple of 8.
WIDEST_HEAD = 256


@dataclass(frozen=True)
class Tables:
    """A bias as tables: rows[i, c] + cols[c, j] at the column c of the clamped distance j - i (`Problem.columns`)."""

    rows: Tensor | None  # (B, Hq, Sq, C)
    cols: Tensor | None  # (B, Hk, C, Sk)
    columns: Tensor | None  # (T,) int32, rising, or None: a column for each distance
    left: int  # entries before distance 0


class ContentBias(Bias):
    """Base of biases that are computed from queries or keys, as they came: before any rotation.

    For `fastattn.attention` only; added after the softcap, like every bias.
    """

    route: Route = "dense"
    # Whether its tables are made of the query, and of the key, whose rows must then be finite.
    reads: tuple[bool, bool] = (True, False)

    def width(self, left: int, right: int) -> int:
        """Columns of its tables where no pair is seen at a distance beyond [-left, right]; 0 where it has none."""
        return 0

    def tables(self, query: Tensor, key: Tensor, scale: float, left: int, right: int) -> Tables:
        """The bias as tables, of operands as in `dense`, of as many columns as `width` says."""
        raise NotImplementedError

    @abstractmethod
    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        """The bias written out, (B, Hq, Sq, Sk) in the dtype of the operands, differentiable in everything.

        Args:
            query, key: (B, Hq, Sq, D) and (B, Hk, Sk, D).
            positions: (B|1, Sq) integer, of the queries among the keys.
            scale: of the scores.
        """

    def lower(self, draft: Draft) -> None:
        if not self._takes_tables(draft):
            self._lower_dense(draft)
            return
        query, key = self._finite_operands(draft, self.reads)
        self._lower_tables(draft, self.tables(query, key, draft.scale, *draft.reach()))

    def _lower_dense(self, draft: Draft) -> None:
        query, key = self._finite_operands(draft, (True, True))
        if not query.shape[2] or not key.shape[2]:
            return
        dense = self.dense(query, key, draft.positions(), draft.scale)
        draft.note_dense(f"{type(self).__name__} written out", dense)
        add_dense(draft, dense)

    def _lower_tables(self, draft: Draft, tables: Tables) -> None:
        name = type(self).__name__
        if "columns_left" in draft.fields:
            fail(ValueError, f"{name}.route", "'auto' or 'dense' beside another bias that is a table", "'table'")
        draft.fields.update(
            row_table=tables.rows, col_table=tables.cols, columns=tables.columns, columns_left=tables.left
        )
        draft.note_tables(name, tables.rows, tables.cols)

    def _operands(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """The query and key of the call, as they came."""
        if draft.operands is None:
            fail(NotImplementedError, type(self).__name__, "a call of fastattn.attention", "one without query and key")
        return draft.operands

    def _finite_operands(self, draft: Draft, reads: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """The same, those of `reads` in the parameter dtype and with zeros for every row that holds a NaN or infinity.

        A masked one has gradient 0, and 0 times it must not get into those of the tables; one that is seen comes out in
        q . k already.
        """
        query, key = (
            _without_bad_rows(x.to(draft.parameter_dtype)) if read else x
            for x, read in zip(self._operands(draft), reads, strict=True)
        )
        return query, key

    def _takes_tables(self, draft: Draft) -> bool:
        """Whether it becomes tables, which "auto" does where the kernels take them and no other bias has taken their
        place: they have no more columns than the call has distances, and nothing of (Sq, Sk) is written out of them."""
        if self.route == "auto":
            return draft.takes_tables and "columns_left" not in draft.fields and self.width(*draft.reach()) > 0
        return self.route == "table"

    def materialize(self, query_length: int, key_length: int, query_offset: int | Tensor | None = None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} depends on queries and keys: use its `dense`")

    def _sizes(self) -> tuple[int, int, torch.device]:
        raise NotImplementedError

    def _dtype(self) -> torch.dtype:
        raise NotImplementedError


def _without_bad_rows(x: Tensor) -> Tensor:
    """x with zeros for its rows that hold a NaN or infinity; x itself where it can be seen that none does."""
    return x if is_readable(x) and are_finite(x).all() else finite_rows(x)[0]


def takes_columns(name: str, route: Route, draft: Draft, columns: int) -> bool:
    """Whether `columns` more are appended to the head dimension, which "auto" does as long as the kernels take it and
    there is no softcap, which biases are not subject to."""
    if route == "auto":
        assert draft.query is not None
        return draft.query.shape[-1] + columns <= WIDEST_HEAD and not draft.caps
    if route == "columns" and draft.caps:
        fail(ValueError, f"{name}.route", "'auto' or 'dense' with a softcap", "'columns'")
    return route == "columns"


def check_route(name: str, route: object, allowed: tuple[str, ...]) -> None:
    if route not in allowed:
        *most, last = map(repr, allowed)
        fail(ValueError, f"{name}.route", f"{', '.join(most)} or {last}", repr(route))


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

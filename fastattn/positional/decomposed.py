"""Decomposed relative positions of image transformers: a term for the row and one for the column."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.lowering import Draft
from fastattn.positional.content import ContentBias, Route, check_route, takes_columns
from fastattn.validation import check_device, check_floating, check_index, fail

__all__ = ["Decomposed"]


class Decomposed(ContentBias):
    """Decomposed relative positions of MViTv2, ViTDet and SAM (Li et al., "MViTv2", CVPR 2022)::

        S[i, j] += q_i . Rh[row(i) - row(j)] + q_i . Rw[col(i) - col(j)]

    with the query as it is, not scaled.  With A_h[i, :] = q_i . Rh, (B, Hq, Sq, Kh), and A_w likewise, this is a
    product of rank Kh + Kw: route "columns" appends (A_h, A_w) / scale to the queries and the indicators of a key's
    row and column to the keys.  Exact, and memory grows with the length only.  Route "dense" writes
    (B, Hq, Sq, Sk) out.  "auto" appends while D + Kh + Kw is at most 256 and there is no softcap.

    Args:
        rows, columns: Rh (L, D) and Rw (L, D) floating, `rel_pos_h` and `rel_pos_w`; L other than 2 max(Q, K) - 1 is
            interpolated linearly, as in the published code.
        query_size: (height, width) of the queries' grid, row by row.
        key_size: of the keys' grid; default query_size.
        prefix: tokens in front of both that have no place in the grid (a class token); their bias is 0.
        route: "auto", "columns" or "dense".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; grids that are not the lengths of the call.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        query_size: tuple[int, int],
        key_size: tuple[int, int] | None = None,
        *,
        prefix: int = 0,
        route: Route = "auto",
    ) -> None:
        name = "Decomposed"
        self.rows, self.columns = check_floating(f"{name}.rows", rows), check_floating(f"{name}.columns", columns)
        for what, x in (("rows", rows), ("columns", columns)):
            if x.dim() != 2 or not x.shape[0]:
                fail(ValueError, f"{name}.{what}", "shape (L, D)", x)
        self.query_size = _size(f"{name}.query_size", query_size)
        self.key_size = self.query_size if key_size is None else _size(f"{name}.key_size", key_size)
        self.prefix = check_index(f"{name}.prefix", prefix, least=0)
        check_route(name, route, ("auto", "columns", "dense"))
        self.route = route

    def __repr__(self) -> str:
        return f"Decomposed({self.query_size}, {self.key_size}, route={self.route!r})"

    def _terms(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """A_h (B, Hq, Sq, Kh) and A_w (B, Hq, Sq, Kw), 0 for the prefix."""
        for what, x in (("rows", self.rows), ("columns", self.columns)):
            check_device(f"Decomposed.{what}", x, query.device)
            if x.shape[-1] != query.shape[-1]:
                fail(ValueError, f"Decomposed.{what}", f"{query.shape[-1]} features", x)
        (height, width), (key_height, key_width) = self.query_size, self.key_size
        grid = query[:, :, self.prefix :].unflatten(2, (height, width))
        by_row = torch.einsum("bhrcd,rkd->bhrck", grid, axis_vectors(self.rows.to(query.dtype), height, key_height))
        by_col = torch.einsum("bhrcd,ckd->bhrck", grid, axis_vectors(self.columns.to(query.dtype), width, key_width))
        pad = (0, 0, self.prefix, 0)
        return (
            torch.nn.functional.pad(by_row.flatten(2, 3), pad),
            torch.nn.functional.pad(by_col.flatten(2, 3), pad),
        )

    def _check_lengths(self, queries: int, keys: int) -> None:
        for name, (height, width), length in (
            ("query_size", self.query_size, queries),
            ("key_size", self.key_size, keys),
        ):
            if height * width + self.prefix != length:
                expected = f"a grid of {length - self.prefix} tokens (length {length}, prefix {self.prefix})"
                fail(ValueError, f"Decomposed.{name}", expected, f"{height} x {width}")

    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        self._check_lengths(query.shape[2], key.shape[2])
        by_row, by_col = self._terms(query)
        total = (by_row[..., :, None] + by_col[..., None, :]).flatten(-2)
        return torch.nn.functional.pad(total, (self.prefix, 0))

    def lower(self, draft: Draft) -> None:
        query, key = self._operands(draft)
        width = sum(self.key_size)
        # the kernel multiplies the columns by the scale, which they must not see
        if not takes_columns("Decomposed", self.route, draft, width) or draft.scale == 0.0:
            super().lower(draft)
            return
        self._check_lengths(query.shape[2], key.shape[2])
        terms = torch.cat(self._terms(query.to(draft.parameter_dtype)), dim=-1) / draft.scale
        draft.append_columns(terms, self._indicators(draft.parameter_dtype, key.device))
        draft.notes.append(f"Decomposed as {width} columns appended to the {draft.head_dim} of query and key")

    def _indicators(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(1, 1, Sk, Kh + Kw): 1 at the row and at the column of each key."""
        height, width = self.key_size
        of_row = torch.eye(height, dtype=dtype, device=device).repeat_interleave(width, dim=0)
        of_col = torch.eye(width, dtype=dtype, device=device).repeat(height, 1)
        return torch.nn.functional.pad(torch.cat((of_row, of_col), dim=-1), (0, 0, self.prefix, 0))[None, None]


def axis_vectors(table: Tensor, queries: int, keys: int) -> Tensor:
    """(queries, keys, D): the vector of each pair of places along one axis, from a table (L, D) of distances."""
    length = 2 * max(queries, keys) - 1
    if table.shape[0] != length:
        table = torch.nn.functional.interpolate(table.t()[None], size=length, mode="linear")[0].t()
    # where the grids differ, places of the shorter one are spread over the longer
    at_query = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    at_key = torch.arange(keys, device=table.device)[None] * max(queries / keys, 1.0)
    index = at_query - at_key + (keys - 1) * max(queries / keys, 1.0)
    return table[index.long()]


def _size(name: str, size: object) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        fail(ValueError, name, "(height, width)", repr(size))
    return check_index(name, size[0], least=1), check_index(name, size[1], least=1)

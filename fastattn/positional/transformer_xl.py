"""Transformer-XL's relative positions: projected sinusoids with two biases of the query."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.lowering import Draft
from fastattn.positional.content import (
    ContentBias,
    Route,
    Tables,
    check_route,
    repeat_heads,
    takes_columns,
)
from fastattn.positional.sinusoid import sinusoidal_embedding
from fastattn.validation import check_device, check_floating, check_index, check_shape, fail

__all__ = ["TransformerXL"]


class TransformerXL(ContentBias):
    """Relative attention of Transformer-XL, XLNet and Conformer, causal or not (Dai et al., ACL 2019)::

        S[i, j] = scale * ((q_i + u_h) . k_j + (q_i + v_h) . W_h R(i - j)),   R(p) = [sin(p w), cos(p w)]

    with w_k = base^(-2k / E).  With A_i = W_h^T (q_i + v_h), (a_i, b_i) its halves, the position term is
    a_i sin((i - j) w) + b_i cos((i - j) w), and by the addition theorem a product of rank E::

        cos(j w) (a_i sin(i w) + b_i cos(i w)) + sin(j w) (b_i sin(i w) - a_i cos(i w))

    Route "columns" appends these E columns to queries and keys: exact, and memory grows with the length only; an E
    of the model's width is more work than the scores themselves.  Route "table" hands the products of q_i + v_h with
    the vectors W_h R of all distances at which the masks show a pair to the kernel: (B, Hq, Sq, Sq + Sk - 1) numbers,
    half as many where attention is causal, at most 2 clamp + 1 for a query with a clamp.  Route "dense" reads the
    diagonals of the products with all vectors into a bias of (B, Hq, Sq, Sk).  "auto" appends while D + E is at most
    256 and there is no clamp, takes the table otherwise, and is "dense" beside a rotation, a softcap, or another bias
    that has tables.  Distances of both signs are computed where they are seen, so that attention need not be causal.

    Args:
        weight: W, (Hq, D, E) floating, E even: `r_net.weight` viewed by head.
        u, v: (Hq, D) floating: `r_w_bias` and `r_r_bias`.
        base: of the wavelengths.
        clamp: distances are clamped to [-clamp, clamp] (`clamp_len`).
        route: "auto", "table", "columns" (without a clamp) or "dense".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; route "columns" with a clamp, or that or "table" beside a
            rotation or a softcap.
    """

    def __init__(
        self,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        *,
        base: float = 10000.0,
        clamp: int | None = None,
        route: Route = "auto",
    ) -> None:
        name = "TransformerXL"
        self.weight = check_floating(f"{name}.weight", weight)
        if weight.dim() != 3 or weight.shape[-1] % 2 or not weight.shape[-1]:
            fail(ValueError, f"{name}.weight", "shape (Hq, D, E), E even", weight)
        self.u, self.v = check_floating(f"{name}.u", u), check_floating(f"{name}.v", v)
        for letter, x in (("u", u), ("v", v)):
            check_shape(f"{name}.{letter}", x, tuple(weight.shape[:2]))
        check_route(name, route, ("auto", "table", "columns", "dense"))
        self.clamp = None if clamp is None else check_index(f"{name}.clamp", clamp, least=1)
        if clamp is not None and route == "columns":
            fail(ValueError, f"{name}.route", "'auto', 'table' or 'dense' with a clamp", "'columns'")
        self.base, self.route = base, route

    def __repr__(self) -> str:
        heads, dim, width = self.weight.shape
        return f"TransformerXL(heads={heads}, head_dim={dim}, width={width}, route={self.route!r})"

    def _check(self, query: Tensor) -> None:
        for letter, x in (("weight", self.weight), ("u", self.u), ("v", self.v)):
            check_device(f"TransformerXL.{letter}", x, query.device)
        check_shape("TransformerXL.u", self.u, (query.shape[1], query.shape[3]))

    def _sinusoid(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., E) in `dtype`: sines, then cosines."""
        width = self.weight.shape[-1]
        return sinusoidal_embedding(positions, width, base=self.base, layout="concatenated", dtype=dtype)

    def _position_query(self, query: Tensor) -> Tensor:
        """A = (q + v) W, (B, Hq, Sq, E)."""
        return (query + self.v.to(query.dtype)[:, None]) @ self.weight.to(query.dtype)

    def _position_scores(self, query: Tensor, distance: Tensor, scale: float) -> Tensor:
        """scale * (q + v) . W R at the distances i - j, (T,) or (B, T): (B, Hq, Sq, T).

        The vectors are projected, not the queries, which are many and would get wider.
        """
        shifted, weight = query + self.v.to(query.dtype)[:, None], scale * self.weight.to(query.dtype)
        vectors = torch.einsum("...te,hde->...htd", self._sinusoid(distance, query.dtype), weight)
        return shifted @ vectors.mT

    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        """Everything that is added to scale * q . k."""
        self._check(query)
        queries, keys = query.shape[2], key.shape[2]
        # i - j of the first query, and of all before it: positions are consecutive
        distance = positions[:, :1] - torch.arange(1 - queries, keys, device=query.device)
        if self.clamp is not None:
            distance = distance.clamp(-self.clamp, self.clamp)
        table = self._position_scores(query, distance[0] if distance.shape[0] == 1 else distance, scale)
        content = repeat_heads(key, query.shape[1]) @ (scale * self.u.to(query.dtype))[..., None]
        return shift_rows(table.contiguous(), keys) + content.mT

    def width(self, left: int, right: int) -> int:
        return left + right + 1 if self.clamp is None else min(self.clamp, left) + min(self.clamp, right) + 1

    def tables(self, query: Tensor, key: Tensor, scale: float, left: int, right: int) -> Tables:
        """Of the position term alone."""
        if self.clamp is not None:
            left, right = min(self.clamp, left), min(self.clamp, right)
        # entry t is of the distance j - i = t - left, and R is of i - j
        distance = torch.arange(left, -right - 1, -1, device=query.device)
        return Tables(self._position_scores(query, distance, scale), None, None, left)

    def lower(self, draft: Draft) -> None:
        query, key = self._operands(draft)
        width = self.weight.shape[-1]
        if (draft.rotates or draft.caps) and self.route in ("table", "columns"):
            expected = "'auto' or 'dense' beside a rotation or a softcap, which u must not see"
            fail(ValueError, "TransformerXL.route", expected, repr(self.route))
        columns = self.clamp is None and takes_columns("TransformerXL", self.route, draft, width)
        tables = not columns and self._takes_tables(draft)
        if draft.rotates or draft.caps or not (tables or columns):
            self._lower_dense(draft)
            return
        self._check(query)
        if tables:
            self._shift_query(draft, query)
            super().lower(draft)
            return
        dtype = draft.parameter_dtype
        a, b = self._position_query(query.to(dtype)).chunk(2, dim=-1)
        sin, cos = self._sinusoid(draft.positions(), dtype)[:, None].chunk(2, dim=-1)
        key_sin, key_cos = self._sinusoid(torch.arange(key.shape[2], device=key.device), dtype).chunk(2, dim=-1)
        self._shift_query(draft, query)
        draft.append_columns(
            torch.cat((a * sin + b * cos, b * sin - a * cos), dim=-1), torch.cat((key_cos, key_sin), dim=-1)[None, None]
        )
        draft.notes.append(f"TransformerXL as {width} columns appended to the {draft.head_dim} of query and key")

    def _shift_query(self, draft: Draft, query: Tensor) -> None:
        """Add u to the draft's query, in the columns of the contents alone."""
        assert draft.query is not None
        shift = torch.nn.functional.pad(self.u.to(query.dtype), (0, draft.query.shape[-1] - query.shape[-1]))
        draft.query = draft.query + shift[:, None]


def shift_rows(table: Tensor, keys: int) -> Tensor:
    """out[i, j] = table[i, Sq - 1 - i + j] of a contiguous (..., Sq, Sq + Sk - 1), as a view (..., Sq, Sk)."""
    queries, columns = table.shape[-2:]
    if queries <= 1:
        return table[..., :keys]
    flat = table.flatten(-2)[..., queries - 1 : queries * columns - 1]
    return flat.unflatten(-1, (queries, columns - 1))[..., :keys]

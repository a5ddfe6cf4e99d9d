"""DeBERTa's disentangled attention: content to position and position to content."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.positional.content import (
    ContentBias,
    Route,
    Tables,
    check_route,
    pick_columns,
    pick_rows,
    repeat_heads,
)
from fastattn.validation import check_device, check_floating, check_index, fail

__all__ = ["Disentangled", "deberta_buckets"]


class Disentangled(ContentBias):
    """Disentangled attention of DeBERTa (He et al., ICLR 2021; v2 and v3 with its logarithmic buckets)::

        S[i, j] = scale * (q_i . k_j + q_i . kr[d(i, j)] + k_j . qr[d(i, j)])
        d(i, j) = clamp(bucket(i - j) + span, 0, 2 span - 1)

    DeBERTa's scale is 1 / sqrt(D n), n the number of terms: pass it to `attention`.  Route "table" hands the products
    q . kr and k . qr to the kernel, (B, Hq, Sq, 2 span) and (B, Hk, 2 span, Sk) numbers.  Route "dense" writes their
    sum out, (B, Hq, Sq, Sk).  "auto" takes the tables unless another bias has tables already.  Where the masks show no
    pair beyond the buckets of one distance each, they have a column for each distance that is seen.

    Args:
        position_keys: kr, (2 span, D), or (Hq, 2 span, D) when projected by head; None without c2p.
        position_queries: qr, likewise, (Hk, 2 span, D); None without p2c.
        max_distance: positions the buckets cover (`max_relative_positions`).
        buckets: `position_buckets`; None for DeBERTa v1, where the distance itself is the bucket.
        route: "auto", "table" or "dense".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; neither term; tables of different span.
    """

    def __init__(
        self,
        position_keys: Tensor | None,
        position_queries: Tensor | None,
        *,
        max_distance: int = 512,
        buckets: int | None = 256,
        route: Route = "auto",
    ) -> None:
        name = "Disentangled"
        tables = {"position_keys": position_keys, "position_queries": position_queries}
        given = {what: check_floating(f"{name}.{what}", x) for what, x in tables.items() if x is not None}
        if not given:
            fail(ValueError, f"{name}.position_keys", "a tensor, or one for position_queries", None)
        spans = set()
        for what, x in given.items():
            if x.dim() not in (2, 3) or x.shape[-2] % 2 or not x.shape[-2]:
                fail(ValueError, f"{name}.{what}", "shape (2 span, D) or (H, 2 span, D)", x)
            spans.add(x.shape[-2])
        if len(spans) > 1:
            fail(ValueError, f"{name}.position_queries", "as many rows as position_keys", str(sorted(spans)))
        self.position_keys, self.position_queries = position_keys, position_queries
        self.span = spans.pop() // 2
        self.reads = (position_keys is not None, position_queries is not None)
        check_route(name, route, ("auto", "table", "dense"))
        self.route = route
        self.max_distance = check_index(f"{name}.max_distance", max_distance, least=2)
        self.buckets = None if buckets is None else check_index(f"{name}.buckets", buckets, least=4)
        if self.buckets is not None and self.max_distance <= self.buckets // 2 + 1:
            expected = f"more than buckets / 2 + 1 = {self.buckets // 2 + 1}"
            fail(ValueError, f"{name}.max_distance", expected, self.max_distance)

    def __repr__(self) -> str:
        terms = [
            n for n, x in (("c2p", self.position_keys), ("p2c", self.position_queries)) if x is not None
        ]  # fmt: skip
        return f"Disentangled({'+'.join(terms)}, span={self.span}, buckets={self.buckets}, route={self.route!r})"

    def width(self, left: int, right: int) -> int:
        return sum(self._near(left, right)) if self._by_distance(left, right) else 2 * self.span

    def _by_distance(self, left: int, right: int) -> bool:
        """Whether each distance of [-left, right] that is not clamped has a column of its own."""
        return self.buckets is None or max(left, right) <= self.buckets // 2

    def _near(self, left: int, right: int) -> tuple[int, int]:
        """How many columns there are before distance j - i = 0, and from there on, of those that are read."""
        return min(self.span - 1, left), min(self.span, right) + 1

    def tables(self, query: Tensor, key: Tensor, scale: float, left: int, right: int) -> Tables:
        by_distance = self._by_distance(left, right)
        before, after = self._near(left, right) if by_distance else (self.span - 1, self.span + 1)

        def vectors(what: str, x: Tensor, operand: Tensor) -> Tensor:
            # they count i - j and tables j - i: in reverse, so that columns rise with the distance
            near = self._vectors(what, x, operand)[..., self.span + 1 - after : self.span + 1 + before, :]
            return scale * near.flip(-2)

        rows = cols = None
        if self.position_keys is not None:
            rows = query @ vectors("position_keys", self.position_keys, query).mT
        if self.position_queries is not None:
            cols = vectors("position_queries", self.position_queries, key) @ key.mT
        if by_distance:
            return Tables(rows, cols, None, before)
        reach = min(max(left, right), self._reach())
        distance = torch.arange(reach, -reach - 1, -1, device=query.device)
        return Tables(rows, cols, (2 * self.span - 1 - self._columns(distance)).int(), reach)

    def _reach(self) -> int:
        """A distance from which on both ways the column is the first or the last."""
        assert self.buckets is not None
        middle = self.buckets // 2
        if self.span <= middle:
            return self.span
        # where the bucket, middle + log(d / middle) / log((max_distance - 1) / middle) * (middle - 1), passes the span
        exponent = math.log((self.max_distance - 1) / middle) * (self.span - middle) / (middle - 1)
        return math.ceil(middle * math.exp(min(exponent, 40.0))) + 2

    def _columns(self, distance: Tensor) -> Tensor:
        """The columns of distances i - j."""
        bucket = deberta_buckets(distance, self.buckets, self.max_distance)
        return bucket.add_(self.span).clamp_(0, 2 * self.span - 1)

    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        # of the first query, and of all before it; row i of the index starts Sq - 1 - i columns on
        distance = positions[:, :1] - torch.arange(1 - queries, keys, device=key.device)
        index = self._columns(distance).unfold(-1, keys, 1).flip(-2)
        total = None
        if self.position_keys is not None:
            table = query @ (scale * self._vectors("position_keys", self.position_keys, query)).mT
            total = pick_rows(table, index)
        if self.position_queries is not None:
            table = key @ (scale * self._vectors("position_queries", self.position_queries, key)).mT
            seen = pick_columns(repeat_heads(table, query.shape[1]), index)
            total = seen if total is None else total + seen
        assert total is not None
        return total

    def _vectors(self, what: str, x: Tensor, operand: Tensor) -> Tensor:
        """The table, (2 span, D) or (H, 2 span, D), in the operand's dtype."""
        check_device(f"Disentangled.{what}", x, operand.device)
        if x.shape[-1] != operand.shape[-1] or (x.dim() == 3 and x.shape[0] != operand.shape[1]):
            heads, dim = operand.shape[1], operand.shape[-1]
            fail(ValueError, f"Disentangled.{what}", f"{dim} features, and {heads} heads if any", x)
        return x.to(operand.dtype)


def deberta_buckets(distance: Tensor, buckets: int | None, max_distance: int) -> Tensor:
    """The bucket of each distance i - j, int64: itself up to buckets / 2, logarithmic from there to max_distance.

    In float32 as in the published code, whose rounding decides the bucket at its edges.
    """
    if buckets is None:
        return distance.clone()
    middle = buckets // 2
    size = torch.where(distance.abs() < middle, middle - 1, distance.abs())
    top = torch.log(torch.tensor((max_distance - 1) / middle, device=distance.device))
    far = torch.ceil(torch.log(size / middle) / top * (middle - 1)) + middle
    return torch.where(size <= middle, distance.to(far.dtype), far * distance.sign()).long()

"""Rotary position embedding as an argument of `fastattn.attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import Draft
from fastattn.validation import (
    as_dtype,
    check_device,
    check_floating,
    check_range,
    check_shape,
    describe,
    fail,
    is_readable,
)


class Rotary:
    """Rotates queries and keys by their positions (Su et al., "RoFormer", 2021): query i by row i + query_offset of
    the tables, key j by row j.

    The leading R = 2 * cos.shape[-1] dimensions of each head rotate; the rest passes.  A pair (x0, x1) becomes
    (x0 cos - x1 sin, x1 cos + x0 sin), computed in float32 from float32 tables (float64 for float64 queries).  An
    amplitude folded into cos and sin (YaRN, LongRoPE, xPos) is honoured forward and backward.  Tables are made
    by `fastattn.nn.RotaryEmbedding`.

    Args:
        cos, sin: (P, R/2) or (B, P, R/2) floating tensors, P positions.  When they require a gradient (learned
            frequencies) the rotation runs in plain torch before the fused kernel, in the memory of a rotated copy of
            queries and keys.
        interleaved: pairs are (2k, 2k + 1) as in GPT-J instead of (k, k + R/2) as in Llama and GPT-NeoX.
        trailing: the last R dimensions rotate instead of the first (the rotary part of DeepSeek's heads).  Interleaved
            pairs pass through the kernel with wider tables; halves are moved to the front first, in a copy of
            queries and keys.
        key_cos, key_sin: tables for the keys where they differ (xPos).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; R > D; a position outside the tables (clamped on a GPU
            when the offsets are a tensor).
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        *,
        trailing: bool = False,
        key_cos: Tensor | None = None,
        key_sin: Tensor | None = None,
    ) -> None:
        self.cos, self.sin = rotary_table("Rotary.cos", cos), rotary_table("Rotary.sin", sin)
        if (key_cos is None) != (key_sin is None):
            fail(ValueError, "Rotary.key_cos, key_sin", "both or neither", "one of them")
        self.key_cos = self.cos if key_cos is None else rotary_table("Rotary.key_cos", key_cos)
        self.key_sin = self.sin if key_sin is None else rotary_table("Rotary.key_sin", key_sin)
        check_shape("Rotary.sin", self.sin, tuple(self.cos.shape))
        check_shape("Rotary.key_sin", self.key_sin, tuple(self.key_cos.shape))
        if self.key_cos.shape[-1] != self.cos.shape[-1]:
            fail(ValueError, "Rotary.key_cos", f"{self.cos.shape[-1]} columns like cos", self.key_cos)
        for name, flag in (("interleaved", interleaved), ("trailing", trailing)):
            if not isinstance(flag, bool):
                fail(TypeError, f"Rotary.{name}", "a bool", describe(flag))
        self.interleaved, self.trailing = interleaved, trailing

    def __repr__(self) -> str:
        flags = "".join(f", {name}=True" for name in ("interleaved", "trailing") if getattr(self, name))
        return f"Rotary(positions={self.cos.shape[1]}, width={2 * self.cos.shape[-1]}{flags})"

    @property
    def requires_grad(self) -> bool:
        return any(t.requires_grad for t in (self.cos, self.sin, self.key_cos, self.key_sin))

    def materialize(
        self, query_length: int, key_length: int, query_offset: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The table rows of each query and key: query cos and sin (B|1, Sq, R/2), key cos and sin (B|1, Sk, R/2)."""
        offset = key_length - query_length if query_offset is None else query_offset
        rows = torch.arange(query_length, device=self.cos.device)
        rows = rows[None] + (offset[:, None] if isinstance(offset, Tensor) else offset)
        rows = rows.clamp(0, self.cos.shape[1] - 1)
        # Tables of one batch index with 0; per-sequence tables index with b, also where the rows are shared.
        batch = torch.arange(self.cos.shape[0], device=rows.device)[:, None]
        return (
            self.cos[batch, rows],
            self.sin[batch, rows],
            self.key_cos[:, :key_length],
            self.key_sin[:, :key_length],
        )

    def check(self, draft: Draft) -> None:
        """Raise unless the tables fit the call and hold every position it needs."""
        width = 2 * self.cos.shape[-1]
        if width > draft.head_dim:
            fail(ValueError, "Rotary.cos", f"at most D/2 = {draft.head_dim // 2} columns", self.cos)
        tables = (("Rotary.cos", self.cos), ("Rotary.sin", self.sin))
        if self.key_cos is not self.cos or self.key_sin is not self.sin:
            tables = (*tables, ("Rotary.key_cos", self.key_cos), ("Rotary.key_sin", self.key_sin))
        for name, table in tables:
            check_device(name, table, draft.device)
            if table.shape[0] not in (1, draft.batch):
                fail(ValueError, name, f"batch dimension 1 or B = {draft.batch}", table)
        if draft.key_length > self.key_cos.shape[1]:
            fail(ValueError, "Rotary.key_cos", f"a row for each of Sk = {draft.key_length} key positions", self.key_cos)
        if not draft.query_length:
            return
        offset, last = draft.query_offset, self.cos.shape[1] - draft.query_length
        what = (
            f"positions query_offset ... query_offset + Sq - 1 within the {self.cos.shape[1]} rows of the rotary "
            f"tables, so query_offset in [0, {last}]"
        )
        if not isinstance(offset, Tensor):
            if offset < 0 or offset > last:
                fail(ValueError, "query_offset", what, offset)
        elif is_readable(offset):
            check_range("query_offset", offset, 0, last, what)

    def lower(self, draft: Draft) -> None:
        """Write the tables into the draft, and turn its query and key here where the kernel cannot."""
        assert draft.query is not None
        assert draft.key is not None
        if self.requires_grad and torch.is_grad_enabled():
            draft.query, draft.key = self._rotate_outside(draft.query, draft.key, draft)
            draft.notes.append("rotation in plain torch, since its tables require a gradient: a copy of query and key")
            return
        skipped = draft.head_dim - 2 * self.cos.shape[-1] if self.trailing else 0
        in_front = 0
        if skipped and self.interleaved and skipped % 2 == 0:
            in_front = skipped // 2  # pairs that turn by nothing: x * 1 - y * 0
        elif skipped:
            # the same permutation of queries and keys leaves their products alone
            draft.query, draft.key = (_front_last(x, draft.head_dim, skipped) for x in (draft.query, draft.key))
            draft.notes.append("the trailing dimensions that rotate are moved to the front: a copy of query and key")

        def converted(table: Tensor, fill: float) -> Tensor:
            table = as_dtype(table, draft.parameter_dtype)
            return torch.nn.functional.pad(table, (in_front, 0), value=fill) if in_front else table

        cos, sin = converted(self.cos, 1.0), converted(self.sin, 0.0)
        draft.fields.update(
            query_cos=cos,
            query_sin=sin,
            key_cos=cos if self.key_cos is self.cos else converted(self.key_cos, 1.0),
            key_sin=sin if self.key_sin is self.sin else converted(self.key_sin, 0.0),
            interleaved=self.interleaved,
        )

    def _rotate_outside(self, query: Tensor, key: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
        """Rotated copies of query and key in plain torch, differentiable in the tables."""
        dtype, width = draft.parameter_dtype, 2 * self.cos.shape[-1]
        cols = torch.arange(key.shape[2], device=key.device)[None]
        turned = []
        for x, cos, sin, rows in (
            (query, self.cos, self.sin, draft.positions()),
            (key, self.key_cos, self.key_sin, cols),
        ):
            # slices, not the whole: what does not rotate is not converted either
            first = draft.head_dim - width if self.trailing else 0
            part = x[..., first : first + width]
            part = reference.rotate(part.to(dtype), cos.to(dtype), sin.to(dtype), rows, self.interleaved).to(x.dtype)
            whole = part.shape[-1] == x.shape[-1]
            turned.append(part if whole else torch.cat((x[..., :first], part, x[..., first + width :]), dim=-1))
        return turned[0], turned[1]


def _front_last(x: Tensor, head_dim: int, skipped: int) -> Tensor:
    """x with its dimensions skipped ... head_dim - 1 in front; columns behind head_dim stay behind."""
    return torch.cat((x[..., skipped:head_dim], x[..., :skipped], x[..., head_dim:]), dim=-1)


def rotary_table(name: str, table: object) -> Tensor:
    table = check_floating(name, table)
    if table.dim() not in (2, 3):
        fail(ValueError, name, "shape (P, R/2) or (B, P, R/2)", table)
    return table if table.dim() == 3 else table[None]

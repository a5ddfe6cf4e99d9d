"""One rotation of queries and keys as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Rotation:
    """Rotary embedding of query and key.  Field order is the argument order of the operators."""

    query: Tensor  # (B, Hq, S, D)
    key: Tensor  # (B, Hk, S, D)
    cos: Tensor  # (B|1, P, R/2) float32 (float64 for float64 operands), R <= D
    sin: Tensor
    positions: Tensor | None  # (B|1, S) int64: token i takes this row of the tables; None = row i
    interleaved: bool  # pairs (2k, 2k+1) instead of (k, k + R/2)
    conjugate: bool = False  # the transpose of the rotation, which is its backward

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    def arguments(self) -> tuple[object, ...]:
        """All fields, in order: the argument tuple of the operators."""
        return tuple([getattr(self, name) for name in ROTATION_FIELDS])

    def features(self) -> list[str]:
        return [
            "rotary",
            *(["interleaved"] if self.interleaved else []),
            *(["positions"] if self.positions is not None else []),
        ]


ROTATION_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Rotation))

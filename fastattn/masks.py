"""Masks: which key each query may attend to.  ``True`` means *may attend*; masks join with ``&``.

Every mask but `BoolMask` is a few numbers or one vector per sequence, so nothing of size (Sq, Sk) is ever built by
a fused backend.  Query ``i`` sits at position ``i + query_offset`` among the keys; `fastattn.attention` defines it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import Draft, empty_problem, standalone
from fastattn.validation import (
    check_broadcast,
    check_device,
    check_index,
    check_integer,
    check_range,
    check_shape,
    check_tensor,
    fail,
)


class Mask(ABC):
    """Base of all masks.  `a & b` lets a query see a key only where both do."""

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return _Conjunction((*_parts(self), *_parts(other)))

    @abstractmethod
    def lower(self, draft: Draft) -> None:
        """Write this mask into the draft, joined with what is there."""

    def _sizes(self) -> tuple[int, int, torch.device]:
        """Batch, heads and device for `materialize`, as far as the mask's own tensors tell."""
        return 1, 1, torch.device("cpu")

    def materialize(self, query_length: int, key_length: int, query_offset: int | Tensor | None = None) -> Tensor:
        """The mask as a bool tensor broadcastable to (B, Hq, query_length, key_length), True = may attend.

        For the reference, for tests and for eyes; no fused path calls it.
        """
        batch, heads, device = self._sizes()
        if isinstance(query_offset, Tensor):
            batch, device = max(batch, query_offset.shape[0]), query_offset.device
        draft = standalone(batch, heads, query_length, key_length, device, query_offset)
        self.lower(draft)
        mask = reference.visible(empty_problem(draft))
        return (
            torch.ones((), dtype=torch.bool, device=device).expand(1, 1, query_length, key_length)
            if mask is None
            else mask
        )


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, _Conjunction) else (mask,)


class _Conjunction(Mask):
    """Several masks joined with &."""

    def __init__(self, parts: tuple[Mask, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    def _sizes(self) -> tuple[int, int, torch.device]:
        sizes = [part._sizes() for part in self.parts]
        devices = [device for *_, device in sizes if device.type != "cpu"]
        return max(s[0] for s in sizes), max(s[1] for s in sizes), devices[0] if devices else torch.device("cpu")

    def lower(self, draft: Draft) -> None:
        for part in self.parts:
            part.lower(draft)


def _narrow(draft: Draft, name: str, bound: int) -> None:
    """Keep the tighter of two window bounds, where -1 is no bound."""
    have = draft.fields.get(name, -1)
    draft.fields[name] = bound if have == -1 else min(have, bound)  # type: ignore[type-var]


def _smaller(draft: Draft, name: str, lengths: Tensor) -> None:
    have = draft.fields.get(name)
    draft.fields[name] = lengths if have is None else torch.minimum(have, lengths)  # type: ignore[arg-type]


def _lengths(name: str, lengths: object) -> Tensor:
    lengths = check_integer(name, lengths)
    if lengths.dim() != 1:
        fail(ValueError, name, "one length per sequence, shape (B,)", lengths)
    return lengths


class Causal(Mask):
    """A query sees no key after its own position: j <= i + query_offset."""

    def __repr__(self) -> str:
        return "Causal()"

    def lower(self, draft: Draft) -> None:
        _narrow(draft, "window_right", 0)


class SlidingWindow(Mask):
    """A query at position p sees keys p - left ... p + right (both included); None leaves that side open.

    Args:
        left: keys before the query's position that it sees, >= 0, or None.
        right: keys after it, >= 0, or None.

    Raises:
        TypeError, ValueError: not an int, or negative.
    """

    def __init__(self, left: int | None, right: int | None) -> None:
        self.left = None if left is None else check_index("SlidingWindow.left", left, least=0)
        self.right = None if right is None else check_index("SlidingWindow.right", right, least=0)

    def __repr__(self) -> str:
        return f"SlidingWindow(left={self.left}, right={self.right})"

    def lower(self, draft: Draft) -> None:
        if self.left is not None:
            _narrow(draft, "window_left", self.left)
        if self.right is not None:
            _narrow(draft, "window_right", self.right)


class KeyLengths(Mask):
    """Sequence b has lengths[b] real keys; the padding after them is invisible.

    Args:
        lengths: (B,) integer tensor, 0 <= lengths <= Sk.  On a GPU, or under torch.compile, values out of that
            range are clamped to it instead of raising.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or values.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = _lengths("KeyLengths.lengths", lengths)

    def __repr__(self) -> str:
        return f"KeyLengths(batch={self.lengths.shape[0]})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return self.lengths.shape[0], 1, self.lengths.device

    def lower(self, draft: Draft) -> None:
        name = "KeyLengths.lengths"
        check_device(name, self.lengths, draft.device)
        check_shape(name, self.lengths, (draft.batch,))
        check_range(name, self.lengths, 0, draft.key_length, f"values in [0, Sk] = [0, {draft.key_length}]")
        _smaller(draft, "key_lengths", self.lengths.long())


class PrefixLM(Mask):
    """Causal, except that the first prefix_lengths[b] keys are visible to every query (Raffel et al., 2020).

    Args:
        prefix_lengths: (B,) integer tensor, >= 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, or a negative value (clamped on a GPU).
    """

    def __init__(self, prefix_lengths: Tensor) -> None:
        self.prefix_lengths = _lengths("PrefixLM.prefix_lengths", prefix_lengths)

    def __repr__(self) -> str:
        return f"PrefixLM(batch={self.prefix_lengths.shape[0]})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return self.prefix_lengths.shape[0], 1, self.prefix_lengths.device

    def lower(self, draft: Draft) -> None:
        name = "PrefixLM.prefix_lengths"
        check_device(name, self.prefix_lengths, draft.device)
        check_shape(name, self.prefix_lengths, (draft.batch,))
        check_range(name, self.prefix_lengths, 0, None, "values >= 0")
        _smaller(draft, "prefix_lengths", self.prefix_lengths.long())


class Documents(Mask):
    """A query sees the keys whose id equals its own: several documents packed into one sequence.

    Args:
        query_ids: (B, Sq) or (Sq,) integer tensor.
        key_ids: (B, Sk) or (Sk,) integer tensor; by default query_ids (self-attention).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None) -> None:
        self.query_ids = self._ids("Documents.query_ids", query_ids)
        self.key_ids = self.query_ids if key_ids is None else self._ids("Documents.key_ids", key_ids)

    @staticmethod
    def _ids(name: str, ids: object) -> Tensor:
        ids = check_integer(name, ids)
        if ids.dim() not in (1, 2):
            fail(ValueError, name, "shape (B, S) or (S,)", ids)
        return ids if ids.dim() == 2 else ids[None]

    def __repr__(self) -> str:
        return f"Documents(query_ids={tuple(self.query_ids.shape)}, key_ids={tuple(self.key_ids.shape)})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return max(self.query_ids.shape[0], self.key_ids.shape[0]), 1, self.query_ids.device

    def lower(self, draft: Draft) -> None:
        for name, ids, length in (
            ("Documents.query_ids", self.query_ids, draft.query_length),
            ("Documents.key_ids", self.key_ids, draft.key_length),
        ):
            check_device(name, ids, draft.device)
            check_shape(name, ids, (draft.batch, length), (1, length))
        query_ids, key_ids = self.query_ids.long(), self.key_ids.long()
        if "query_ids" in draft.fields:
            query_ids, key_ids = _pair_ids(draft.fields["query_ids"], draft.fields["key_ids"], query_ids, key_ids)  # type: ignore[arg-type]
        draft.fields.update(query_ids=query_ids, key_ids=key_ids)


def _pair_ids(query_a: Tensor, key_a: Tensor, query_b: Tensor, key_b: Tensor) -> tuple[Tensor, Tensor]:
    """One id per pair of ids: equal exactly where both members are."""
    batch = max(x.shape[0] for x in (query_a, key_a, query_b, key_b))
    split = query_a.shape[1]
    a = torch.cat((query_a.expand(batch, -1), key_a.expand(batch, -1)), dim=1)
    b = torch.cat((query_b.expand(batch, -1), key_b.expand(batch, -1)), dim=1)
    _, pair = torch.unique(torch.stack((a, b), dim=-1).flatten(0, 1), dim=0, return_inverse=True)
    pair = pair.view(batch, -1)
    return pair[:, :split], pair[:, split:]


class BoolMask(Mask):
    """An arbitrary mask.  True = may attend (as in `torch.nn.functional.scaled_dot_product_attention`).

    Kernels pass over the keys before and after all that a few neighbouring queries see; what is hidden between these is
    computed.  On a GPU, from 256 queries and keys on, the mask is read once for that, for all heads that share it.

    Args:
        tensor: bool, broadcastable to (B, Hq, Sq, Sk); read with stride 0 where it broadcasts, never expanded.

    Raises:
        TypeError: not a bool tensor.
        ValueError: does not broadcast, or on another device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = check_tensor("BoolMask.tensor", tensor)
        if tensor.dtype != torch.bool:
            fail(TypeError, "BoolMask.tensor", "dtype bool, True = may attend (a float mask is a DenseBias)", tensor)

    def __repr__(self) -> str:
        return f"BoolMask({tuple(self.tensor.shape)})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        shape = (1,) * (4 - self.tensor.dim()) + tuple(self.tensor.shape)
        return shape[0], shape[1], self.tensor.device

    def lower(self, draft: Draft) -> None:
        check_device("BoolMask.tensor", self.tensor, draft.device)
        mask = check_broadcast("BoolMask.tensor", self.tensor, draft.score_shape)
        have = draft.fields.get("dense_mask")
        draft.fields["dense_mask"] = mask if have is None else have & mask  # type: ignore[operator]

"""Biases: what is added to the scaled scores before the softmax.  They join with ``+`` and all have gradients.

``distance(i, j) = j - (i + query_offset)``: negative for keys before the query, 0 for its own position.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from functools import lru_cache

import torch
from torch import Tensor

from fastattn import reference
from fastattn.lowering import Draft, empty_problem, standalone
from fastattn.validation import (
    as_dtype,
    check_broadcast,
    check_device,
    check_floating,
    check_index,
    check_shape,
    describe,
    fail,
)


class Bias(ABC):
    """Base of all biases.  `a + b` adds both."""

    def __add__(self, other: Bias) -> Bias:
        if not isinstance(other, Bias):
            return NotImplemented
        return _Sum((*_parts(self), *_parts(other)))

    @abstractmethod
    def lower(self, draft: Draft) -> None:
        """Write this bias into the draft, added to what is there."""

    @abstractmethod
    def _sizes(self) -> tuple[int, int, torch.device]:
        """Batch, heads and device, as far as the bias's own tensors tell."""

    def materialize(self, query_length: int, key_length: int, query_offset: int | Tensor | None = None) -> Tensor:
        """The bias as a tensor broadcastable to (B, Hq, query_length, key_length), differentiable.

        For the reference, for tests and for eyes; no fused path calls it.
        """
        batch, heads, device = self._sizes()
        if isinstance(query_offset, Tensor):
            batch = max(batch, query_offset.shape[0])
        draft = standalone(batch, heads, query_length, key_length, device, query_offset)
        draft.parameter_dtype = self._dtype()
        self.lower(draft)
        total = reference.bias(empty_problem(draft), draft.parameter_dtype)
        assert total is not None
        return total

    @abstractmethod
    def _dtype(self) -> torch.dtype:
        """The dtype to materialize in: that of the bias's tensors."""


def _parts(bias: Bias) -> tuple[Bias, ...]:
    return bias.parts if isinstance(bias, _Sum) else (bias,)


class _Sum(Bias):
    """Several biases joined with +."""

    def __init__(self, parts: tuple[Bias, ...]) -> None:
        self.parts = parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def _sizes(self) -> tuple[int, int, torch.device]:
        sizes = [part._sizes() for part in self.parts]
        return max(s[0] for s in sizes), max(s[1] for s in sizes), sizes[0][2]

    def _dtype(self) -> torch.dtype:
        dtype = self.parts[0]._dtype()
        for part in self.parts[1:]:
            dtype = torch.promote_types(dtype, part._dtype())
        return dtype

    def lower(self, draft: Draft) -> None:
        for part in self.parts:
            part.lower(draft)


def _add(draft: Draft, name: str, tensor: Tensor) -> None:
    have = draft.fields.get(name)
    draft.fields[name] = tensor if have is None else have + tensor  # type: ignore[operator]


class DenseBias(Bias):
    """An arbitrary additive bias, such as a pair bias or a float attention mask; -inf masks, as in `BoolMask`.

    Args:
        tensor: floating, broadcastable to (B, Hq, Sq, Sk); read with stride 0 where it broadcasts, never expanded.
            Its gradient is reduced over the broadcast dimensions inside the kernel and has the tensor's own shape.

    Raises:
        TypeError: not floating.
        ValueError: does not broadcast, or on another device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = check_floating("DenseBias.tensor", tensor)

    def __repr__(self) -> str:
        return f"DenseBias({tuple(self.tensor.shape)})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        shape = (1,) * (4 - self.tensor.dim()) + tuple(self.tensor.shape)
        return shape[0], shape[1], self.tensor.device

    def _dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def lower(self, draft: Draft) -> None:
        check_device("DenseBias.tensor", self.tensor, draft.device)
        add_dense(draft, check_broadcast("DenseBias.tensor", self.tensor, draft.score_shape))


def add_dense(draft: Draft, tensor: Tensor) -> None:
    """Add a bias broadcastable to (B, Hq, Sq, Sk) to the draft's."""
    have = draft.fields.get("dense_bias")
    if have is not None:  # a sum of half precision biases is not rounded before it meets the scores
        tensor = tensor.to(draft.parameter_dtype) + have.to(draft.parameter_dtype)  # type: ignore[attr-defined]
    draft.fields["dense_bias"] = tensor


class ALiBi(Bias):
    """-slope * |distance| (Press et al., "Train short, test long", ICLR 2022), with gradient for learned slopes.

    Under a causal mask this equals the paper's form; without one it is the symmetric variant, or with `after` any
    asymmetric one.  Distances are integer differences, so nothing cancels at long range; slopes are used in float32
    (float64 for float64 queries).

    Args:
        slopes: (Hq,) or (B, Hq) floating tensor, see `alibi_slopes`.
        after: slopes for the keys after the query, same shape; by default the same slopes.  0 leaves them alone,
            +inf hides them: heads that look one way each are two complementary tensors of slopes and inf.  With it
            the bias becomes a distance table of O(Hq (Sq + Sk)) numbers.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """

    def __init__(self, slopes: Tensor, after: Tensor | None = None) -> None:
        self.slopes = check_floating("ALiBi.slopes", slopes)
        if slopes.dim() not in (1, 2):
            fail(ValueError, "ALiBi.slopes", "shape (Hq,) or (B, Hq)", slopes)
        self.after = None if after is None else check_floating("ALiBi.after", after)
        if after is not None:
            check_shape("ALiBi.after", after, tuple(slopes.shape))

    def __repr__(self) -> str:
        sides = "" if self.after is None else ", after=..."
        return f"ALiBi(heads={self.slopes.shape[-1]}{sides})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return (self.slopes.shape[0] if self.slopes.dim() == 2 else 1), self.slopes.shape[-1], self.slopes.device

    def _dtype(self) -> torch.dtype:
        return self.slopes.dtype

    def lower(self, draft: Draft) -> None:
        check_device("ALiBi.slopes", self.slopes, draft.device)
        check_shape("ALiBi.slopes", self.slopes, (draft.heads,), (draft.batch, draft.heads))
        slopes = as_dtype(self.slopes, draft.parameter_dtype)
        slopes = slopes if slopes.dim() == 2 else slopes.unsqueeze(0)
        if self.after is None:
            _add(draft, "slopes", slopes)
            return
        check_device("ALiBi.after", self.after, draft.device)
        after = as_dtype(self.after, draft.parameter_dtype)
        after = after if after.dim() == 2 else after[None]
        left, right = draft.reach()
        # distance 0 by itself: inf * 0 is not a number
        before = slopes[..., None] * torch.arange(-left, 0, device=draft.device)
        behind = -after[..., None] * torch.arange(1, right + 1, device=draft.device)
        add_table(draft, torch.cat((before, torch.zeros_like(slopes)[..., None], behind), dim=-1), left)


def alibi_slopes(
    num_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """The standard ALiBi slopes for any head count (Press et al., 2022, and the authors' published code).

    For a power of two H: 2^(-8 (h + 1) / H).  Otherwise the slopes of the power of two c below H, followed by every
    other slope of 2c.

    Returns:
        (num_heads,) tensor.
    """
    num_heads = check_index("num_heads", num_heads, least=1)
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / below) for h in range(below)]
    slopes += [2.0 ** (-4.0 * (2 * t + 1) / below) for t in range(num_heads - below)]
    return torch.tensor(slopes, dtype=dtype, device=device)


class DistanceTable(Bias):
    """A learned bias per head and clipped distance: table[h, clamp(distance, -left, right) + left].

    Every one-dimensional relative bias lowers to this.  Its memory is that of the table, forward and backward.

    Args:
        table: (Hq, left + right + 1) or (B, Hq, left + right + 1) floating tensor; first column: left or more before.
        left: columns before distance 0; by default the table is symmetric, left = right.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device; an even number of columns without `left`.
    """

    def __init__(self, table: Tensor, left: int | None = None) -> None:
        self.table = check_floating("DistanceTable.table", table)
        if table.dim() not in (2, 3) or table.shape[-1] == 0:
            fail(ValueError, "DistanceTable.table", "shape (Hq, T) or (B, Hq, T) with T >= 1", table)
        columns = table.shape[-1]
        if left is None:
            if columns % 2 == 0:
                fail(ValueError, "DistanceTable.table", "an odd number of columns, or `left` given", table)
            left = columns // 2
        self.left = check_index("DistanceTable.left", left, least=0)
        if self.left >= columns:
            fail(ValueError, "DistanceTable.left", f"an int < {columns}, the number of columns", left)

    def __repr__(self) -> str:
        right = self.table.shape[-1] - 1 - self.left
        return f"DistanceTable(heads={self.table.shape[-2]}, left={self.left}, right={right})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return (self.table.shape[0] if self.table.dim() == 3 else 1), self.table.shape[-2], self.table.device

    def _dtype(self) -> torch.dtype:
        return self.table.dtype

    def lower(self, draft: Draft) -> None:
        name, columns = "DistanceTable.table", self.table.shape[-1]
        check_device(name, self.table, draft.device)
        check_shape(name, self.table, (draft.heads, columns), (draft.batch, draft.heads, columns))
        table = self.table if self.table.dim() == 3 else self.table.unsqueeze(0)
        add_table(draft, as_dtype(table, draft.parameter_dtype), self.left)


def add_table(draft: Draft, table: Tensor, left: int) -> None:
    """Add a distance table (B|1, H, T) to the draft's, stretching both to the wider reach."""
    have = draft.fields.get("table")
    if have is not None:
        have_left: int = draft.fields["table_left"]  # type: ignore[assignment]
        reach_left = max(left, have_left)
        reach_right = max(table.shape[-1] - left, have.shape[-1] - have_left) - 1  # type: ignore[attr-defined]
        table = _stretch(table, left, reach_left, reach_right) + _stretch(have, have_left, reach_left, reach_right)  # type: ignore[arg-type]
        left = reach_left
    draft.fields.update(table=table, table_left=left)


def _stretch(table: Tensor, left: int, reach_left: int, reach_right: int) -> Tensor:
    distance = torch.arange(-reach_left, reach_right + 1, device=table.device)
    return table[..., distance.clamp(-left, table.shape[-1] - 1 - left) + left]


class DistanceBias(Bias):
    """Base of biases that are some function of the distance alone.

    The function is evaluated once at every distance that occurs in a call, O(Sq + Sk) of them per head, and lowers to a
    `DistanceTable`: exact, and differentiable in whatever parameters the function has.  Where offsets are a tensor on
    a GPU they are taken to lie in [0, Sk].
    """

    @abstractmethod
    def values(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """(Hq, T) or (B, Hq, T) in `dtype` at the integer distances (T,)."""

    def lower(self, draft: Draft) -> None:
        left, right = draft.reach()
        table = self.values(torch.arange(-left, right + 1, device=draft.device), draft.parameter_dtype)
        name, columns = type(self).__name__, table.shape[-1]
        check_device(name, table, draft.device)
        if table.shape[-2] != draft.heads:
            fail(ValueError, name, f"parameters for Hq = {draft.heads} heads", f"{table.shape[-2]}")
        table = table if table.dim() == 3 else table[None]
        check_shape(name, table, (1, draft.heads, columns), (draft.batch, draft.heads, columns))
        add_table(draft, table, left)


class T5Bias(Bias):
    """T5's bucketed relative position bias (Raffel et al., 2020; the Mesh-TensorFlow bucket function, exactly).

    The weight is expanded to a distance table on the host, in O(max_distance * H), so the kernel takes no logarithm.
    T5 itself uses attention without 1/sqrt(D): pass scale=1.0 to reproduce it.

    Args:
        weight: (num_buckets, Hq) floating tensor, the `relative_attention_bias.weight` of a T5 checkpoint.
        bidirectional: True in an encoder; False in a decoder, where every later key falls into bucket 0.
        max_distance: distances from here on share the last bucket.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; too few buckets; max_distance too small for them.
    """

    def __init__(self, weight: Tensor, bidirectional: bool = True, max_distance: int = 128) -> None:
        self.weight = check_floating("T5Bias.weight", weight)
        if weight.dim() != 2:
            fail(ValueError, "T5Bias.weight", "shape (num_buckets, Hq)", weight)
        if not isinstance(bidirectional, bool):
            fail(TypeError, "T5Bias.bidirectional", "a bool", describe(bidirectional))
        self.bidirectional = bidirectional
        buckets = weight.shape[0]
        if buckets < (4 if bidirectional else 2) or (bidirectional and buckets % 2):
            expected = "an even number of buckets >= 4" if bidirectional else "at least 2 buckets"
            fail(ValueError, "T5Bias.weight", expected, weight)
        exact = buckets // (4 if bidirectional else 2)
        self.max_distance = check_index("T5Bias.max_distance", max_distance, least=exact + 1)

    def __repr__(self) -> str:
        buckets, heads = self.weight.shape
        return (
            f"T5Bias(buckets={buckets}, heads={heads}, bidirectional={self.bidirectional}, "
            f"max_distance={self.max_distance})"
        )

    def _sizes(self) -> tuple[int, int, torch.device]:
        return 1, self.weight.shape[1], self.weight.device

    def _dtype(self) -> torch.dtype:
        return self.weight.dtype

    def lower(self, draft: Draft) -> None:
        check_device("T5Bias.weight", self.weight, draft.device)
        check_shape("T5Bias.weight", self.weight, (self.weight.shape[0], draft.heads))
        buckets = self.weight.shape[0], self.bidirectional, self.max_distance
        if torch.compiler.is_compiling():
            index = torch.tensor(t5_buckets(*buckets))
        else:  # a tensor of a list costs as much as the attention of a short sequence
            index = torch.frombuffer(_t5_bucket_array(*buckets), dtype=torch.int64)
        if draft.device.type != "cpu":
            index = index.to(draft.device)
        table = as_dtype(self.weight, draft.parameter_dtype).t().index_select(1, index)
        add_table(draft, table.unsqueeze(0), self.max_distance)


@lru_cache
def t5_buckets(num_buckets: int, bidirectional: bool, max_distance: int) -> tuple[int, ...]:
    """The bucket of every distance -max_distance ... max_distance (... 0 when not bidirectional)."""
    per_side = num_buckets // 2 if bidirectional else num_buckets
    exact = per_side // 2

    def bucket(n: int) -> int:
        if n < exact:
            return n
        # The published code truncates a float32 quotient of logarithms; in float64 the quotient can fall a rounding
        # error short of an integer at exact powers, hence the nudge far below the spacing of true values.
        steps = math.log(n / exact) / math.log(max_distance / exact) * (per_side - exact)
        return min(per_side - 1, exact + int(steps + 1e-9))

    before = [bucket(n) for n in range(max_distance, -1, -1)]
    after = [per_side + bucket(n) for n in range(1, max_distance + 1)] if bidirectional else []
    return tuple(before + after)


@lru_cache
def _t5_bucket_array(num_buckets: int, bidirectional: bool, max_distance: int) -> array[int]:
    return array("q", t5_buckets(num_buckets, bidirectional, max_distance))

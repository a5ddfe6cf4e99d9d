"""The narrow waist: one plain description of an attention call, understood by every backend.

Public mask, bias and rotary objects lower to a `Problem`; a backend never sees anything else.  The
pipeline is fixed and every stage is optional:

    rotate q, k -> scale -> softcap -> + bias -> mask -> softmax (+ sink) -> dropout -> times V

Positions.  Query ``i`` of batch ``b`` sits at position ``i + offset(b)`` among the keys, where
``offset`` is `query_offset`, or `query_offsets[b]` when that tensor is given.  Masks, biases and
rotation all use it; ``distance(i, j) = j - (i + offset)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from operator import attrgetter

import torch
from torch import Tensor


@dataclass(eq=False, slots=True, kw_only=True)
class Problem:
    """One attention call.  Every tensor but `columns` and `dropout_seed` has a leading batch dimension of B or 1.

    Nobody changes one that exists; it is not declared frozen because that triples the time to make one, microseconds
    of every call.

    Field order is the argument order of the native operators (`fastattn.ops`) and of the C++ struct in
    ``csrc/common/problem.h``: change all three together.
    """

    query: Tensor  # (B, Hq, Sq, D), last dimension dense
    key: Tensor  # (B, Hk, Sk, D), Hq % Hk == 0
    value: Tensor  # (B, Hk, Sk, Dv)
    scale: float  # multiplies q.k; any finite number
    softcap: float = 0.0  # c * tanh(s / c) after the scale; 0 = off
    # rotary: query i uses row offset + i of query_cos, key j row j of key_cos
    query_cos: Tensor | None = None  # (B|1, P, R/2) float32 (float64 for float64 problems), R <= D
    query_sin: Tensor | None = None
    key_cos: Tensor | None = None  # the same tensors as query_cos/query_sin unless the scheme is xPos-like
    key_sin: Tensor | None = None
    interleaved: bool = False  # pairs (2k, 2k+1) instead of (k, k + R/2)
    # interval mask: query at position p sees keys j with
    #   p - window_left <= j                       when window_left >= 0
    #   j <= p + window_right                      when window_right >= 0 (causal is window_right = 0)
    #   j <= max(p, prefix_lengths[b] - 1)         when given (prefix-LM is this bound alone)
    #   j < key_lengths[b]                         when given
    query_offset: int = 0
    query_offsets: Tensor | None = None  # (B|1,) int64, overrides query_offset
    window_left: int = -1  # -1 = unbounded
    window_right: int = -1
    key_lengths: Tensor | None = None  # (B|1,) int64
    prefix_lengths: Tensor | None = None  # (B|1,) int64
    query_ids: Tensor | None = None  # (B|1, Sq) int64: sees keys whose id is equal
    key_ids: Tensor | None = None  # (B|1, Sk) int64
    dense_mask: Tensor | None = None  # bool (B|1, Hq|1, Sq|1, Sk|1), True = may attend
    # biases, all added to the scaled (and capped) scores
    slopes: Tensor | None = None  # (B|1, Hq): -slope * |distance|
    table: Tensor | None = None  # (B|1, Hq, T): table[clamp(distance, -table_left, T-1-table_left) + table_left]
    table_left: int = 0
    dense_bias: Tensor | None = None  # floating (B|1, Hq|1, Sq|1, Sk|1)
    # tables of each query's and of each key's own, read at column c(distance):
    #   c(d) = columns[clamp(d, -columns_left, T-1-columns_left) + columns_left], the index itself without `columns`
    row_table: Tensor | None = None  # (B, Hq, Sq, C): query i, key j get row_table[i, c]
    col_table: Tensor | None = None  # (B, Hk, C, Sk): ... and col_table[c, j]
    columns: Tensor | None = None  # (T,) int32 in [0, C), rising; None: T = C, a column for each distance
    columns_left: int = 0
    sink: Tensor | None = None  # (B|1, Hq): an extra logit in the softmax denominator
    # dropout: element (b, h, i, j) is kept iff philox(seed; b, h, i, j) >= dropout_p (see fastattn/philox.py)
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None  # (2,) int64 (key, counter offset) when dropout_p > 0

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def batch_size(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def query_length(self) -> int:
        return self.query.shape[2]

    @property
    def key_length(self) -> int:
        return self.key.shape[2]

    @property
    def parameter_dtype(self) -> torch.dtype:
        return parameter_dtype(self.query.dtype)

    @property
    def column_entries(self) -> int:
        """T, the clamped distances that row and column tables tell apart."""
        if self.columns is not None:
            return self.columns.shape[0]
        if self.row_table is not None:
            return self.row_table.shape[3]
        return 0 if self.col_table is None else self.col_table.shape[2]

    def arguments(self) -> tuple[object, ...]:
        """All fields, in order: the argument tuple of the operators."""
        if torch.compiler.is_compiling():  # Dynamo does not trace the getter, which takes a third of the loop's time
            return tuple([getattr(self, name) for name in FIELD_NAMES])
        return _all_fields(self)

    def is_plain(self) -> bool:
        """Whether `PLAIN_FIELDS` say all of it.  Of fields that come together one is asked for."""
        return (
            self.query_cos is None
            and self.key_cos is None
            and self.query_offsets is None
            and self.key_lengths is None
            and self.prefix_lengths is None
            and self.query_ids is None
            and self.dense_mask is None
            and self.slopes is None
            and self.table is None
            and self.dense_bias is None
            and self.row_table is None
            and self.col_table is None
            and self.sink is None
            and not self.dropout_p
        )

    def features(self) -> list[str]:
        """Names of the optional stages this problem uses, for `explain` and for refusals."""
        used = []
        if self.query_cos is not None:
            used.append("rotary")
        if self.softcap:
            used.append("softcap")
        if self.window_left >= 0 or self.window_right >= 0:
            used.append("causal" if (self.window_left, self.window_right) == (-1, 0) else "window")
        if self.is_plain():
            return used
        for name in (
            "key_lengths",
            "prefix_lengths",
            "query_ids",
            "dense_mask",
            "slopes",
            "table",
            "dense_bias",
            "row_table",
            "col_table",
            "sink",
        ):
            if getattr(self, name) is not None:
                used.append("documents" if name == "query_ids" else name)
        if self.dropout_p > 0:
            used.append("dropout")
        return used


FIELD_NAMES: tuple[str, ...] = tuple(f.name for f in fields(Problem))
# The operands, and numbers: what most calls need of them.
PLAIN_FIELDS = ("query", "key", "value", "scale", "softcap", "query_offset", "window_left", "window_right")
_all_fields = attrgetter(*FIELD_NAMES)
TENSOR_FIELDS: frozenset[str] = frozenset(f.name for f in fields(Problem) if "Tensor" in str(f.type))
# Fields a backend returns a gradient for, in the order of the backward operator's outputs.
GRADIENT_FIELDS: tuple[str, ...] = (
    "query",
    "key",
    "value",
    "slopes",
    "table",
    "dense_bias",
    "sink",
    "row_table",
    "col_table",
)


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of tables, slopes, sinks, rotary tables and lse: float64 for float64 problems, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(head_dim: int) -> float:
    """1 / sqrt(D), the scale of Vaswani et al. (2017); 1 for an empty head dimension."""
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0

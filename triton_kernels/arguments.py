"""How a `Problem`'s tensors travel into a kernel: named tuples of pointers and strides.

A field that is absent is None, which Triton folds at compile time, so a kernel's features are known from the presence
of their tensors alone.  Strides count elements; a broadcast dimension has stride 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .launcher import remembers


@remembers
class Operand(NamedTuple):
    """A (B, H, S, D) tensor whose last dimension is dense."""

    ptr: Any
    sb: Any
    sh: Any
    si: Any


@remembers
class Interval(NamedTuple):
    """Vectors, one value per batch, that bound which keys a query may see."""

    offsets: Any  # position of the first query
    offsets_sb: Any
    key_lengths: Any
    key_lengths_sb: Any
    prefix_lengths: Any
    prefix_lengths_sb: Any


@remembers
class Spans(NamedTuple):
    """(B, H, blocks, 4) int32: what blocks of rows see by masks by element (spans.py)."""

    ptr: Any
    sb: Any
    sh: Any


@remembers
class Mask(NamedTuple):
    """Masks that need a look at every element, and what is known of them."""

    query_ids: Any
    query_ids_sb: Any
    key_ids: Any
    key_ids_sb: Any
    dense: Any  # uint8, non-zero = may attend
    dense_sb: Any
    dense_sh: Any
    dense_si: Any
    dense_sj: Any
    key_spans: Any  # Spans of the queries, or None
    query_spans: Any  # of the keys


@remembers
class Content(NamedTuple):
    """Tables of each query's and of each key's own, and the columns that distances within [-left, right] read."""

    rows: Any
    rows_sb: Any
    rows_sh: Any
    rows_si: Any
    cols: Any
    cols_sb: Any
    cols_sh: Any
    cols_sc: Any
    columns: Any  # int32, None = a column for each distance
    left: Any
    right: Any
    last: Any  # the last column
    group: Any  # query heads of a key head


@remembers
class Bias(NamedTuple):
    """What is added to the scores."""

    slopes: Any
    slopes_sb: Any
    table: Any
    table_sb: Any
    table_sh: Any
    dense: Any
    dense_sb: Any
    dense_sh: Any
    dense_si: Any
    dense_sj: Any
    content: Any  # Content or None


@remembers
class Extra(NamedTuple):
    """Sink logits and the dropout seed."""

    sink: Any
    sink_sb: Any
    seed: Any


@remembers
class Numbers(NamedTuple):
    """Scalars of the call; every one is there, and the flags in `Shape` tell which are used."""

    scale: Any
    softcap: Any
    query_offset: Any
    window_left: Any
    window_right: Any
    table_left: Any
    table_right: Any
    drop_threshold: Any  # a weight is kept iff its Philox word is not below this
    keep_scale: Any  # 1 / (1 - p)
    query_length: Any
    key_length: Any


NO_INTERVAL = Interval(*[None, 0] * 3)
NO_MASK = Mask(None, 0, None, 0, None, 0, 0, 0, 0, None, None)
NO_BIAS = Bias(None, 0, None, 0, 0, None, 0, 0, 0, 0, None)

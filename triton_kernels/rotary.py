"""Rotary embedding of queries and keys in one launch; its backward is the same kernel with the sines negated.

The transpose of a rotation with amplitude A is A times the opposite rotation, which is what negated sines give, so
scaled tables (YaRN, LongRoPE, xPos) need nothing more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launcher import constants, launch, remembers
from .layout import dense, empty_like_layout
from .tiles import cdiv, padded


@remembers
class Side(NamedTuple):
    """Queries or keys: where they are, where they go, their tables and their positions."""

    x: Any
    x_sb: Any
    x_sh: Any
    x_si: Any
    y: Any
    y_sb: Any
    y_sh: Any
    y_si: Any
    cos: Any  # (B|1, P, R/2), dense rows
    sin: Any
    table_sb: Any
    table_sp: Any
    positions: Any  # (B|1, S) int64, or None: row i is at position i + offset
    positions_sb: Any
    offsets: Any  # (B|1,) int64, or None
    offsets_sb: Any
    offset: Any
    heads: Any
    length: Any
    rows: Any  # P


@triton.jit
def _rotate_heads(
    side, b, h0, t0,
    D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BHALF: tl.constexpr, BREST: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, COPY_REST: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads of BT tokens; cosines and sines are loaded once for all of them."""
    i = t0 + tl.arange(0, BT)
    o_r = tl.arange(0, BHALF)
    in_t = i < side.length
    in_r = o_r < HALF
    if side.positions is not None:
        p = tl.load(side.positions + b * side.positions_sb + i, mask=in_t, other=0)
    elif side.offsets is not None:
        p = i + tl.load(side.offsets + b * side.offsets_sb)
    else:
        p = i + tl.cast(side.offset, tl.int64)
    # a position outside the table is clamped to it, never read past it
    p = tl.minimum(tl.maximum(p, 0), side.rows - 1)
    # [BT, BHALF]
    at_table = b * side.table_sb + p[:, None] * side.table_sp + o_r[None, :]
    cos = tl.load(side.cos + at_table, mask=in_t[:, None] & in_r[None, :], other=0.0).to(tl.float32)
    sin = tl.load(side.sin + at_table, mask=in_t[:, None] & in_r[None, :], other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    row = i.to(tl.int64)[:, None]
    for n in range(HEADS):
        h = h0 + n
        inside = in_t[:, None] & (h < side.heads)
        p_x = side.x + b * side.x_sb + h * side.x_sh + row * side.x_si
        p_y = side.y + b * side.y_sb + h * side.y_sh + row * side.y_si
        if INTERLEAVED:
            o_pair = tl.arange(0, 2 * BHALF)
            in_pair = inside & (o_pair < 2 * HALF)[None, :]
            # one wide load, split into even and odd dimensions in registers
            pairs = tl.load(p_x + o_pair[None, :], mask=in_pair, other=0.0).to(tl.float32)
            x0, x1 = tl.split(tl.reshape(pairs, [BT, BHALF, 2]))
            turned = tl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin)
            turned = tl.reshape(turned, [BT, 2 * BHALF]).to(side.y.dtype.element_ty)
            tl.store(p_y + o_pair[None, :], turned, mask=in_pair)
        else:
            in_half = inside & in_r[None, :]
            x0 = tl.load(p_x + o_r[None, :], mask=in_half, other=0.0).to(tl.float32)
            x1 = tl.load(p_x + HALF + o_r[None, :], mask=in_half, other=0.0).to(tl.float32)
            tl.store(p_y + o_r[None, :], (x0 * cos - x1 * sin).to(side.y.dtype.element_ty), mask=in_half)
            tl.store(p_y + HALF + o_r[None, :], (x1 * cos + x0 * sin).to(side.y.dtype.element_ty), mask=in_half)
        if COPY_REST:
            o_rest = 2 * HALF + tl.arange(0, BREST)
            in_rest = inside & (o_rest < D)[None, :]
            tl.store(p_y + o_rest[None, :], tl.load(p_x + o_rest[None, :], mask=in_rest), mask=in_rest)


@triton.jit
def rotary_kernel(
    query, key, QUERY_GROUPS, KEY_GROUPS, TILES,
    D: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr, BHALF: tl.constexpr, BREST: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, COPY_REST: tl.constexpr,
):  # fmt: skip
    """One program per BT tokens of HEADS heads of the queries or of the keys."""
    pid = tl.program_id(0)
    group = pid % (QUERY_GROUPS + KEY_GROUPS)
    t0 = (pid // (QUERY_GROUPS + KEY_GROUPS)) % TILES * BT
    b = (pid // ((QUERY_GROUPS + KEY_GROUPS) * TILES)).to(tl.int64)
    if group < QUERY_GROUPS:
        _rotate_heads(
            query, b, tl.cast(group, tl.int64) * HEADS, t0,
            D, HALF, BT, BHALF, BREST, HEADS, INTERLEAVED, CONJUGATE, COPY_REST,
        )  # fmt: skip
    else:
        _rotate_heads(
            key, b, tl.cast(group - QUERY_GROUPS, tl.int64) * HEADS, t0,
            D, HALF, BT, BHALF, BREST, HEADS, INTERLEAVED, CONJUGATE, COPY_REST,
        )  # fmt: skip


def _side(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int | Tensor) -> Side:
    cos, sin = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (cos, sin))
    if cos.stride() != sin.stride():
        sin = sin.contiguous()
        cos = cos.contiguous()
    offsets = offset if isinstance(offset, Tensor) else None
    return Side(
        x, *x.stride()[:3], y, *y.stride()[:3],
        cos, sin, cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        positions, 0 if positions is None or positions.shape[0] == 1 else positions.stride(0),
        offsets, 0 if offsets is None or offsets.shape[0] == 1 else offsets.stride(0),
        0 if isinstance(offset, Tensor) else offset,
        x.shape[1], x.shape[2], cos.shape[1],
    )  # fmt: skip


def rotate(
    query: Tensor,
    key: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    interleaved: bool,
    query_offset: int | Tensor = 0,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    conjugate: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotated query (B, Hq, Sq, D) and key (B, Hk, Sk, D), in float32 arithmetic, in one launch.

    Args:
        tables: query cos and sin, key cos and sin, each (B|1, P, R/2) floating.
        query_offset: position of query 0, or (B|1,) int64; key j is at position j.
        query_positions, key_positions: (B|1, S) int64 positions per token instead.
        conjugate: apply the transpose, which is the backward.
        out: where to write; may be (query, key) themselves.  New tensors of the same layout by default.
    """
    source = dense(query), dense(key)
    if out is None:
        out = empty_like_layout(query, tuple(query.shape)), empty_like_layout(key, tuple(key.shape))
    half, dim = tables[0].shape[-1], query.shape[-1]
    width = padded(half)
    query_side = _side(source[0], out[0], *tables[:2], query_positions, query_offset)
    key_side = _side(source[1], out[1], *tables[2:], key_positions, 0)
    # 8 warps' worth of 16-byte accesses per program; four heads share the cosines
    tokens, heads = max(16, 4096 // width // 4), 4
    tiles = cdiv(max(query.shape[2], key.shape[2]), tokens)
    groups = cdiv(query.shape[1], heads), cdiv(key.shape[1], heads)
    programs = query.shape[0] * tiles * sum(groups)
    in_place = out[0].data_ptr() == source[0].data_ptr() and out[1].data_ptr() == source[1].data_ptr()
    if programs:
        fixed = constants(
            D=dim, HALF=half, BT=tokens, BHALF=width, BREST=padded(dim - 2 * half),
            HEADS=heads, INTERLEAVED=interleaved, CONJUGATE=conjugate, COPY_REST=dim > 2 * half and not in_place,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        launch(
            rotary_kernel, programs, (query_side, key_side), fixed,
            QUERY_GROUPS=groups[0], KEY_GROUPS=groups[1], TILES=tiles,
        )  # fmt: skip
    return out

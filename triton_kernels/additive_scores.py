"""Additive scores (Bahdanau et al., 2015) of a tile: sum_d w_d tanh(q_id + k_jd), one d after the other in registers.

Queries and keys come as float32 columns, (B, H, D, S) contiguous, so that the loop over d reads whole vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .scores import tanh


class Columns(NamedTuple):
    """float32 columns of queries and keys, (B, Hq, D, Sq) and (B, Hk, D, Sk), and the weights (B|1, Hq, D)."""

    q: Any
    k: Any
    w: Any
    w_sb: Any


@triton.jit
def columns_of(columns, b, h, numbers, HEADS, GROUP, D: tl.constexpr):
    """Where the columns of query head h begin, and its weights."""
    p_q = columns.q + (b * HEADS + h) * numbers.query_length * D
    p_k = columns.k + (b * (HEADS // GROUP) + h // GROUP) * numbers.key_length * D
    return p_q, p_k, columns.w + b * columns.w_sb + h * D


@triton.jit
def tanh_tile(p_q, p_k, d, i, j, numbers):
    """[BM, BN] tanh(q_id + k_jd) of one d; rows and keys past the end count as 0."""
    at = tl.cast(d, tl.int64)
    q = tl.load(p_q + at * numbers.query_length + i, mask=i < numbers.query_length, other=0.0)
    k = tl.load(p_k + at * numbers.key_length + j, mask=j < numbers.key_length, other=0.0)
    x = q[:, None] + k[None, :]
    return tl.where(x == x, tanh(x), x)


@triton.jit
def additive_products(p_q, p_k, p_w, i, j, numbers, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] what attention has q k^T for."""
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for d in range(D):
        acc += tl.load(p_w + d) * tanh_tile(p_q, p_k, d, i, j, numbers)
    return acc

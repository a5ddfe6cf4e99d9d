"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer arithmetic.

The dropout mask of an attention call is a pure function of the seed and of the element's place (b, h, i, j), so
that every backend, tile size, thread count and recomputation draws the same mask.  The native kernels implement the
same function; this one is their oracle and what anything written in plain torch uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _mul_hi_lo(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # int64 products wrap modulo 2**64, which leaves all 64 bits right; the shift's sign fill is masked off.
    product = a * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on 32-bit words held in int64 tensors that broadcast together.

    Args:
        counter: four int64 tensors with values in [0, 2**32).
        key: two int64 tensors with values in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32), in the broadcast shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, dropout_p: float, batch_heads: Tensor, rows: Tensor, cols: range) -> Tensor:
    """The dropout mask of a rectangle of an attention call's weights: True where the weight is kept.

    Args:
        seed: (2,) int64, the Philox key and the counter offset of the call (`Problem.dropout_seed`).
        dropout_p: probability of dropping, in [0, 1].
        batch_heads: (N,) int64, the index b * num_heads + h of each wanted batch and query head.
        rows: (R,) int64 query indices.
        cols: contiguous key indices.

    Returns:
        (N, R, len(cols)) bool.
    """
    seed = seed.to(rows.device)
    first, last = cols.start >> 2, (cols.stop + 3) >> 2
    zero = torch.zeros((), dtype=torch.int64, device=rows.device)
    groups = torch.arange(first, last, device=rows.device)
    counter = (groups, rows[:, None], batch_heads[:, None, None], zero + (seed[1] & _MASK32))
    words = torch.stack(philox_4x32(counter, (seed[0] & _MASK32, (seed[0] >> 32) & _MASK32)), dim=-1)
    kept = words.flatten(-2) >= int(dropout_p * 2**32)
    skip = cols.start - 4 * first
    return kept[..., skip : skip + len(cols)]

"""How a row of key tiles is split into loops, so that most tiles run without masks and without table look-ups."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split(
    first, last, lo, hi, full_lo, full_hi, reach_left, reach_right,
    BN: tl.constexpr, ALWAYS_GENERAL: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Tile-aligned bounds start <= full <= near <= far <= full_end of five loops over the keys of one query tile:

    general [start, full), fast far-left [full, near), general [near, far), fast far-right [far, full_end), general
    [full_end, hi).  Without a table every fully visible tile is in the second.  first and last are the positions of
    the tile's queries, reach_left and reach_right what `table_reach` says.
    """
    start = lo // BN * BN
    if ALWAYS_GENERAL:
        full = tl.maximum(hi, start)
        near = full
        far = full
        full_end = full
    else:
        full = tl.maximum((tl.maximum(full_lo, 0) + BN - 1) // BN * BN, start)
        full_end = tl.maximum(tl.maximum(full_hi, 0) // BN * BN, full)
        near = full_end
        far = full_end
        if HAS_TABLE:
            left_end = tl.maximum(first - reach_left + 1, 0) // BN * BN
            near = tl.minimum(tl.maximum(left_end, full), full_end)
            if not HAS_RIGHT:
                right_start = (tl.maximum(last + reach_right, 0) + BN - 1) // BN * BN
                far = tl.minimum(tl.maximum(right_start, near), full_end)
    return start, full, near, far, full_end

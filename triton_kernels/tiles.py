"""Tile sizes: one pure table function, keyed on the kernel, the padded head dimension, the element size and the shared
memory of a block, never on device names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

# Shared memory a block may use, in bytes: sm_90 and sm_100, sm_80, and sm_86, sm_89, sm_120.
LARGE, MEDIUM, SMALL = 232448, 166912, 101376


class Tile(NamedTuple):
    """Queries and keys per tile, warps of a program, and depth of the load pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# (largest padded head dimension, tile) by kernel, for 2-byte elements; the first row that fits the head is taken.
# The figures that chose each row are registers, stack and shared memory read from the compiled code (tests/aot).
_HALF = {
    "forward": ((64, Tile(128, 64, 4, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(128, 64, 8, 2))),
    "backward_kv": ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 64, 8, 1))),
    "backward_q": ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(64, 32, 8, 1))),
    "bias_gradient": ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 64, 4, 1)), (256, Tile(64, 64, 8, 1))),
}
# 4-byte elements: operands take twice the room, and the products run on the vector units.
_SINGLE = {
    "forward": ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 32, 8, 1)), (256, Tile(32, 32, 8, 1))),
    "backward_kv": ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 32, 8, 1))),
    "backward_q": ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(32, 16, 8, 1))),
    "bias_gradient": ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(32, 32, 8, 1))),
}

_override: dict[str, Tile] = {}


def tile(kernel: str, head_dim: int, itemsize: int, shared_memory: int = LARGE) -> Tile:
    """The tile of a kernel ("forward", "backward_kv", "backward_q", "bias_gradient").

    Args:
        head_dim: the larger of the padded D and Dv.
        itemsize: bytes per element of q.
        shared_memory: bytes a block may use on the device.
    """
    if kernel in _override:
        return _override[kernel]
    rows = (_HALF if itemsize == 2 else _SINGLE)[kernel]
    chosen = next(row for limit, row in rows if head_dim <= limit)
    if shared_memory < MEDIUM and head_dim > 64:
        # less than half the room: one stage, and half the keys
        chosen = chosen._replace(BN=max(chosen.BN // 2, 16), num_stages=1)
    elif shared_memory < LARGE and head_dim > 128:
        chosen = chosen._replace(num_stages=1)
    return chosen


@contextmanager
def override(**tiles: Tile) -> Iterator[None]:
    """Use these tiles inside the block: ``with override(forward=Tile(64, 64, 4, 2)):`` (tests and tuning)."""
    saved = dict(_override)
    _override.update(tiles)
    try:
        yield
    finally:
        _override.clear()
        _override.update(saved)

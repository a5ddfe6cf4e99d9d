"""Tile sizes: one pure table function, keyed on the kernel, the padded head dimension, the element size and the shared
memory of a block, never on device names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Shared memory a block may use, in bytes: sm_90 and sm_100, sm_80, and sm_86, sm_89, sm_120.
LARGE, MEDIUM, SMALL = 232448, 166912, 101376


class Tile(NamedTuple):
    """Queries and keys per tile, warps of a program, and depth of the load pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# Rows of (largest padded head dimension, tile), by kernel and shared memory, for 2-byte elements; the first row that
# fits the head is taken.  Beside a choice: registers a thread (limit 255) and stack bytes of the plain kernel, as
# tests/resources/triton.json holds them; each row is the largest tile tried that keeps the stack at 0.
_HALF: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = {
    "forward": {
        # 128 x 64 with 4 warps: stack 88 at D = 64.  64 rows with 4 warps leave room for two blocks per processor,
        # which is what overlaps one block's softmax with the other's products.
        LARGE: ((64, Tile(64, 64, 4, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(128, 32, 8, 2))),
        # D = 256: 128 x 32 has a stack of 320 on sm_80, where operands of mma live in registers
        MEDIUM: ((64, Tile(64, 64, 4, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))),
        SMALL: ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 32, 4, 2)), (256, Tile(64, 32, 8, 1))),
    },
    "backward_kv": {
        # D = 128: 64 x 64 has a stack of 56, 32 x 128 of 48, and more when causal
        LARGE: ((64, Tile(64, 64, 4, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        # D = 64: 64 x 64 has a stack of 16 on sm_80
        MEDIUM: ((64, Tile(32, 64, 4, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        SMALL: ((64, Tile(32, 64, 4, 2)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
    },
    "backward_q": {
        LARGE: ((64, Tile(128, 64, 8, 2)), (128, Tile(128, 32, 8, 2)), (256, Tile(32, 32, 8, 1))),
        # D = 64: 64 x 64 has a stack of 32 on sm_80
        MEDIUM: ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        SMALL: ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 32, 4, 2)), (256, Tile(32, 32, 8, 1))),
    },
    "bias_gradient": {
        LARGE: ((64, Tile(64, 64, 4, 1)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        MEDIUM: ((64, Tile(64, 64, 8, 1)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        SMALL: ((64, Tile(64, 64, 8, 1)), (128, Tile(32, 32, 4, 1)), (256, Tile(32, 32, 8, 1))),
    },
}
# 4-byte elements: operands take twice the room, and the products run on the vector units; one set for every device.
_SINGLE = {
    "forward": ((64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 8, 1)), (256, Tile(32, 16, 8, 1))),
    "backward_kv": ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 16, 8, 1))),
    "backward_q": ((64, Tile(32, 16, 8, 1)), (128, Tile(32, 16, 8, 1)), (256, Tile(16, 16, 8, 1))),
    "bias_gradient": ((64, Tile(32, 32, 8, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 8, 1))),
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
    size = room(shared_memory)
    measured = tuned(os.environ.get("FASTATTN_TILES")).get((kernel, head_dim, itemsize, size))
    if measured is not None:
        return measured
    rows = _HALF[kernel][size] if itemsize == 2 else _SINGLE[kernel]
    return next(row for limit, row in rows if head_dim <= limit)


def room(shared_memory: int) -> int:
    """The class of devices that one with this shared memory belongs to: LARGE, MEDIUM or SMALL."""
    return next((size for size in (LARGE, MEDIUM) if shared_memory >= size), SMALL)


@cache
def tuned(path: str | None) -> dict[tuple[str, int, int, int], Tile]:
    """Rows measured by ``python -m fastattn tune`` in the file that FASTATTN_TILES names; none without it.

    Keyed on kernel, padded head dimension, element size and class of shared memory.

    Raises:
        ValueError: the file is not one that `tune` wrote.
    """
    if path is None:
        return {}
    try:
        rows = json.loads(Path(path).read_text())
        return {(r["kernel"], r["head_dim"], r["itemsize"], r["shared_memory"]): Tile(*r["tile"]) for r in rows}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"FASTATTN_TILES: expected a file written by `python -m fastattn tune`, got {path}: {error}"
        ) from error


def row_tile(columns: int) -> Tile:
    """The tile of the kernels that hold whole rows of `columns` elements (masked softmax).

    Rows of up to 16384 columns are one tile, padded to a power of two, with as many rows as make 2048 elements: 8 to
    32 registers a thread for each of the one or two tensors that are held, never more.  Longer rows go by in parts.
    """
    if "rows" in _override:
        return _override["rows"]
    width = max(16, 1 << (columns - 1).bit_length()) if columns > 1 else 16
    if width > 16384:
        return Tile(1, 8192, 8, 1)
    return Tile(max(1, min(16, 2048 // width)), width, min(16, max(4, width // 512)), 1)


def additive_tile(head_dim: int, itemsize: int) -> Tile:
    """The tile of all kernels of additive attention, for the larger of the padded D and Dv; square, as a block diagonal
    of a table's gradient needs it.

    The time goes into D hyperbolic tangents an element, not into operands: the largest tile of those tried whose
    scores, dS and results stay in registers.  Stack bytes of the backward on sm_90: 0 or 8, and 96 at D = 128 in
    float32; the next larger tile has 16 to 328.  float32 at D = 256 has no such tile: 3600 at the smallest.
    """
    if "additive" in _override:
        return _override["additive"]
    if itemsize == 4:
        return Tile(16, 16, 4 if head_dim <= 64 else 8, 1)
    return Tile(32, 32, 4, 1) if head_dim <= 64 else Tile(32, 32, 8, 1) if head_dim <= 128 else Tile(16, 16, 8, 1)


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

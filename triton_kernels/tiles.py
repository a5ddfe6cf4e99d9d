"""Tile sizes: one pure table function, keyed on the kernel, the head dimension, the element size, and the device's
compute capability and shared memory, never on its name.

Capability and shared memory put a device into one of three classes.  What decides between tiles is where the tensor
cores take their operands from: `wgmma` (9.x) and `tcgen05` (10.x, 11.x) read them from shared memory, `mma` (8.x, 12.x)
from registers, which are what runs out first there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Classes of devices, named by the bytes of shared memory a block may use: sm_90 and sm_100; sm_80; sm_86, 89 and 120.
LARGE, MEDIUM, SMALL = 232448, 166912, 101376
# First digit of the compute capabilities whose tensor cores read shared memory.
_FROM_SHARED_MEMORY = (9, 10, 11)


class Tile(NamedTuple):
    """Queries and keys per tile, warps of a program, and depth of the load pipeline."""

    BM: int
    BN: int
    num_warps: int
    num_stages: int


# Rows of (largest head dimension, tile), by kernel and class of device, for 2-byte elements; the first row that has
# room for the head is taken.  A head dimension that is no power of two is padded to one inside, and the masks of its
# loads take registers: at 127 stands a row for those that the tile of 128 has none left for.
#
# Beside each class: what the compiler made of the plain kernel (of the dense bias's gradient) at D = 64, 128 and 256,
# registers a thread (limit 255), from tests/resources/triton.json, and the stack of tiles that were turned down.  Each
# row is the largest tile tried that keeps the stack at 0.  No row has been timed on hardware yet: `python -m fastattn
# tune` does that.
_HALF: dict[str, dict[int, tuple[tuple[int, Tile], ...]]] = {
    "forward": {
        # 128 x 64 with 4 warps: stack 88 at D = 64.  64 rows with 4 warps leave room for two blocks per processor,
        # which is what overlaps one block's softmax with the other's products.
        # D = 192: 128 x 32 has a stack of 32 on sm_90, of 8 with one stage
        # registers: sm_90 175, 223, 240; sm_100 177, 246, 225
        LARGE: (
            (64, Tile(64, 64, 4, 3)),
            (128, Tile(128, 64, 8, 2)),
            (255, Tile(64, 32, 8, 2)),
            (256, Tile(128, 32, 8, 2)),
        ),
        # D = 256: 128 x 32 has a stack of 320 on sm_80, where operands of mma live in registers
        # D = 96: 128 x 64 has a stack of 64, 64 x 64 with 4 warps of 88
        # registers: sm_80 210, 235, 231
        MEDIUM: (
            (64, Tile(64, 64, 4, 3)),
            (127, Tile(128, 32, 8, 2)),
            (128, Tile(128, 64, 8, 2)),
            (256, Tile(64, 32, 8, 2)),
        ),
        # registers: sm_86 206, 209, 220; sm_120 198, 230, 222
        SMALL: ((64, Tile(64, 64, 4, 2)), (128, Tile(64, 32, 4, 2)), (256, Tile(64, 32, 8, 1))),
    },
    "backward_kv": {
        # D = 128: 64 x 64 has a stack of 56, 32 x 128 of 48, and more when causal
        # registers: sm_90 250, 248, 174; sm_100 176, 103, 172
        LARGE: ((64, Tile(64, 64, 4, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        # D = 64: 64 x 64 has a stack of 16 on sm_80.  D = 96: 64 x 64 with two stages has a stack of 8, 24 when causal
        # registers: sm_80 182, 215, 196
        MEDIUM: (
            (64, Tile(32, 64, 4, 2)),
            (127, Tile(32, 64, 8, 2)),
            (128, Tile(64, 64, 8, 2)),
            (256, Tile(32, 32, 8, 1)),
        ),
        # registers: sm_86 180, 181, 172; sm_120 182, 212, 186
        SMALL: ((64, Tile(32, 64, 4, 2)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
    },
    "backward_q": {
        # registers: sm_90 160, 160, 253; sm_100 126, 98, 253
        LARGE: ((64, Tile(128, 64, 8, 2)), (128, Tile(128, 32, 8, 2)), (256, Tile(32, 32, 8, 1))),
        # D = 64: 64 x 64 has a stack of 32 on sm_80
        # registers: sm_80 225, 195, 254
        MEDIUM: ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 8, 1))),
        # registers: sm_86 223, 228, 251; sm_120 216, 210, 252
        SMALL: ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 32, 4, 2)), (256, Tile(32, 32, 8, 1))),
    },
    "bias_gradient": {
        # registers: sm_90 252, 194, 255 (stack 40); sm_100 242, 176, 255 (stack 32)
        LARGE: ((64, Tile(64, 64, 4, 1)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        # registers: sm_80 255 (stack 32), 255 (stack 120), 255 (stack 24)
        MEDIUM: ((64, Tile(64, 64, 8, 1)), (128, Tile(64, 64, 8, 1)), (256, Tile(32, 32, 8, 1))),
        # registers: sm_86 255 (stack 88), 178, 255 (stack 40); sm_120 255 (stack 112), 182, 244
        SMALL: ((64, Tile(64, 64, 8, 1)), (128, Tile(32, 32, 4, 1)), (256, Tile(32, 32, 8, 1))),
    },
}
# Where 10.x and 11.x, which move accumulators between tensor memory and registers, differ from LARGE: at D = 192 and
# 256, 128 x 32 has a stack of 104 on sm_100, 64 x 64 of 48; 64 x 32 takes 225 registers and none.
_TENSOR_MEMORY = {
    "forward": ((64, Tile(64, 64, 4, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))),
}
# 4-byte elements: operands take twice the room, and the products run on the vector units; one set for every device.
_SINGLE = {
    "forward": ((64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 8, 1)), (256, Tile(32, 16, 8, 1))),
    "backward_kv": ((64, Tile(32, 32, 8, 1)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 16, 8, 1))),
    "backward_q": ((64, Tile(32, 16, 8, 1)), (128, Tile(32, 16, 8, 1)), (256, Tile(16, 16, 8, 1))),
    "bias_gradient": ((64, Tile(32, 32, 8, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(16, 16, 8, 1))),
}

# Calls with row or column tables, 2-byte elements: every near pair has addresses of its own to read and, backward, to
# write, so that small tiles with one stage are what the registers hold.  One set for every device.  Stack of tiles that
# were turned down, D = 64, sm_90 and sm_80: forward 64 x 64 0 and 16; kv 64 x 64 976 and 5512, 32 x 64 24 and 304; q
# 64 x 64 with 8 warps 88 and 688, 64 x 32 104 and 392.  D = 256: q 32 x 32 72 and 64; 32 x 16 has 0 and 16.
_TABLES = {
    "forward": ((64, Tile(64, 32, 4, 2)), (128, Tile(64, 32, 8, 2)), (256, Tile(32, 32, 8, 1))),
    "backward_kv": ((64, Tile(32, 32, 4, 1)), (256, Tile(32, 32, 8, 1))),
    "backward_q": ((64, Tile(32, 32, 4, 1)), (128, Tile(32, 32, 8, 1)), (256, Tile(32, 16, 8, 1))),
}
# 4-byte elements: the tiles of calls without tables have a stack of 0 but forward, of 400 at D = 64.
_SINGLE_TABLES = {"forward": ((256, Tile(32, 16, 8, 1)),)}

_override: dict[str, Tile] = {}


def cdiv(a: int, b: int) -> int:
    """a / b rounded up.  triton.cdiv is meant for compile time: it costs 2 µs on the host."""
    return -(-a // b)


def padded(n: int) -> int:
    """The smallest power of two that is not below n and not below 1: lengths of tensors inside a kernel."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def launch_options(tile: Tile) -> dict[str, object]:
    # enable_fp_fusion is pinned: its default changes between Triton versions, and results and registers with it.
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def tile(
    kernel: str,
    head_dim: int,
    itemsize: int,
    capability: tuple[int, int] = (9, 0),
    shared_memory: int = LARGE,
    has_tables: bool = False,
) -> Tile:
    """The tile of a kernel ("forward", "backward_kv", "backward_q", "bias_gradient").

    Args:
        head_dim: the larger of D and Dv.
        itemsize: bytes per element of q.
        capability: compute capability of the device.
        shared_memory: bytes a block may use on the device.
        has_tables: whether the call has row or column tables.
    """
    if kernel in _override:
        return _override[kernel]
    own = _TABLES if itemsize == 2 else _SINGLE_TABLES
    if has_tables and kernel in own:
        return next(row for limit, row in own[kernel] if head_dim <= limit)
    return _tile(kernel, head_dim, itemsize, capability, shared_memory, os.environ.get("FASTATTN_TILES"))


@cache
def _tile(
    kernel: str, head_dim: int, itemsize: int, capability: tuple[int, int], shared_memory: int, file: str | None
) -> Tile:
    measured = tuned(file).get((kernel, max(16, padded(head_dim)), itemsize, capability, shared_memory))
    if measured is not None:
        return measured
    kind = device_class(capability, shared_memory)
    if itemsize != 2:
        rows = _SINGLE[kernel]
    elif kind == LARGE and capability[0] > 9 and kernel in _TENSOR_MEMORY:
        rows = _TENSOR_MEMORY[kernel]
    else:
        rows = _HALF[kernel][kind]
    return next(row for limit, row in rows if head_dim <= limit)


def device_class(capability: tuple[int, int], shared_memory: int) -> int:
    """The class of a device: LARGE, MEDIUM or SMALL."""
    if shared_memory >= LARGE and capability[0] in _FROM_SHARED_MEMORY:
        return LARGE
    return MEDIUM if shared_memory >= MEDIUM else SMALL


@cache
def tuned(path: str | None) -> dict[tuple[str, int, int, tuple[int, int], int], Tile]:
    """Rows measured by ``python -m fastattn tune`` in the file that FASTATTN_TILES names; none without it.

    Keyed on kernel, padded head dimension, element size, compute capability and shared memory, so that what was
    measured on one kind of device is not taken for another.

    Raises:
        ValueError: the file is not one that `tune` wrote.
    """
    if path is None:
        return {}
    try:
        rows = json.loads(Path(path).read_text())
        return {
            (r["kernel"], r["head_dim"], r["itemsize"], tuple(r["capability"]), r["shared_memory"]): Tile(*r["tile"])
            for r in rows
        }
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
    width = max(16, padded(columns))
    if width > 16384:
        # with 8 warps the causal kernel has a stack of 16 on sm_120, with 16 none, in 62 to 106 registers
        return Tile(1, 8192, 16, 1)
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

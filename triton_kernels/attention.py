"""Host side of the attention kernels: allocate, choose tiles, launch."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from fastattn.problem import Problem

from . import tiles
from .attention_forward import attention_forward_kernel
from .features import Features, operand
from .launcher import Constants, constants, launch
from .layout import dense, empty_like_layout
from .rotary import rotate
from .spans import with_spans


class Call(Features):
    """An attention problem in the form the kernels take: shared by the forward and all backward launches."""

    def __init__(self, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__(problem)
        self.q, self.k, self.v = dense(query), dense(key), dense(value)
        self.dim, self.value_dim = problem.query.shape[3], problem.value.shape[3]
        self.padded = max(16, tiles.padded(self.dim)), max(16, tiles.padded(self.value_dim))
        self.group = problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1
        self.precision = precision(problem.query.dtype)

    def tile(self, kernel: str) -> tiles.Tile:
        device = target(self.q.device)
        has_tables = self.bias.content is not None
        return tiles.tile(kernel, max(self.dim, self.value_dim), self.q.element_size(), *device, has_tables)

    def constants(self, tile: tiles.Tile) -> Constants:
        """Compile-time arguments and launch options of a kernel with this tile."""
        has_softcap, has_dropout = self.problem.softcap != 0, self.problem.dropout_p > 0
        return _constants(
            self.dim, self.value_dim, *self.padded, tile, *self.window_flags, has_softcap, has_dropout, self.precision
        )


@cache
def _constants(
    dim: int, value_dim: int, padded: int, value_padded: int, tile: tiles.Tile,
    has_left: bool, has_right: bool, has_softcap: bool, has_dropout: bool, precision: str,
) -> Constants:  # fmt: skip
    return constants(
        D=dim, DV=value_dim, BD=padded, BDV=value_padded, BM=tile.BM, BN=tile.BN, HAS_LEFT=has_left,
        HAS_RIGHT=has_right, HAS_SOFTCAP=has_softcap, HAS_DROPOUT=has_dropout, PRECISION=precision,
        **tiles.launch_options(tile),
    )  # fmt: skip


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: TF32 only where torch allows it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


@cache
def target(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory a block may use; those of an H100 where there is no GPU (the
    interpreter)."""
    if device.type != "cuda":
        return (9, 0), tiles.LARGE
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin


def interpreted() -> bool:
    """Whether the kernels of this process run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def rotated(problem: Problem) -> tuple[Tensor, Tensor]:
    """Query and key after rotation, in one launch; themselves without rotary.

    Rotating first costs one pass over q and k.  Rotating keys inside the attention loop would repeat that work for
    every tile of queries.
    """
    if problem.query_cos is None:
        return problem.query, problem.key
    tables = (problem.query_cos, problem.query_sin, problem.key_cos, problem.key_sin)
    offset = problem.query_offset if problem.query_offsets is None else problem.query_offsets
    return rotate(problem.query, problem.key, tables, interleaved=problem.interleaved, query_offset=offset)  # type: ignore[arg-type]


def attention_forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, Hq, Sq, Dv) in the query's dtype, lse (B, Hq, Sq) float32, and (B, Hq, Sq, 2) float32: each row's
    largest score and the logarithm of its denominator relative to that, both to base 2, for the backward."""
    call = Call(problem, *rotated(problem), problem.value)
    batch, heads, length, _ = problem.query.shape
    out = empty_like_layout(problem.query, (batch, heads, length, call.value_dim))
    lse = problem.query.new_empty((batch, heads, length), dtype=torch.float32)
    statistics = lse.new_empty((batch, heads, length, 2))
    tile = call.tile("forward")
    num_tiles = tiles.cdiv(length, tile.BM)
    if num_tiles * batch * heads:
        arguments = (
            operand(call.q), operand(call.k), operand(call.v), operand(out), lse, statistics,
            with_spans(call.mask, problem), call.bias, call.extra, call.interval, call.numbers,
        )  # fmt: skip
        launch(
            attention_forward_kernel, num_tiles * batch * heads, arguments, call.constants(tile),
            HEADS=heads, GROUP=call.group, TILES=num_tiles,
        )  # fmt: skip
    return out, lse, statistics

"""Host side of the attention kernels: allocate, choose tiles, launch."""

from __future__ import annotations

import os

import torch
import triton
from torch import Tensor

from fastattn.problem import Problem

from . import tiles
from .attention_forward import attention_forward_kernel
from .features import Features, operand
from .layout import dense, empty_like_layout
from .rotary import rotate


class Call(Features):
    """An attention problem in the form the kernels take: shared by the forward and all backward launches."""

    def __init__(self, problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> None:
        super().__init__(problem)
        self.q, self.k, self.v = dense(query), dense(key), dense(value)
        self.dim, self.value_dim = problem.query.shape[3], problem.value.shape[3]
        self.padded = max(16, triton.next_power_of_2(self.dim)), max(16, triton.next_power_of_2(self.value_dim))
        self.group = problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1
        self.flags = {
            **self.window_flags,
            "HAS_SOFTCAP": problem.softcap != 0,
            "HAS_DROPOUT": problem.dropout_p > 0,
            "PRECISION": precision(problem.query.dtype),
        }

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(kernel, max(self.padded), self.q.element_size(), shared_memory(self.q.device))

    def constants(self, tile: tiles.Tile) -> dict[str, object]:
        """Compile-time arguments and launch options of a kernel with this tile."""
        return {
            "D": self.dim,
            "DV": self.value_dim,
            "BD": self.padded[0],
            "BDV": self.padded[1],
            "BM": tile.BM,
            "BN": tile.BN,
            **self.flags,
            **launch_options(tile),
        }


def launch_options(tile: tiles.Tile) -> dict[str, object]:
    # enable_fp_fusion is pinned: its default changes between Triton versions, and results and registers with it.
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: TF32 only where torch allows it."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a block may use; the largest where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return tiles.LARGE
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


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
    num_tiles = triton.cdiv(length, tile.BM)
    if num_tiles * batch * heads:
        attention_forward_kernel[(num_tiles * batch * heads,)](
            operand(call.q), operand(call.k), operand(call.v), operand(out), lse, statistics,
            call.mask, call.bias, call.extra, call.interval, call.numbers,
            HEADS=heads, GROUP=call.group, TILES=num_tiles,
            **call.constants(tile),
        )  # fmt: skip
    return out, lse, statistics

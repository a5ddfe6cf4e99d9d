"""Host side of the attention backward: which kernels a set of wanted gradients needs, and the small sums after them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.problem import GRADIENT_FIELDS, Problem

from .attention import Call, rotated
from .attention_backward import attention_backward_kv_kernel, attention_backward_q_kernel, attention_delta_kernel
from .bias_gradient import dense_bias_gradient_kernel, table_gradient_kernel
from .content_tables import table_gradient_fold_kernel
from .features import operand
from .launcher import constants, launch
from .layout import dense, empty_like_layout
from .rotary import rotate
from .spans import with_spans
from .tiles import Tile, cdiv, launch_options

# Programs the table kernel aims for: enough for every GPU of today; each costs one tile of float32.
_TABLE_PROGRAMS = 1024
# Rows (keys) and columns of a program that folds the gradient of a row (column) table.
_FOLD = 32


def attention_backward(
    problem: Problem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the fields named in `needs`.

    Args:
        grad_out: (B, Hq, Sq, Dv).
        grad_lse: (B, Hq, Sq) or None.
        out, statistics: what the forward returned.
    """
    call = Call(problem, *rotated(problem), problem.value)
    grad_out = dense(grad_out)
    batch, heads, length, _ = problem.query.shape
    grads = {name: _empty_gradient(problem, name) for name in GRADIENT_FIELDS if name in needs}
    if not (batch * heads * length):
        return {name: grad.zero_() for name, grad in grads.items()}

    delta = statistics.new_empty((batch, heads, length))
    tile = call.tile("backward_q")
    num_tiles = cdiv(length, tile.BM)
    partial_sink = delta.new_empty(batch, heads, num_tiles) if "sink" in needs else None
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    launch(
        attention_delta_kernel, num_tiles * batch * heads,
        (operand(dense(out)), operand(grad_out), statistics, grad_lse, delta, call.extra, partial_sink),
        constants(DV=call.value_dim, BM=tile.BM, BDV=call.padded[1], **launch_options(tile)),
        HEADS=heads, TILES=num_tiles, query_length=length,
    )  # fmt: skip
    if partial_sink is not None:
        grads["sink"] = reduce_batch(partial_sink.sum(-1), problem.sink)
    tensors = (operand(call.q), operand(call.k), operand(call.v), operand(grad_out))
    for_keys = bool(needs & {"key", "value", "col_table"})
    for_queries = bool(needs & {"query", "slopes", "table", "row_table"})
    mask = with_spans(call.mask, problem, of_queries=for_queries or "dense_bias" in needs, of_keys=for_keys)
    features = (mask, call.bias, call.extra, call.interval, call.numbers)

    if for_keys:
        _launch_kv(call, tensors, features, statistics, delta, grads)
    if for_queries:
        _launch_q(call, tensors, features, statistics, delta, grads)
    if "dense_bias" in needs:
        _launch_dense_bias(call, tensors, features, statistics, delta, grads["dense_bias"])
    if "table" in needs:
        grads["table"] = grads["table"] + _table_interior(call, tensors, features, statistics, delta)
    if problem.query_cos is not None:
        _unrotate(problem, grads)
    return grads


def _unrotate(problem: Problem, grads: dict[str, Tensor]) -> None:
    """Turn the gradients of the rotated query and key into those of query and key, in place."""
    tables = (problem.query_cos, problem.query_sin, problem.key_cos, problem.key_sin)
    offset = problem.query_offset if problem.query_offsets is None else problem.query_offsets
    # one of them may not be wanted: an empty stand-in has nothing to rotate
    dq = grads.get("query", problem.query[:, :, :0])
    dk = grads.get("key", problem.key[:, :, :0])
    rotate(
        dq, dk, tables, interleaved=problem.interleaved, query_offset=offset, conjugate=True, out=(dq, dk)  # type: ignore[arg-type]
    )  # fmt: skip


def _empty_gradient(problem: Problem, name: str) -> Tensor:
    like: Tensor = getattr(problem, name)
    if name in ("query", "key", "value"):
        return empty_like_layout(like, tuple(like.shape))
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def reduce_batch(grad: Tensor, like: Tensor | None) -> Tensor:
    """A per-batch gradient summed over the batch where the parameter has none."""
    assert like is not None
    return grad.sum(0, keepdim=True) if like.shape[0] == 1 and grad.shape[0] != 1 else grad


def _launch_kv(
    call: Call, tensors: tuple, features: tuple, statistics: Tensor, delta: Tensor, grads: dict[str, Tensor]
) -> None:
    problem = call.problem
    tile = call.tile("backward_kv")
    num_tiles = cdiv(problem.key_length, tile.BN)
    # one loop makes both, so a gradient that is not wanted still needs a place to go
    dk = grads.get("key")
    dv = grads.get("value")
    dk = _empty_gradient(problem, "key") if dk is None else dk
    dv = _empty_gradient(problem, "value") if dv is None else dv
    if not num_tiles:
        return
    wide = _wide_gradient(problem, grads, "col_table", (problem.column_entries, problem.key_length))
    launch(
        attention_backward_kv_kernel, num_tiles * problem.batch_size * problem.num_kv_heads,
        (*tensors, operand(dk), operand(dv), statistics, delta, wide, *features), call.constants(tile),
        HEADS=problem.num_heads, GROUP=call.group, TILES=num_tiles,
    )  # fmt: skip
    if wide is not None:
        _fold(problem, wide, grads["col_table"])


def _launch_q(
    call: Call, tensors: tuple, features: tuple, statistics: Tensor, delta: Tensor, grads: dict[str, Tensor]
) -> None:
    problem = call.problem
    batch, heads, length, _ = problem.query.shape
    tile = call.tile("backward_q")
    num_tiles = cdiv(length, tile.BM)
    partial_slopes = delta.new_empty(batch, heads, num_tiles) if "slopes" in grads else None
    partial_ends = delta.new_empty(batch, heads, num_tiles, 2) if "table" in grads else None
    dq = grads.get("query")
    dq = _empty_gradient(problem, "query") if dq is None else dq
    wide = _wide_gradient(problem, grads, "row_table", (length, problem.column_entries))
    launch(
        attention_backward_q_kernel, num_tiles * batch * heads,
        (*tensors, operand(dq), statistics, delta, partial_slopes, partial_ends, wide, *features), call.constants(tile),
        HEADS=heads, GROUP=call.group, TILES=num_tiles,
    )  # fmt: skip
    if wide is not None:
        _fold(problem, wide.mT, grads["row_table"].mT)
    if partial_slopes is not None:
        grads["slopes"] = reduce_batch(partial_slopes.sum(-1), problem.slopes)
    if partial_ends is not None:
        ends = reduce_batch(partial_ends.sum(2), problem.table)
        table = grads["table"].zero_()
        # a table of one entry has both ends in it
        table[..., 0] += ends[..., 0]
        table[..., -1] += ends[..., 1]


def _wide_gradient(
    problem: Problem, grads: dict[str, Tensor], name: str, size: tuple[int, int]
) -> Tensor | None:  # fmt: skip
    """Zeros for the gradient of a row or column table by query head and distance, (B, Hq, *size): the gradient itself
    where that is what it is by."""
    if name not in grads:
        return None
    grad = grads[name]
    shape = (problem.batch_size, problem.num_heads, *size)
    return grad.zero_() if grad.shape == shape and problem.columns is None else grad.new_zeros(shape)


def _fold(problem: Problem, wide: Tensor, grad: Tensor) -> None:
    """grad (B, H, C, X) as the sum of wide (B, Hq, T, X) over the entries of a column and the heads of a group."""
    if wide.data_ptr() == grad.data_ptr() or not grad.numel():
        return
    heads, columns, length = grad.shape[1:]
    begin = None
    if problem.columns is not None:
        wanted = torch.arange(columns + 1, dtype=torch.int32, device=grad.device)
        begin = torch.searchsorted(problem.columns, wanted, out_int32=True)
    tiles_c, tiles_x = cdiv(columns, _FOLD), cdiv(length, _FOLD)
    launch(
        table_gradient_fold_kernel, tiles_c * tiles_x * problem.batch_size * heads, (wide, grad, begin),
        constants(BX=_FOLD, BC=_FOLD, num_warps=4),
        GROUP=problem.num_heads // heads, ENTRIES=wide.shape[2], COLUMNS=columns, LENGTH=length,
        TILES_C=tiles_c, TILES_X=tiles_x,
        wide_st=wide.stride(2), wide_sx=wide.stride(3), grad_sc=grad.stride(2), grad_sx=grad.stride(3),
    )  # fmt: skip


def _launch_dense_bias(call: Call, tensors: tuple, features: tuple, lse: Tensor, delta: Tensor, grad: Tensor) -> None:
    tile = call.tile("bias_gradient")
    programs, where, ones = dense_bias_grid(call.problem, grad, tile)
    if programs:
        launch(
            dense_bias_gradient_kernel, programs, (*tensors, lse, delta, grad, *features),
            constants(**call.constants(tile).values, **ones),
            HEADS=call.problem.num_heads, GROUP=call.group, **where,
        )  # fmt: skip


def dense_bias_grid(problem: Problem, grad: Tensor, tile: Tile) -> tuple[int, dict[str, int], dict[str, bool]]:
    """Programs that own the tiles of a dense bias's gradient, what tells them which score tiles to sum, and which of
    the gradient's two lengths are 1, known at compile time."""
    batch, heads, length, _ = problem.query.shape
    tiles_m, tiles_n = cdiv(length, tile.BM), cdiv(problem.key_length, tile.BN)
    grad_b, grad_h, rows, cols = grad.shape
    # a length of 1 is the same whether it broadcasts or not
    grad_m = 1 if rows == 1 else tiles_m
    grad_n = 1 if cols == 1 else tiles_n
    where = {
        "GRAD_B": grad_b,
        "GRAD_H": grad_h,
        "GRAD_M": grad_m,
        "GRAD_N": grad_n,
        "SUM_B": 1 if grad_b == batch else batch,
        "SUM_H": 1 if grad_h == heads else heads,
        "SUM_M": tiles_m if rows == 1 else 1,
        "SUM_N": tiles_n if cols == 1 else 1,
    }
    ones = {"ONE_ROW": rows == 1, "ONE_COL": cols == 1}
    return (grad_b * grad_h * grad_m * grad_n if grad.numel() else 0), where, ones


def _table_interior(call: Call, tensors: tuple, features: tuple, lse: Tensor, delta: Tensor) -> Tensor | float:
    tile = call.tile("bias_gradient")
    assert tile.BM == tile.BN, "a block diagonal needs square tiles"

    def run(programs: int, partial: Tensor, where: dict[str, int]) -> None:
        launch(
            table_gradient_kernel, programs, (*tensors, lse, delta, partial, *features), call.constants(tile),
            HEADS=call.problem.num_heads, GROUP=call.group, **where,
        )  # fmt: skip

    return table_interior(call.problem, tile.BM, run)


def table_interior(problem: Problem, size: int, run: Callable[[int, Tensor, dict[str, int]], None]) -> Tensor | float:
    """Gradient of the table's entries between its two ends, zero at the ends; broadcasts to the table's shape.

    Args:
        size: rows and columns of a score tile.
        run: given a number of programs and where they are, adds up the dS tiles of each program's block diagonal in
            its (size, size) part of a tensor.
    """
    assert problem.table is not None
    batch, heads, length, _ = problem.query.shape
    columns = problem.table.shape[-1]
    left, right = problem.table_left, columns - 1 - problem.table_left
    tiles_m, tiles_n = cdiv(length, size), cdiv(problem.key_length, size)
    first, last = -(tiles_m - 1), tiles_n - 1
    if problem.query_offsets is None:
        # only diagonals with a distance strictly between the ends: |distance - size * diagonal + offset| < size
        offset = problem.query_offset
        first = max(first, -((left + size - 1 - offset) // size))
        last = min(last, (right + size - 1 + offset) // size)
    if columns <= 2 or last < first:
        return 0.0
    diagonals = last - first + 1
    # batches whose distances or tables differ are kept apart
    apart = batch if problem.query_offsets is not None or problem.table.shape[0] > 1 else 1
    splits = max(1, min(_TABLE_PROGRAMS // (diagonals * heads * apart), min(tiles_m, tiles_n)))
    partial = torch.empty(
        (apart, heads, diagonals, splits, size, size), dtype=torch.float32, device=problem.query.device
    )
    where = {
        "FIRST_DIAGONAL": first,
        "DIAGONALS": diagonals,
        "SPLITS": splits,
        "SUM_B": batch // apart,
        "TILES_M": tiles_m,
        "TILES_N": tiles_n,
    }
    run(apart * heads * diagonals * splits, partial, where)
    sums = _join_diagonals(_diagonal_sums(partial.sum(3)))
    # sums[..., x] belongs to j - i = size * first - (size - 1) + x, and table column c to j - i = c - left + offset
    position = problem.query_offset if problem.query_offsets is None else problem.query_offsets[:, None]
    index = torch.arange(columns, device=sums.device) - left + position - (size * first - (size - 1))
    index = index.expand(apart, columns) if index.dim() == 1 else index.expand(apart, -1)
    inside = (index >= 0) & (index < sums.shape[-1])
    inside[:, 0] = False
    inside[:, -1] = False
    index = index.clamp(0, sums.shape[-1] - 1)[:, None].expand(-1, heads, -1)
    grad = sums.gather(-1, index) * inside[:, None]
    return reduce_batch(grad, problem.table)


def _diagonal_sums(tiles: Tensor) -> Tensor:
    """Sums along the diagonals of square tiles (..., n, n): (..., 2n - 1), entry x for column - row = x - (n - 1)."""
    n = tiles.shape[-1]
    # Upside down, padded to width 2n and read back with width 2n - 1, row r is shifted right by r.
    padded = torch.nn.functional.pad(tiles.flip(-2), (0, n)).flatten(-2)
    return padded[..., : n * (2 * n - 1)].unflatten(-1, (n, 2 * n - 1)).sum(-2)


def _join_diagonals(sums: Tensor) -> Tensor:
    """Per-block-diagonal sums (B, H, K, 2n - 1), each starting n after the one before it, added into one row
    (B, H, (K + 1) n)."""
    n = (sums.shape[-1] + 1) // 2
    pad = torch.nn.functional.pad
    low, high = sums[..., :n], pad(sums[..., n:], (0, 1))
    return (pad(low, (0, 0, 0, 1)) + pad(high, (0, 0, 1, 0))).flatten(-2)

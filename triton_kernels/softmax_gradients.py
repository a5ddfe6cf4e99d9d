"""Gradients of the masked softmax: of its scores, and of the parameters of its biases.

The kernels of the dense bias and of the distance table are those of attention with another way to a tile of dS: here it
is read off the output and its gradient instead of being recomputed from queries and keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattn.softmax_problem import SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

from .attention_gradients import dense_bias_grid, reduce_batch, table_interior
from .bias_gradient import any_visible, store_bias_tile
from .features import operand
from .launcher import constants, launch
from .layout import dense
from .masked_softmax import Rows, softmax_backward_kernel
from .tiles import Tile, launch_options

# Square, as a block diagonal needs it; each warp reads 128 consecutive bytes of float32.
TILE = Tile(32, 32, 4, 1)


@triton.jit
def _score_gradient(b, h, m0, n0, y, dy, p_delta, numbers, HEADS, BM: tl.constexpr, BN: tl.constexpr):
    """dS of the tile at rows m0 ... and columns n0 ..., zero where masked: [BM, BN] float32."""
    i = m0 + tl.arange(0, BM)
    j = n0 + tl.arange(0, BN)
    row = i.to(tl.int64)[:, None]
    inside = (i < numbers.query_length)[:, None] & (j < numbers.key_length)[None, :]
    b_y = tl.load(y.ptr + b * y.sb + h * y.sh + row * y.si + j[None, :], mask=inside, other=0.0).to(tl.float32)
    b_dy = tl.load(dy.ptr + b * dy.sb + h * dy.sh + row * dy.si + j[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (b * HEADS + h) * numbers.query_length + i
    delta = tl.load(p_delta + at, mask=i < numbers.query_length, other=0.0)
    return tl.where(b_y == 0, 0.0, b_y * (b_dy - delta[:, None]))


@triton.jit
def softmax_bias_gradient_kernel(
    y, dy, p_delta, p_grad, interval, numbers, HEADS, GRAD_B, GRAD_H, GRAD_M, GRAD_N, SUM_B, SUM_H, SUM_M, SUM_N,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    ONE_ROW: tl.constexpr, ONE_COL: tl.constexpr,
):  # fmt: skip
    """The twin of `dense_bias_gradient_kernel`."""
    pid = tl.program_id(0)
    i_n = pid % GRAD_N
    i_m = (pid // GRAD_N) % GRAD_M
    i_h = (pid // (GRAD_N * GRAD_M)) % GRAD_H
    i_b = pid // (GRAD_N * GRAD_M * GRAD_H)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r in range(SUM_B * SUM_H * SUM_M * SUM_N):
        n0 = (i_n + r % SUM_N) * BN
        m0 = (i_m + (r // SUM_N) % SUM_M) * BM
        h = tl.cast(i_h + (r // (SUM_N * SUM_M)) % SUM_H, tl.int64)
        b = tl.cast(i_b + r // (SUM_N * SUM_M * SUM_H), tl.int64)
        if any_visible(b, 0, m0, n0, None, interval, numbers, BM, BN, HAS_LEFT, HAS_RIGHT):
            acc += _score_gradient(b, h, m0, n0, y, dy, p_delta, numbers, HEADS, BM, BN)
    store_bias_tile(p_grad, acc, i_b * GRAD_H + i_h, i_m, i_n, numbers, BM, BN, ONE_ROW, ONE_COL)


@triton.jit
def softmax_table_gradient_kernel(
    y, dy, p_delta, p_partial, interval, numbers, HEADS, FIRST_DIAGONAL, DIAGONALS, SPLITS, SUM_B, TILES_M, TILES_N,
    BM: tl.constexpr, BN: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """The twin of `table_gradient_kernel`."""
    pid = tl.program_id(0)
    i_s = pid % SPLITS
    i_k = (pid // SPLITS) % DIAGONALS
    h = ((pid // (SPLITS * DIAGONALS)) % HEADS).to(tl.int64)
    i_b = pid // (SPLITS * DIAGONALS * HEADS)
    diagonal = FIRST_DIAGONAL + i_k
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for r in range(SUM_B):
        b = tl.cast(i_b + r, tl.int64)
        for i_m in range(tl.maximum(0, -diagonal) + i_s, tl.minimum(TILES_M, TILES_N - diagonal), SPLITS):
            m0 = i_m * BM
            n0 = (i_m + diagonal) * BN
            if any_visible(b, 0, m0, n0, None, interval, numbers, BM, BN, HAS_LEFT, HAS_RIGHT):
                acc += _score_gradient(b, h, m0, n0, y, dy, p_delta, numbers, HEADS, BM, BN)
    p_tile = p_partial + pid.to(tl.int64) * (BM * BN)
    tl.store(p_tile + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


def softmax_backward(problem: SoftmaxProblem, grad_out: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """Gradients of the fields named in `needs`.

    Args:
        problem: with the forward's output in place of the scores.
        grad_out: (B, H, Sq, Sk).
    """
    out, grad_out = dense(problem.scores), dense(grad_out)
    grads = {
        name: getattr(problem, name).new_empty(getattr(problem, name).shape)
        for name in SOFTMAX_GRADIENT_FIELDS
        if name in needs
    }
    if not out.numel():
        return {name: grad.zero_() for name, grad in grads.items()}
    rows = Rows(problem)
    batch, heads, length, _ = out.shape

    def partial(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=out.device)

    delta = partial(batch, heads, length) if needs & {"table", "dense_bias"} else None
    slope_parts = partial(batch, heads, rows.tiles) if "slopes" in needs else None
    end_parts = partial(batch, heads, rows.tiles, 2) if "table" in needs else None
    arguments = (
        operand(out), operand(grad_out), operand(grads["scores"]) if "scores" in needs else None,
        delta, slope_parts, end_parts, rows.interval, rows.numbers,
    )  # fmt: skip
    launch(softmax_backward_kernel, rows.programs, arguments, rows.constants, HEADS=heads, TILES=rows.tiles)
    if slope_parts is not None:
        grads["slopes"] = reduce_batch(slope_parts.sum(-1), problem.slopes)
    tile_arguments = (operand(out), operand(grad_out), delta)
    has_left, has_right = rows.window_flags
    fixed = {"BM": TILE.BM, "BN": TILE.BN, "HAS_LEFT": has_left, "HAS_RIGHT": has_right, **launch_options(TILE)}
    if "dense_bias" in needs:
        grad = grads["dense_bias"]
        programs, where, ones = dense_bias_grid(rows.problem, grad, TILE)
        if programs:
            launch(
                softmax_bias_gradient_kernel, programs, (*tile_arguments, grad, rows.interval, rows.numbers),
                constants(**fixed, **ones), HEADS=heads, **where,
            )  # fmt: skip
    if end_parts is not None:

        def run(programs: int, parts: Tensor, where: dict[str, int]) -> None:
            launch(
                softmax_table_gradient_kernel, programs, (*tile_arguments, parts, rows.interval, rows.numbers),
                constants(**fixed), HEADS=heads, **where,
            )  # fmt: skip

        ends = reduce_batch(end_parts.sum(2), problem.table)
        table = grads["table"].zero_()
        # a table of one entry has both ends in it
        table[..., 0] += ends[..., 0]
        table[..., -1] += ends[..., 1]
        grads["table"] = table + table_interior(rows.problem, TILE.BM, run)
    return grads

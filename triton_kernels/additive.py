"""Host side of additive attention: columns of queries and keys, tiles, launches, and the small sums after them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastattn.additive_problem import ADDITIVE_GRADIENT_FIELDS, AdditiveProblem

from . import tiles
from .additive_backward import (
    additive_backward_kv_kernel,
    additive_backward_q_kernel,
    additive_bias_gradient_kernel,
    additive_table_gradient_kernel,
)
from .additive_forward import additive_forward_kernel
from .additive_scores import Columns
from .attention import precision
from .attention_backward import attention_delta_kernel
from .attention_gradients import dense_bias_grid, reduce_batch, table_interior
from .features import Features, operand
from .layout import dense, empty_like_layout
from .spans import with_spans
from .tiles import launch_options

_LARGEST = torch.finfo(torch.float32).max


class AdditiveCall(Features):
    """A problem in the form the kernels take."""

    def __init__(self, problem: AdditiveProblem, *, forget: bool) -> None:
        """`forget`: for the backward, where a NaN of query or key counts as 0."""
        super().__init__(problem.attention)
        attention = problem.attention
        self.dim, self.value_dim = attention.query.shape[3], attention.value.shape[3]
        self.padded = max(16, triton.next_power_of_2(self.dim)), max(16, triton.next_power_of_2(self.value_dim))
        self.tile = tiles.additive_tile(max(self.padded), attention.query.element_size())
        self.value = dense(attention.value)
        weight = dense(problem.weight.contiguous())
        self.columns = Columns(
            _columns(attention.query, forget), _columns(attention.key, forget), weight,
            weight.stride(0) if weight.shape[0] > 1 else 0,
        )  # fmt: skip
        mask = with_spans(self.mask, attention, of_keys=forget)
        self.features = (mask, self.bias, self.extra, self.interval, self.numbers)
        group = attention.num_heads // attention.num_kv_heads if attention.num_kv_heads else 1
        self.counts = {"HEADS": attention.num_heads, "GROUP": group}
        self.constants = {
            "D": self.dim,
            "DV": self.value_dim,
            "BM": self.tile.BM,
            "BN": self.tile.BN,
            "BDV": self.padded[1],
            "HAS_DROPOUT": attention.dropout_p > 0,
            "PRECISION": _precision(attention.dtype),
            "HAS_LEFT": self.window_flags[0],
            "HAS_RIGHT": self.window_flags[1],
            **launch_options(self.tile),
        }


def _precision(dtype: torch.dtype) -> str:
    """As attention's, but float32 products in three TF32 ones where there are such, which keep the accuracy: unrolled
    multiply-adds spill (thousands of bytes of stack at D = 128)."""
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    return "tf32x3" if exact and torch.version.hip is None else precision(dtype)


def _columns(x: Tensor, forget: bool) -> Tensor:
    """(B, H, S, D) as contiguous float32 (B, H, D, S), infinities as the largest number there is."""
    columns = x.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    columns = columns.clamp(-_LARGEST, _LARGEST).contiguous()
    return columns.nan_to_num_(0.0) if forget else columns


def additive_forward(problem: AdditiveProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Output, lse and statistics, as `attention_forward`."""
    call = AdditiveCall(problem, forget=False)
    query = problem.attention.query
    batch, heads, length, _ = query.shape
    out = empty_like_layout(query, (batch, heads, length, call.value_dim))
    lse = query.new_empty((batch, heads, length), dtype=torch.float32)
    statistics = lse.new_empty((batch, heads, length, 2))
    num_tiles = triton.cdiv(length, call.tile.BM)
    if num_tiles * batch * heads:
        additive_forward_kernel[(num_tiles * batch * heads,)](
            call.columns, operand(call.value), operand(out), lse, statistics, *call.features,
            TILES=num_tiles, **call.counts, **call.constants,
        )  # fmt: skip
    return out, lse, statistics


def additive_backward(
    problem: AdditiveProblem,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    statistics: Tensor,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """Gradients of the fields named in `needs`; the other arguments as in `attention_backward`."""
    attention = problem.attention
    batch, heads, length, _ = attention.query.shape
    grads: dict[str, Tensor] = {}
    for name in ADDITIVE_GRADIENT_FIELDS:
        if name in needs:
            like = problem.weight if name == "weight" else getattr(attention, name)
            operands = name in ("query", "key", "value")
            grads[name] = empty_like_layout(like, tuple(like.shape)) if operands else like.new_empty(like.shape)
    if not (batch * heads * length):
        return {name: grad.zero_() for name, grad in grads.items()}
    call = AdditiveCall(problem, forget=True)
    grad_out = dense(grad_out)
    delta = statistics.new_empty((batch, heads, length))
    num_tiles = triton.cdiv(length, call.tile.BM)
    attention_delta_kernel[(num_tiles * batch * heads,)](
        operand(dense(out)), operand(grad_out), statistics, None if grad_lse is None else grad_lse.contiguous(), delta,
        call.extra, None, HEADS=heads, TILES=num_tiles, query_length=length,
        DV=call.value_dim, BM=call.tile.BM, BDV=call.padded[1], **launch_options(call.tile),
    )  # fmt: skip
    tensors = (call.columns, operand(call.value), operand(grad_out))
    rows = (statistics, delta)
    if needs & {"key", "value"}:
        _launch_kv(call, tensors, rows, grads)
    if needs & {"query", "weight", "slopes", "table"}:
        _launch_q(call, problem, tensors, rows, grads)
    if "dense_bias" in needs:
        programs, where, flags = dense_bias_grid(attention, grads["dense_bias"], call.tile)
        if programs:
            additive_bias_gradient_kernel[(programs,)](
                *tensors, *rows, grads["dense_bias"], *call.features, **call.counts, **where, **flags,
                **call.constants,
            )  # fmt: skip
    if "table" in needs:

        def launch(programs: int, partial: Tensor, where: dict[str, int]) -> None:
            additive_table_gradient_kernel[(programs,)](
                *tensors, *rows, partial, *call.features, **call.counts, **where, **call.constants
            )

        grads["table"] = grads["table"] + table_interior(attention, call.tile.BM, launch)
    return grads


def _launch_kv(call: AdditiveCall, tensors: tuple, rows: tuple, grads: dict[str, Tensor]) -> None:
    problem = call.problem
    num_tiles = triton.cdiv(problem.key_length, call.tile.BN)
    # one loop makes both, so a gradient that is not wanted still needs a place to go
    dk, dv = (
        grads[name] if name in grads else empty_like_layout(like, tuple(like.shape))
        for name, like in (("key", problem.key), ("value", problem.value))
    )
    if num_tiles:
        additive_backward_kv_kernel[(num_tiles * problem.batch_size * problem.num_kv_heads,)](
            *tensors, operand(dk), operand(dv), *rows, *call.features,
            TILES=num_tiles, BD=call.padded[0], **call.counts, **call.constants,
        )  # fmt: skip


def _launch_q(
    call: AdditiveCall, problem: AdditiveProblem, tensors: tuple, rows: tuple, grads: dict[str, Tensor]
) -> None:
    attention, delta = problem.attention, rows[1]
    batch, heads, length, dim = attention.query.shape
    num_tiles = triton.cdiv(length, call.tile.BM)
    partial_weight = delta.new_empty(batch, heads, num_tiles, dim)
    partial_slopes = delta.new_empty(batch, heads, num_tiles) if "slopes" in grads else None
    partial_ends = delta.new_empty(batch, heads, num_tiles, 2) if "table" in grads else None
    dq = grads["query"] if "query" in grads else empty_like_layout(attention.query, tuple(attention.query.shape))
    additive_backward_q_kernel[(num_tiles * batch * heads,)](
        *tensors, operand(dq), *rows, partial_weight, partial_slopes, partial_ends, *call.features,
        TILES=num_tiles, BD=call.padded[0], **call.counts, **call.constants,
    )  # fmt: skip
    if "weight" in grads:
        grads["weight"] = reduce_batch(partial_weight.sum(2), problem.weight)
    if partial_slopes is not None:
        grads["slopes"] = reduce_batch(partial_slopes.sum(-1), attention.slopes)
    if partial_ends is not None:
        ends = reduce_batch(partial_ends.sum(2), attention.table)
        table = grads["table"].zero_()
        # a table of one entry has both ends in it
        table[..., 0] += ends[..., 0]
        table[..., -1] += ends[..., 1]

"""The weights of any lowered call, for eyes: `attention_weights` takes queries, keys and dense masks only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.nn.weights import WeightArguments, attention_weights
from fastattn.problem import Problem


def attend_with_weights(problem: Problem, *, average: bool, leading: int) -> tuple[Tensor, Tensor]:
    """Output (B, H, L, Dv) and weights of a problem, as `problem_weights` gives them: in one pass where a kernel does
    that."""
    out, weights = dispatch.run_with_weights(problem, average=average, leading=leading)
    if weights is None:
        weights = problem_weights(problem, average=average, leading=leading)
    return out, weights


def problem_weights(
    problem: Problem, *, average: bool = False, leading: int = 0, heads: Sequence[int] | None = None
) -> Tensor:
    """The attention weights of a problem without softcap and sink, differentiable.

    Without a kernel for them, structured masks and biases are written out, for the chosen heads, in the size of the
    result.

    Args:
        problem: the call.
        average: over the heads.
        leading: extra keys in front, which the result has last.
        heads: which ones; dropout is left out then, since its draw counts all heads.

    Returns:
        (B, H, L, S), or (B, L, S) with average, in the query's dtype, after dropout.
    """
    if heads is not None:
        problem = replace(_select(problem, heads), dropout_p=0.0, dropout_seed=None)
    weights = dispatch.weights_alone(problem, average=average, leading=leading)
    if weights is not None:
        return weights
    if problem.num_heads != problem.num_kv_heads:
        problem = _select(problem, range(problem.num_heads))
    query, key = problem.query, problem.key
    if problem.query_cos is not None:
        assert problem.query_sin is not None and problem.key_cos is not None and problem.key_sin is not None
        wide = problem.parameter_dtype  # as the kernels do: rotated queries and keys are not rounded
        rows, cols = reference.query_positions(problem), torch.arange(key.shape[2], device=key.device)[None]
        query = reference.rotate(query.to(wide), problem.query_cos, problem.query_sin, rows, problem.interleaved)
        key = reference.rotate(key.to(wide), problem.key_cos, problem.key_sin, cols, problem.interleaved)
    plain_causal = (
        (problem.window_left, problem.window_right) == (-1, 0)
        and problem.query_offsets is None
        and problem.query_offset == leading
    )
    masks = replace(problem, window_right=-1) if plain_causal else problem
    only_dense = all(x is None for x in (problem.slopes, problem.table, problem.row_table, problem.col_table))
    weights = attention_weights(
        WeightArguments(
            query=query,
            key=key,
            dense_mask=reference.visible(masks) if _is_structured(masks) else masks.dense_mask,
            dense_bias=problem.dense_bias if only_dense else reference.bias(problem, problem.parameter_dtype),
            dropout_seed=problem.dropout_seed,
            scale=problem.scale,
            dropout_p=problem.dropout_p,
            causal=plain_causal,
            leading=leading,
            average=average,
        )
    )
    return weights.to(problem.dtype)


def _is_structured(problem: Problem) -> bool:
    return (
        problem.window_left >= 0
        or problem.window_right >= 0
        or any(x is not None for x in (problem.key_lengths, problem.prefix_lengths, problem.query_ids))
    )


def _select(problem: Problem, heads: Sequence[int]) -> Problem:
    """The problem of some query heads, each with a key head of its own."""
    index = torch.tensor(list(heads), dtype=torch.int64, device=problem.device)
    kv_index = index // (problem.num_heads // max(problem.num_kv_heads, 1))

    def chosen(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[1] == 1 else x.index_select(1, index)

    return replace(
        problem,
        query=problem.query.index_select(1, index),
        key=problem.key.index_select(1, kv_index),
        value=problem.value.index_select(1, kv_index),
        slopes=chosen(problem.slopes),
        table=chosen(problem.table),
        dense_mask=chosen(problem.dense_mask),
        dense_bias=chosen(problem.dense_bias),
        row_table=chosen(problem.row_table),
        col_table=None if problem.col_table is None else problem.col_table.index_select(1, kv_index),
    )

"""The functional core of `MultiheadAttention`: check, project, attend, project back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import DenseBias
from fastattn.functional import attention, lower
from fastattn.masks import BoolMask, Causal, Mask
from fastattn.nn.inputs import check_mask_dtype, check_mask_shapes, check_ranks, check_sizes
from fastattn.nn.masks import CallMasks, hint_replaces_mask, lower_masks
from fastattn.nn.projections import count_extra_keys, join_heads, prepend_extra_keys, project, split_heads
from fastattn.nn.weights import WeightArguments, attention_weights

if TYPE_CHECKING:
    from fastattn.nn.multihead_attention import MultiheadAttention


def multi_head_attention(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """`MultiheadAttention.forward` on dense tensors; it documents arguments, results and errors."""
    check_mask_dtype("key_padding_mask", key_padding_mask)
    check_mask_dtype("attn_mask", attn_mask)
    batched = check_ranks(query, key, value, key_padding_mask, attn_mask, module.num_heads)
    layout = {"batched": batched, "batch_first": module.batch_first}
    sizes = check_sizes(
        query, key, value, **layout, embed_dim=module.embed_dim, separate=not module._qkv_same_embed_dim
    )
    extra_keys = count_extra_keys(module)
    causal = hint_replaces_mask(is_causal, attn_mask, key_padding_mask, need_weights)
    check_mask_shapes(key_padding_mask, None if causal else attn_mask, sizes, module.num_heads, extra_keys)

    q, k, v = (split_heads(x, module.num_heads, **layout) for x in project(module, query, key, value))
    if extra_keys:
        k, v = prepend_extra_keys(module, k, v)
    masks = lower_masks(
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        causal=causal,
        sizes=sizes,
        num_heads=module.num_heads,
        extra_keys=extra_keys,
        query_dtype=query.dtype,
    )
    dropout_p = _check_dropout(module.dropout) if module.training else 0.0
    if need_weights:
        out, weights = _attend_with_weights(q, k, v, masks, dropout_p, extra_keys, average_attn_weights)
        weights = weights if batched else weights.squeeze(0)
    else:
        # Extra keys stand in front, so shifting the queries by their number shows them to every query.
        out, weights = attention(q, k, v, **_objects(masks), dropout_p=dropout_p, query_offset=extra_keys), None
    # Called, not read: hooks, parametrizations and replacements of the output projection take part.
    return module.out_proj(join_heads(out, **layout)), weights


def _check_dropout(dropout_p: float) -> float:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    return dropout_p


def _objects(masks: CallMasks) -> dict[str, object]:
    """The masks as keyword arguments of `fastattn.attention`."""
    mask: Mask | None = Causal() if masks.causal else None
    if masks.dense_mask is not None:
        dense = BoolMask(masks.dense_mask)
        mask = dense if mask is None else mask & dense
    return {"mask": mask, "bias": None if masks.dense_bias is None else DenseBias(masks.dense_bias)}


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, masks: CallMasks, dropout_p: float, extra_keys: int, average: bool
) -> tuple[Tensor, Tensor]:
    """The output (N, H, L, D) and the weights (N, L, S) or (N, H, L, S) of one and the same call."""
    problem = lower(q, k, v, **_objects(masks), dropout_p=dropout_p, query_offset=extra_keys)  # type: ignore[arg-type]
    out, _ = dispatch.run(problem, None)
    weights = attention_weights(
        WeightArguments(
            query=problem.query,
            key=problem.key,
            dense_mask=problem.dense_mask,
            dense_bias=problem.dense_bias,
            dropout_seed=problem.dropout_seed,
            scale=problem.scale,
            dropout_p=problem.dropout_p,
            causal=masks.causal,
            leading=extra_keys,
            average=average,
        )
    )
    if dropout_p == 1.0:  # lowered without dropout: everything is dropped
        return torch.zeros_like(out), torch.zeros_like(weights)
    return out, weights

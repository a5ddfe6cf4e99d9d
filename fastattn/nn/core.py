"""The functional core of `MultiheadAttention`: check, project, attend, project back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import DenseBias
from fastattn.masks import BoolMask, Causal, Mask
from fastattn.nn.cache import KVCache, MemoryCache
from fastattn.nn.inputs import check_mask_dtype, check_mask_shapes, check_ranks, check_sizes
from fastattn.nn.masks import CallMasks, hint_replaces_mask, lower_masks
from fastattn.nn.position import Encoding, Encodings, encode, encode_packed, own_position
from fastattn.nn.projections import (
    count_extra_keys,
    join_heads,
    prepend_extra_keys,
    project_heads,
    project_query,
)
from fastattn.nn.readout import attend_with_weights, problem_weights
from fastattn.nn.recording import record, watchers
from fastattn.problem import Problem
from fastattn.validation import describe, fail

if TYPE_CHECKING:
    from fastattn.nn.multihead_attention import MultiheadAttention
    from fastattn.nn.padding import Packed


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
    position: Encodings | None = None,
    cache: KVCache | MemoryCache | None = None,
    packed: Packed | None = None,
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
    own = own_position(module)
    if position is not None and own is not None:
        fail(ValueError, "position", "None for a module that has its own", describe(position))
    position = own if position is None else position
    _check_extra_keys(extra_keys, position, cache)

    heads = module.num_heads
    first: int = 0
    offset: int | None = extra_keys  # in front, so shifting the queries by their number shows them to every query
    if isinstance(cache, KVCache):
        q, k, v = project_heads(module, query, key, value, layout)
        padding = _cached_padding(attn_mask, key_padding_mask, batched)
        k, v, first, padding = cache.append(k, v, padding)
        objects: dict[str, Any] = {"mask": _hide(cache.mask(), padding), "bias": None}
        offset = None  # the last query is the last key
    else:
        if cache is None:
            q, k, v = project_heads(module, query, key, value, layout)
        else:
            q, k, v = _project_memory(module, query, key, value, layout, cache)
        if extra_keys:
            k, v = prepend_extra_keys(module, k, v)
        masks = lower_masks(
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            causal=causal,
            sizes=sizes,
            num_heads=heads,
            extra_keys=extra_keys,
            query_dtype=query.dtype,
        )
        objects = _objects(masks)
    if packed is None:
        encoding = encode(position, k.shape[2], first)  # type: ignore[arg-type]
    else:
        objects["mask"] = packed.mask if objects["mask"] is None else objects["mask"] & packed.mask
        if packed.as_documents:
            encoding = encode_packed(position, packed)  # type: ignore[arg-type]
        else:
            encoding = encode(position, packed.length)  # type: ignore[arg-type]
            q, k, v = packed.unpack_heads(q), packed.unpack_heads(k), packed.unpack_heads(v)
    dropout_p = _check_dropout(module.dropout) if module.training else 0.0
    call = {**objects, "dropout_p": dropout_p, "query_offset": offset}
    seen = watchers(module)
    if need_weights or seen:
        average = average_attn_weights if need_weights else None
        out, weights, problem = _attend_and_keep(encoding, q, k, v, call, average, extra_keys)
    else:
        out, weights, problem = encoding.run(q, k, v, **call), None, None
    if packed is not None and not packed.as_documents:
        out = packed.pack_heads(out)
    if weights is not None and not batched:
        weights = weights.squeeze(0)
    for watcher in seen:
        record(watcher, module, problem, extra_keys)
    # Unless autograd keeps them, the output projection can have their memory.
    del q, k, v, problem
    # Called, not read: hooks, parametrizations and replacements of the output projection take part.
    return module.out_proj(join_heads(out, **layout)), weights


def _check_extra_keys(extra_keys: int, position: object, cache: object) -> None:
    for name, x in (("position", position), ("cache", cache)):
        if extra_keys and x is not None:
            fail(ValueError, name, "None with add_bias_kv or add_zero_attn, whose keys have no position", describe(x))


def _project_memory(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, layout: dict[str, bool], cache: MemoryCache
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of this step, and the keys and values of the memory, projected once."""
    if not cache.holds(key, value):
        _, k, v = project_heads(module, query, key, value, layout)
        cache.fill((key, value), k, v)
    assert cache.key is not None
    assert cache.value is not None
    return project_query(module, query, layout), cache.key, cache.value


def _cached_padding(attn_mask: Tensor | None, key_padding_mask: Tensor | None, batched: bool) -> Tensor | None:
    """The padding of the new tokens, (N, n), for the cache to keep."""
    if attn_mask is not None:
        fail(ValueError, "attn_mask", "None with a cache, which is causal", describe(attn_mask))
    if key_padding_mask is None:
        return None
    if key_padding_mask.dtype != torch.bool:
        fail(TypeError, "key_padding_mask", "bool with a cache, for the new tokens", describe(key_padding_mask))
    return key_padding_mask if batched else key_padding_mask[None]


def _hide(mask: Mask, padding: Tensor | None) -> Mask:
    return mask if padding is None else mask & BoolMask(~padding[:, None, None])


def _check_dropout(dropout_p: float) -> float:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout_p}")
    return dropout_p


def _objects(masks: CallMasks) -> dict[str, Any]:
    """The masks as keyword arguments of `fastattn.attention`."""
    mask: Mask | None = Causal() if masks.causal else None
    if masks.dense_mask is not None:
        dense = BoolMask(masks.dense_mask)
        mask = dense if mask is None else mask & dense
    return {"mask": mask, "bias": None if masks.dense_bias is None else DenseBias(masks.dense_bias)}


def _attend_and_keep(
    encoding: Encoding, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any], average: bool | None, extra_keys: int
) -> tuple[Tensor, Tensor | None, Problem]:
    """The output (N, H, L, D), the weights unless `average` is None, and the lowered call that they are of."""
    weights: Tensor | None = None
    if encoding.operator is not None:  # draws its own dropout: the weights are those before it
        out, problem = encoding.run(q, k, v, **call), encoding.lower(q, k, v, **{**call, "dropout_p": 0.0})
        if average is not None:
            weights = problem_weights(problem, average=average, leading=extra_keys)
    else:
        problem = encoding.lower(q, k, v, **call)
        if average is not None:
            out, weights = attend_with_weights(problem, average=average, leading=extra_keys)
        else:
            out, _ = dispatch.run(problem, None, with_lse=False)
    if call["dropout_p"] == 1.0:  # lowered without dropout: everything is dropped
        out = torch.zeros_like(out)
        weights = None if weights is None else torch.zeros_like(weights)
    return out, weights, problem

"""The projections around attention: x -> heads, extra keys, heads -> output layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.validation import as_dtype

if TYPE_CHECKING:
    from fastattn.nn.multihead_attention import MultiheadAttention


def key_heads(module: MultiheadAttention) -> int:
    """The number of key and value heads; a replaced module of torch has as many as query heads."""
    return getattr(module, "num_kv_heads", None) or module.num_heads


def project_heads(
    module: MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, layout: dict[str, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The in-projections, split into heads: (N, H, L, D), (N, Hk, S, D) and (N, Hk, S, Dv).

    One product where inputs are the same object, as in torch: all three for self-attention, key and value for
    attention over a memory.  The results may be slices of one packed tensor.

    Raises:
        AssertionError: separate weights whose shapes do not fit the inputs.
    """
    bias, heads, kv_heads = _bias(module, query), module.num_heads, key_heads(module)
    dim = module.embed_dim // heads
    if module._qkv_same_embed_dim:
        weight = _packed_weight(module)
        if query is key and key is value:
            q, k, v = split_heads(F.linear(query, weight, bias), (heads, kv_heads, kv_heads), **layout)
            return q, k, v
        rows = (dim * heads, 2 * dim * kv_heads)
        if key is value:
            query_weight, memory_weight = weight.split(rows)
            query_bias, memory_bias = (None, None) if bias is None else bias.split(rows)
            (q,) = split_heads(F.linear(query, query_weight, query_bias), (heads,), **layout)
            k, v = split_heads(F.linear(key, memory_weight, memory_bias), (kv_heads, kv_heads), **layout)
            return q, k, v
    rows = (dim * heads, dim * kv_heads, dim * kv_heads)
    if module._qkv_same_embed_dim:
        weights = weight.split(rows)
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        for name, x, w, size in zip(("query", "key", "value"), (query, key, value), weights, rows, strict=True):
            if w is None:
                raise AssertionError(f"use_separate_proj_weight is True but {name[0]}_proj_weight is None")
            expected = (size, x.shape[-1])
            if w.shape != expected:
                raise AssertionError(f"expecting {name} weights shape of {expected}, but got {w.shape}")
    biases = (None, None, None) if bias is None else bias.split(rows)
    q, k, v = (
        split_heads(F.linear(x, w, b), (size // dim,), **layout)[0]
        for x, w, b, size in zip((query, key, value), weights, biases, rows, strict=True)
    )
    return q, k, v


def project_query(module: MultiheadAttention, query: Tensor, layout: dict[str, bool]) -> Tensor:
    """The first of the in-projections alone."""
    weight = _packed_weight(module)[: module.embed_dim] if module._qkv_same_embed_dim else module.q_proj_weight
    bias = _bias(module, query)
    projected = F.linear(query, weight, None if bias is None else bias[: module.embed_dim])
    return split_heads(projected, (module.num_heads,), **layout)[0]


def _packed_weight(module: MultiheadAttention) -> Tensor:
    if module.in_proj_weight is None:
        raise AssertionError("use_separate_proj_weight is False but in_proj_weight is None")
    return module.in_proj_weight


def _bias(module: MultiheadAttention, query: Tensor) -> Tensor | None:
    bias = module.in_proj_bias
    # models that keep biases in another precision work in torch too
    return None if bias is None else as_dtype(bias, query.dtype)


def split_heads(x: Tensor, parts: tuple[int, ...], *, batched: bool, batch_first: bool) -> list[Tensor]:
    """A projected (N, L, E), (L, N, E) or (L, E) tensor with so many heads of each part, as views (N, H, L, D)."""
    count = sum(parts)
    packed = x.view(*x.shape[:-1], count, x.shape[-1] // count)
    heads = packed.split_with_sizes(parts, -2) if len(parts) > 1 else (packed,)
    if not batched:
        return [h.unsqueeze(0).transpose(1, 2) for h in heads]
    return [h.transpose(1, 2) if batch_first else h.permute(1, 2, 0, 3) for h in heads]


def join_heads(x: Tensor, *, batched: bool, batch_first: bool) -> Tensor:
    """The inverse of `split_heads`; the result is contiguous."""
    if not batched:
        return x.squeeze(0).transpose(0, 1).flatten(-2)
    return x.transpose(1, 2).flatten(-2) if batch_first else x.permute(2, 0, 1, 3).flatten(-2)


def count_extra_keys(module: MultiheadAttention) -> int:
    """How many keys the module adds to the caller's.

    Raises:
        AssertionError: only one of bias_k and bias_v.
    """
    if (module.bias_k is None) != (module.bias_v is None):
        has, lacks = ("bias_v", "bias_k") if module.bias_k is None else ("bias_k", "bias_v")
        raise AssertionError(f"{has} is set but {lacks} is None")
    return (module.bias_k is not None) + bool(module.add_zero_attn)


def prepend_extra_keys(module: MultiheadAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v (N, H, S, D) with the bias key and the zero key in front.

    torch appends them.  Attention does not care, and in front every query sees them under a causal mask that is
    shifted by their number, without any mask tensor.
    """
    batch, heads, _, dim = k.shape

    def extended(x: Tensor, bias: Tensor | None) -> Tensor:
        parts = [x]
        if module.add_zero_attn:
            parts.insert(0, x.new_zeros((batch, heads, 1, dim)))
        if bias is not None:
            parts.insert(0, bias.view(1, heads, 1, dim).expand(batch, -1, -1, -1).to(x.dtype))
        return torch.cat(parts, dim=2)

    return extended(k, module.bias_k), extended(v, module.bias_v)

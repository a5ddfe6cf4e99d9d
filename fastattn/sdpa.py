"""torch's `scaled_dot_product_attention`, argument for argument, on fastattn's kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.biases import DenseBias
from fastattn.functional import attention
from fastattn.masks import BoolMask, Causal
from fastattn.validation import FLOATING

_CAUSAL = Causal()


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """A drop-in for `torch.nn.functional.scaled_dot_product_attention`: same arguments, shapes and semantics.

    The formula is torch's documented one.  `is_causal` is top-left aligned (query i sees keys j <= i, whatever the
    lengths); dropout is applied whenever dropout_p > 0; a float mask may require a gradient, which is reduced over
    its broadcast dimensions; a query whose keys are all masked gives 0.

    Args:
        query: (N, ..., Hq, L, E) or any rank >= 2.
        key: (N, ..., H, S, E).
        value: (N, ..., H, S, Ev).
        attn_mask: bool (True = may attend) or float32 or query's dtype (added), broadcastable to (N, ..., Hq, L, S).
        dropout_p: probability in [0, 1].
        is_causal: causal mask; not together with attn_mask.
        scale: default 1/sqrt(E).
        enable_gqa: allow Hq to be a multiple of H.

    Returns:
        (N, ..., Hq, L, Ev).

    Raises:
        RuntimeError, ValueError, TypeError: where torch raises.  What only torch can do (nested tensors, tensor
            subclasses with ``__torch_function__``) goes to torch.
    """
    operands = (query, key, value, attn_mask)
    if has_torch_function(operands):
        return handle_torch_function(
            torch.nn.functional.scaled_dot_product_attention, operands, query, key, value, attn_mask, dropout_p,
            is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    if query.is_nested or query.dtype not in FLOATING or query.layout != torch.strided:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    usual = _is_usual(query, key, value, attn_mask, enable_gqa)
    if not usual or attn_mask is not None:
        _check_ranks_and_mask(query, key, value, attn_mask, is_causal)
    if dropout_p < 0.0 or dropout_p > 1.0:
        raise RuntimeError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")

    lead, squeeze_heads = query.shape[:1], False
    if not usual:
        squeeze_heads = max(query.dim(), key.dim(), value.dim()) == 2
        query, key, value, lead = _flatten_all(query, key, value, attn_mask, enable_gqa)
        attn_mask = None if attn_mask is None else _flatten_mask(attn_mask, lead)
    mask, bias = _CAUSAL if is_causal else None, None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            mask = BoolMask(attn_mask)
        else:
            bias = DenseBias(attn_mask)
    out = attention(query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, query_offset=0)
    if len(lead) != 1:
        out = out.unflatten(0, lead) if lead else out.squeeze(0)
    return out.squeeze(0) if squeeze_heads else out


def _is_usual(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> bool:
    """Whether the operands are (B, H, S, E) as they come, with nothing to broadcast but the mask."""
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    return (
        len(shape) == len(key_shape) == len(value_shape) == 4
        and shape[0] == key_shape[0] == value_shape[0]
        and (enable_gqa or shape[1] == key_shape[1] == value_shape[1])
        and (attn_mask is None or attn_mask.dim() < 4 or (attn_mask.dim() == 4 and attn_mask.shape[0] in (1, shape[0])))
    )


def _check_ranks_and_mask(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None and is_causal:
        raise RuntimeError("is_causal: expected False when attn_mask is given, got both")
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "query, key, value: expected at least 2 dimensions, got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"attn_mask: expected dtype bool, float32 or {query.dtype} like query, got {attn_mask.dtype}"
        )


def _flatten_all(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """The operands as (B, H, S, E), and the leading dimensions that B is the product of."""
    rank = max(query.dim(), key.dim(), value.dim(), 3)
    if not query.dim() == key.dim() == value.dim() == rank:
        query, key, value = (x[(None,) * (rank - x.dim())] for x in (query, key, value))
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if heads != kv_heads and not enable_gqa and 1 not in (heads, kv_heads):
        raise RuntimeError(f"key: expected {heads} heads like query (or enable_gqa=True), got {kv_heads}")
    if not enable_gqa:
        heads = max(heads, kv_heads, value.shape[-3])
    # Leading dimensions broadcast, as in torch; heads only do without enable_gqa.
    lead = query.shape[:-3]
    if not lead == key.shape[:-3] == value.shape[:-3]:
        lead = torch.broadcast_shapes(lead, key.shape[:-3], value.shape[:-3])
    if attn_mask is not None and attn_mask.dim() > 3:
        lead = torch.broadcast_shapes(lead, attn_mask.shape[:-3])
    return (
        _flatten(query, lead, heads),
        _flatten(key, lead, key.shape[-3] if enable_gqa else heads),
        _flatten(value, lead, value.shape[-3] if enable_gqa else heads),
        lead,
    )


def _flatten(x: Tensor, lead: torch.Size, heads: int) -> Tensor:
    """x expanded to (*lead, heads, S, E) and flattened to (B, heads, S, E)."""
    if len(lead) == 1 and x.shape[0] == lead[0] and x.shape[1] == heads:
        return x  # as nearly every call comes
    x = x.expand(*lead, heads, *x.shape[-2:])
    return x.flatten(0, -4) if lead else x[None]


def _flatten_mask(mask: Tensor, lead: torch.Size) -> Tensor:
    """The mask with its leading dimensions flattened like the batch, left broadcast where they all are 1."""
    if mask.dim() <= 3:
        return mask
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).flatten(0, -4)

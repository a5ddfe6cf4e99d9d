"""From torch's two masks and its causal hint to what `fastattn.attention` takes, kept structured where it can be.

torch turns every mask into floats of the query's dtype and adds them up to (N * H, L, S).  Here a padding mask stays
(N, 1, 1, S), an (L, S) mask stays (1, 1, L, S), and a causal call has no mask tensor at all: the backends have one
slot for a bool mask and one for a float bias, each read with stride 0 where it broadcasts, and the two masks share
the two slots.  The exception is two float masks whose values cannot be looked at: they are added, as torch does, but
without the head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.inputs import Sizes, check_mask_precision
from fastattn.validation import is_readable

NEG_INF = float("-inf")


class CallMasks(NamedTuple):
    """The masks of one call over all keys, extra ones first; H and the sizes as in `Sizes`."""

    causal: bool  # query i sees caller's keys j <= i, and every extra key
    dense_mask: Tensor | None  # bool, True = may attend, (N|1, H|1, L|1, S + extra)
    dense_bias: Tensor | None  # floating, same shapes


def hint_replaces_mask(
    is_causal: bool, attn_mask: Tensor | None, key_padding_mask: Tensor | None, need_weights: bool
) -> bool:
    """Whether `is_causal` stands for the mask, which is then not looked at.

    As in torch, the hint is trusted when no padding mask has to be merged and no weights are asked for, and the mask
    wins otherwise.  Without a mask there is nothing to doubt: the call is causal (torch raises an error there, or on
    its inference fast path ignores the request).
    """
    return is_causal and (attn_mask is None or (key_padding_mask is None and not need_weights))


def lower_masks(
    *,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    causal: bool,
    sizes: Sizes,
    num_heads: int,
    extra_keys: int,
    query_dtype: torch.dtype,
) -> CallMasks:
    """Lower checked masks in torch's convention (True = masked out) for a call with `extra_keys` leading keys.

    Raises:
        RuntimeError: a float mask that is neither float32 nor of the query's dtype.
    """
    mask: Tensor | None = None
    bias: Tensor | None = None
    if causal:
        attn_mask = None
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (sizes.batch, num_heads))
        if attn_mask.dtype == torch.bool:
            mask = ~attn_mask
        else:
            check_mask_precision(attn_mask, query_dtype)
            bias = attn_mask
    if key_padding_mask is not None:
        padding = key_padding_mask.view(sizes.batch, 1, 1, sizes.key_length)
        if padding.dtype != torch.bool:
            check_mask_precision(padding, query_dtype)
            padding = as_bool(padding)
        if padding.dtype != torch.bool:
            bias = padding if bias is None else bias + padding
        elif mask is None:
            mask = ~padding
        elif mask.shape[0] == sizes.batch:
            mask = mask & ~padding
        else:
            # Two bool masks that broadcast differently: the small one goes into the free slot, as 0 and -inf.
            bias = torch.zeros(padding.shape, dtype=query_dtype, device=padding.device).masked_fill(padding, NEG_INF)
    if extra_keys:
        mask = None if mask is None else F.pad(mask, (extra_keys, 0), value=True)
        bias = None if bias is None else F.pad(bias, (extra_keys, 0))
    return CallMasks(causal, mask, bias)


def as_bool(padding: Tensor) -> Tensor:
    """A float padding mask of nothing but 0 and -inf as the bool mask it came from, where looking costs no sync.

    nn.TransformerEncoder makes such floats out of every bool mask; as bools they leave the bias slot free, and a
    kernel can skip the padding.
    """
    if padding.dtype == torch.bool or padding.requires_grad or not is_readable(padding):
        return padding
    hidden = padding == NEG_INF
    return hidden if torch.equal(hidden, padding != 0) else padding

"""What `MultiheadAttention.forward` accepts: torch's rules, error types and messages.

The messages are those of torch.nn.functional.multi_head_attention_forward, in its order, so that code and tests that
catch or match them keep working.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Sizes of a call; an unbatched call has batch 1."""

    batched: bool
    batch: int
    query_length: int
    key_length: int


def check_mask_dtype(name: str, mask: Tensor | None) -> None:
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(f"only bool and floating types of {name} are supported")


def check_ranks(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None, num_heads: int
) -> bool:
    """Whether the call is batched (3-D); AssertionError for ranks that do not fit together."""
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {rank}-D query tensor")
    kind = "batched (3-D)" if rank == 3 else "unbatched (2-D)"
    if key.dim() != rank or value.dim() != rank:
        raise AssertionError(
            f"For {kind} `query`, expected `key` and `value` to be {rank}-D"
            f" but found {key.dim()}-D and {value.dim()}-D tensors respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != rank - 1:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {rank - 1}-D"
            f" but found {key_padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(
            f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D"
            f" but found {attn_mask.dim()}-D tensor instead"
        )
    if rank == 2 and attn_mask is not None and attn_mask.dim() == 3:
        expected = (num_heads, query.shape[0], key.shape[0])
        if attn_mask.shape != expected:
            raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}")
    return rank == 3


def check_sizes(
    query: Tensor, key: Tensor, value: Tensor, *, batched: bool, batch_first: bool, embed_dim: int, separate: bool
) -> Sizes:
    """The sizes of a call whose ranks fit; AssertionError or RuntimeError where the sizes do not."""

    def sequence_first(x: Tensor) -> torch.Size:
        # torch checks, and prints, the shapes it works in: (S, N, E)
        if not batched:
            return torch.Size((x.shape[0], 1, x.shape[1]))
        return torch.Size((x.shape[1], x.shape[0], x.shape[2])) if batch_first else x.shape

    query_shape = sequence_first(query)
    key_shape = query_shape if key is query else sequence_first(key)
    value_shape = key_shape if value is key else sequence_first(value)
    query_length, batch, query_dim = query_shape
    if query_dim != embed_dim:
        raise AssertionError(f"was expecting embedding dimension of {embed_dim}, but got {query_dim}")
    if separate:
        if key_shape[:2] != value_shape[:2]:
            raise AssertionError(
                f"key's sequence and batch dims {key_shape[:2]} do not match value's {value_shape[:2]}"
            )
    elif key_shape != value_shape:
        raise AssertionError(f"key shape {key_shape} does not match value shape {value_shape}")
    key_length, key_batch, _ = key_shape
    if key_batch != batch:
        raise RuntimeError(f"query has batch size {batch}, but key and value have batch size {key_batch}")
    return Sizes(batched, batch, query_length, key_length)


def check_mask_shapes(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, sizes: Sizes, num_heads: int, extra_keys: int
) -> None:
    """The masks' sizes; `extra_keys` are the bias and zero keys, which torch counts in its message."""
    if attn_mask is not None:
        two, three = (
            (sizes.query_length, sizes.key_length),
            (sizes.batch * num_heads, sizes.query_length, sizes.key_length),
        )
        if attn_mask.dim() == 2 and attn_mask.shape != two:
            raise RuntimeError(f"The shape of the 2D attn_mask is {attn_mask.shape}, but should be {two}.")
        if attn_mask.dim() == 3 and attn_mask.shape != three:
            raise RuntimeError(f"The shape of the 3D attn_mask is {attn_mask.shape}, but should be {three}.")
    if key_padding_mask is not None:
        batch, length = (1, *key_padding_mask.shape)[-2:]
        if batch != sizes.batch:
            raise AssertionError(f"Expected key_padded_mask.shape[0] to be {sizes.batch}, but got {batch}")
        if length != sizes.key_length:
            expected, got = sizes.key_length + extra_keys, length + extra_keys
            raise AssertionError(f"Expected key_padded_mask.shape[1] to be {expected}, but got {got}")


def check_mask_precision(mask: Tensor, query_dtype: torch.dtype) -> None:
    """A float mask is float32 or of the query's dtype, as torch's attention has it; autocast takes any of its own."""
    allowed = [torch.float32, query_dtype]
    if torch.is_autocast_enabled(mask.device.type):
        allowed += [torch.bfloat16, torch.float16]
    if mask.dtype not in allowed:
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, "
            f"but got attn_mask.dtype: {mask.dtype} and query.dtype: {query_dtype} instead."
        )

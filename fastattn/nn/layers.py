"""Transformer layers: torch's own, with attention by fastattn, an encoding of positions, and a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.cache import LayerCache
from fastattn.nn.classes import as_leaf
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.position import Encodings, Position, make_position

if TYPE_CHECKING:
    from fastattn.nn.padding import Packed

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]


def _attention(
    stock: torch.nn.MultiheadAttention, position: Position | None, num_kv_heads: int | None
) -> MultiheadAttention:
    """A fastattn module in the place of the one that torch's layer has just made, with its parameters.

    Nothing is drawn unless heads are grouped, so that one seed gives torch's weights.
    """
    if num_kv_heads is None or num_kv_heads == stock.num_heads:
        ours = MultiheadAttention.from_torch(stock)
        if position is not None:
            ours.position = make_position(position, ours.head_dim)
        return ours
    weight = stock.out_proj.weight
    return MultiheadAttention(
        stock.embed_dim,
        stock.num_heads,
        stock.dropout,
        stock.in_proj_bias is not None,
        batch_first=stock.batch_first,
        device=weight.device,
        dtype=weight.dtype,
        position=position,
        num_kv_heads=num_kv_heads,
    )


def _activate(activation: Callable[[Tensor], Tensor], linear: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The activation of what `linear` has given, in place where nobody else has it.

    The memory of a second hidden layer, fresh from the system, takes longer to get than the activation to compute.
    With gradients autograd would copy what it saves: the hidden layer is a view.
    """
    in_place = torch.relu_ if activation is F.relu else torch.ops.aten.gelu_ if activation is F.gelu else None
    alone = (
        in_place is not None
        and type(linear) is torch.nn.Linear
        and type(hidden) is Tensor
        and not hidden.requires_grad
        and "forward" not in vars(linear)
        and not linear._forward_hooks
        and not torch.nn.modules.module._has_any_global_hook()
    )
    return in_place(hidden) if alone else activation(hidden)  # type: ignore[misc]


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with attention by fastattn: same arguments, state dict and results.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: torch's.
        position: encoding of positions in the self-attention, `self_attn.position`, as in
            `fastattn.nn.MultiheadAttention`.  An encoding that several layers share belongs to their stack.
        num_kv_heads: heads of keys and values, as there.

    Where it differs from torch, on purpose:

    * torch's fused inference path, which never calls ``self_attn``, is not taken; nested tensors, which only that path
      takes, are refused.
    * bool masks stay bool.  ``is_causal=True`` without a mask is a causal mask; a wholly masked query attends to
      nothing.  For both see `fastattn.nn.MultiheadAttention`.

    Formula: Vaswani et al., 2017; with ``norm_first`` Xiong et al., "On layer normalization in the transformer
    architecture", 2020.
    """

    self_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Position | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = _attention(self.self_attn, position, num_kv_heads)
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        position: Encodings | None = None,
        cache: LayerCache | None = None,
        packed: Packed | None = None,
    ) -> Tensor:
        """The layer's output, shaped as `src`.

        Args:
            src: (S, N, E), (N, S, E) with batch_first, or (S, E).
            src_mask: (S, S) or (N * H, S, S); bool with True = may not attend, or floating.
            src_key_padding_mask: (N, S) or (S); bool with True = ignore, or floating.
            is_causal: `src_mask` is causal, or without a mask: attention is.
            position: an encoding for this call, from the stack.
            cache: decode: attention is causal over the cached tokens and `src`, which is the next ones; `src_mask`
                must be None and the padding mask covers the new tokens.
            packed: from a stack that does without padding: `src` is the tokens of its batch in a row.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as `fastattn.nn.MultiheadAttention`.
        """
        if isinstance(src, torch.fx.Proxy):
            call = (src, src_mask, src_key_padding_mask, is_causal)
            return as_leaf(self, call, {"position": position, "cache": cache, "packed": packed})

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, x, x, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, need_weights=False,
                is_causal=is_causal, position=position, cache=None if cache is None else cache.self_attn, packed=packed,
            )  # fmt: skip
            return self.dropout1(out)

        x = src
        if self.norm_first:
            x = x + attend(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attend(x))
        return self.norm2(x + self._ff_block(x))

    def _ff_block(self, x: Tensor) -> Tensor:
        hidden = _activate(self.activation, self.linear1, self.linear1(x))
        return self.dropout2(self.linear2(self.dropout(hidden)))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with attention by fastattn: same arguments, state dict and results.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype: torch's.
        position: encoding of positions in the self-attention; attention over the memory has none.
        num_kv_heads: heads of keys and values, in both.

    Differences from torch, and formula: see `TransformerEncoderLayer`.
    """

    self_attn: MultiheadAttention
    multihead_attn: MultiheadAttention

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Position | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.self_attn = _attention(self.self_attn, position, num_kv_heads)
        self.multihead_attn = _attention(self.multihead_attn, None, num_kv_heads)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        position: Encodings | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """The layer's output, shaped as `tgt`.

        Args:
            tgt: (T, N, E), (N, T, E) with batch_first, or (T, E).
            memory: the encoder's output, (S, N, E), (N, S, E) or (S, E).
            tgt_mask: (T, T) or (N * H, T, T); bool with True = may not attend, or floating.
            memory_mask: (T, S) or (N * H, T, S), likewise.
            tgt_key_padding_mask, memory_key_padding_mask: (N, T) and (N, S); bool with True = ignore, or floating.
            tgt_is_causal, memory_is_causal: the mask is causal, or without a mask: attention is.
            position: an encoding for this call's self-attention, from the stack.
            cache: decode, as in `TransformerEncoderLayer.forward`; the memory is projected at the first step only.

        Raises:
            AssertionError, RuntimeError, ValueError, TypeError: as `fastattn.nn.MultiheadAttention`.
        """
        if isinstance(tgt, torch.fx.Proxy):
            call = (
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
            return as_leaf(self, call, {"position": position, "cache": cache})

        def attend(x: Tensor) -> Tensor:
            out, _ = self.self_attn(
                x, x, x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, need_weights=False,
                is_causal=tgt_is_causal, position=position, cache=None if cache is None else cache.self_attn,
            )  # fmt: skip
            return self.dropout1(out)

        def attend_memory(x: Tensor) -> Tensor:
            out, _ = self.multihead_attn(
                x, memory, memory, attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask,
                need_weights=False, is_causal=memory_is_causal, cache=None if cache is None else cache.memory,
            )  # fmt: skip
            return self.dropout2(out)

        x = tgt
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + attend_memory(self.norm2(x))
            return x + self._ff_block(self.norm3(x))
        x = self.norm1(x + attend(x))
        x = self.norm2(x + attend_memory(x))
        return self.norm3(x + self._ff_block(x))

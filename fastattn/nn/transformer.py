"""The Transformer and its stacks: torch's own, with attention by fastattn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from fastattn.nn.cache import DecodingCache, KVCache, LayerCache, MemoryCache
from fastattn.nn.classes import as_leaf
from fastattn.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.padding import packed_batch, torch_nests
from fastattn.nn.position import Position, copy_position, make_position, own_position
from fastattn.nn.projections import key_heads
from fastattn.nn.sharing import layer_groups
from fastattn.validation import describe, fail

__all__ = ["Transformer", "TransformerDecoder", "TransformerEncoder"]


class _Stack(nn.Module):
    """What both stacks have beside torch's: groups of layers, one encoding for all of them, caches."""

    layers: nn.ModuleList

    def _build(
        self, kind: type[nn.Module], name: str, layer: nn.Module, num_layers: int,
        share_layers: int | Sequence[int] | None, position: Position | None,
    ) -> None:  # fmt: skip
        """Make the layers, clones of `layer` as in torch, one per group."""
        if not isinstance(layer, kind):
            fail(TypeError, name, f"a fastattn.nn.{kind.__name__}", describe(layer))
        self.layer_groups = layer_groups(num_layers, share_layers)
        distinct = max(self.layer_groups, default=-1) + 1
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(distinct))
        attention: MultiheadAttention = layer.self_attn  # type: ignore[assignment]
        if position is not None:
            if own_position(attention) is not None:
                fail(ValueError, "position", f"None with a {name} that has its own", type(position).__name__)
            self.position = make_position(position, attention.head_dim)

    def _groups(self) -> Sequence[int]:
        """`layer_groups`, which an encoder that was made by torch and replaced does not have."""
        return vars(self).get("layer_groups", range(len(self.layers)))

    def _uses(self, cache: DecodingCache | None) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Every use of a layer, with what the stack adds to its arguments."""
        groups = self._groups()
        places = len(groups)
        if cache is not None and len(cache) != places:
            fail(ValueError, "cache", f"one for {places} layers, from make_cache", f"{cache!r}")
        position = getattr(self, "position", None)
        caches = [None] * places if cache is None else cache.layers
        # a layer that somebody else made knows only torch's arguments
        given = {} if position is None else {"position": position}
        return [
            (self.layers[group], given if own is None else {**given, "cache": own})
            for group, own in zip(groups, caches, strict=True)
        ]

    def make_cache(
        self, batch_size: int, *, max_length: int | None = None, window: int | None = None
    ) -> DecodingCache:  # fmt: skip
        """Caches for decoding with this stack: static with `max_length`, sliding with `window`; see `KVCache`.

        Each call of the stack with it takes the next tokens and attends causally; 1 token or several, the prompt too::

            cache = decoder.make_cache(batch_size, max_length=100)
            with torch.no_grad():
                for token in ...:                          # embed(token): (B, 1, E) with batch_first
                    out = decoder(embed(token, offset=cache.length), memory, cache=cache)
        """
        layers = []
        for group in self._groups():
            layer = self.layers[group]
            attention: MultiheadAttention = layer.self_attn  # type: ignore[assignment]
            weight = attention.out_proj.weight
            own = KVCache(
                batch_size, key_heads(attention), attention.head_dim, max_length=max_length, window=window,
                device=weight.device, dtype=weight.dtype,
            )  # fmt: skip
            layers.append(LayerCache(own, MemoryCache() if hasattr(layer, "multihead_attn") else None))
        return DecodingCache(layers)


class TransformerEncoder(_Stack, torch.nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` over `fastattn.nn.TransformerEncoderLayer`: same arguments, state dict, results.

    Args:
        encoder_layer: the layer, cloned; all clones start with its parameters, as in torch.
        num_layers: L.
        norm: after the last layer.
        enable_nested_tensor: whether padded positions are left out in inference where torch makes nested tensors, and
            their output is 0 (before `norm`): batched inputs in eval mode without gradients, a padding mask alone,
            post-norm layers with batch_first, biases, ReLU or GELU, and an even number of heads.
        mask_check: whether that takes padding on the right only, as in torch; False: wherever it lies.
        position: one encoding that all layers share, `position` of this module, as T5 shares its bias; one for each
            layer belongs to `encoder_layer`.  See `fastattn.nn.MultiheadAttention`.
        share_layers: groups of layers that are one module: a number of groups (1: ALBERT), or the group of each
            layer; see `layer_groups`.  `layers` holds one module per group, so every shared tensor has one entry in
            the state dict, and its gradients from all uses add up.
        skip_padding: True leaves padded positions out in training too, with any of these layers, wherever the padding
            lies: all tokens go through the layers as one sequence, each attends to its own, and what a layer's hooks
            see is that sequence.  The output at padded positions is 0 (before `norm`), and so are their gradients.
            None is torch's rule above, False never.  Padding is computed all the same with a mask or a cache, in
            compiled graphs, under functorch's transforms, while a CUDA graph is captured, with encodings that know
            absolute positions, or distances where a sequence has gaps, and where a part of a layer is none of torch's.

    Attributes:
        layer_groups: for each of the L uses, the index in `layers`.
        skip_padding: may be changed at any time, on an encoder changed by `fastattn.replace_attention` too.

    Where it differs from torch: see `TransformerEncoderLayer`.
    """

    skip_padding: bool | None = None

    def __init__(
        self,
        encoder_layer: TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
        *,
        position: Position | None = None,
        share_layers: int | Sequence[int] | None = None,
        skip_padding: bool | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._build(TransformerEncoderLayer, "encoder_layer", encoder_layer, num_layers, share_layers, position)
        self.num_layers, self.norm = num_layers, norm
        self.enable_nested_tensor, self.mask_check = enable_nested_tensor, mask_check
        self.use_nested_tensor = enable_nested_tensor and torch_nests(encoder_layer)
        if skip_padding is not None:
            if not isinstance(skip_padding, bool):
                fail(TypeError, "skip_padding", "a bool or None", describe(skip_padding))
            self.skip_padding = skip_padding

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """The output of the last layer, shaped as `src`.

        Args:
            src, mask, src_key_padding_mask: as in `TransformerEncoderLayer.forward`.
            is_causal: the mask is causal, or without a mask: attention is.  None: look at the mask.
            cache: decode with a causal stack; see `make_cache`.
        """
        if isinstance(src, torch.fx.Proxy):
            return as_leaf(self, (src, mask, src_key_padding_mask, is_causal), {"cache": cache})
        if cache is None and self.layers:
            length = _get_seq_len(src, self.layers[0].self_attn.batch_first)
            is_causal = _detect_is_causal_mask(mask, is_causal, length)
        packed = None if cache is not None else packed_batch(self, src, mask, src_key_padding_mask)
        x = src if packed is None else packed.pack(src)
        if packed is None:
            call = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask}
        else:
            call = {"packed": packed}
        for layer, extra in self._uses(cache):
            x = layer(x, is_causal=bool(is_causal), **call, **extra)
        if packed is not None:
            x = packed.unpack(x, src.shape)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(_Stack, torch.nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` over `fastattn.nn.TransformerDecoderLayer`: same arguments, state dict, results.

    Args:
        decoder_layer: the layer, cloned; all clones start with its parameters, as in torch.
        num_layers: L.
        norm: after the last layer.
        position, share_layers: as in `TransformerEncoder`; the encoding is that of the self-attention.
    """

    def __init__(
        self,
        decoder_layer: TransformerDecoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        *,
        position: Position | None = None,
        share_layers: int | Sequence[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._build(TransformerDecoderLayer, "decoder_layer", decoder_layer, num_layers, share_layers, position)
        self.num_layers, self.norm = num_layers, norm

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: DecodingCache | None = None,
    ) -> Tensor:
        """The output of the last layer, shaped as `tgt`.

        Args:
            tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, memory_is_causal: as in
                `TransformerDecoderLayer.forward`.
            tgt_is_causal: the mask is causal, or without a mask: attention is.  None: look at the mask.
            cache: decode: `tgt` is the next tokens; see `make_cache`.
        """
        if isinstance(tgt, torch.fx.Proxy):
            call = (
                tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
                memory_is_causal,
            )  # fmt: skip
            return as_leaf(self, call, {"cache": cache})
        if cache is None and self.layers:
            length = _get_seq_len(tgt, self.layers[0].self_attn.batch_first)
            tgt_is_causal = _detect_is_causal_mask(tgt_mask, tgt_is_causal, length)
        x = tgt
        for layer, extra in self._uses(cache):
            x = layer(
                x, memory, tgt_mask=tgt_mask, memory_mask=memory_mask, tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask, tgt_is_causal=bool(tgt_is_causal),
                memory_is_causal=memory_is_causal, **extra,
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


class Transformer(torch.nn.Transformer):
    """`torch.nn.Transformer` computed by fastattn: same arguments, state dict in both directions, same results.

    It has torch's extent: no embeddings, and no projection to a vocabulary.  Absolute positions are added to the
    embeddings by the caller (`SinusoidalEmbedding`, `LearnedEmbedding`); `TiedLinear` is an output that shares its
    matrix with an embedding.

    Args:
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout, activation, custom_encoder,
            custom_decoder, layer_norm_eps, batch_first, norm_first, bias, device, dtype: torch's.
        position: encoding inside self-attention, one per stack and shared by its layers, as in T5.  A pair (a tuple of
            two) is for encoder and decoder, and either may be None.  Otherwise both have it, each with parameters of
            its own: a function is called twice, a module is copied.  Not with custom stacks, which bring their own.
        num_kv_heads: heads of keys and values, in all attention modules.
        share_layers: groups of layers that are one module, in both stacks, as in `TransformerEncoder`; or a tuple of
            two, one for each, of which either may be None, an int or a list.

    Raises:
        TypeError, ValueError: arguments that do not fit, or that a custom stack would ignore.

    Differences from torch, and formula: see `TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: Position | tuple[Position | None, Position | None] | None = None,
        num_kv_heads: int | None = None,
        share_layers: int | Sequence[int] | tuple[Any, Any] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        positions = position if _is_pair(position) else (position, copy_position(position))  # type: ignore[arg-type]
        # the groups of two layers hold a 0, two numbers of groups do not
        shared = share_layers if _is_pair(share_layers) and 0 not in share_layers else (share_layers,) * 2  # type: ignore[operator]
        where = {"device": device, "dtype": dtype}
        options = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias)
        ours = {"position": position, "num_kv_heads": num_kv_heads, "share_layers": share_layers}
        for name, custom in (("custom_encoder", custom_encoder), ("custom_decoder", custom_decoder)):
            ignored = [key for key, value in ours.items() if value is not None]
            if custom is not None and ignored:
                fail(ValueError, ignored[0], f"None with a {name}, which brings its own", describe(ours[ignored[0]]))

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)

        if custom_encoder is not None:
            self.encoder = custom_encoder
        else:
            layer = TransformerEncoderLayer(*options, **where, num_kv_heads=num_kv_heads)
            self.encoder = TransformerEncoder(
                layer, num_encoder_layers, norm(), position=positions[0], share_layers=shared[0]
            )  # fmt: skip
        if custom_decoder is not None:
            self.decoder = custom_decoder
        else:
            decoder_layer = TransformerDecoderLayer(*options, **where, num_kv_heads=num_kv_heads)
            self.decoder = TransformerDecoder(
                decoder_layer, num_decoder_layers, norm(), position=positions[1], share_layers=shared[1]
            )  # fmt: skip
        self._reset_parameters()
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first

    def _reset_parameters(self) -> None:
        """torch's initialisation; an encoding keeps its own."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and "position" not in name.split("."):
                nn.init.xavier_uniform_(parameter)

    def make_cache(
        self, batch_size: int, *, max_length: int | None = None, window: int | None = None
    ) -> DecodingCache:  # fmt: skip
        """Caches for decoding with `decoder`, as `TransformerDecoder.make_cache`: encode once, then decode::

        memory = model.encoder(source)
        out = model.decoder(token, memory, cache=cache)
        """
        return self.decoder.make_cache(batch_size, max_length=max_length, window=window)


def _is_pair(position: object) -> bool:
    return isinstance(position, tuple) and len(position) == 2

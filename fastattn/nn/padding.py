"""Batches without their padding: all tokens as one sequence, through layers that act on them one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.masks import BoolMask, Documents, KeyLengths, Mask
from fastattn.nn.classes import plain_class
from fastattn.nn.layers import TransformerEncoderLayer
from fastattn.nn.masks import as_bool
from fastattn.nn.multihead_attention import MultiheadAttention
from fastattn.nn.position import can_pack, own_position
from fastattn.nn.recording import watchers

if TYPE_CHECKING:
    from fastattn.nn.transformer import TransformerEncoder


class Packed(NamedTuple):
    """The T tokens of a padded batch, sequence after sequence.

    Attributes:
        places: (T,) where each stands among the batch's N * S places, as these lie in memory.
        sequences: (T,) which sequence it belongs to.
        positions: (T,) where in that sequence it stands.
        real: (N, S) which places of the batch are tokens.
        on_the_right: whether every padding is.
        batch_first: whether the batch is (N, S, E), or (S, N, E).
        as_documents: whether attention sees the row of tokens as documents, in time by visible area; or the batch, put
            together again, where kernels would compute every pair of documents.
    """

    places: Tensor
    sequences: Tensor
    positions: Tensor
    real: Tensor
    on_the_right: bool
    batch_first: bool
    as_documents: bool

    @property
    def length(self) -> int:
        return self.real.shape[1]

    @property
    def mask(self) -> Mask:
        """What keeps every token to its own sequence."""
        if self.as_documents:
            return Documents(self.sequences)
        return KeyLengths(self.real.sum(1)) if self.on_the_right else BoolMask(self.real[:, None, None])

    def pack(self, x: Tensor) -> Tensor:
        """The tokens of a batch as one sequence: (1, T, E), or (T, 1, E)."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0 if self.batch_first else 1)

    def unpack(self, x: Tensor, batch: torch.Size) -> Tensor:
        """The inverse, into a batch of this shape; its padded positions are 0."""
        out = x.new_zeros((batch[0] * batch[1], batch[2]))
        return out.index_copy_(0, self.places, x.flatten(0, 1)).view(batch)

    def unpack_heads(self, x: Tensor) -> Tensor:
        """(1, H, T, D) as (N, H, S, D), with zeros where no token is."""
        out = x.new_zeros((*self.real.shape, x.shape[1], x.shape[3]))
        rows = self.sequences * self.length + self.positions
        out.flatten(0, 1).index_copy_(0, rows, x[0].transpose(0, 1))
        return out.transpose(1, 2)

    def pack_heads(self, x: Tensor) -> Tensor:
        """The inverse: (N, H, S, D) as (1, H, T, D)."""
        return x.transpose(1, 2)[self.sequences, self.positions].transpose(0, 1)[None]


def torch_nests(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether torch makes nested tensors of the padded batches that reach an encoder over such a layer, in inference.

    The rule is that of the constructor of `torch.nn.TransformerEncoder`.
    """
    attention = layer.self_attn
    return (
        not layer.norm_first
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.in_proj_bias is not None
        and (layer.activation in (F.relu, F.gelu) or isinstance(layer.activation, (nn.ReLU, nn.GELU)))
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )


def packed_batch(encoder: TransformerEncoder, src: Tensor, mask: object, padding: Tensor | None) -> Packed | None:
    """How to do without the padding of a call; None where nothing is padded or it has to be computed."""
    if padding is None or mask is not None or encoder.skip_padding is False or not encoder.layers:
        return None
    wanted = encoder.skip_padding is True
    batch_first = encoder.layers[0].self_attn.batch_first
    if not _is_plain_batch(src, padding, batch_first) or not (wanted or _nests_now(encoder, src)):
        return None
    if not _acts_on_tokens(encoder):
        return None
    positions = [getattr(encoder, "position", None), *(own_position(layer.self_attn) for layer in encoder.layers)]
    if not all(can_pack(position, gaps=False) for position in positions):
        return None
    padding = as_bool(padding)
    if padding.dtype != torch.bool:
        return None
    real = ~padding
    begins = real[:, 1:] > real[:, :-1]
    on_the_right = not begins.any()
    if not wanted and getattr(encoder, "mask_check", True) and not on_the_right:
        return None  # torch computes such padding
    gaps_matter = not all(can_pack(position, gaps=True) for position in positions)
    if gaps_matter and bool((begins.sum(1) + real[:, 0] > 1).any()):
        return None
    sequences, steps = real.nonzero(as_tuple=True)
    if sequences.numel() in (0, padding.numel()):
        return None
    batch, length = padding.shape
    places = sequences * length + steps if batch_first else steps * batch + sequences
    return Packed(places, sequences, steps, real, on_the_right, batch_first, _passes_over_documents(src.device))


def _passes_over_documents(device: torch.device) -> bool:
    """Whether attention between documents takes no time there."""
    return device.type == "cpu"


def _is_plain_batch(src: Tensor, padding: Tensor, batch_first: bool) -> bool:
    """Whether the tokens can be counted here: not in a graph, under a transform or while a CUDA graph is captured."""
    if type(src) is not Tensor or type(padding) is not Tensor or src.dim() != 3 or src.is_nested:
        return False
    if padding.shape != (src.shape[:2] if batch_first else src.shape[1::-1]) or padding.device != src.device:
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (src.is_cuda and torch.cuda.is_current_stream_capturing())


def _acts_on_tokens(encoder: TransformerEncoder) -> bool:
    """Whether nothing but attention, which is told, can see what stands beside a token."""
    return all(
        plain_class(layer) is TransformerEncoderLayer
        and plain_class(layer.self_attn) is MultiheadAttention
        and layer.self_attn.bias_k is None
        and not layer.self_attn.add_zero_attn
        and not watchers(layer.self_attn)
        and isinstance(layer.linear1, nn.Linear)
        and isinstance(layer.linear2, nn.Linear)
        and all(isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) for norm in (layer.norm1, layer.norm2))
        for layer in encoder.layers
    )


def _nests_now(encoder: TransformerEncoder, src: Tensor) -> bool:
    """Whether this call is one that torch's encoder makes nested tensors for, and no hook would see their shape."""
    return (
        getattr(encoder, "use_nested_tensor", False)  # encoders of old pickles lack it, as torch's own forward knows
        and not encoder.layers[0].training
        and torch.backends.mha.get_fastpath_enabled()
        and not torch.is_autocast_enabled()
        and not (torch.is_grad_enabled() and (src.requires_grad or any(p.requires_grad for p in encoder.parameters())))
        and not nn.modules.module._has_any_global_hook()
        and not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.layers.modules())
    )

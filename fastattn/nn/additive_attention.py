"""Bahdanau's attention as a module: the projections of states and annotations, and the weight vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.additive import additive_attention
from fastattn.biases import Bias
from fastattn.masks import BoolMask, Mask
from fastattn.validation import check_index, check_shape, check_tensor, fail


class AdditiveAttention(nn.Module):
    """Additive attention of decoder states over annotations: a(s, h) = v^T tanh(W s + U h).

    Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate", 2015, section
    A.1.2: v is `weight`, W is `query_projection` and U is `key_projection`; as there, none has a bias unless asked for
    (then U has one, which serves for both).  The context is the weighted mean of the values, which are not projected.
    The fused kernels never hold the (Sq, Sk, attention_dim) tensor of the formula.

    Args:
        query_dim: width of the states.
        key_dim: width of the annotations.
        attention_dim: width of the alignment model's hidden layer.
        bias: add a bias in front of tanh.
        dropout: probability that a weight is dropped while training.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, dim in (("query_dim", query_dim), ("key_dim", key_dim), ("attention_dim", attention_dim)):
            check_index(name, dim, 1)
        if not 0.0 <= dropout <= 1.0:
            fail(ValueError, "dropout", "a probability in [0, 1]", dropout)
        self.dropout = dropout
        self.query_projection = nn.Linear(query_dim, attention_dim, bias=False, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_dim, attention_dim, bias=bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(attention_dim, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -(attention_dim**-0.5), attention_dim**-0.5)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        mask: Mask | None = None,
        bias: Bias | None = None,
    ) -> Tensor:
        """The contexts (B, Sq, value width) of states (B, Sq, query_dim) over annotations (B, Sk, key_dim).

        Args:
            query: the states; one of them per step of a decoder is Sq = 1.
            key: the annotations.
            value: (B, Sk, Dv), what is averaged; None means the annotations.
            key_padding_mask: (B, Sk) bool, True = padding, as in `torch.nn.MultiheadAttention`.
            mask, bias: as in `fastattn.additive_attention`, for one head.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        value = key if value is None else value
        for name, x in (("query", query), ("key", key), ("value", value)):
            if check_tensor(name, x).dim() != 3:
                fail(ValueError, name, "three dimensions (batch, length, width)", x)
        if key_padding_mask is not None:
            if check_tensor("key_padding_mask", key_padding_mask).dtype != torch.bool:
                fail(TypeError, "key_padding_mask", "dtype bool, True = padding", key_padding_mask)
            check_shape("key_padding_mask", key_padding_mask, tuple(key.shape[:2]))
            seen = BoolMask(~key_padding_mask[:, None, None])
            mask = seen if mask is None else mask & seen
        heads = [self.query_projection(query), self.key_projection(key), value]
        out = additive_attention(
            *[x[:, None] for x in heads], self.weight, mask=mask, bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return out[:, 0]

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

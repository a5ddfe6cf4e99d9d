"""Absolute position embeddings, added to the input of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.positional.sinusoid import Layout, sinusoidal_embedding
from fastattn.validation import check_floating, check_index, check_integer, check_range, fail

__all__ = ["LearnedEmbedding", "SinusoidalEmbedding"]

INITIAL_STD = 0.02


class SinusoidalEmbedding(nn.Module):
    """x + sines and cosines of the position; no parameters, any length.  Formula: `sinusoidal_embedding`.

    Args:
        dim: E, even.
        base, layout, endpoint: as in `fastattn.positional.sinusoid.sinusoidal_embedding`.
    """

    def __init__(
        self, dim: int, *, base: float = 10000.0, layout: Layout = "interleaved", endpoint: bool = False
    ) -> None:
        super().__init__()
        self.dim, self.base, self.layout, self.endpoint = dim, base, layout, endpoint
        sinusoidal_embedding(torch.zeros(0), dim, base=base, layout=layout, endpoint=endpoint)  # checks

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, layout={self.layout!r}, endpoint={self.endpoint}"

    def forward(self, x: Tensor, positions: Tensor | None = None, *, offset: int = 0) -> Tensor:
        """x (..., S, E) plus the embedding of each position: offset, offset + 1, ..., or `positions` (S,) or (..., S).

        The embedding is rounded once to the dtype of x.
        """
        _check_features(x, self.dim)
        rows = _rows(x, positions, offset)
        table = sinusoidal_embedding(
            rows, self.dim, base=self.base, layout=self.layout, endpoint=self.endpoint, dtype=x.dtype
        )  # fmt: skip
        return x + table


class LearnedEmbedding(nn.Module):
    """x + a learned vector per position, `weight` (max_length, E): loads the position embedding of BERT or GPT-2.

    The gradient of a row is the sum of the gradients at its position (Gehring et al., 2017; Devlin et al., 2019).

    Raises:
        ValueError: a position outside [0, max_length), where positions can be read without waiting for a device.
    """

    def __init__(
        self,
        max_length: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        max_length, dim = check_index("max_length", max_length, least=1), check_index("dim", dim, least=1)
        self.weight = nn.Parameter(torch.empty(max_length, dim, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_STD)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))

    def forward(self, x: Tensor, positions: Tensor | None = None, *, offset: int = 0) -> Tensor:
        """x (..., S, E) plus the vector of each position: offset, offset + 1, ..., or `positions` (S,) or (..., S)."""
        _check_features(x, self.weight.shape[1])
        last = self.weight.shape[0] - 1
        if positions is None:  # a slice: its gradient needs no scatter
            length = x.shape[-2]
            if check_index("offset", offset, least=0) + length > last + 1:
                fail(ValueError, "offset", f"positions below max_length = {last + 1}", f"{offset} + {length}")
            return x + self.weight[offset : offset + length].to(x.dtype)
        rows = check_integer("positions", positions)
        check_range("positions", rows, 0, last, f"values in [0, {last}]")
        return x + nn.functional.embedding(rows.long(), self.weight).to(x.dtype)


def _check_features(x: object, dim: int) -> None:
    x = check_floating("x", x)
    if x.dim() < 2 or x.shape[-1] != dim:
        fail(ValueError, "x", f"shape (..., S, {dim})", x)


def _rows(x: Tensor, positions: Tensor | None, offset: int) -> Tensor:
    if positions is None:
        return torch.arange(x.shape[-2], device=x.device) + check_index("offset", offset)
    return positions

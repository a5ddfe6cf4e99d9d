"""Sinusoidal position embeddings, which are added to the input of a model."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn.validation import check_index, check_number, check_tensor, describe, fail

Layout = Literal["interleaved", "concatenated"]


def sinusoidal_embedding(
    positions: Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    layout: Layout = "interleaved",
    endpoint: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sines and cosines of the positions at dim / 2 wavelengths (Vaswani et al., "Attention is all you need", 2017)::

        interleaved:   PE[p, 2k] = sin(p w_k), PE[p, 2k + 1] = cos(p w_k)     the paper
        concatenated:  PE[p, k]  = sin(p w_k), PE[p, dim/2 + k] = cos(p w_k)  tensor2tensor's published code
        w_k = base^(-2k / dim), or base^(-k / (dim/2 - 1)) with `endpoint`

    Args:
        positions: integer or floating, any shape.
        dim: an even number of features.
        base: ratio of the longest to the shortest wavelength (nearly, without `endpoint`).
        layout: as above; the two differ by a permutation of the features.
        endpoint: the last wavelength is 2 pi * base exactly, as in tensor2tensor, fairseq and Whisper.
        dtype: of the result; computed in float64.

    Returns:
        (*positions.shape, dim).

    Raises:
        TypeError, ValueError: dim is odd or < 2 (< 4 with endpoint); another layout.
    """
    check_tensor("positions", positions)
    dim = check_index("dim", dim, least=4 if endpoint else 2)
    if dim % 2:
        fail(ValueError, "dim", "an even number", dim)
    if layout not in ("interleaved", "concatenated"):
        fail(ValueError, "layout", "'interleaved' or 'concatenated'", describe(layout))
    half = dim // 2
    step = torch.arange(half, dtype=torch.float64, device=positions.device) / (half - 1 if endpoint else half)
    angle = positions.to(torch.float64)[..., None] * check_number("base", base) ** -step
    if layout == "interleaved":
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(dtype)
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype)

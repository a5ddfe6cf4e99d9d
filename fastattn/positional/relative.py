"""KERPLE and Sandwich: biases that are a formula of the distance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn.biases import DistanceBias
from fastattn.validation import check_device, check_floating, check_index, check_number, check_shape, describe, fail


class KERPLE(DistanceBias):
    """Kernelized relative position bias (Chi et al., "KERPLE", NeurIPS 2022), with gradients for both parameters::

        log:    -r1 * ln(1 + r2 * |distance|)          r1, r2 > 0
        power:  -r1 * |distance|^r2                    r1 > 0, 0 < r2 <= 2

    Evaluated at the O(Sq + Sk) distances of a call; the kernel sees a distance table.

    Args:
        r1, r2: (Hq,) floating tensors.
        kind: "log" or "power".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; another kind.
    """

    def __init__(self, r1: Tensor, r2: Tensor, kind: Literal["log", "power"] = "log") -> None:
        self.r1, self.r2 = check_floating("KERPLE.r1", r1), check_floating("KERPLE.r2", r2)
        if r1.dim() != 1:
            fail(ValueError, "KERPLE.r1", "shape (Hq,)", r1)
        check_shape("KERPLE.r2", r2, tuple(r1.shape))
        if kind not in ("log", "power"):
            fail(ValueError, "KERPLE.kind", "'log' or 'power'", describe(kind))
        self.kind = kind

    def __repr__(self) -> str:
        return f"KERPLE(heads={self.r1.shape[0]}, kind={self.kind!r})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return 1, self.r1.shape[0], self.r1.device

    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.r1.dtype, self.r2.dtype)

    def values(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        check_device("KERPLE.r1", self.r1, distance.device)
        check_device("KERPLE.r2", self.r2, distance.device)
        r1, r2, size = self.r1.to(dtype)[:, None], self.r2.to(dtype)[:, None], distance.abs().to(dtype)
        return -r1 * (torch.log1p(r2 * size) if self.kind == "log" else size**r2)


class Sandwich(DistanceBias):
    """Inner products of sinusoidal embeddings as a fixed bias that fades with the distance (Chi et al., "Dissecting
    transformer length extrapolation via the lens of receptive field analysis", ACL 2023)::

        sum over k < dim/2 of cos(distance / base^(2k/dim)) / ratio_h,   ratio_h = 8 (h + 1) / Hq

    Args:
        num_heads: Hq.
        dim: of the embeddings, 128 in the paper.
        base: of their wavelengths.

    Raises:
        TypeError, ValueError: num_heads or dim not an int in range, dim odd.
    """

    def __init__(self, num_heads: int, dim: int = 128, base: float = 10000.0) -> None:
        self.num_heads = check_index("Sandwich.num_heads", num_heads, least=1)
        self.dim = check_index("Sandwich.dim", dim, least=2)
        if dim % 2:
            fail(ValueError, "Sandwich.dim", "an even number", dim)
        self.base = check_number("Sandwich.base", base)

    def __repr__(self) -> str:
        return f"Sandwich(heads={self.num_heads}, dim={self.dim})"

    def _sizes(self) -> tuple[int, int, torch.device]:
        return 1, self.num_heads, torch.device("cpu")

    def _dtype(self) -> torch.dtype:
        return torch.float64

    def values(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        # float64: angles of long distances keep their fraction
        step = torch.arange(0, self.dim, 2, dtype=torch.float64, device=distance.device) / self.dim
        total = torch.cos(distance[:, None] * self.base**-step).sum(-1)
        ratio = torch.arange(1, self.num_heads + 1, dtype=torch.float64, device=distance.device) * 8 / self.num_heads
        return (total / ratio[:, None]).to(dtype)

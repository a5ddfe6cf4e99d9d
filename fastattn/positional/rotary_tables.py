"""From positions and frequencies to the cos and sin tables of `Rotary` and `apply_rotary`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.positional.scaling import RotaryScaling, rotary_frequencies
from fastattn.validation import check_index, describe, fail


def frequencies_of(
    width: int,
    base: float,
    scaling: RotaryScaling | None,
    length: int | None = None,
    *,
    axes: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, float]:
    """inv_freq (width / 2,) and amplitude; with several axes each has the spectrum of width / axes dimensions, one
    after the other (axial rotary embedding: Heo et al., "Rotary position embedding for vision transformer", 2024)."""
    if width % (2 * axes):
        fail(ValueError, "width", f"a multiple of {2 * axes} for {axes} axes", width)
    if scaling is None:
        inv_freq, amplitude = rotary_frequencies(width // axes, base, dtype=dtype), 1.0
    else:
        inv_freq, amplitude = scaling.frequencies(width // axes, base, length, dtype=dtype)
    return inv_freq.repeat(axes), amplitude


def axial_pairs(width: int, axes: int) -> Tensor:
    """(width / 2,) int64: the axis each pair follows in axial rotary embedding, in runs of width / 2 / axes."""
    return torch.arange(axes).repeat_interleave(width // 2 // axes)


def section_pairs(sections: Sequence[int], *, interleaved: bool = False) -> Tensor:
    """(sum(sections),) int64: the axis each pair follows in multimodal rotary embedding (M-RoPE).

    One spectrum is dealt out to the axes (time, height, width): in runs of sections[a] pairs (Wang et al.,
    "Qwen2-VL", 2024), or interleaved, pair 3k + a to axis a for k < sections[a] and the rest to the first axis
    (Qwen3-VL's published code).

    Raises:
        TypeError, ValueError: a section is not an int >= 0; fewer than two sections.
    """
    sizes = [check_index(f"sections[{a}]", size, least=0) for a, size in enumerate(sections)]
    axes, pairs = len(sizes), sum(sizes)
    if axes < 2:
        fail(ValueError, "sections", "at least two numbers", describe(tuple(sizes)))
    if not interleaved:
        return torch.arange(axes).repeat_interleave(torch.tensor(sizes))
    axis = torch.zeros(pairs, dtype=torch.int64)
    for a in range(1, axes):
        axis[a : axes * sizes[a] : axes] = a
    if [int((axis == a).sum()) for a in range(axes)] != sizes:
        fail(ValueError, "sections", "sizes that interleave: none much larger than the first", describe(tuple(sizes)))
    return axis


def rotary_angles(positions: Tensor, inv_freq: Tensor, axis_of_pair: Tensor | None = None) -> Tensor:
    """positions * inv_freq, in the dtype of inv_freq.

    Args:
        positions: (..., S) integer or floating; with `axis_of_pair` (axes, ..., S).
        inv_freq: (R/2,).
        axis_of_pair: (R/2,) integer, the axis whose position turns each pair.

    Returns:
        (..., S, R/2), differentiable in inv_freq.
    """
    positions = positions.to(inv_freq.dtype)
    if axis_of_pair is None:
        return positions[..., None] * inv_freq
    return positions[axis_of_pair].movedim(0, -1) * inv_freq


def rotary_tables(
    angles: Tensor, amplitude: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """amplitude * cos and amplitude * sin of the angles, rounded once to `dtype`."""
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def xpos_scale(positions: Tensor, width: int, center: float, scale_base: float = 512.0) -> Tensor:
    """zeta_k^((p - center) / scale_base) with zeta_k = (2k + 0.4 R) / (1.4 R): what xPos multiplies the query tables
    by, and divides the key tables by (Sun et al., "A length-extrapolatable transformer", 2023).

    Scores depend on the difference of positions only; the center keeps the factors near 1.

    Returns:
        (..., S, R/2) float64 for positions (..., S).
    """
    zeta = (torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) + 0.4 * width) / (1.4 * width)
    return zeta ** ((positions.to(torch.float64) - center) / scale_base)[..., None]


def grid_positions(height: int, width: int, prefix: int = 0, *, device: torch.device | str | None = None) -> Tensor:
    """(2, prefix + height * width) int64: row and column of each patch, row by row, for axial rotary embedding.

    `prefix` tokens in front (class and register tokens) are at (0, 0), where nothing turns.
    """
    height, width = check_index("height", height, least=0), check_index("width", width, least=0)
    rows = torch.arange(height, device=device).repeat_interleave(width)
    cols = torch.arange(width, device=device).repeat(height)
    front = torch.zeros(2, check_index("prefix", prefix, least=0), dtype=torch.int64, device=device)
    return torch.cat((front, torch.stack((rows, cols))), dim=1)

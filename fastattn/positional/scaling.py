"""Rotary frequencies and the rules that stretch them to longer contexts.

A rule gives inv_freq (R/2,), the angle per position of each pair, and an amplitude that multiplies cos and sin.  All
are computed in float64.  With ``dtype=torch.float32`` each takes the steps of the published float32 code in their
order, and reproduces the tables of existing checkpoints bit for bit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.validation import check_index, check_number, describe, fail


def rotary_frequencies(width: int, base: float = 10000.0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """inv_freq[k] = base^(-2k / width) of the `width` dimensions that rotate (Su et al., "RoFormer", 2021).

    Returns:
        (width / 2,) tensor of `dtype`.

    Raises:
        TypeError, ValueError: width is not an even int >= 2; base is not a finite number > 0.
    """
    width = check_index("width", width, least=2)
    if width % 2:
        fail(ValueError, "width", "an even number of dimensions", width)
    if check_number("base", base) <= 0:
        fail(ValueError, "base", "a number > 0", base)
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.int64).to(dtype) / width))


class RotaryScaling(ABC):
    """A rule for longer contexts than the model was trained on."""

    # whether the tables depend on how long the sequence at hand is
    needs_length = False

    @abstractmethod
    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        """inv_freq (width / 2,) and amplitude, for sequences of `length` positions where the rule looks at that."""


def _positive(owner: str, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and check_number(f"{owner}.{name}", number) <= 0:
            fail(ValueError, f"{owner}.{name}", "a number > 0", number)


@dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: every frequency divided by `factor` (Chen et al., "Extending context window of large
    language models via positional interpolation", 2023)."""

    factor: float

    def __post_init__(self) -> None:
        _positive("LinearScaling", factor=self.factor)

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        return rotary_frequencies(width, base, dtype=dtype) / self.factor, 1.0


@dataclass(frozen=True)
class NTKScaling(RotaryScaling):
    """NTK-aware: the base times factor^(R / (R - 2)), so that the slowest pair slows by `factor` and the fastest does
    not (bloc97, 2023; described in Peng et al., "YaRN", 2024, section 3.1)."""

    factor: float

    def __post_init__(self) -> None:
        _positive("NTKScaling", factor=self.factor)

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        return rotary_frequencies(width, _stretched(base, self.factor, width), dtype=dtype), 1.0


@dataclass(frozen=True)
class DynamicNTKScaling(RotaryScaling):
    """NTK-aware with a factor that grows with the sequence: factor * L / original_length - (factor - 1) for
    L > original_length, 1 up to there (emozilla, 2023; the "dynamic" rule of transformers).

    The tables depend on the length, so keys that were rotated and cached at another length do not fit: let
    `fastattn.attention` rotate them (`RotaryEmbedding.forward`).
    """

    factor: float
    original_length: int
    needs_length = True

    def __post_init__(self) -> None:
        _positive("DynamicNTKScaling", factor=self.factor)
        check_index("DynamicNTKScaling.original_length", self.original_length, least=1)

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        length = self.original_length if length is None else max(length, self.original_length)
        stretch = (self.factor * length / self.original_length) - (self.factor - 1)
        return rotary_frequencies(width, _stretched(base, stretch, width), dtype=dtype), 1.0


def _stretched(base: float, factor: float, width: int) -> float:
    if width <= 2:
        fail(ValueError, "width", "more than 2 rotating dimensions for an NTK-aware rule", width)
    return base * factor ** (width / (width - 2))


@dataclass(frozen=True)
class YaRNScaling(RotaryScaling):
    """YaRN: fast pairs keep their frequency, slow ones are divided by `factor`, with a ramp between; cos and sin are
    multiplied by 0.1 ln(factor) + 1, so scores by its square (Peng et al., "YaRN", 2024).

    Args:
        factor: stretch of the context.
        original_length: positions the model was trained on.
        beta_fast, beta_slow: rotations over the original length above which a pair keeps its frequency, and below
            which it is interpolated in full.
        attention_factor: the amplitude, where it is not the paper's.
        mscale, mscale_all_dim: DeepSeek's variant: amplitude (0.1 mscale ln f + 1) / (0.1 mscale_all_dim ln f + 1).
        truncate: whether the ends of the ramp are rounded to whole pairs (gpt-oss does not).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _positive(
            "YaRNScaling", factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow,
            attention_factor=self.attention_factor,
        )  # fmt: skip
        check_index("YaRNScaling.original_length", self.original_length, least=1)

    def _amplitude(self) -> float:
        def of(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)

    def _ramp(self, width: int, base: float, dtype: torch.dtype) -> Tensor:
        """0 where a pair keeps its frequency, 1 where it is interpolated."""

        def pair_that_turns(rotations: float) -> float:
            return (width * math.log(self.original_length / (rotations * 2 * math.pi))) / (2 * math.log(base))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001  # the published code's way out of 0 / 0
        return torch.clamp((torch.arange(width // 2, dtype=dtype) - low) / (high - low), 0, 1)

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        kept = rotary_frequencies(width, base, dtype=dtype)
        slowed = 1.0 / (self.factor * base ** (torch.arange(0, width, 2).to(dtype) / width))
        keep = 1 - self._ramp(width, base, dtype)
        return slowed * (1 - keep) + kept * keep, self._amplitude()


@dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's rule: wavelengths above original_length / low_frequency_factor are stretched by `factor`, those
    below original_length / high_frequency_factor stay, and between them frequencies are interpolated (Grattafiori et
    al., "The Llama 3 herd of models", 2024, and its published code)."""

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _positive(
            "Llama3Scaling", factor=self.factor, low_frequency_factor=self.low_frequency_factor,
            high_frequency_factor=self.high_frequency_factor,
        )  # fmt: skip
        check_index("Llama3Scaling.original_length", self.original_length, least=1)
        if self.low_frequency_factor >= self.high_frequency_factor:
            fail(
                ValueError, "Llama3Scaling.low_frequency_factor",
                f"less than high_frequency_factor = {self.high_frequency_factor}", self.low_frequency_factor,
            )  # fmt: skip

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        kept = rotary_frequencies(width, base, dtype=dtype)
        wavelength = 2 * math.pi / kept
        longest = self.original_length / self.low_frequency_factor
        shortest = self.original_length / self.high_frequency_factor
        span = self.high_frequency_factor - self.low_frequency_factor
        smooth = (self.original_length / wavelength - self.low_frequency_factor) / span
        between = (1 - smooth) * kept / self.factor + smooth * kept
        ends = torch.where(wavelength > longest, kept / self.factor, kept)
        return torch.where((wavelength < shortest) | (wavelength > longest), ends, between), 1.0


@dataclass(frozen=True)
class LongRoPEScaling(RotaryScaling):
    """LongRoPE: a searched divisor for every pair, one list up to the original length and one beyond it, and an
    amplitude sqrt(1 + ln(factor) / ln(original_length)) (Ding et al., "LongRoPE", 2024; Phi-3 in transformers).

    Args:
        short_factors, long_factors: R/2 numbers each.
        original_length: positions the model was trained on.
        factor: longest length over the original one; only the amplitude depends on it.
        attention_factor: the amplitude, where it is not the paper's.
    """

    short_factors: Sequence[float]
    long_factors: Sequence[float]
    original_length: int
    factor: float = 1.0
    attention_factor: float | None = None
    needs_length = True

    def __post_init__(self) -> None:
        _positive("LongRoPEScaling", factor=self.factor, attention_factor=self.attention_factor)
        check_index("LongRoPEScaling.original_length", self.original_length, least=2)
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))

    def frequencies(
        self, width: int, base: float, length: int | None = None, *, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, float]:
        is_long = length is not None and length > self.original_length
        name, divisors = ("long_factors", self.long_factors) if is_long else ("short_factors", self.short_factors)
        if len(divisors) != width // 2:
            fail(ValueError, f"LongRoPEScaling.{name}", f"R/2 = {width // 2} numbers", f"{len(divisors)}")
        amplitude = self.attention_factor
        if amplitude is None:
            amplitude = 1.0
            if self.factor > 1:
                amplitude = math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        exponent = torch.arange(0, width, 2, dtype=torch.int64).to(dtype) / width
        return 1.0 / (torch.tensor(divisors, dtype=dtype) * base**exponent), amplitude


def scaling_from_config(parameters: Mapping[str, Any], max_positions: int) -> RotaryScaling | None:
    """The rule that a transformers configuration names: its `rope_parameters` (formerly `rope_scaling`) and
    `max_position_embeddings`.  None for the default rule.

    Raises:
        ValueError: a rule that fastattn does not have.
        KeyError: a number the rule needs is missing.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    factor = parameters.get("factor")
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(parameters["factor"])
    if kind == "dynamic":
        return DynamicNTKScaling(parameters["factor"], max_positions)  # measured against max_positions, as there
    if kind == "yarn":
        original = parameters["original_max_position_embeddings"]
        return YaRNScaling(
            factor=max_positions / original if factor is None else factor,
            original_length=original,
            beta_fast=parameters.get("beta_fast") or 32.0,
            beta_slow=parameters.get("beta_slow") or 1.0,
            attention_factor=parameters.get("attention_factor"),
            mscale=parameters.get("mscale"),
            mscale_all_dim=parameters.get("mscale_all_dim"),
            truncate=parameters.get("truncate", True),
        )
    if kind == "llama3":
        return Llama3Scaling(
            factor=parameters["factor"],
            low_frequency_factor=parameters["low_freq_factor"],
            high_frequency_factor=parameters["high_freq_factor"],
            original_length=parameters["original_max_position_embeddings"],
        )
    if kind == "longrope":
        original = parameters["original_max_position_embeddings"]
        return LongRoPEScaling(
            short_factors=parameters["short_factor"],
            long_factors=parameters["long_factor"],
            original_length=original,
            factor=max_positions / original if factor is None else factor,
            attention_factor=parameters.get("attention_factor"),
        )
    return fail(ValueError, "rope_type", "default, linear, dynamic, yarn, llama3 or longrope", describe(kind))

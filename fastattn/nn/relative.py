"""Relative position biases of the distance, as modules: each call gives the `bias` argument of `fastattn.attention`.

A bias that all layers share, as in T5, is one module that all layers call.  With a cache of keys nothing changes:
`attention` puts the last query on the last key, or the first one on `query_offset`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

import fastattn
from fastattn.biases import alibi_slopes
from fastattn.nn.full_precision import FullPrecision
from fastattn.positional import fire, relative
from fastattn.validation import check_index

__all__ = ["FIRE", "KERPLE", "ALiBi", "ClippedBias", "T5Bias"]

INITIAL_STD = 0.02


class T5Bias(nn.Module):
    """T5's bucketed bias with its table, `weight` (num_buckets, num_heads): loads `relative_attention_bias.weight`.

    T5 shares it over the layers of a stack, has none in cross-attention and no 1/sqrt(D): pass scale=1.0.
    Formula and errors: `fastattn.T5Bias`.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=INITIAL_STD)
        self()  # checks the numbers now

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        sides = f"bidirectional={self.bidirectional}"
        return f"{heads}, num_buckets={buckets}, max_distance={self.max_distance}, {sides}"

    def forward(self) -> fastattn.T5Bias:
        return fastattn.T5Bias(self.weight, self.bidirectional, self.max_distance)


class ALiBi(FullPrecision):
    """ALiBi with the published slopes for any head count, fixed or learned from there; float32 whatever the model is.

    Args:
        num_heads: H.
        learned: the slopes are a parameter, `slopes` (H,); otherwise there is no state.
        sides: "symmetric": the same slope before and after the query, which under a causal mask is the paper's form.
            "asymmetric": half the heads look back only and half look ahead only, each half with the slopes of H/2
            heads (the authors' suggestion for bidirectional models).

    Formula and errors: `fastattn.ALiBi`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        learned: bool = False,
        sides: Literal["symmetric", "asymmetric"] = "symmetric",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if sides not in ("symmetric", "asymmetric"):
            raise ValueError(f"sides: expected 'symmetric' or 'asymmetric', got {sides!r}")
        if sides == "asymmetric" and num_heads % 2:
            raise ValueError(f"num_heads: expected an even number for asymmetric ALiBi, got {num_heads}")
        self.sides = sides
        slopes = alibi_slopes(num_heads, device=device)
        if sides == "asymmetric":
            slopes = alibi_slopes(num_heads // 2, device=device).repeat(2)
        if learned:
            self.slopes = nn.Parameter(slopes)
        else:
            self.register_buffer("slopes", slopes, persistent=False)

    def extra_repr(self) -> str:
        return f"{len(self.slopes)}, learned={isinstance(self.slopes, nn.Parameter)}, sides={self.sides!r}"

    def forward(self) -> fastattn.ALiBi:
        if self.sides == "symmetric":
            return fastattn.ALiBi(self.slopes)
        half = len(self.slopes) // 2
        hidden = self.slopes.new_full((half,), float("inf"))
        return fastattn.ALiBi(torch.cat((self.slopes[:half], hidden)), torch.cat((hidden, self.slopes[half:])))


class ClippedBias(nn.Module):
    """One learned number per head and distance clipped to [-left, right]: `table` (num_heads, left + right + 1).

    The scalar form of Shaw et al. (2018), as used by music and vision transformers.  Lowers to `DistanceTable`.
    """

    def __init__(
        self,
        num_heads: int,
        left: int,
        right: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.left = check_index("left", left, least=0)
        right = left if right is None else check_index("right", right, least=0)
        self.table = nn.Parameter(torch.empty(num_heads, left + right + 1, device=device, dtype=dtype))
        nn.init.normal_(self.table, std=INITIAL_STD)

    def extra_repr(self) -> str:
        return f"{self.table.shape[0]}, left={self.left}, right={self.table.shape[1] - 1 - self.left}"

    def forward(self) -> fastattn.DistanceTable:
        return fastattn.DistanceTable(self.table, left=self.left)


class KERPLE(nn.Module):
    """KERPLE with its two parameters per head, `r1` and `r2` (H,), drawn as in the authors' code.

    They are used clamped to their range, and the gradient passes through the clamp, so that a parameter that left its
    range can come back.  Formula and errors: `fastattn.positional.relative.KERPLE`.
    """

    def __init__(
        self,
        num_heads: int,
        kind: Literal["log", "power"] = "log",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.r1 = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.r2 = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        nn.init.uniform_(self.r1, 0.0, 2.0 if kind == "log" else 1.0)
        nn.init.uniform_(self.r2, 0.0, 1.0 if kind == "log" else 2.0)
        self()

    def extra_repr(self) -> str:
        return f"{len(self.r1)}, kind={self.kind!r}"

    def forward(self) -> relative.KERPLE:
        return relative.KERPLE(_within(self.r1), _within(self.r2, None if self.kind == "log" else 2.0), self.kind)


def _within(x: Tensor, most: float | None = None, least: float = 1e-2) -> Tensor:
    """x clamped, with the gradient of x."""
    return x + (x.clamp(least, most) - x).detach()


class FIRE(nn.Module):
    """FIRE with its network (1 -> width -> num_heads, ReLU), `c` and the learned multiple of the threshold.

    Formula, memory and errors: `fastattn.positional.fire.FIRE`.

    Args:
        num_heads: H.
        width: of the hidden layer.
        initial_c: of psi(x) = ln(|c x| + 1).
        initial_threshold: positions from which on distances are relative to the query's position.
    """

    def __init__(
        self,
        num_heads: int,
        width: int = 32,
        initial_c: float = 0.1,
        initial_threshold: float = 512.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.network = nn.Sequential(nn.Linear(1, width, **where), nn.ReLU(), nn.Linear(width, num_heads, **where))
        self.c = nn.Parameter(torch.tensor(initial_c, **where))
        self.initial_threshold = initial_threshold
        self.threshold_multiple = nn.Parameter(torch.tensor(1.0, **where))

    def forward(self) -> fire.FIRE:
        return fire.FIRE(self.network, self.c, self.threshold_multiple * self.initial_threshold)

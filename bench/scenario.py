"""The vocabulary of the bench: sizes, cases, and what a scenario is; they are in scenarios.py and encodings.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastattn

ALL_HEADS = slice(None)


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; fewer KV heads than heads is GQA."""

    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    kv_heads: int = 0  # 0 = heads
    value_dim: int = 0  # 0 = head_dim

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def offset(self) -> int:
        return self.key_length - self.query_length


@dataclass(frozen=True)
class Case:
    """One row of a suite: a scenario at a size, in a dtype, in some directions."""

    suite: str
    scenario: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    directions: tuple[str, ...] = ("forward", "both")

    @property
    def name(self) -> str:
        """Scenario, with GQA said where the shape has it: names the line of a plot."""
        grouped = self.shape.kv_heads != self.shape.heads
        return f"{self.scenario}-gqa" if grouped else self.scenario


Extras = dict[str, Tensor]


@dataclass(frozen=True)
class Scenario:
    """One feature.  `dense_mask` and `dense_bias` return tensors broadcastable to (B, heads, Sq, Sk).

    A parameter that all heads share has head dim None.  The extras that `dense_bias` gets hold the query and key of
    the call as well, for those heads: "_query", "_key".
    """

    name: str
    title: str
    draw: Callable[[Shape, torch.Generator], Extras] = lambda shape, generator: {}
    arguments: Callable[[Shape, Extras], dict[str, object]] = lambda shape, extras: {}
    dense_mask: Callable[[Shape, Extras], Tensor] | None = None
    dense_bias: Callable[[Shape, Extras, slice], Tensor] | None = None
    mask_mod: Callable[[Shape, Extras], Callable[..., Tensor]] | None = None
    score_mod: Callable[[Shape, Extras], Callable[..., Tensor]] | None = None
    visible: Callable[[Shape, Extras], float] = lambda shape, extras: 1.0  # share of the (i, j) pairs that FLOPs count
    parameters: Mapping[str, int | None] = field(default_factory=dict)  # extras with a gradient -> head dim
    # what is done to queries and keys before their product, for some heads: rotations, normalization
    transform: Callable[[Shape, Extras, Tensor, Tensor, slice], tuple[Tensor, Tensor]] | None = None
    # what is added to weights (B, heads, Sq, Sk) times values
    value_term: Callable[[Shape, Extras, Tensor, slice], Tensor] | None = None
    without: str = "plain"  # the scenario that is left when this one's feature is taken away
    name_of_function: str = "attention"  # of fastattn, that `arguments` are for
    # columns that fastattn appends to the head dimension for it: longer sums have larger rounding errors
    appended: Callable[[Shape], int] = lambda shape: 0
    of_content: bool = False  # the bias depends on queries or keys
    softcap: float = 0.0
    dropout_p: float = 0.0
    sink: bool = False
    causal: bool = False  # exactly the causal mask: peers may use their flag for it
    empty_rows: bool = False  # some query sees no key at all: the answer is 0
    numbers: torch.dtype | None = None  # queries, keys and values are numbers of this dtype, whatever they are held in

    @property
    def function(self) -> Callable[..., Tensor]:
        """Looked up at each call, so that a test may replace it."""
        return getattr(fastattn, self.name_of_function)


def positions(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query positions (Sq, 1) and key positions (1, Sk)."""
    rows = torch.arange(shape.query_length, device=device)[:, None] + shape.offset
    return rows, torch.arange(shape.key_length, device=device)[None, :]


def distances(shape: Shape, device: torch.device) -> Tensor:
    """j - position(i), (Sq, Sk)."""
    rows, cols = positions(shape, device)
    return cols - rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """RoFormer's rotation of x (..., S, D) by cos, sin (S, R/2), R <= D; pairs (k, k + R/2), or (2k, 2k+1)."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((pairs.flatten(-2), rest), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

"""Every encoding that can be the `position` of an attention module, and whether a causal cache makes sense for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastattn
from fastattn import nn as fnn
from fastattn.positional import DynamicNTKScaling, YaRNScaling

# What the factories are made for.
HEADS, HEAD_DIM, LENGTH = 4, 8, 12
WIDTH = HEADS * HEAD_DIM


class Disentangled(torch.nn.Module):
    """DeBERTa's bias with relative embeddings of its own: how a model hands its own to `DisentangledBias`."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = fnn.DisentangledBias(WIDTH, HEADS, max_distance=16, buckets=8)
        self.embeddings = torch.nn.Parameter(torch.randn(16, WIDTH))

    def forward(self) -> fastattn.Disentangled:
        return self.bias(self.embeddings)


@dataclass(frozen=True)
class Case:
    make: Callable[[], object]
    no_cache: str = ""  # why decoding with it does not equal one forward over everything
    no_sliding: str = ""  # the same for a cache that drops keys
    table_eps: float = 0.0  # rounding of tables that are others for another length


_FIXED = torch.linspace(-1, 1, HEADS * LENGTH * LENGTH).view(HEADS, LENGTH, LENGTH).sin()

CASES: dict[str, Case] = {
    "none": Case(lambda: None),
    "rotary": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM)),
    "rotary-interleaved-partial": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM, width=4, interleaved=True)),
    "rotary-trailing": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM, width=4, trailing=True)),
    "rotary-yarn": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM, scaling=YaRNScaling(4.0, 8))),
    "rotary-dynamic-ntk": Case(
        lambda: fnn.RotaryEmbedding(HEAD_DIM, scaling=DynamicNTKScaling(2.0, 4)),
        no_cache="its frequencies are those of the whole length, which earlier steps do not know",
        no_sliding="as static",
    ),
    # the tables are float32, and centered in the middle of the length
    "rotary-xpos": Case(
        lambda: fnn.RotaryEmbedding(HEAD_DIM, xpos_base=512.0), table_eps=torch.finfo(torch.float32).eps
    ),
    "rotary-sections": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM, sections=(2, 1, 1))),
    "rotary-learned": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM, learned=True)),
    "rotary-object": Case(lambda: fnn.RotaryEmbedding(HEAD_DIM)(40)),
    "t5": Case(lambda: fnn.T5Bias(HEADS, 8, 20)),
    "t5-one-sided": Case(lambda: fnn.T5Bias(HEADS, 8, 20, bidirectional=False)),
    "alibi": Case(lambda: fnn.ALiBi(HEADS)),
    "alibi-learned": Case(lambda: fnn.ALiBi(HEADS, learned=True)),
    "alibi-asymmetric": Case(lambda: fnn.ALiBi(HEADS, sides="asymmetric")),
    "clipped": Case(lambda: fnn.ClippedBias(HEADS, 5)),
    "kerple-log": Case(lambda: fnn.KERPLE(HEADS)),
    "kerple-power": Case(lambda: fnn.KERPLE(HEADS, "power")),
    "fire": Case(
        lambda: fnn.FIRE(HEADS, initial_threshold=4.0),
        no_sliding="its scale is the position itself, which a bias does not get; raises",
    ),
    "sandwich": Case(lambda: fastattn.Sandwich(HEADS)),
    "shaw": Case(lambda: fnn.ShawAttention(HEAD_DIM, 4)),
    "shaw-keys": Case(lambda: fnn.ShawAttention(HEAD_DIM, 4, values=False)),
    "transformer-xl-columns": Case(lambda: fnn.TransformerXLBias(HEADS, HEAD_DIM, 16)),
    "transformer-xl-dense": Case(lambda: fnn.TransformerXLBias(HEADS, HEAD_DIM, 16, route="dense")),
    "disentangled": Case(Disentangled),
    "cosine": Case(lambda: fnn.CosineAttention(HEADS)),
    "rotary-and-alibi": Case(lambda: [fnn.RotaryEmbedding(HEAD_DIM), fnn.ALiBi(HEADS)]),
    "rotary-and-cosine": Case(lambda: [fnn.RotaryEmbedding(HEAD_DIM), fnn.CosineAttention(HEADS)]),
    "dense": Case(
        lambda: fastattn.DenseBias(_FIXED),
        no_cache="a matrix of one length",
        no_sliding="as static",
    ),
    "swin": Case(
        lambda: fnn.SwinBias(HEADS, (3, 4)),
        no_cache="a window of an image, not causal",
        no_sliding="as static",
    ),
    "swin-v2": Case(
        lambda: fnn.SwinV2Bias(HEADS, (3, 4)),
        no_cache="a window of an image, not causal",
        no_sliding="as static",
    ),
    "decomposed": Case(
        lambda: fnn.DecomposedBias(HEAD_DIM, (3, 4)),
        no_cache="the grid of an image, not causal",
        no_sliding="as static",
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> object:
    """The encoding, with parameters that are not trivial."""
    made = CASES[name].make()
    parts = made if isinstance(made, list) else [made]
    for part in parts:
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
            with torch.no_grad():
                for parameter in part.parameters():
                    parameter.add_(0.3 * torch.rand_like(parameter))
    return made

"""Positional encodings in the Triton interpreter, one for each way they reach a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import nn as fnn
from fastattn.positional import (
    FIRE,
    KERPLE,
    Decomposed,
    Disentangled,
    ShawKeys,
    TransformerXL,
    shifted_window_ids,
    window_bias,
)
from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Tile

QUERIES = KEYS = 24


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    kernels = ("forward", "backward_kv", "backward_q", "bias_gradient")
    with tiles.override(**{kernel: Tile(16, 16, 4, 1) for kernel in kernels}):
        yield


def _cases() -> dict[str, object]:
    """Name -> (parameters, their objects as keywords of `attention`)."""
    return {
        "a table of a formula": ([(2,), (2,)], lambda a, b: {"bias": KERPLE(a.abs() + 0.1, b.abs() + 0.1)}),
        "a table with hidden sides": (
            [(2,)],
            lambda a: {"bias": fastattn.ALiBi(a.abs(), after=torch.full_like(a, float("inf")))},
        ),
        "a row table": ([(7, 16)], lambda e: {"bias": ShawKeys(e)}),
        "a row table written out": ([(7, 16)], lambda e: {"bias": ShawKeys(e, route="dense")}),
        "a row table beside a distance table": (
            [(7, 16), (2, 13)],
            lambda e, t: {"bias": ShawKeys(e) + fastattn.DistanceTable(t, left=9), "mask": fastattn.Causal()},
        ),
        "row and column tables": (
            [(2, 12, 16), (2, 12, 16)],
            lambda k, q: {"bias": Disentangled(k, q, max_distance=16, buckets=8)},
        ),
        "a row table of clamped sinusoids": (
            [(2, 16, 8), (2, 16), (2, 16)],
            lambda w, u, v: {"bias": TransformerXL(w, u, v, clamp=4)},
        ),
        "appended columns": (
            [(2, 16, 8), (2, 16), (2, 16)],
            lambda w, u, v: {"bias": TransformerXL(w, u, v), "mask": fastattn.Causal()},
        ),
        "appended indicators beside a rotation": (
            [(11, 16), (7, 16)],
            lambda r, c: {
                "bias": Decomposed(r, c, (6, 4)),
                "rotary": fnn.RotaryEmbedding(16, width=8, trailing=True)(KEYS),
            },
        ),
        "windows": (
            [(77, 2)],
            lambda t: {
                "bias": fastattn.DenseBias(window_bias(t, (6, 4))),
                "mask": fastattn.Documents(shifted_window_ids(6, 8, (6, 4), (2, 1))),
            },
        ),
        "a network at every pair": (
            [(), ()],
            lambda c, t: {"bias": FIRE(torch.nn.Linear(1, 2, bias=False).requires_grad_(False), c, t.abs() + 4)},
        ),
    }


@pytest.mark.parametrize("name", _cases())
def test_like_the_reference(name: str) -> None:
    shapes, make = _cases()[name]  # type: ignore[misc]
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, QUERIES, 16, requires_grad=True) for _ in range(3)]
    leaves += [torch.randn(shape, requires_grad=True) for shape in shapes]
    results: list[list[Tensor]] = []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        out = fastattn.attention(*leaves[:3], **make(*leaves[3:]), backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, want in zip(*results, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)

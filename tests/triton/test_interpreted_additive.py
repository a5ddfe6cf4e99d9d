"""The Triton kernels of additive attention in the interpreter: masks, biases, dropout, gradients, what may not leak.

float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

from __future__ import annotations

import math

import pytest
import torch
from additive_oracle import AdditiveCall
from features import BIASES, CONTENT, MASKS, Shape
from oracle import check

import fastattn
from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Tile

SHAPE = Shape(batch=2, heads=2, kv_heads=1, query_length=17, key_length=21, head_dim=3, value_dim=5)
DTYPES = (torch.float32, torch.float16)
TILE = Tile(16, 16, 4, 1)


@pytest.mark.parametrize("feature", [None, *MASKS, *BIASES, *CONTENT])
def test_feature(feature: str | None) -> None:
    """Tiles are small, so that the shape has full and partial ones."""
    with tiles.override(additive=TILE):
        check(AdditiveCall(() if feature is None else (feature,), SHAPE), "triton")


@pytest.mark.parametrize(
    "features",
    [("causal", "alibi", "table"), ("documents", "dense_keys")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composition(dtype: torch.dtype, features: tuple[str, ...]) -> None:
    check(AdditiveCall(features, SHAPE, dtype, scale=0.5, dropout_p=0.3), "triton")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 1, 1, 1),
        Shape(1, 2, 2, 33, 16, 17, 1),
        Shape(1, 4, 1, 15, 65, 3, 40),
    ],
    ids=lambda s: f"{s.query_length}x{s.key_length}x{s.head_dim}",
)
def test_sizes(shape: Shape) -> None:
    check(AdditiveCall(("causal",), shape, offset=-2), "triton")


@pytest.mark.parametrize("size", [1e-6, 0.2, 15.0, 1e4])
def test_small_and_large_operands(size: float) -> None:
    call = AdditiveCall((), SHAPE, scale=0.2)
    for name in ("query", "key"):
        call.leaves[name] = call.leaves[name] * size
    check(call, "triton")


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_empty(size: tuple[int, ...]) -> None:
    batch, heads, queries, keys = size
    query, key, value = (torch.randn(batch, heads, n, 5, requires_grad=True) for n in (queries, keys, keys))
    weight, table = torch.randn(heads, 5, requires_grad=True), torch.randn(heads, 3, requires_grad=True)
    out = fastattn.additive_attention(query, key, value, weight, bias=fastattn.DistanceTable(table), backend="triton")
    assert out.shape == (batch, heads, queries, 5)
    for grad in torch.autograd.grad(out.sum(), (query, key, weight, table)):
        assert (grad == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_of_a_masked_key_is_seen(value: float) -> None:
    results = []
    for fill in (0.0, value):
        call = AdditiveCall((), SHAPE)
        leaves = {n: t.clone() for n, t in call.leaves.items()}
        for name in ("key", "value"):
            leaves[name][0, :, 5:] = fill
            leaves[name][1] = fill
        operands = [leaves[n].requires_grad_() for n in ("query", "key", "value", "weight")]
        lengths = fastattn.KeyLengths(torch.tensor([5, 0]))
        out = fastattn.additive_attention(*operands, mask=lengths, backend="triton")
        grad = call.grad_out.clone()
        grad[1] = fill  # of rows that see nothing
        results.append((out, *torch.autograd.grad(out, operands, grad)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_is_seen_where_it_is_visible(name: str) -> None:
    leaves = {n: torch.randn(1, 1, 9, 3) for n in ("query", "key", "value")}
    leaves[name][0, 0, 4, 1] = math.nan
    operands = [t.requires_grad_() for t in leaves.values()]
    out = fastattn.additive_attention(*operands, torch.randn(3), mask=fastattn.Causal(), backend="triton")
    sees = torch.arange(9) == 4 if name == "query" else torch.arange(9) >= 4
    assert torch.equal(out[0, 0].isfinite().all(-1), ~sees)
    (dquery,) = torch.autograd.grad(out.sum(), operands[:1])
    assert torch.equal(dquery[0, 0].isfinite().all(-1), ~sees)
    assert fastattn.last_call().kernel == "triton additive attention (interpreter)"

"""The Triton masked softmax in the interpreter: every mask and bias, forward and gradients, in one pass and in two."""

from __future__ import annotations

import math

import bodies
import pytest
import torch
from features import BIASES, MASKS, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from softmax_oracle import SoftmaxCall, check

import fastattn
from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Tile

SHAPE = Shape(heads=2, query_length=7, key_length=45)
# Parts of rows instead of whole rows, at a size where several are needed.
PARTS = Tile(1, 16, 4, 1)
DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature(feature: str, dtype: torch.dtype) -> None:
    check(SoftmaxCall((feature,), SHAPE, dtype), "triton")


@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature_in_parts(feature: str) -> None:
    with tiles.override(rows=PARTS):
        check(SoftmaxCall((feature,), SHAPE), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 129, 1000, 17000])
def test_row_length(length: int, dtype: torch.dtype) -> None:
    """17000 does not fit a program's registers: its rows take two passes."""
    shape = Shape(batch=1, heads=1, query_length=2, key_length=length)
    check(SoftmaxCall((), shape, dtype), "triton")
    check(SoftmaxCall(("window_left", "alibi"), shape, dtype, scale=0.3), "triton")


def test_the_tile_is_one_row_until_16384_columns() -> None:
    for columns in (1, 2, 16, 17, 2048, 2049, 16384):
        tile = tiles.row_tile(columns)
        assert columns <= tile.BN and tile.BM * tile.BN <= 16384, columns
    assert tiles.row_tile(16385).BN < 16385


@settings(max_examples=25)
@given(data=st.data())
def test_composition(data: st.DataObject) -> None:
    names = (*data.draw(st.permutations(MASKS), "masks")[: data.draw(st.integers(0, 2))],)
    names += (*data.draw(st.permutations(BIASES), "biases")[: data.draw(st.integers(0, 2))],)
    shape = Shape(
        batch=data.draw(st.integers(1, 2)),
        heads=data.draw(st.integers(1, 3)),
        query_length=data.draw(st.integers(1, 20)),
        key_length=data.draw(st.integers(1, 50)),
    )
    offset = data.draw(st.one_of(st.none(), st.integers(-25, 45), st.just("tensor")))
    if offset == "tensor":
        offset = torch.randint(-9, 30, (shape.batch,))
    scale = data.draw(st.sampled_from([1.0, 0.25, -1.5, 0.0]))
    call = SoftmaxCall(names, shape, data.draw(st.sampled_from(DTYPES)), offset=offset, scale=scale)
    with tiles.override(**({"rows": PARTS} if data.draw(st.booleans(), "in parts") else {})):
        check(call, "triton")


@pytest.mark.parametrize("in_parts", [False, True])
def test_guard_bands(in_parts: bool) -> None:
    with tiles.override(**({"rows": PARTS} if in_parts else {})):
        bodies.softmax_inside_guard_bands("triton", "cpu", SHAPE)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_sees_no_number(value: float, in_parts: bool) -> None:
    scores = torch.randn(1, 2, 4, 40)
    scores[0, 1, 2, 1] = value
    seen = torch.ones(1, 1, 1, 40, dtype=torch.bool)
    seen[..., 3] = False
    with tiles.override(**({"rows": PARTS} if in_parts else {})):
        out = fastattn.masked_softmax(scores, mask=fastattn.BoolMask(seen), backend="triton")
    assert (out[..., 3] == 0).all()
    bad = out.isnan()
    assert bad[0, 1, 2][seen[0, 0, 0]].all()
    bad[0, 1, 2] = False
    assert not bad.any()


@pytest.mark.parametrize("in_parts", [False, True])
def test_low_scores(in_parts: bool) -> None:
    """-inf masks, finfo.min is a number: rows of nothing else are zero and uniform."""
    lowest = torch.finfo(torch.float32).min
    scores = torch.full((1, 1, 3, 20), lowest)
    scores[0, 0, 1] = -math.inf
    scores[0, 0, 2, 5:] = -math.inf
    expected = torch.zeros(3, 20)
    expected[0], expected[2, :5] = 0.05, 0.2
    with tiles.override(**({"rows": PARTS} if in_parts else {})):
        out = fastattn.masked_softmax(scores, backend="triton")
        biased = fastattn.masked_softmax(torch.randn(1, 1, 3, 20), bias=fastattn.DenseBias(scores), backend="triton")
    torch.testing.assert_close(out[0, 0], expected)
    torch.testing.assert_close(biased[0, 0], expected)


def test_gradients_are_the_same_bits_on_every_run() -> None:
    bodies.the_same_bits_on_every_run("triton", "cpu", SoftmaxCall(("causal", "alibi", "table", "dense_keys"), SHAPE))


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty(size: tuple[int, ...]) -> None:
    scores, table = torch.randn(size, requires_grad=True), torch.randn(size[1], 5, requires_grad=True)
    out = fastattn.masked_softmax(scores, bias=fastattn.DistanceTable(table), backend="triton")
    assert out.shape == size
    out.sum().backward()
    assert (table.grad == 0).all()

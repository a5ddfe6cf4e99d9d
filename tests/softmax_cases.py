"""Cases of the masked softmax that every GPU backend's kernels must pass, wherever they run."""

from __future__ import annotations

import math

import pytest
import torch
from features import BIASES, MASKS, Shape
from hypothesis import strategies as st
from softmax_oracle import SoftmaxCall

import fastattn

SHAPE = Shape(heads=2, query_length=7, key_length=45)


def draw_composition(data: st.DataObject, dtypes: tuple[torch.dtype, ...]) -> SoftmaxCall:
    """Up to two masks and two biases at any small shape, offset and scale."""
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
    return SoftmaxCall(names, shape, data.draw(st.sampled_from(dtypes)), offset=offset, scale=scale)


def check_a_row_that_sees_no_number(backend: str, value: float, columns: int = 40) -> None:
    scores = torch.randn(1, 2, 4, columns)
    scores[0, 1, 2, 1] = value
    seen = torch.ones(1, 1, 1, columns, dtype=torch.bool)
    seen[..., 3] = False
    out = fastattn.masked_softmax(scores, mask=fastattn.BoolMask(seen), backend=backend)
    assert (out[..., 3] == 0).all()
    bad = out.isnan()
    assert bad[0, 1, 2][seen[0, 0, 0]].all()
    bad[0, 1, 2] = False
    assert not bad.any()


def check_low_scores(backend: str) -> None:
    """-inf masks, finfo.min is a number: rows of nothing else are zero and uniform."""
    lowest = torch.finfo(torch.float32).min
    scores = torch.full((1, 1, 3, 20), lowest)
    scores[0, 0, 1] = -math.inf
    scores[0, 0, 2, 5:] = -math.inf
    expected = torch.zeros(3, 20)
    expected[0], expected[2, :5] = 0.05, 0.2
    out = fastattn.masked_softmax(scores, backend=backend)
    biased = fastattn.masked_softmax(torch.randn(1, 1, 3, 20), bias=fastattn.DenseBias(scores), backend=backend)
    torch.testing.assert_close(out[0, 0], expected)
    torch.testing.assert_close(biased[0, 0], expected)


EMPTY = [pytest.param(size, id=str(size)) for size in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0))]


def check_empty(backend: str, size: tuple[int, ...]) -> None:
    scores, table = torch.randn(size, requires_grad=True), torch.randn(size[1], 5, requires_grad=True)
    out = fastattn.masked_softmax(scores, bias=fastattn.DistanceTable(table), backend=backend)
    assert out.shape == size
    out.sum().backward()
    assert (table.grad == 0).all()

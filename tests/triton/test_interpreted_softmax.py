"""The Triton masked softmax in the interpreter: every mask and bias, forward and gradients, in one pass and in two."""

from __future__ import annotations

import math
from collections.abc import Iterator

import bodies
import pytest
import torch
from features import BIASES, MASKS, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from softmax_cases import (
    EMPTY,
    SHAPE,
    check_a_row_that_sees_no_number,
    check_empty,
    check_low_scores,
    draw_composition,
)
from softmax_oracle import SoftmaxCall, check

from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Tile

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
    call = draw_composition(data, DTYPES)
    with tiles.override(**({"rows": PARTS} if data.draw(st.booleans(), "in parts") else {})):
        check(call, "triton")


@pytest.fixture(params=[False, True], ids=["whole", "in parts"])
def in_parts(request: pytest.FixtureRequest) -> Iterator[None]:
    with tiles.override(**({"rows": PARTS} if request.param else {})):
        yield


@pytest.mark.usefixtures("in_parts")
def test_guard_bands() -> None:
    bodies.softmax_inside_guard_bands("triton", "cpu", SHAPE)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_sees_no_number(value: float) -> None:
    check_a_row_that_sees_no_number("triton", value)


@pytest.mark.usefixtures("in_parts")
def test_low_scores() -> None:
    check_low_scores("triton")


def test_gradients_are_the_same_bits_on_every_run() -> None:
    bodies.the_same_bits_on_every_run("triton", "cpu", SoftmaxCall(("causal", "alibi", "table", "dense_keys"), SHAPE))


@pytest.mark.parametrize("size", EMPTY)
def test_empty(size: tuple[int, ...]) -> None:
    check_empty("triton", size)

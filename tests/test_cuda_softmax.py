"""The CUDA masked softmax in the simulator: every mask and bias, forward and gradients, in one pass and in two, by one
warp and by eight, in wide accesses and in narrow ones."""

from __future__ import annotations

import math

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

pytestmark = pytest.mark.usefixtures("cuda_simulator")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Rows of whole 16-byte vectors; long enough for several warps each, as the simulated device is not filled otherwise.
WIDE = Shape(heads=2, query_length=7, key_length=544)
# More columns than the threads of a block hold at once.
LONG = Shape(batch=1, heads=1, query_length=2, key_length=8201)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature(feature: str, dtype: torch.dtype) -> None:
    check(SoftmaxCall((feature,), SHAPE, dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature_in_wide_accesses(feature: str, dtype: torch.dtype) -> None:
    check(SoftmaxCall((feature,), WIDE, dtype), "cuda")


@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature_in_parts(feature: str) -> None:
    check(SoftmaxCall((feature,), LONG, torch.bfloat16), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 129, 1000, 1024, 4096, 16384])
def test_row_length(length: int, dtype: torch.dtype) -> None:
    shape = Shape(batch=1, heads=1, query_length=2, key_length=length)
    check(SoftmaxCall((), shape, dtype), "cuda")
    check(SoftmaxCall(("window_left", "alibi"), shape, dtype, scale=0.3), "cuda")


@pytest.mark.parametrize(
    ("rows", "length", "threads"),
    [
        (2048, 64, 4),
        (2048, 128, 4),
        (2048, 136, 8),
        (1024, 129, 16),
        (256, 1024, 32),
        (64, 1025, 64),
        (64, 9000, 256),
        (64, 64, 8),
    ],
)
def test_threads_of_a_row(cuda_simulator, rows: int, length: int, threads: int) -> None:
    """As few as hold the row, once there are rows enough to fill the device: 256 of them in a block."""
    cuda_simulator.clear_reports()
    SoftmaxCall((), Shape(batch=1, heads=1, query_length=rows, key_length=length), torch.float16).fused("cuda")
    assert cuda_simulator.reports()[0]["grid"] == (rows * threads // 256, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature_with_several_rows_to_a_warp(feature: str, dtype: torch.dtype) -> None:
    for columns in (40, 37):
        check(SoftmaxCall((feature,), Shape(batch=2, heads=3, query_length=70, key_length=columns), dtype), "cuda")


def test_wide_accesses(cuda_simulator) -> None:
    """What there is of each row is read once and written once, in sectors that are used in full."""
    cuda_simulator.clear_reports()
    call = SoftmaxCall((), WIDE, torch.bfloat16)
    call.fused("cuda")
    forward, backward = cuda_simulator.reports()
    sectors = call.leaves["scores"].numel() * 2 // 32
    for report, operands in ((forward, 1), (backward, 2)):
        assert report["traffic"]["load_constant"]["actual"] == operands * sectors
        assert report["traffic"]["store_global"]["actual"] == sectors


def test_what_is_hidden_is_not_read(cuda_simulator) -> None:
    """A causal square reads half of itself, and the vectors that its diagonal cuts."""
    cuda_simulator.clear_reports()
    shape = Shape(batch=1, heads=1, query_length=256, key_length=256)
    SoftmaxCall(("causal",), shape, torch.bfloat16).fused("cuda")
    forward = cuda_simulator.reports()[0]["traffic"]
    assert forward["load_constant"]["actual"] <= (256 * 257 // 2 + 256 * 15) * 2 // 32
    assert forward["store_global"]["actual"] == 256 * 256 * 2 // 32


@settings(max_examples=40)
@given(data=st.data())
def test_composition(data: st.DataObject) -> None:
    check(draw_composition(data, DTYPES), "cuda")


def test_guard_bands() -> None:
    bodies.softmax_inside_guard_bands("cuda", "cpu", SHAPE)


@pytest.mark.parametrize("columns", [40, 4100])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_sees_no_number(value: float, columns: int) -> None:
    check_a_row_that_sees_no_number("cuda", value, columns)


def test_low_scores() -> None:
    check_low_scores("cuda")


def test_gradients_are_the_same_bits_on_every_run() -> None:
    bodies.the_same_bits_on_every_run("cuda", "cpu", SoftmaxCall(("causal", "alibi", "table", "dense_keys"), SHAPE))


@pytest.mark.parametrize("size", EMPTY)
def test_empty(size: tuple[int, ...]) -> None:
    check_empty("cuda", size)

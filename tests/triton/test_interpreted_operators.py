"""The Triton operators in the interpreter: schema, fake implementation and results, through the tests of the CPU's."""

from __future__ import annotations

import pytest
import test_apply_rotary
import test_masked_softmax
import test_ops
import torch

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("features", test_ops.COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention(dtype: torch.dtype, features: tuple[str, ...]) -> None:
    test_ops.test_opcheck("triton", dtype, features)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_fake_tensors_have_the_strides_of_real_ones(layout: str) -> None:
    test_ops.test_fake_tensors_have_the_strides_of_real_ones("triton", layout)


def test_only_needed_gradients_are_computed() -> None:
    test_ops.test_only_needed_gradients_are_computed("triton")


def test_values_that_cannot_be_checked_are_clamped() -> None:
    test_ops.test_values_that_cannot_be_checked_are_clamped("triton")


@pytest.mark.parametrize("positions", ["none", "each"])
def test_rotary(positions: str) -> None:
    test_apply_rotary.test_opcheck("triton", positions)


SOFTMAX_COMBINATIONS = [
    (),
    ("causal", "alibi"),
    ("window", "table_batch"),
    ("documents", "bool_keys", "dense_infinite"),
]


@pytest.mark.parametrize("features", SOFTMAX_COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype: torch.dtype, features: tuple[str, ...]) -> None:
    test_masked_softmax.test_opcheck("triton", dtype, features)

"""What a mask hides does not reach the Triton kernels' results, what it shows does: the tests of the CPU's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_masked_values as cpu
import torch

from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.tiles import Tile


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    small = Tile(32, 16, 4, 1)
    with tiles.override(
        forward=small, backward_q=small, backward_kv=Tile(16, 32, 4, 1), bias_gradient=Tile(16, 16, 4, 1)
    ):
        yield


@pytest.mark.parametrize("kind", list(cpu._masks()))
def test_masked_keys_do_not_leak(kind: str) -> None:
    cpu.test_masked_keys_do_not_leak(kind, "plain", torch.float32, "triton", "cpu")


@pytest.mark.parametrize("features", ["softcap", "rotary", "table"])
def test_masked_keys_do_not_leak_beside(features: str) -> None:
    cpu.test_masked_keys_do_not_leak("key_lengths+causal", features, torch.float16, "triton", "cpu")


@pytest.mark.parametrize("heads", [1, 3])
def test_what_minus_infinity_hides_does_not_leak(heads: int) -> None:
    cpu.test_what_minus_infinity_hides_does_not_leak(heads, "triton", "cpu")


@pytest.mark.parametrize("kind", cpu.EMPTY_ROWS)
def test_wholly_masked_rows(kind: str) -> None:
    cpu.test_wholly_masked_rows(kind, torch.float32, "triton", "cpu")


@pytest.mark.parametrize(
    "test",
    [
        cpu.test_causal_future_does_not_leak,
        cpu.test_visible_nan_reaches_the_rows_that_see_it,
        cpu.test_everything_masked,
        cpu.test_wholly_masked_rows_with_a_sink,
        cpu.test_minus_infinity_equals_a_bool_mask,
    ],
)
def test_others(test: object) -> None:
    test("triton", "cpu")  # type: ignore[operator]

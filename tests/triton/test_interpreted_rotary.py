"""The Triton rotation by itself in the interpreter: pairings, widths, positions, gradients, in place."""

from __future__ import annotations

import bodies
import pytest
import torch
from rotary_cases import SHAPES, check_empty, check_gradient_of_one_operand
from rotary_oracle import RotaryCall, RotaryShape, check_rotation

import fastattn


@pytest.mark.parametrize("positions", ["none", "shared", "each"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rotation(dtype: torch.dtype, shape: str, interleaved: bool, positions: str) -> None:
    batched = positions == "each"
    call = RotaryCall(SHAPES[shape], dtype, interleaved=interleaved, positions=positions, batched=batched)
    check_rotation(call, "triton")


@pytest.mark.parametrize("empty", ["batch", "heads", "kv_heads", "length"])
def test_empty(empty: str) -> None:
    check_empty("triton", empty)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place_inside_guard_bands(dtype: torch.dtype, interleaved: bool) -> None:
    bodies.rotation_in_place_inside_guard_bands("triton", "cpu", dtype, interleaved)


@pytest.mark.parametrize("which", ["query", "key"])
def test_gradient_of_one_operand(which: str) -> None:
    check_gradient_of_one_operand("triton", which)


def test_it_is_the_kernel_that_runs() -> None:
    RotaryCall(RotaryShape()).run("triton")
    call = fastattn.last_call()
    assert call is not None and (call.backend, call.kernel) == ("triton", "triton rotary (interpreter)")

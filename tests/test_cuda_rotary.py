"""The CUDA rotation by itself in the simulator: pairings, widths, positions, gradients, in place; wide and narrow
accesses."""

from __future__ import annotations

import bodies
import pytest
import torch
from rotary_cases import SHAPES, WIDE, check_empty, check_gradient_of_one_operand
from rotary_oracle import RotaryCall, RotaryShape, check_rotation

import fastattn

pytestmark = pytest.mark.usefixtures("cuda_simulator")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("positions", ["none", "shared", "each"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation(dtype: torch.dtype, shape: str, interleaved: bool, positions: str) -> None:
    batched = positions == "each"
    chosen = (SHAPES | WIDE)[shape]
    check_rotation(RotaryCall(chosen, dtype, interleaved=interleaved, positions=positions, batched=batched), "cuda")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shape", "size"), [("wide", 16), ("wide, partial", 16), ("odd rest", 2)])
def test_accesses_are_as_wide_as_they_can_be(cuda_simulator, shape: str, size: int, interleaved: bool) -> None:
    """Sectors: a kernel of 16-byte accesses moves what its width alone needs, and both operands in one launch."""
    cuda_simulator.clear_reports()
    call = RotaryCall((SHAPES | WIDE)[shape], torch.float16, interleaved=interleaved)
    call.run("cuda")
    (report,) = cuda_simulator.reports()
    elements = call.query.numel() + call.key.numel()
    stores = report["traffic"]["store_global"]
    assert report["kernel"] == "rotary_f16"
    assert stores["requests"] <= elements * 2 / size / 4  # at least 4 of 32 lanes at work in so small a call
    assert (stores["requests"] < elements / 16) == (size == 16)


@pytest.mark.parametrize("empty", ["batch", "heads", "kv_heads", "length"])
def test_empty(empty: str) -> None:
    check_empty("cuda", empty)


@pytest.mark.parametrize("shape", [None, WIDE["wide, partial"]], ids=["narrow", "wide"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_inside_guard_bands(dtype: torch.dtype, interleaved: bool, shape: RotaryShape | None) -> None:
    bodies.rotation_in_place_inside_guard_bands("cuda", "cpu", dtype, interleaved, shape)


@pytest.mark.parametrize("which", ["query", "key"])
def test_gradient_of_one_operand(which: str) -> None:
    check_gradient_of_one_operand("cuda", which)


def test_it_is_the_kernel_that_runs() -> None:
    RotaryCall(RotaryShape()).run("cuda")
    call = fastattn.last_call()
    assert call is not None and (call.backend, call.kernel) == ("cuda", "cuda rotary (simulator)")

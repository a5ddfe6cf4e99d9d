"""The Triton rotation by itself in the interpreter: pairings, widths, positions, gradients, in place."""

from __future__ import annotations

import bodies
import pytest
import torch
from rotary_oracle import RotaryCall, RotaryShape, check_rotation

import fastattn

SHAPES = {
    "usual": RotaryShape(),
    "partial": RotaryShape(dim=24, width=10),
    "odd rest": RotaryShape(dim=13, width=6),
    "many heads": RotaryShape(heads=6, kv_heads=1, length=3),
    "long": RotaryShape(batch=1, heads=1, kv_heads=1, length=300, rows=300, dim=64, width=64),
    "nothing rotates": RotaryShape(dim=8, width=0),
}


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
    call = RotaryCall(RotaryShape(**{empty: 0}), positions="each")
    query, key = call.run("triton")
    torch.testing.assert_close(query.double(), call.exact(call.query), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key.double(), call.exact(call.key), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place_inside_guard_bands(dtype: torch.dtype, interleaved: bool) -> None:
    bodies.rotation_in_place_inside_guard_bands("triton", "cpu", dtype, interleaved)


@pytest.mark.parametrize("which", ["query", "key"])
def test_gradient_of_one_operand(which: str) -> None:
    call = RotaryCall(RotaryShape())
    leaf = getattr(call, which).requires_grad_()
    place = ("query", "key").index(which)
    (grad,) = torch.autograd.grad(call.run("triton", **{which: leaf})[place], leaf, call.grads[place])
    torch.testing.assert_close(grad, call.exact(call.grads[place], conjugate=True).float())


def test_it_is_the_kernel_that_runs() -> None:
    RotaryCall(RotaryShape()).run("triton")
    call = fastattn.last_call()
    assert call is not None and (call.backend, call.kernel) == ("triton", "triton rotary (interpreter)")

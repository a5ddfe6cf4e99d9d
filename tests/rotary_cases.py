"""Cases of the rotation by itself that every GPU backend's kernels must pass, wherever they run."""

from __future__ import annotations

import math

import torch
from rotary_oracle import RotaryCall, RotaryShape

SHAPES = {
    "usual": RotaryShape(),
    "partial": RotaryShape(dim=24, width=10),
    "odd rest": RotaryShape(dim=13, width=6),
    "many heads": RotaryShape(heads=6, kv_heads=1, length=3),
    "long": RotaryShape(batch=1, heads=1, kv_heads=1, length=300, rows=300, dim=64, width=64),
    "nothing rotates": RotaryShape(dim=8, width=0),
}


def check_empty(backend: str, empty: str) -> None:
    call = RotaryCall(RotaryShape(**{empty: 0}), positions="each")
    query, key = call.run(backend)
    torch.testing.assert_close(query.double(), call.exact(call.query), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key.double(), call.exact(call.key), atol=1e-5, rtol=1e-5)


def check_in_place_inside_guard_bands(
    backend: str, dtype: torch.dtype, *, interleaved: bool, shape: RotaryShape | None = None
) -> None:
    """The same bits as out of place, and nothing beside the operands is read or written."""
    shape = shape or RotaryShape(dim=24, width=10)
    call = RotaryCall(shape, dtype, interleaved=interleaved, positions="each")
    expected = call.run(backend)
    padded = [torch.nn.functional.pad(x, (3, 5, 2, 1), value=math.nan) for x in (call.query, call.key)]
    inner = [x[..., 2:-1, 3:-5] for x in padded]
    for ours, want in zip(call.run(backend, query=inner[0], key=inner[1]), expected, strict=True):
        assert torch.equal(ours, want)
    found = call.run(backend, query=inner[0], key=inner[1], inplace=True)
    for whole, part, ours, want in zip(padded, inner, found, expected, strict=True):
        assert ours.data_ptr() == part.data_ptr() and torch.equal(part, want)
        assert whole.isnan().sum() == whole.numel() - part.numel()


def check_gradient_of_one_operand(backend: str, which: str) -> None:
    call = RotaryCall(RotaryShape())
    leaf = getattr(call, which).requires_grad_()
    place = ("query", "key").index(which)
    (grad,) = torch.autograd.grad(call.run(backend, **{which: leaf})[place], leaf, call.grads[place])
    torch.testing.assert_close(grad, call.exact(call.grads[place], conjugate=True).float())

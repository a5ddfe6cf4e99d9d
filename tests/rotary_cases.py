"""Cases of the rotation by itself that every GPU backend's kernels must pass, wherever they run."""

from __future__ import annotations

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

# What takes 16-byte accesses: every part of a row in whole vectors.
WIDE = {
    "wide": RotaryShape(dim=32, width=32, length=5),
    "wide, partial": RotaryShape(dim=64, width=32, heads=5, kv_heads=1, length=3),
    "wide, long": RotaryShape(batch=1, heads=2, kv_heads=1, length=70, rows=70, dim=128, width=128),
}


def check_empty(backend: str, empty: str) -> None:
    call = RotaryCall(RotaryShape(**{empty: 0}), positions="each")
    query, key = call.run(backend)
    torch.testing.assert_close(query.double(), call.exact(call.query), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(key.double(), call.exact(call.key), atol=1e-5, rtol=1e-5)


def check_gradient_of_one_operand(backend: str, which: str) -> None:
    call = RotaryCall(RotaryShape())
    leaf = getattr(call, which).requires_grad_()
    place = ("query", "key").index(which)
    (grad,) = torch.autograd.grad(call.run(backend, **{which: leaf})[place], leaf, call.grads[place])
    torch.testing.assert_close(grad, call.exact(call.grads[place], conjugate=True).float())

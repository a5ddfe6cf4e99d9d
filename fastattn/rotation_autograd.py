"""The autograd boundary of the rotation: linear in query and key, so its backward is itself, transposed, and has
derivatives of every order.  The tables get no gradient here; `fastattn.apply_rotary` takes the plain formula for that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import _batch_axis, _fold_all, _unfold, call, call_backward
from fastattn.rotation import ROTATION_FIELDS, Rotation


def fused_rotation(backend: str, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotated query and key on a fused backend, differentiable in both."""
    return call(FusedRotation, backend, *rotation.arguments())


class FusedRotation(torch.autograd.Function):
    """query', key' = FusedRotation.apply(backend, *rotation.arguments())."""

    @staticmethod
    def forward(
        backend: str, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None,
        interleaved: bool, conjugate: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        operator = getattr(torch.ops.fastattn, f"{backend}_rotate")
        return operator(query, key, cos, sin, positions, interleaved, conjugate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend, _, _, cos, sin, positions, ctx.interleaved, ctx.conjugate = inputs
        ctx.save_for_backward(cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor | None, grad_key: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:3]
        grads = [grad if want else None for grad, want in zip((grad_query, grad_key), wanted, strict=True)]
        some = next((grad for grad in grads if grad is not None), None)
        turned: list[Tensor | None] = [None, None]
        if some is not None:
            # one of them may be missing: a stand-in without heads has nothing to rotate
            operands = [some[:, :0] if grad is None else grad for grad in grads]
            found = call_backward(
                FusedRotation, ctx.backend, *operands, *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate
            )
            turned = [None if grad is None else x for grad, x in zip(grads, found, strict=True)]
        return None, *turned, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *args: Any) -> tuple[Any, tuple[int, int]]:
        size, batch = info.batch_size, args[0].shape[_batch_axis(in_dims[1])]
        folded = _fold_all(size, batch, args, in_dims[1:], ROTATION_FIELDS)
        query, key = FusedRotation.apply(backend, *folded)
        return (_unfold(query, size), _unfold(key, size)), (0, 0)

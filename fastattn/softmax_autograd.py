"""The autograd boundary of the fused masked softmax.

Backward needs the output, not the scores: with y the softmax and dy its gradient, dS = y * (dy - sum(y dy)) is the
gradient of score plus bias, dscores = scale * dS, and every bias parameter sums dS over what it broadcasts to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import (
    _batch_axis,
    _fold_all,
    _unfold,
    call,
    call_backward,
    no_second_derivative,
    unfold_gradients,
)
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

# The forward's arguments are scores and then these, which the backward takes as well.
_FEATURES = SOFTMAX_FIELDS[1:]
_GRADIENT_PLACES = tuple(SOFTMAX_FIELDS.index(name) for name in SOFTMAX_GRADIENT_FIELDS)


def fused_softmax(backend: str, problem: SoftmaxProblem) -> Tensor:
    """The softmax of `problem` on a fused backend, differentiable."""
    return call(FusedSoftmax, backend, *problem.arguments())


class FusedSoftmax(torch.autograd.Function):
    """out = FusedSoftmax.apply(backend, *problem.arguments())."""

    @staticmethod
    def forward(backend: str, *args: Any) -> Tensor:
        return getattr(torch.ops.fastattn, f"{backend}_softmax_forward")(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        backend, _, *features = inputs
        ctx.backend = backend
        ctx.scalars = [None if isinstance(x, Tensor) else x for x in features]
        ctx.is_tensor = [isinstance(x, Tensor) for x in features]
        ctx.save_for_backward(output, *[x for x in features if isinstance(x, Tensor)])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * (1 + len(SOFTMAX_FIELDS))
        needs = sum(1 << bit for bit, place in enumerate(_GRADIENT_PLACES) if ctx.needs_input_grad[1 + place])
        if not needs:
            return tuple(result)
        out, *tensors = ctx.saved_tensors
        remaining = iter(tensors)
        features = [
            next(remaining) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.scalars, strict=True)
        ]
        grads = call_backward(FusedSoftmaxBackward, ctx.backend, needs, grad_out, out, *features)
        for bit, place in enumerate(_GRADIENT_PLACES):
            if needs >> bit & 1:
                result[1 + place] = grads[bit]
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *args: Any) -> tuple[Tensor, int]:
        batch = args[0].shape[_batch_axis(in_dims[1])]
        folded = _fold_all(info.batch_size, batch, args, in_dims[1:], SOFTMAX_FIELDS)
        return _unfold(FusedSoftmax.apply(backend, *folded), info.batch_size), 0


class FusedSoftmaxBackward(torch.autograd.Function):
    """The backward operator.  Has no derivative of its own, and says so."""

    @staticmethod
    def forward(backend: str, needs: int, grad_out: Tensor, out: Tensor, *features: Any) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fastattn, f"{backend}_softmax_backward")(grad_out, out, needs, *features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative(ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, needs: int, *args: Any) -> tuple[Any, Any]:
        # The output stands for the scores: it has their shape.
        names = ("grad_out", "scores", *_FEATURES)
        dims, size = in_dims[2:], info.batch_size
        batch = args[1].shape[_batch_axis(dims[1])]
        folded = _fold_all(size, batch, args, dims, names, own_copy=frozenset(SOFTMAX_GRADIENT_FIELDS))
        grads = FusedSoftmaxBackward.apply(backend, needs, *folded)
        unfolded = unfold_gradients(size, batch, grads, needs, SOFTMAX_GRADIENT_FIELDS, args, dims, names)
        return unfolded, (0,) * len(SOFTMAX_GRADIENT_FIELDS)

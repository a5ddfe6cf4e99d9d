"""The autograd boundary of fused attention that gives its weights: as `fastattn.autograd`, with one output more.

Nothing of the weights' size is saved.  Where nobody differentiates them, the backward is that of attention alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import (
    _GRADIENT_PLACES,
    _ORDER,
    _SCALARS,
    _TENSORS,
    FusedBackward,
    _batch_axis,
    _each_sample,
    _fold_all,
    _one_seed_for_all,
    _unfold,
    call,
    call_backward,
    unfold_gradients,
)
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem

NO_SECOND_DERIVATIVE = (
    "fastattn: attention weights have no second derivative; compute them from fastattn.attention's formula in plain "
    "torch operations where one is needed"
)
_FIXED = 3  # arguments before those of the problem: backend, average, leading


def fused_with_weights(backend: str, problem: Problem, *, average: bool, leading: int) -> tuple[Tensor, Tensor]:
    """Output and weights of `problem` on a fused backend, differentiable.

    Args:
        backend: one that has the operators `weights_forward` and `weights_backward`.
        problem: the call.
        average: over the heads.
        leading: so many keys at the front have the last columns of the weights.

    Returns:
        (B, Hq, Sq, Dv), and the weights after dropout, (B, Hq, Sq, Sk) or (B, Sq, Sk) with average, in the query's
        dtype.

    Raises:
        NotImplementedError: on a second derivative.
    """
    out, _, _, weights = call(FusedWeights, backend, average, leading, *problem.arguments())
    return out, weights.squeeze(1) if average else weights


class FusedWeights(torch.autograd.Function):
    """out, lse, statistics, weights = FusedWeights.apply(backend, average, leading, *problem.arguments()), the weights
    (B, Hq|1, Sq, Sk); lse and statistics have no gradient."""

    @staticmethod
    def forward(backend: str, average: bool, leading: int, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return getattr(torch.ops.fastattn, f"{backend}_weights_forward")(average, leading, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.average, ctx.leading = inputs[:_FIXED]
        args = inputs[_FIXED:]
        ctx.scalars = [args[place] for place in _SCALARS]
        out, lse, statistics, _ = output
        ctx.mark_non_differentiable(lse, statistics)
        ctx.save_for_backward(out, statistics, *[args[place] for place in _TENSORS])

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, _lse: Tensor | None, _statistics: Tensor | None, grad_weights: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * (_FIXED + len(FIELD_NAMES))
        needs = sum(1 << bit for bit, place in enumerate(_GRADIENT_PLACES) if ctx.needs_input_grad[_FIXED + place])
        if not needs or (grad_out is None and grad_weights is None):
            return tuple(result)
        out, statistics, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        saved = [*tensors, *ctx.scalars]
        args = [saved[place] for place in _ORDER]
        if grad_weights is None:
            grads = call_backward(FusedBackward, ctx.backend, needs, grad_out, None, out, statistics, *args)
        else:
            fixed = (ctx.backend, needs, ctx.average, ctx.leading)
            grads = call_backward(FusedWeightsBackward, *fixed, grad_out, grad_weights, out, statistics, *args)
        for bit, place in enumerate(_GRADIENT_PLACES):
            if needs >> bit & 1:
                result[_FIXED + place] = grads[bit]
        return tuple(result)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], backend: str, average: bool, leading: int, *args: Any
    ) -> tuple[Any, Any]:
        size, dims, fixed = info.batch_size, in_dims[_FIXED:], (backend, average, leading)
        if _one_seed_for_all(args, dims, FIELD_NAMES):
            each = [FusedWeights.apply(*fixed, *sample) for sample in _each_sample(size, args, dims)]
            return tuple(torch.stack(results) for results in zip(*each, strict=True)), (0,) * 4
        batch = args[0].shape[_batch_axis(dims[0])]
        results = FusedWeights.apply(*fixed, *_fold_all(size, batch, args, dims, FIELD_NAMES))
        return tuple(_unfold(each, size) for each in results), (0,) * 4


class FusedWeightsBackward(torch.autograd.Function):
    """The backward operator where the weights have a gradient.  Has no derivative of its own, and says so."""

    @staticmethod
    def forward(
        backend: str,
        needs: int,
        average: bool,
        leading: int,
        grad_out: Tensor,
        grad_weights: Tensor,
        out: Tensor,
        statistics: Tensor,
        *args: Any,
    ) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.fastattn, f"{backend}_weights_backward")
        return operator(grad_out, grad_weights, out, statistics, needs, average, leading, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], backend: str, needs: int, average: bool, leading: int, *args: Any
    ) -> tuple[Any, Any]:
        names = ("grad_out", "grad_weights", "out", "statistics", *FIELD_NAMES)
        size, dims, fixed = info.batch_size, in_dims[4:], (backend, needs, average, leading)
        if _one_seed_for_all(args, dims, names):
            each = [FusedWeightsBackward.apply(*fixed, *sample) for sample in _each_sample(size, args, dims)]
            stacked = tuple(torch.stack(grads) for grads in zip(*each, strict=True))
            return stacked, (0,) * len(GRADIENT_FIELDS)
        query = names.index("query")
        batch = args[query].shape[_batch_axis(dims[query])]
        folded = _fold_all(size, batch, args, dims, names, own_copy=frozenset(GRADIENT_FIELDS))
        grads = FusedWeightsBackward.apply(*fixed, *folded)
        unfolded = unfold_gradients(size, batch, grads, needs, GRADIENT_FIELDS, args, dims, names)
        return unfolded, (0,) * len(GRADIENT_FIELDS)

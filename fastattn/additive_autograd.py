"""The autograd boundary of fused additive attention: as `fastattn.autograd`, with the weight in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.additive_problem import ADDITIVE_FIELDS, ADDITIVE_GRADIENT_FIELDS, AdditiveProblem
from fastattn.autograd import (
    _batch_axis,
    _each_sample,
    _fold_all,
    _one_seed_for_all,
    _unfold,
    call,
    call_backward,
    no_second_derivative,
    unfold_gradients,
)

_GRADIENT_PLACES = tuple(ADDITIVE_FIELDS.index(name) for name in ADDITIVE_GRADIENT_FIELDS)
_QUERY = ADDITIVE_FIELDS.index("query")


def fused_additive(backend: str, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
    """Output and lse of `problem` on a fused backend, differentiable."""
    out, lse, _ = call(FusedAdditive, backend, *problem.arguments())
    return out, lse


class FusedAdditive(torch.autograd.Function):
    """out, lse, statistics = FusedAdditive.apply(backend, *problem.arguments()); the statistics have no gradient."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(torch.ops.fastattn, f"{backend}_additive_forward")(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.backend, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.scalars = [None if isinstance(x, Tensor) else x for x in args]
        ctx.is_tensor = [isinstance(x, Tensor) for x in args]
        out, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(out, statistics, *[x for x in args if isinstance(x, Tensor)])

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * (1 + len(ADDITIVE_FIELDS))
        needs = sum(1 << bit for bit, place in enumerate(_GRADIENT_PLACES) if ctx.needs_input_grad[1 + place])
        if not needs or (grad_out is None and grad_lse is None):
            return tuple(result)
        out, statistics, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        remaining = iter(tensors)
        args = [next(remaining) if is_tensor else x for is_tensor, x in zip(ctx.is_tensor, ctx.scalars, strict=True)]
        grads = call_backward(FusedAdditiveBackward, ctx.backend, needs, grad_out, grad_lse, out, statistics, *args)
        for bit, place in enumerate(_GRADIENT_PLACES):
            if needs >> bit & 1:
                result[1 + place] = grads[bit]
        return tuple(result)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *args: Any) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[1:]
        if _one_seed_for_all(args, dims, ADDITIVE_FIELDS):
            results = zip(*[FusedAdditive.apply(backend, *one) for one in _each_sample(size, args, dims)], strict=True)
            return tuple(torch.stack(each) for each in results), (0, 0, 0)
        batch = args[_QUERY].shape[_batch_axis(dims[_QUERY])]
        results = FusedAdditive.apply(backend, *_fold_all(size, batch, args, dims, ADDITIVE_FIELDS))
        return tuple(_unfold(each, size) for each in results), (0, 0, 0)


class FusedAdditiveBackward(torch.autograd.Function):
    """The backward operator.  Has no derivative of its own, and says so."""

    @staticmethod
    def forward(
        backend: str, needs: int, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        operator = getattr(torch.ops.fastattn, f"{backend}_additive_backward")
        return operator(grad_out, grad_lse, out, statistics, needs, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative(ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, needs: int, *args: Any) -> tuple[Any, Any]:
        names = ("grad_out", "grad_lse", "out", "statistics", *ADDITIVE_FIELDS)
        size, dims, kinds = info.batch_size, in_dims[2:], ADDITIVE_GRADIENT_FIELDS
        if _one_seed_for_all(args, dims, names):
            each = [FusedAdditiveBackward.apply(backend, needs, *one) for one in _each_sample(size, args, dims)]
            return tuple(torch.stack(grads) for grads in zip(*each, strict=True)), (0,) * len(kinds)
        query = names.index("query")
        batch = args[query].shape[_batch_axis(dims[query])]
        folded = _fold_all(size, batch, args, dims, names, own_copy=frozenset(kinds))
        grads = FusedAdditiveBackward.apply(backend, needs, *folded)
        return unfold_gradients(size, batch, grads, needs, kinds, args, dims, names), (0,) * len(kinds)

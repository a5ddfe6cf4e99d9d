"""The autograd boundary of the fused backends: one Function over the flat arguments of a `Problem`."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, TENSOR_FIELDS, Problem

# Places of tensors and of the others among the arguments, and of each argument in a list of tensors and then others.
_TENSORS = tuple(place for place, name in enumerate(FIELD_NAMES) if name in TENSOR_FIELDS)
_SCALARS = tuple(place for place, name in enumerate(FIELD_NAMES) if name not in TENSOR_FIELDS)
_ORDER = tuple((*_TENSORS, *_SCALARS).index(place) for place in range(len(FIELD_NAMES)))
# For each gradient, the place of its field among the arguments.
_GRADIENT_PLACES = tuple(FIELD_NAMES.index(name) for name in GRADIENT_FIELDS)
# Fields without a batch dimension.
_UNBATCHED = frozenset({"columns", "dropout_seed"})


def fused_attention(backend: str, problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and lse of `problem` on a fused backend, differentiable."""
    out, lse, _ = call(FusedAttention, backend, *problem.arguments())
    return out, lse


def call(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), by the shortest way and in a form that torch.compile can trace."""
    if is_bare(args):
        return function.forward(*args)
    if torch.compiler.is_compiling():
        # Dynamo cannot trace a Function that has nothing to differentiate.
        if not torch.is_grad_enabled() or not _any_requires_grad(args):
            return function.forward(*args)
        return function.apply(*_distinct(args))
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function.apply(*args)
    # What Function.apply does outside of transforms, but for the defaults: there are none, and to look for them takes
    # longer than all the rest.
    args = tuple([unwrap_if_dead(x) if x is not None and isinstance(x, Tensor) else x for x in args])
    return super(torch.autograd.Function, function).apply(*args)


def is_bare(args: tuple[Any, ...]) -> bool:
    """Whether nothing compiles, maps or differentiates a call with these arguments, so that a Function around its
    operator would only cost time."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not (torch.is_grad_enabled() and _any_requires_grad(args))
    )


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110  most are None, and a generator would take three times as long
        if x is not None and isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with every repetition of a tensor (self-attention, shared rotary tables) replaced by a view."""
    seen: list[Tensor] = []
    distinct = []
    for arg in args:
        if isinstance(arg, Tensor):
            if any(arg is other for other in seen):
                arg = arg.view_as(arg)
            seen.append(arg)
        distinct.append(arg)
    return distinct


class FusedAttention(torch.autograd.Function):
    """out, lse, statistics = FusedAttention.apply(backend, *problem.arguments()); the statistics have no gradient."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(torch.ops.fastattn, f"{backend}_forward")(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        backend, *args = inputs
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        ctx.scalars = [args[place] for place in _SCALARS]
        out, _, statistics = output
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(out, statistics, *[args[place] for place in _TENSORS])

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        none: list[Tensor | None] = [None] * (1 + len(FIELD_NAMES))
        needed = ctx.needs_input_grad
        needs = sum([1 << bit for bit, place in enumerate(_GRADIENT_PLACES) if needed[1 + place]])
        if not needs or (grad_out is None and grad_lse is None):
            return tuple(none)
        out, statistics, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        saved = [*tensors, *ctx.scalars]
        args = [saved[place] for place in _ORDER]
        grads = call_backward(FusedBackward, ctx.backend, needs, grad_out, grad_lse, out, statistics, *args)
        for bit, place in enumerate(_GRADIENT_PLACES):
            if needs >> bit & 1:
                none[1 + place] = grads[bit]
        return tuple(none)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], backend: str, *args: Any) -> tuple[Any, Any]:
        if _one_seed_for_all(args, in_dims[1:], FIELD_NAMES):
            samples = _each_sample(info.batch_size, args, in_dims[1:])
            results = zip(*[FusedAttention.apply(backend, *sample) for sample in samples], strict=True)
            return tuple(torch.stack(each) for each in results), (0, 0, 0)
        batch = args[0].shape[_batch_axis(in_dims[1])]
        folded = _fold_all(info.batch_size, batch, args, in_dims[1:], FIELD_NAMES)
        results = FusedAttention.apply(backend, *folded)
        return tuple(_unfold(each, info.batch_size) for each in results), (0, 0, 0)


def call_backward(function: type[torch.autograd.Function], *args: Any) -> Any:
    """The Function of a backward pass: applied where anything may differentiate or map that pass (create_graph=True or
    a functorch transform), else its forward alone."""
    if torch.compiler.is_compiling():
        return function.forward(*args)
    transformed = torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None
    return function.apply(*args) if transformed else function.forward(*args)


def no_second_derivative(backend: str) -> NoReturn:
    raise NotImplementedError(
        f"fastattn: the {backend} backend has no second derivative; use backend='reference' for double backward"
    )


class FusedBackward(torch.autograd.Function):
    """The backward operator.  Has no derivative of its own, and says so."""

    @staticmethod
    def forward(
        backend: str, needs: int, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        return getattr(torch.ops.fastattn, f"{backend}_backward")(grad_out, grad_lse, out, statistics, needs, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        no_second_derivative(ctx.backend)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], backend: str, needs: int, *tensors_and_args: Any
    ) -> tuple[Any, Any]:
        names = ("grad_out", "grad_lse", "out", "statistics", *FIELD_NAMES)
        dims = in_dims[2:]
        if _one_seed_for_all(tensors_and_args, dims, names):
            samples = _each_sample(info.batch_size, tensors_and_args, dims)
            per_sample = [FusedBackward.apply(backend, needs, *sample) for sample in samples]
            return tuple(torch.stack(grads) for grads in zip(*per_sample, strict=True)), (0,) * len(GRADIENT_FIELDS)
        query = names.index("query")
        batch = tensors_and_args[query].shape[_batch_axis(dims[query])]
        own_copy = frozenset(GRADIENT_FIELDS)
        folded = _fold_all(info.batch_size, batch, tensors_and_args, dims, names, own_copy=own_copy)
        grads = FusedBackward.apply(backend, needs, *folded)
        unfolded = unfold_gradients(
            info.batch_size, batch, grads, needs, GRADIENT_FIELDS, tensors_and_args, dims, names
        )  # fmt: skip
        return unfolded, (0,) * len(GRADIENT_FIELDS)


def unfold_gradients(
    size: int,
    batch: int,
    grads: tuple[Tensor, ...],
    needs: int,
    gradient_names: tuple[str, ...],
    args: tuple[Any, ...],
    dims: tuple[int | None, ...],
    names: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """Gradients of a folded call, one per sample, in the shapes of the arguments they belong to.

    The call was folded with `own_copy` for all of them: parameters shared by all samples get one gradient per sample.
    """
    out: list[Tensor] = []
    for bit, (name, grad) in enumerate(zip(gradient_names, grads, strict=True)):
        if not needs >> bit & 1:
            out.append(grad.new_empty((size, 0)))
            continue
        place = names.index(name)
        unfolded = _unfold(grad, size)
        if args[place].shape[_batch_axis(dims[place])] == 1 and batch != 1:
            unfolded = unfolded.sum(dim=1, keepdim=True)
        out.append(unfolded)
    return tuple(out)


def _batch_axis(dim: int | None) -> int:
    """Where the batch axis of an argument is, given its vmapped axis."""
    return 1 if dim == 0 else 0


def _one_seed_for_all(args: tuple[Any, ...], in_dims: tuple[int | None, ...], names: tuple[str, ...]) -> bool:
    """Whether all samples must drop the same weights, as vmap(randomness="same") asks: folded, each would have its own
    mask, which is a function of the batch index."""
    seed = names.index("dropout_seed")
    return args[seed] is not None and in_dims[seed] is None


def _each_sample(size: int, args: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> list[list[Any]]:
    return [
        [arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)]
        for i in range(size)
    ]


def _fold_all(
    size: int,
    batch: int,
    args: tuple[Any, ...],
    in_dims: tuple[int | None, ...],
    names: tuple[str, ...],
    own_copy: frozenset[str] = frozenset(),
) -> list[Any]:
    """Fold the mapped axis of every tensor into its batch axis: `size` calls of batch B become one of size * B."""
    folded = []
    for name, arg, dim in zip(names, args, in_dims, strict=True):
        if not isinstance(arg, Tensor):
            folded.append(arg)
        elif name in _UNBATCHED:
            # The mask is a function of the batch index too, so one seed gives every sample its own.
            folded.append(arg if dim is None else arg.select(dim, 0))
        elif dim is None and arg.shape[0] == 1 and batch != 1 and name not in own_copy:
            folded.append(arg)  # broadcasts over the folded batch as it did over B
        else:
            moved = arg.movedim(dim, 0) if dim is not None else arg.expand(size, *arg.shape)
            if moved.shape[1] != batch:
                moved = moved.expand(size, batch, *moved.shape[2:])
            folded.append(moved.flatten(0, 1))
    return folded


def _unfold(x: Tensor, size: int) -> Tensor:
    return x.unflatten(0, (size, -1))

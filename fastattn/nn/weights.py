"""Attention weights on request, where no kernel gives them beside the output: on GPUs.

The returned tensor is filled tile by tile from q and k, so that besides the tensor itself only tiles of about
`TILE_ELEMENTS` scores exist, forward and backward; with ``average`` the weights of the single heads never exist
together.  A tile holds whole rows, so it takes its own softmax: exp(s - lse) with the kernel's log-sum-exp would be
the same but for huge scores, where lse rounds the logarithm of the number of keys away (a row of finfo.min).

The formula is that of `torch.nn.functional.multi_head_attention_forward` with ``need_weights=True``:
softmax(scale * q k^T + bias), masked, after dropout, optionally averaged over the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.autograd import _batch_axis, _fold_all, _unfold
from fastattn.philox import keep_mask
from fastattn.weights_autograd import NO_SECOND_DERIVATIVE

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32 scores: stays in a core's second-level cache


class WeightArguments(NamedTuple):
    """What the weights are a function of; B, H, L, S are batch, heads, queries and keys.

    Field order is that of the operators' arguments.  ``leading`` keys stand before key 0 of the caller (a bias key,
    a zero key) and are seen by every query of a causal call; the returned columns have them *after* the caller's
    keys, where torch puts them.
    """

    query: Tensor  # (B, H, L, D)
    key: Tensor  # (B, H, S, D)
    dense_mask: Tensor | None  # bool (B|1, H|1, L|1, S|1), True = may attend
    dense_bias: Tensor | None  # floating (B|1, H|1, L|1, S|1); -inf masks
    dropout_seed: Tensor | None  # (2,) int64, see fastattn/philox.py
    scale: float
    dropout_p: float
    causal: bool  # query i sees keys j <= i + leading
    leading: int
    average: bool


_TENSOR_FIELDS = 5
_DENSE_BIAS = WeightArguments._fields.index("dense_bias")


def _compute_dtype(args: WeightArguments) -> torch.dtype:
    return torch.float64 if args.query.dtype == torch.float64 else torch.float32


class _Tile(NamedTuple):
    batch: slice
    heads: slice
    rows: slice

    def of(self, x: Tensor) -> Tensor:
        """This tile's part of a tensor (B|1, H|1, L|1, ...)."""
        return x[tuple(slice(None) if size == 1 else part for part, size in zip(self, x.shape[:3], strict=True))]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _tiles(shape: tuple[int, int, int, int]) -> Iterator[tuple[_Tile, ...]]:
    """Tiles of about TILE_ELEMENTS scores that cover (B, H, L, S), in groups that hold all heads of their rows."""
    batch, heads, rows, cols = shape
    # Rows first: a product of many rows with one head's keys packs those keys once for all of them.
    row_step = max(1, min(rows, TILE_ELEMENTS // max(cols, 1)))
    head_step = max(1, min(heads, TILE_ELEMENTS // max(cols * row_step, 1)))
    batch_step = max(1, TILE_ELEMENTS // max(cols * row_step * head_step, 1)) if head_step == heads else 1
    for b in _slices(batch, batch_step):
        for i in _slices(rows, row_step):
            yield tuple(_Tile(b, h, i) for h in _slices(heads, head_step))


def _hidden(args: WeightArguments, tile: _Tile) -> list[Tensor]:
    """Bool tensors, broadcastable to the tile's scores, that are True where a key is masked."""
    parts = []
    if args.causal:
        rows = torch.arange(tile.rows.start, tile.rows.stop, device=args.key.device)
        cols = torch.arange(args.key.shape[2], device=args.key.device)
        parts.append(cols > rows[:, None] + args.leading)
    if args.dense_mask is not None:
        parts.append(~tile.of(args.dense_mask))
    if args.dense_bias is not None:
        parts.append(tile.of(args.dense_bias) == float("-inf"))
    return parts


def _probabilities(args: WeightArguments, tile: _Tile, hidden: list[Tensor]) -> Tensor:
    """softmax of the tile's scores before dropout, in the dtype it is computed in."""
    dtype = _compute_dtype(args)
    query, key = tile.of(args.query).to(dtype), args.key[tile.batch, tile.heads].to(dtype)
    scores = torch.matmul(query * args.scale, key.transpose(-2, -1))
    if args.dense_bias is not None:
        scores += tile.of(args.dense_bias)
    for part in hidden:
        scores.masked_fill_(part, float("-inf"))
    p = torch.softmax(scores, dim=-1)
    # The softmax of a wholly masked row is NaN.
    for part in hidden:
        p.masked_fill_(part, 0.0)
    return p


def _kept(args: WeightArguments, tile: _Tile) -> Tensor:
    """The dropout mask of a tile: True where the weight is kept."""
    assert args.dropout_seed is not None
    device, heads = args.key.device, args.query.shape[1]
    batch_index = torch.arange(tile.batch.start, tile.batch.stop, device=device)
    head_index = torch.arange(tile.heads.start, tile.heads.stop, device=device)
    place = (batch_index[:, None] * heads + head_index).flatten()
    rows = torch.arange(tile.rows.start, tile.rows.stop, device=device)
    kept = keep_mask(args.dropout_seed, args.dropout_p, place, rows, range(args.key.shape[2]))
    return kept.unflatten(0, (len(batch_index), len(head_index)))


def _drop(x: Tensor, kept: Tensor, dropout_p: float) -> Tensor:
    # With p = 1 nothing is kept and 1 / (1 - p) must not turn the zeros into NaN.
    return x.mul_(1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0).masked_fill_(~kept, 0.0)


def _sizes(args: WeightArguments) -> tuple[int, int, int, int]:
    return (*args.query.shape[:3], args.key.shape[2])


def _result_shape(args: WeightArguments) -> tuple[int, ...]:
    batch, heads, rows, cols = _sizes(args)
    return (batch, rows, cols) if args.average else (batch, heads, rows, cols)


def _fill(*flat: Any) -> Tensor:
    """fastattn::attention_weights."""
    args = WeightArguments(*flat)
    result = args.query.new_empty(_result_shape(args))
    heads, keys = args.query.shape[1], args.key.shape[2] - args.leading

    def write(target: Tensor, p: Tensor) -> None:
        target[..., :keys] = p[..., args.leading :]
        if args.leading:
            target[..., keys:] = p[..., : args.leading]

    with torch.autocast(args.query.device.type, enabled=False):
        for group in _tiles(_sizes(args)):
            total: Tensor | None = None
            for tile in group:
                p = _probabilities(args, tile, _hidden(args, tile))
                if args.dropout_p > 0.0:
                    p = _drop(p, _kept(args, tile), args.dropout_p)
                if not args.average:
                    write(tile.of(result), p)
                else:
                    total = p.sum(1) if total is None else total.add_(p.sum(1))
            if total is not None:
                write(result[group[0].batch, group[0].rows], total.div_(heads))
    return result


def _fill_backward(grad: Tensor, bias_needed: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """fastattn::attention_weights_backward: gradients of query, key and dense_bias (empty where not needed).

    dS = P * (dP - sum_j P dP) for the softmax P of every row, recomputed; the rest are products with q and k.
    """
    args = WeightArguments(*flat)
    dtype, heads = _compute_dtype(args), args.query.shape[1]
    zeros = {"dtype": dtype, "device": args.query.device}
    dquery, dkey = torch.zeros(args.query.shape, **zeros), torch.zeros(args.key.shape, **zeros)
    bias = args.dense_bias if bias_needed else None
    dbias = torch.zeros(0 if bias is None else bias.shape, **zeros)
    with torch.autocast(args.query.device.type, enabled=False):
        for group in _tiles(_sizes(args)):
            for tile in group:
                g = grad[tile.batch, tile.rows, :][:, None] if args.average else tile.of(grad)
                keys = g.shape[-1] - args.leading
                g = torch.cat((g[..., keys:], g[..., :keys]), dim=-1).to(dtype) if args.leading else g.to(dtype)
                hidden = _hidden(args, tile)
                p = _probabilities(args, tile, hidden)
                g = g.expand(p.shape) / heads if args.average else g.clone()
                if args.dropout_p > 0.0:
                    g = _drop(g, _kept(args, tile), args.dropout_p)
                for part in hidden:
                    g.masked_fill_(part, 0.0)
                ds = g.sub_((p * g).sum(-1, keepdim=True)).mul_(p)
                # Where a row or key holds NaN, ds of the places that see it is NaN already and of the others 0, which
                # must stay 0.
                query = tile.of(args.query).to(dtype).nan_to_num(0.0, 0.0, 0.0)
                key = args.key[tile.batch, tile.heads].to(dtype).nan_to_num(0.0, 0.0, 0.0)
                tile.of(dquery).add_(ds @ key, alpha=args.scale)
                dkey[tile.batch, tile.heads].add_(ds.transpose(-2, -1) @ query, alpha=args.scale)
                if bias is not None:
                    target = tile.of(dbias)
                    target.add_(ds.sum_to_size(target.shape))
    return dquery.to(args.query.dtype), dkey.to(args.key.dtype), dbias.to(dtype if bias is None else bias.dtype)


def _fake(*flat: Any) -> Tensor:
    args = WeightArguments(*flat)
    return args.query.new_empty(_result_shape(args))


def _fake_backward(grad: Tensor, bias_needed: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = WeightArguments(*flat)
    bias = args.dense_bias if bias_needed else None
    dbias = args.query.new_empty(0, dtype=_compute_dtype(args)) if bias is None else bias.new_empty(bias.shape)
    return args.query.new_empty(args.query.shape), args.key.new_empty(args.key.shape), dbias


_SCHEMA = (
    "Tensor query, Tensor key, Tensor? dense_mask, Tensor? dense_bias, Tensor? dropout_seed, "
    "float scale, float dropout_p, bool causal, SymInt leading, bool average"
)
_library = torch.library.Library("fastattn", "FRAGMENT")
_library.define(f"attention_weights({_SCHEMA}) -> Tensor")
_library.define(f"attention_weights_backward(Tensor grad, bool bias_needed, {_SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.impl("attention_weights", _fill, "CompositeExplicitAutograd")
_library.impl("attention_weights_backward", _fill_backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::attention_weights", _fake, lib=_library)
torch.library.register_fake("fastattn::attention_weights_backward", _fake_backward, lib=_library)


def attention_weights(args: WeightArguments) -> Tensor:
    """The attention weights of a call, differentiable in query, key and dense_bias.

    Args:
        args: see `WeightArguments`.

    Returns:
        (B, H, L, S), or (B, L, S) with ``average``, in the query's dtype.  A wholly masked row is 0.

    Raises:
        NotImplementedError: on a second derivative.
    """
    if _needs_autograd(args):
        return _Weights.apply(*args)
    return torch.ops.fastattn.attention_weights(*args)


def _needs_autograd(args: WeightArguments) -> bool:
    """False for plain inference, which need not pay for the autograd boundary (and which dynamo mistraces with it)."""
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (args.query, args.key, args.dense_bias)
    ):
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(*flat: Any) -> Tensor:
        return torch.ops.fastattn.attention_weights(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_TENSOR_FIELDS])
        ctx.scalars = inputs[_TENSOR_FIELDS:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(WeightArguments._fields)
        if grad is not None:
            bias_needed = ctx.needs_input_grad[_DENSE_BIAS]
            # Dynamo cannot trace a Function within a Function's backward; what it compiles has no second derivative
            # and no vmap to lose.
            run = (
                torch.ops.fastattn.attention_weights_backward
                if torch.compiler.is_compiling()
                else _WeightsBackward.apply
            )
            dquery, dkey, dbias = run(grad, bias_needed, *ctx.saved_tensors, *ctx.scalars)
            grads[0], grads[1] = dquery, dkey
            if bias_needed:
                grads[_DENSE_BIAS] = dbias
        return tuple(grads)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *flat: Any) -> tuple[Tensor, int]:
        batch = flat[0].shape[_batch_axis(in_dims[0])]
        folded = _fold_all(info.batch_size, batch, flat, in_dims, WeightArguments._fields)
        return _unfold(_Weights.apply(*folded), info.batch_size), 0


class _WeightsBackward(torch.autograd.Function):
    """The backward operator.  Has no derivative of its own, and says so."""

    @staticmethod
    def forward(grad: Tensor, bias_needed: bool, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastattn.attention_weights_backward(grad, bias_needed, *flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, bias_needed: bool, *flat: Any
    ) -> tuple[Any, Any]:
        names = ("grad", *WeightArguments._fields)
        dims = (in_dims[0], *in_dims[2:])
        batch = flat[0].shape[_batch_axis(dims[1])]
        size = info.batch_size
        # Parameters shared by all samples still get one gradient per sample, so each is given its own copy.
        own_copy = frozenset({"query", "key", "dense_bias"})
        grad, *folded = _fold_all(size, batch, (grad, *flat), dims, names, own_copy=own_copy)
        dquery, dkey, dbias = _WeightsBackward.apply(grad, bias_needed, *folded)
        bias = flat[_DENSE_BIAS]
        if not bias_needed:
            dbias = dbias.new_empty((size, 0))
        else:
            dbias = _unfold(dbias, size)
            if bias.shape[_batch_axis(dims[1 + _DENSE_BIAS])] == 1 and batch != 1:
                dbias = dbias.sum(dim=1, keepdim=True)
        return (_unfold(dquery, size), _unfold(dkey, size), dbias), (0, 0, 0)

"""The public function `additive_attention`: Bahdanau's scores in place of q.k, and everything else as in attention."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastattn import dispatch
from fastattn.additive_problem import AdditiveProblem
from fastattn.biases import Bias
from fastattn.functional import lower
from fastattn.masks import Mask
from fastattn.validation import check_device, check_floating, check_number, check_shape

__all__ = ["additive_attention"]


@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive attention, fused: the (Sq, Sk, D) tensor of the formula never exists, nor does a (Sq, Sk) one.

    Computes, for each batch and query head (Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning
    to align and translate", 2015, section A.1.2, whose W s and U h are `query` and `key` here)::

        s_ij = scale * sum_d weight_d tanh(query_id + key_jd)
        s    = s + bias, -inf where masked
        p    = softmax(s)
        out  = dropout(p) value

    Differentiable in query, key, value, weight and every bias parameter.  With t = tanh(query_id + key_jd), recomputed
    tile by tile, and dS the gradient of the score (the chain rule)::

        dquery_id = scale * weight_d * sum_j dS_ij (1 - t^2)
        dkey_jd   = scale * weight_d * sum_i dS_ij (1 - t^2)
        dweight_d = scale * sum_ij dS_ij t

    Gradients are the same bits on every run and for any number of threads.  Arithmetic is float32 (float64 for float64
    operands).  An infinite element of query or key counts as the largest finite number.

    Args:
        query: (B, Hq, Sq, D), float32, float64, bfloat16 or float16.  Any strides.
        key: (B, Hk, Sk, D), same dtype and device.  Hq must be a multiple of Hk: query head h reads head
            h // (Hq / Hk).
        value: (B, Hk, Sk, Dv); Dv may differ from D.
        weight: (D,) or (Hq, D), any floating dtype.
        mask, bias: as in `attention`.
        scale: finite number that multiplies the scores, before the bias.
        dropout_p, query_offset, return_lse: as in `attention`.
        backend: name of the backend to use; None picks the first that can.

    Rotation, softcap and sink of `attention` are not offered here.

    Returns:
        out (B, Hq, Sq, Dv) in the query's dtype, laid out in memory as (B, Sq, Hq, Dv) when the query is, 0 for a query
        that sees nothing; with return_lse also lse (B, Hq, Sq) in float32 (float64 for float64), +inf for such a query.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what was expected and what came.
        fastattn.UnsupportedError: the backend asked for cannot run this call, with its reasons.
    """
    check_floating("weight", weight)
    scale = check_number("scale", scale)  # `lower` would take None for attention's default
    problem = lower(
        query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, query_offset=query_offset,
        takes_tables=False,
    )  # fmt: skip
    heads, dim = problem.num_heads, problem.query.shape[3]
    check_device("weight", weight, problem.device)
    check_shape("weight", weight, (dim,), (heads, dim))
    weight = weight.to(problem.parameter_dtype).expand(1, heads, dim)
    out, lse = dispatch.additive(AdditiveProblem(weight=weight, attention=problem), backend)
    if dropout_p == 1.0:
        out = out * 0.0  # everything is dropped; lowering ran the call without dropout
    return (out, lse) if return_lse else out

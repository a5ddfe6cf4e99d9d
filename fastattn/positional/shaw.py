"""Relative position vectors added to keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import Bias
from fastattn.functional import attention, cast_for_autocast, lower, lower_offset
from fastattn.lowering import standalone
from fastattn.masks import Mask
from fastattn.positional.content import ContentBias, Route, Tables, check_route, pick_rows, repeat_heads
from fastattn.problem import default_scale, parameter_dtype
from fastattn.softmax import masked_softmax
from fastattn.validation import check_device, check_floating, check_number, fail

__all__ = ["ShawKeys", "shaw_attention"]


class ShawKeys(ContentBias):
    """A learned vector per clipped distance beside each key (Shaw et al., "Self-attention with relative position
    representations", NAACL 2018)::

        S[i, j] += scale * q_i . e[clip(j - i, -k, k) + k]

    with e (2k + 1, D).  Gradients: de_r = scale * sum of dS[i, j] q_i over the pairs at distance r, and
    dq_i += scale * sum_j dS[i, j] e_r.  Route "table" hands the products q . e to the kernel, (B, Hq, Sq, 2k + 1)
    numbers, or those alone of the distances at which the masks show a pair.  Route "dense" writes them out,
    (B, Hq, Sq, Sk).  "auto" takes the table unless another bias has tables already.

    Args:
        embeddings: (2k + 1, D), or (Hq, 2k + 1, D) for vectors of each head's own; floating.
        route: "auto", "table" or "dense".

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; an even number of vectors.
    """

    def __init__(self, embeddings: Tensor, *, route: Route = "auto") -> None:
        self.embeddings = _check_vectors("ShawKeys.embeddings", embeddings)
        check_route("ShawKeys", route, ("auto", "table", "dense"))
        self.route, self.max_distance = route, embeddings.shape[-2] // 2

    def __repr__(self) -> str:
        return f"ShawKeys(max_distance={self.max_distance}, route={self.route!r})"

    def _products(self, query: Tensor, scale: float, left: int, right: int) -> Tensor:
        """scale * q . e at the distances -left ... right, (B, Hq, Sq, left + right + 1)."""
        _check_fit("ShawKeys.embeddings", self.embeddings, query, query.shape[-1])
        vectors = self.embeddings[..., self.max_distance - left : self.max_distance + right + 1, :]
        return query @ (scale * vectors.to(query.dtype)).mT

    def width(self, left: int, right: int) -> int:
        return min(self.max_distance, left) + min(self.max_distance, right) + 1

    def tables(self, query: Tensor, key: Tensor, scale: float, left: int, right: int) -> Tables:
        left, right = min(self.max_distance, left), min(self.max_distance, right)
        return Tables(self._products(query, scale, left, right), None, None, left)

    def dense(self, query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
        reach = self.max_distance
        return pick_rows(self._products(query, scale, reach, reach), clipped_index(positions, key.shape[2], reach))


def clipped_index(positions: Tensor, key_length: int, reach: int) -> Tensor:
    """clip(j - position, -reach, reach) + reach, (B|1, Sq, Sk) int64."""
    distance = torch.arange(key_length, device=positions.device) - positions[..., None]
    return distance.clamp_(-reach, reach).add_(reach)


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_embeddings: Tensor | None,
    value_embeddings: Tensor | None,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention with relative vectors beside keys and values (Shaw et al., NAACL 2018), with r = clip(j - i, -k, k)::

        S[i, j] = scale * q_i . (k_j + a_r),   out_i = sum_j P[i, j] (v_j + b_r)

    The second term of the output is sum_r W[i, r] b_r with W[i, r] the weights summed over the keys at clipped
    distance r, so db_r = sum_i W[i, r] dout_i, and dP[i, j] gains dout_i . b_r.

    Without `value_embeddings` this is `attention` with `ShawKeys`.  With them the weights themselves are needed,
    (B, Hq, Sq, Sk) numbers.  On CPUs a kernel gives them beside its output, in the query's dtype; elsewhere they are
    made by the fused masked softmax of scores that are written out, both in float32 (float64 for float64 queries), and
    dropout is torch's.

    Args:
        query, key, value: (B, Hq, Sq, D), (B, Hk, Sk, D), (B, Hk, Sk, Dv) as in `attention`.
        key_embeddings: a, (2k + 1, D) or (Hq, 2k + 1, D), or None.
        value_embeddings: b, (2k + 1, Dv) or (Hq, 2k + 1, Dv), or None.
        mask, bias, scale, dropout_p, query_offset, backend: as in `attention`.

    Returns:
        (B, Hq, Sq, Dv) in the query's dtype, or that of autocast.

    Raises:
        TypeError, ValueError: as `attention`, and for embeddings of the wrong dtype, shape or device.
    """
    if value_embeddings is None:
        if key_embeddings is not None:
            shaw = ShawKeys(key_embeddings)
            bias = shaw if bias is None else bias + shaw
        return attention(
            query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, query_offset=query_offset,
            backend=backend,
        )  # fmt: skip
    for name, x in (("query", query), ("key", key), ("value", value)):
        if check_floating(name, x).dim() != 4:
            fail(ValueError, name, "four dimensions (batch, heads, length, head_dim)", x)
    query, key, value = cast_for_autocast(query, key, value)
    vectors = _check_vectors("value_embeddings", value_embeddings)
    _check_fit("value_embeddings", vectors, query, value.shape[-1])
    scale = default_scale(query.shape[-1]) if scale is None else check_number("scale", scale)
    offset = lower_offset({}, query_offset, query.shape[0], query.shape[2], key.shape[2], query.device)
    positions = standalone(*query.shape[:3], key.shape[2], query.device, offset).positions()
    dtype = parameter_dtype(query.dtype)
    call = {"mask": mask, "bias": bias, "query_offset": query_offset}
    with torch.autocast(query.device.type, enabled=False):
        shaw = None if key_embeddings is None else ShawKeys(key_embeddings)
        if dispatch.gives_weights(lower(query, key, value), backend):  # type: ignore[arg-type]
            out, weights = _with_weights(query, key, value, shaw, scale, dropout_p, backend, **call)
        else:
            out, weights = _written_out(query, key, value, shaw, scale, dropout_p, backend, positions, **call)
        index = clipped_index(positions, key.shape[2], vectors.shape[-2] // 2)[:, None].expand(weights.shape)
        weights = weights.to(dtype)
        by_distance = weights.new_zeros(*weights.shape[:3], vectors.shape[-2]).scatter_add(-1, index, weights)
        return (out + by_distance @ vectors.to(dtype)).to(query.dtype)


def _with_weights(
    query: Tensor, key: Tensor, value: Tensor, shaw: ShawKeys | None, scale: float, dropout_p: float,
    backend: str | None, *, bias: Bias | None, **call: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The first term of the output and the weights, by a kernel that gives both."""
    both = bias if shaw is None else shaw if bias is None else bias + shaw
    problem = lower(query, key, value, bias=both, scale=scale, dropout_p=dropout_p, **call)
    out, weights = dispatch.run_with_weights(problem, average=False, leading=0, name=backend)  # type: ignore[arg-type]
    assert weights is not None
    if dropout_p == 1.0:  # lowered without dropout: everything is dropped
        return out * 0.0, weights * 0.0
    return out, weights


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, shaw: ShawKeys | None, scale: float, dropout_p: float,
    backend: str | None, positions: Tensor, **call: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the scores written out, in the parameter dtype."""
    heads, dtype = query.shape[1], parameter_dtype(query.dtype)
    wide = query.to(dtype)
    scores = scale * (wide @ repeat_heads(key.to(dtype), heads).mT)
    if shaw is not None:
        scores = scores + shaw.dense(wide, key, positions, scale)
    weights = masked_softmax(scores, backend=backend, **call)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return weights @ repeat_heads(value.to(dtype), heads), weights


def _check_vectors(name: str, x: object) -> Tensor:
    x = check_floating(name, x)
    if x.dim() not in (2, 3) or x.shape[-2] % 2 == 0:
        fail(ValueError, name, "shape (2k + 1, D) or (Hq, 2k + 1, D)", x)
    return x


def _check_fit(name: str, x: Tensor, query: Tensor, dim: int) -> None:
    check_device(name, x, query.device)
    if x.shape[-1] != dim or (x.dim() == 3 and x.shape[0] != query.shape[1]):
        fail(ValueError, name, f"{dim} features, and Hq = {query.shape[1]} heads if any", x)

"""The naive formula: every feature, every dtype, plain differentiable torch.  The oracle of all other backends.

It materialises the (B, Hq, Sq, Sk) scores.  Half precision inputs are computed in float32 and rounded once at
the end.  All steps are ordinary torch operations, so autograd, double backward, vmap and every device work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.additive_problem import AdditiveProblem
from fastattn.philox import keep_mask
from fastattn.problem import Problem
from fastattn.rotation import Rotation
from fastattn.softmax_problem import SoftmaxProblem

NEG_INF = float("-inf")


def query_positions(problem: Problem) -> Tensor:
    """(B|1, Sq) int64: the position of every query among the keys."""
    rows = torch.arange(problem.query_length, device=problem.query.device)
    if problem.query_offsets is None:
        return (rows + problem.query_offset)[None]
    return rows + problem.query_offsets[:, None]


def distances(problem: Problem) -> Tensor:
    """(B|1, 1, Sq, Sk) int64: j - position(i)."""
    cols = torch.arange(problem.key_length, device=problem.query.device)
    return (cols - query_positions(problem)[..., None])[:, None]


def visible(problem: Problem) -> Tensor | None:
    """Bool, broadcastable to (B, Hq, Sq, Sk): True where the masks let query i attend to key j; None without masks.

    A dense bias of -inf masks as well; `scores` accounts for it.
    """
    parts: list[Tensor] = []
    delta = distances(problem)
    cols = torch.arange(problem.key_length, device=problem.query.device)
    if problem.window_left >= 0:
        parts.append(delta >= -problem.window_left)
    if problem.window_right >= 0:
        parts.append(delta <= problem.window_right)
    if problem.prefix_lengths is not None:
        parts.append((delta <= 0) | (cols < problem.prefix_lengths[:, None, None, None]))
    if problem.key_lengths is not None:
        parts.append(cols < problem.key_lengths[:, None, None, None])
    if problem.query_ids is not None and problem.key_ids is not None:
        parts.append((problem.query_ids[:, :, None] == problem.key_ids[:, None, :])[:, None])
    if problem.dense_mask is not None:
        parts.append(problem.dense_mask)
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total & part
    return total


def bias(problem: Problem, dtype: torch.dtype) -> Tensor | None:
    """The sum of all biases, broadcastable to (B, Hq, Sq, Sk), in `dtype`; None without biases."""
    total: Tensor | None = None
    if problem.slopes is not None:
        total = -problem.slopes.to(dtype)[:, :, None, None] * distances(problem).abs()
    if problem.table is not None:
        right = problem.table.shape[-1] - 1 - problem.table_left
        index = distances(problem).clamp(-problem.table_left, right) + problem.table_left
        table = problem.table.to(dtype)[:, :, None, :]
        batch = max(index.shape[0], table.shape[0])
        table = table.expand(batch, -1, problem.query_length, -1)
        gathered = table.gather(-1, index.expand(batch, table.shape[1], -1, -1))
        total = gathered if total is None else total + gathered
    if problem.dense_bias is not None:
        dense = problem.dense_bias.to(dtype)
        total = dense if total is None else total + dense
    if problem.row_table is not None or problem.col_table is not None:
        read = table_terms(problem, dtype)
        total = read if total is None else total + read
    return total


def table_terms(problem: Problem, dtype: torch.dtype) -> Tensor:
    """What row and column tables add, (B, Hq, Sq, Sk) in `dtype`."""
    right = problem.column_entries - 1 - problem.columns_left
    index = distances(problem).clamp(-problem.columns_left, right) + problem.columns_left
    if problem.columns is not None:
        index = problem.columns.long()[index]
    index = index.expand(problem.batch_size, problem.num_heads, -1, -1)
    total: Tensor | None = None
    if problem.row_table is not None:
        total = problem.row_table.to(dtype).gather(-1, index)
    if problem.col_table is not None:
        group = problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1
        read = problem.col_table.to(dtype).repeat_interleave(group, dim=1).gather(-2, index)
        total = read if total is None else total + read
    assert total is not None
    return total


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., 2021) of x (B, H, S, D) by rows (B|1, S) of cos/sin (B|1, P, R/2).

    The leading R dimensions rotate, pair by pair: (x0 c - x1 s, x1 c + x0 s).  Rows are clamped to the table.
    """
    rows = rows.clamp(0, cos.shape[1] - 1)
    batch = rows.shape[0] if cos.shape[0] == 1 else cos.shape[0]
    index = rows.expand(batch, -1)[..., None].expand(-1, -1, cos.shape[-1])
    c = cos.expand(batch, -1, -1).gather(1, index)[:, None].to(x.dtype)
    s = sin.expand(batch, -1, -1).gather(1, index)[:, None].to(x.dtype)
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        x0, x1 = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack((x0 * c - x1 * s, x1 * c + x0 * s), dim=-1).flatten(-2)
    else:
        x0, x1 = turned.chunk(2, dim=-1)
        y = torch.cat((x0 * c - x1 * s, x1 * c + x0 * s), dim=-1)
    return torch.cat((y, rest), dim=-1)


def are_finite(x: Tensor) -> Tensor:
    """(..., S) flags: which rows of x hold no NaN and no infinity."""
    if not x.shape[-1]:
        return x.new_ones(x.shape[:-1], dtype=torch.bool)
    return x.detach().abs().amax(dim=-1) < math.inf  # a twentieth of the time of isfinite().all(); a NaN is the largest


def finite_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with every row that holds a NaN or infinity zeroed, and the (..., S) flags of the rows kept as they were."""
    finite = are_finite(x)
    return torch.where(finite[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device)), finite


def products(problem: Problem, dtype: torch.dtype) -> Tensor:
    """scale * q.k (B, Hq, Sq, Sk) in `dtype`.

    Rows of q or k that are not finite are zeroed before the product and their scores set to NaN after it, so that
    0 * NaN cannot leak through a masked place, forward or backward.
    """
    query, key = problem.query.to(dtype), problem.key.to(dtype)
    query, finite_query = finite_rows(query)
    key, finite_key = finite_rows(key)
    if problem.query_cos is not None:
        assert problem.query_sin is not None and problem.key_cos is not None and problem.key_sin is not None
        cols = torch.arange(problem.key_length, device=key.device)[None]
        query = rotate(query, problem.query_cos, problem.query_sin, query_positions(problem), problem.interleaved)
        key = rotate(key, problem.key_cos, problem.key_sin, cols, problem.interleaved)
    group = problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1
    if group != 1:
        key, finite_key = key.repeat_interleave(group, dim=1), finite_key.repeat_interleave(group, dim=1)
    s = (query @ key.transpose(-2, -1)) * problem.scale
    return s.masked_fill(~(finite_query[..., :, None] & finite_key[..., None, :]), float("nan"))


def additive_products(problem: AdditiveProblem, dtype: torch.dtype) -> Tensor:
    """scale * sum_d weight_d tanh(q_id + k_jd) (B, Hq, Sq, Sk) in `dtype`; NaN for rows of q or k that hold one, which
    are zeroed before, as in `products`."""
    attention = problem.attention
    largest = torch.finfo(dtype).max
    rows, numbers = [], []
    for x in (attention.query, attention.key):
        x = x.to(dtype).clamp(-largest, largest)
        known = ~x.isnan().any(dim=-1)
        group = attention.num_heads // x.shape[1] if x.shape[1] else 1
        rows.append(x.masked_fill(~known[..., None], 0.0).repeat_interleave(group, dim=1))
        numbers.append(known.repeat_interleave(group, dim=1))
    t = torch.tanh(rows[0][..., :, None, :] + rows[1][..., None, :, :])
    s = (t @ problem.weight.to(dtype)[:, :, None, :, None]).squeeze(-1) * attention.scale
    return s.masked_fill(~(numbers[0][..., :, None] & numbers[1][..., None, :]), float("nan"))


def scores(problem: Problem, dtype: torch.dtype, s: Tensor) -> tuple[Tensor, Tensor]:
    """Masked scores (B, Hq, Sq, Sk) in `dtype` from products `s`, -inf where masked, and the mask they were filled with
    (True = masked)."""
    if problem.softcap:
        s = problem.softcap * torch.tanh(s / problem.softcap)
    masked = torch.zeros((), dtype=torch.bool, device=s.device)
    added = bias(problem, dtype)
    if added is not None:
        s = s + added
        masked = masked | (added == NEG_INF)
    mask = visible(problem)
    if mask is not None:
        masked = masked | ~mask
    masked = masked.expand(s.shape)
    return s.masked_fill(masked, NEG_INF), masked


def weights(problem: Problem, dtype: torch.dtype, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights before dropout (B, Hq, Sq, Sk), lse (B, Hq, Sq), and the mask (True = masked)."""
    s, masked = scores(problem, dtype, s)
    # amax has no identity for an empty dimension; without keys every row is empty anyway.
    top = s.detach().amax(dim=-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), NEG_INF)
    sink = None if problem.sink is None else problem.sink.to(dtype)[:, :, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == NEG_INF, 0.0)
    p = torch.exp(s - top)
    total = p.sum(dim=-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, float("inf"))
    return p / total, lse.squeeze(-1), masked


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Sq, Dv) in the query's dtype and lse (B, Hq, Sq) in the parameter dtype."""
    return _forward(problem, products(problem, problem.parameter_dtype))


def additive(problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
    """The same for additive attention.  It materialises (B, Hq, Sq, Sk, D)."""
    return _forward(problem.attention, additive_products(problem, problem.attention.parameter_dtype))


def _forward(problem: Problem, s: Tensor) -> tuple[Tensor, Tensor]:
    dtype = problem.parameter_dtype
    p, lse, masked = weights(problem, dtype, s)
    if problem.dropout_p > 0:
        assert problem.dropout_seed is not None
        heads = torch.arange(problem.batch_size * problem.num_heads, device=p.device)
        rows = torch.arange(problem.query_length, device=p.device)
        kept = keep_mask(problem.dropout_seed, problem.dropout_p, heads, rows, range(problem.key_length))
        p = torch.where(
            kept.view(p.shape), p / (1.0 - problem.dropout_p), torch.zeros((), dtype=dtype, device=p.device)
        )
    value, finite_value = finite_rows(problem.value.to(dtype))
    group = problem.num_heads // problem.num_kv_heads if problem.num_kv_heads else 1
    if group != 1:
        value, finite_value = value.repeat_interleave(group, dim=1), finite_value.repeat_interleave(group, dim=1)
    out = p @ value
    # A row that sees a non-finite value row is NaN; one that does not must be untouched by it.
    poisoned = ((~masked).to(dtype) @ (~finite_value).to(dtype)[..., None]) > 0
    out = out.masked_fill(poisoned, float("nan"))
    # Rows without any visible key: 0 * NaN of an incoming gradient must not reach v.
    out = out.masked_fill(masked.all(dim=-1, keepdim=True), 0.0)
    return out.to(problem.query.dtype), lse


def softmax(problem: SoftmaxProblem) -> Tensor:
    """Masked softmax (B, H, Sq, Sk) in the dtype of the scores.

    A place counts as masked where a mask says so and where score plus bias is -inf.  It gets 0 whatever else its row
    holds, and nothing that stands there is seen, forward or backward.
    """
    view = problem.attention()
    dtype = view.parameter_dtype
    s = problem.scores.to(dtype) * problem.scale
    added = bias(view, dtype)
    if added is not None:
        s = s + added
    masked = s == NEG_INF
    mask = visible(view)
    if mask is not None:
        masked = masked | ~mask
    s = s.masked_fill(masked, NEG_INF)
    top = s.detach().amax(dim=-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    p = torch.exp(s - top.masked_fill(top == NEG_INF, 0.0))
    total = p.sum(dim=-1, keepdim=True)
    out = p / total.masked_fill(total == 0, 1.0)
    # again, for the gradient: 0 * NaN of an incoming one must not reach the row
    return out.masked_fill(masked, 0.0).to(problem.dtype)


def rotate_pair(rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotated query and key in their own dtype, computed in that of the tables; differentiable in the tables too."""
    rows = rotation.positions
    if rows is None:
        rows = torch.arange(rotation.query.shape[2], device=rotation.device)[None]
    sin = -rotation.sin if rotation.conjugate else rotation.sin
    query, key = [
        rotate(x.to(rotation.cos.dtype), rotation.cos, sin, rows, rotation.interleaved).to(x.dtype)
        for x in (rotation.query, rotation.key)
    ]
    return query, key

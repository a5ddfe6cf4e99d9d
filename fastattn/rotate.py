"""The public function `apply_rotary`: rotary embedding alone, for models that rotate before they cache or attend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import dispatch, reference
from fastattn.functional import dense_rows
from fastattn.rotary import rotary_table
from fastattn.rotation import Rotation
from fastattn.validation import (
    check_device,
    check_floating,
    check_integer,
    check_range,
    check_shape,
    describe,
    fail,
    is_readable,
)

__all__ = ["apply_rotary"]


def apply_rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    trailing: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their positions (Su et al., "RoFormer", 2021), both in one pass.

    The leading R = 2 * cos.shape[-1] dimensions of each head rotate; the rest passes.  A pair (x0, x1) becomes
    (x0 cos - x1 sin, x1 cos + x0 sin), computed in float32 from float32 tables (float64 for float64 operands) and
    rounded once.  An amplitude folded into cos and sin (YaRN, LongRoPE, xPos) is honoured; the gradient is the
    transpose with the same amplitude, and has derivatives of every order.

    Args:
        query: (B, Hq, S, D), float32, float64, bfloat16 or float16.  Any strides; no copy where the last dimension is
            dense.
        key: (B, Hk, S, D), same dtype and device; Hk may differ from Hq.
        cos, sin: (P, R/2) or (B, P, R/2) floating, R <= D.  When one of them requires a gradient, the rotation runs in
            plain torch on every backend, like `Rotary` with learned frequencies.
        positions: integer tensor (S,) or (B, S), the row of the tables that each token takes; None means 0 ... S - 1.
            On a GPU, or under torch.compile, values outside [0, P - 1] are clamped to it instead of raising.
        interleaved: pairs are (2k, 2k + 1) as in GPT-J instead of (k, k + R/2) as in Llama and GPT-NeoX.
        trailing: the last R dimensions rotate instead of the first (the rotary part of DeepSeek's heads).
        inplace: write over query and key and return them.  For inference: it is refused while a gradient of anything
            is recorded, because both are usually views of one projection, which autograd cannot follow.
        backend: name of the backend to use; None picks the first that can.

    Returns:
        Rotated query and key, in their dtype, each laid out in memory as (B, S, H, D) when its operand is.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what was expected and what came.
        fastattn.UnsupportedError: the backend asked for cannot run this call, with its reasons.
    """
    _check_operands(query, key)
    batch, _, length, dim = query.shape
    parameter_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = rotary_table("cos", cos), rotary_table("sin", sin)
    check_shape("sin", sin, tuple(cos.shape))
    if 2 * cos.shape[-1] > dim:
        fail(ValueError, "cos", f"at most D/2 = {dim // 2} columns", cos)
    for name, table in (("cos", cos), ("sin", sin)):
        check_device(name, table, query.device)
        if table.shape[0] not in (1, batch):
            fail(ValueError, name, f"batch dimension 1 or B = {batch}", table)
    for name, flag in (("interleaved", interleaved), ("trailing", trailing), ("inplace", inplace)):
        if not isinstance(flag, bool):
            fail(TypeError, name, "a bool", describe(flag))
    rows = _positions(positions, batch, length, cos)
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if inplace:
        _check_inplace(query, key, learned)
    else:
        query, key = dense_rows(query), dense_rows(key)
    first, whole = (dim - 2 * cos.shape[-1] if trailing else 0), (query, key)
    if first:
        query, key = query[..., first:], key[..., first:]
    rotation = Rotation(
        query=query, key=key, cos=cos.to(parameter_dtype), sin=sin.to(parameter_dtype), positions=rows,
        interleaved=interleaved,
    )  # fmt: skip
    turned = reference.rotate_pair(rotation) if learned else dispatch.rotate(rotation, backend, inplace)
    if not first:
        return turned
    if inplace:
        return whole
    joined = [torch.cat((x[..., :first], y), dim=-1) for x, y in zip(whole, turned, strict=True)]
    return joined[0], joined[1]


def _check_operands(query: Tensor, key: Tensor) -> None:
    for name, x in (("query", query), ("key", key)):
        if check_floating(name, x).dim() != 4:
            fail(ValueError, name, "four dimensions (batch, heads, length, head_dim)", x)
    if key.dtype != query.dtype:
        fail(TypeError, "key", f"dtype {query.dtype} like query", str(key.dtype))
    check_device("key", key, query.device)
    for axis, what in ((0, "batch size"), (2, "length"), (3, "head dimension")):
        if key.shape[axis] != query.shape[axis]:
            fail(ValueError, "key", f"{what} {query.shape[axis]} like query", key)


def _positions(positions: Tensor | None, batch: int, length: int, cos: Tensor) -> Tensor | None:
    """(B|1, S) int64 table rows, or None where they are 0 ... S - 1."""
    table_rows = cos.shape[1]
    if positions is None:
        if length > table_rows:
            fail(ValueError, "cos", f"a row for each of S = {length} positions", cos)
        return None
    rows = check_integer("positions", positions).long()
    check_device("positions", rows, cos.device)
    check_shape("positions", rows, (length,), (batch, length))
    if table_rows == 0 and length:
        fail(ValueError, "cos", "at least one row", cos)
    if is_readable(rows):
        check_range("positions", rows, 0, table_rows - 1, f"rows of the tables, in [0, {table_rows - 1}]")
    rows = rows if rows.dim() == 2 else rows[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_inplace(query: Tensor, key: Tensor, learned: bool) -> None:
    if learned or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)):
        fail(ValueError, "inplace", "False while a gradient is recorded (or torch.no_grad())", True)
    for name, x in (("query", query), ("key", key)):
        if x.shape[3] > 1 and x.stride(3) != 1:
            fail(ValueError, name, "a dense last dimension when inplace=True", f"stride {x.stride(3)}")
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            fail(ValueError, name, "no expanded dimension when inplace=True", f"strides {x.stride()}")
    if query is key:
        fail(ValueError, "key", "another tensor than query when inplace=True", "query itself")

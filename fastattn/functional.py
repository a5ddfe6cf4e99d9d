"""The public functions: `attention`, `explain`, `backends`, `last_call`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.biases import Bias
from fastattn.dispatch import Explanation, backends
from fastattn.float8 import (
    Scales,
    check_without_gradients,
    dequantized,
    is_float8,
    note,
    stages_without_kernel,
    stand_in,
)
from fastattn.lowering import Draft
from fastattn.masks import Causal, Mask
from fastattn.problem import Problem, default_scale, parameter_dtype
from fastattn.quantized_problem import FLOAT8, QuantizedProblem
from fastattn.rotary import Rotary
from fastattn.validation import (
    FLOATING,
    as_dtype,
    check_device,
    check_floating,
    check_index,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    describe,
    fail,
)

__all__ = ["attention", "backends", "explain", "last_call"]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with any mask, bias and rotation, fused, with gradients for all of it.

    Computes, for each batch and query head (Vaswani et al., 2017, with the optional stages in this order)::

        q, k   = rotate(query), rotate(key)                  # rotary
        s      = scale * q k^T                               # scale
        s      = softcap * tanh(s / softcap)                 # softcap (Gemma-2)
        s      = s + bias, -inf where masked                 # bias, mask
        p      = exp(s) / (sum exp(s) + exp(sink))           # sink (gpt-oss)
        out    = dropout(p) value

    Args:
        query: (B, Hq, Sq, D), float32, float64, bfloat16, float16, or float8_e4m3fn, which has no gradient.  Any
            strides; no copy where the last dimension is dense.
        key: (B, Hk, Sk, D), same dtype and device.  Hq must be a multiple of Hk: query head h reads head
            h // (Hq / Hk), which is grouped-query attention (Hk = 1: multi-query).
        value: (B, Hk, Sk, Dv); Dv may differ from D.
        mask: what each query may see, masks joined with ``&``.  A query that sees nothing gives 0, with gradient 0.
        bias: added to the scores, biases joined with ``+``.
        rotary: rotation of queries and keys by position.
        scale: finite number, default 1/sqrt(D).  T5 uses 1.0.
        softcap: finite number > 0.
        sink: (Hq,) or (B, Hq) floating: an extra logit that only enlarges the denominator.
        dropout_p: probability in [0, 1] that a weight is dropped; applied whenever it is > 0.
        query_offset: position of the first query among the keys, an int or an integer tensor (B,); masks, biases and
            rotation all use it.  None means Sk - Sq: the last query sits on the last key, as in decoding with a
            cache::

                         key 0 1 2 3 4                       key 0 1 2 3 4
                query 0      # # # . .               query 0     # . . . .
                query 1      # # # # .               query 1     # # . . .
                query 2      # # # # #               query 2     # # # . .
                query_offset=None (= 5 - 3), Causal()        query_offset=0, Causal()

            `torch.nn.functional.scaled_dot_product_attention(is_causal=True)` is the right-hand picture.
        query_scale: (Hq,) or (B, Hq) float32 >= 0, for float8_e4m3fn operands alone: what each head's numbers are to be
            multiplied by, as quantisation divided them.  None = 1.
        key_scale, value_scale: (Hk,) or (B, Hk), the same of key and value.
        return_lse: also return the log of the softmax denominator (natural logarithm), differentiable.
        backend: name of the backend to use; None picks the first that can (see `explain`).

    float8_e4m3fn operands (query, key and value alike) go as they are to a kernel for sm_90a where `explain` says so:
    scales are applied in float32, and weights are rounded to float8_e4m3fn.  Everywhere else they become bfloat16,
    which has each of their numbers: query, times the scales of query and key, and value, times its own, are rounded
    once each (with a bias, query and key each times its own).

    Under autocast, float32 (and mixed half precision) inputs are cast to the autocast dtype, as for torch's own SDPA.

    Returns:
        out (B, Hq, Sq, Dv) in the query's dtype, bfloat16 for float8_e4m3fn, laid out in memory as (B, Sq, Hq, Dv) when
        the query is; with return_lse also lse (B, Hq, Sq) in float32 (float64 for float64), +inf for a query that sees
        nothing.

    Raises:
        TypeError, ValueError, NotImplementedError: naming the argument, what was expected and what came.  Values
            inside GPU tensors are not inspected (that would wait for the device); kernels clamp them instead.
        fastattn.UnsupportedError: the backend asked for cannot run this call, with its reasons.
    """
    if (
        (mask is None or type(mask) is Causal)
        and bias is None
        and rotary is None
        and softcap is None
        and sink is None
        and dropout_p == 0.0
        and query_scale is key_scale is value_scale is None
        and not return_lse
        and backend is None
    ):
        short = dispatch.run_shortcut(query, key, value, scale, query_offset, mask is not None)  # type: ignore[arg-type]
        if short is not None:
            return short
    scales = None
    if query_scale is not None or key_scale is not None or value_scale is not None:
        scales = Scales(query_scale, key_scale, value_scale)
    problem = lower(
        query, key, value, mask=mask, bias=bias, rotary=rotary, scale=scale, softcap=softcap, sink=sink,
        dropout_p=dropout_p, query_offset=query_offset, scales=scales, takes_float8=True, backend=backend,
    )  # fmt: skip
    if type(problem) is Problem:
        out, lse = dispatch.run(problem, backend, return_lse)
    else:
        out, lse = dispatch.quantized(problem, backend)
    if dropout_p == 1.0:
        out = out * 0.0  # everything is dropped; lowering ran the call without dropout
    return (out, lse) if return_lse else out


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    query_scale: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which kernel `attention` would run for these arguments, with which tiles, and why each other one would not.

    Takes the arguments of `attention`, checks them the same way and raises the same errors, and runs no kernel.  Its
    notes tell what is done before the kernel to arguments that it does not take as they are, and in which memory.
    """
    notes: list[str] = []
    problem = lower(
        query, key, value, mask=mask, bias=bias, rotary=rotary, scale=scale, softcap=softcap, sink=sink,
        dropout_p=dropout_p, query_offset=query_offset, draw_seed=False, notes=notes,
        scales=Scales(query_scale, key_scale, value_scale), takes_float8=True, backend=backend,
    )  # fmt: skip
    return dispatch.explain(problem, backend, notes)


def last_call() -> Explanation | None:
    """What ran for the last eager call of `attention`, `additive_attention`, `masked_softmax` or `apply_rotary` in this
    thread; None before the first.

    Calls inside a torch.compile graph are not recorded.
    """
    return dispatch.last_call()


def lower(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    rotary: Rotary | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    query_offset: int | Tensor | None = None,
    draw_seed: bool = True,
    notes: list[str] | None = None,
    takes_tables: bool = True,
    scales: Scales | None = None,
    takes_float8: bool = False,
    backend: str | None = None,
) -> Problem | QuantizedProblem:
    """Check the arguments of `attention` and lower them to a `Problem`.

    `notes` receives those of `explain`; without `takes_tables` no bias chooses row or column tables by itself.
    With `takes_float8`, 8-bit operands, times their `scales`, make a `QuantizedProblem` where a kernel of the backend
    asked for takes them as they are, and are dequantised elsewhere.
    """
    if torch._C._is_any_autocast_enabled() and not is_float8(query, key, value):
        query, key, value = cast_for_autocast(
            check_floating("query", query), check_floating("key", key), check_floating("value", value)
        )
    sizes = _sizes(query, key, value)
    if sizes is None:
        if takes_float8 and is_float8(query, key, value):
            return _lower_float8(
                query, key, value, scales or Scales(), backend, mask=mask, bias=bias, rotary=rotary, scale=scale,
                softcap=softcap, sink=sink, dropout_p=dropout_p, query_offset=query_offset, draw_seed=draw_seed,
                notes=notes,
            )  # fmt: skip
        sizes = _check_operands(query, key, value)
    (batch, heads, query_length, head_dim), key_length = sizes
    if scales is not None:
        scales.refuse(query.dtype)
    fields: dict[str, object] = {}
    if query_offset is None:
        fields["query_offset"] = offset = key_length - query_length
    else:
        offset = lower_offset(fields, query_offset, batch, query_length, key_length, query.device)
    scale = default_scale(head_dim) if scale is None else check_number("scale", scale)
    if type(mask) is Causal and bias is None and rotary is None:
        fields["window_right"] = 0  # what most masked calls are, for which a draft costs a microsecond and more
    elif mask is not None or bias is not None or rotary is not None:
        draft = Draft(
            batch, heads, query_length, key_length, head_dim, query.device, parameter_dtype(query.dtype), offset,
            fields, query, key, scale, rotary is not None, softcap is not None, takes_tables, (query, key),
        )  # fmt: skip
        query, key = _lower_objects(draft, mask, bias, rotary)
        if notes is not None:
            notes += draft.notes
    if softcap is not None:
        fields["softcap"] = check_number("softcap", softcap)
        if fields["softcap"] <= 0:  # type: ignore[operator]
            fail(ValueError, "softcap", "a number > 0 or None", softcap)
    if sink is not None:
        check_floating("sink", sink)
        check_device("sink", sink, query.device)
        check_shape("sink", sink, (heads,), (batch, heads))
        sink = as_dtype(sink, parameter_dtype(query.dtype))
        fields["sink"] = sink if sink.dim() == 2 else sink.unsqueeze(0)
    if dropout_p != 0.0:
        dropout_p = check_number("dropout_p", dropout_p)
        if not 0.0 <= dropout_p <= 1.0:
            fail(ValueError, "dropout_p", "a probability in [0, 1]", dropout_p)
        if dropout_p < 1.0:
            fields["dropout_p"] = dropout_p
            # To explain a call must not move the generator on: the next call would drop other weights.
            fields["dropout_seed"] = (
                torch.randint(-(2**63), 2**63 - 1, (2,), device=query.device)
                if draw_seed
                else torch.zeros(2, dtype=torch.int64, device=query.device)
            )
    return Problem(query=dense_rows(query), key=dense_rows(key), value=dense_rows(value), scale=scale, **fields)  # type: ignore[arg-type]


def _lower_float8(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Scales,
    backend: str | None,
    *,
    bias: Bias | None,
    rotary: Rotary | None,
    softcap: float | None,
    dropout_p: float,
    sink: Tensor | None,
    notes: list[str] | None,
    **call: Any,
) -> Problem | QuantizedProblem:
    """`lower` for operands one of which is of 8 bits."""
    _check_operands(query, key, value, float8=True)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(query.device.type):
        # it would cast what the operands become
        with torch.autocast(query.device.type, enabled=False):
            return _lower_float8(
                query, key, value, scales, backend, bias=bias, rotary=rotary, softcap=softcap, dropout_p=dropout_p,
                sink=sink, notes=notes, **call,
            )  # fmt: skip
    scales = scales.checked(query, key)
    check_without_gradients([("query", query), ("key", key), ("value", value), *scales.named()])
    reasons = stages_without_kernel(bias, rotary, softcap, dropout_p, sink)
    if not reasons:
        attention = lower(*map(stand_in, (query, key, value)), sink=sink, **call)
        attention = replace(attention, query=dense_rows(query), key=dense_rows(key), value=dense_rows(value))
        problem = QuantizedProblem(
            query_scale=scales.query, key_scale=scales.key, value_scale=scales.value, attention=attention
        )
        reasons = dispatch.quantized_refusals(problem, backend)
        if not reasons:
            return problem
    if notes is not None:
        notes.append(note(query, key, value, scales, reasons))
    return lower(
        *dequantized(query, key, value, scales, fold=bias is None), bias=bias, rotary=rotary, softcap=softcap,
        dropout_p=dropout_p, sink=sink, notes=notes, **call,
    )  # fmt: skip


def lower_offset(
    fields: dict[str, object],
    query_offset: int | Tensor | None,
    batch: int,
    query_length: int,
    key_length: int,
    device: torch.device,
) -> int | Tensor:
    """Check the `query_offset` of a call, write it into the fields and return it; None = Sk - Sq."""
    if isinstance(query_offset, Tensor):
        offsets = check_integer("query_offset", query_offset).long()
        check_device("query_offset", offsets, device)
        check_shape("query_offset", offsets, (batch,))
        fields["query_offsets"] = offsets
        return offsets
    offset = key_length - query_length if query_offset is None else check_index("query_offset", query_offset)
    fields["query_offset"] = offset
    return offset


def dense_rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense, as every kernel reads it; else a copy that is."""
    return x if x.stride()[3] == 1 or x.shape[3] <= 1 else x.contiguous()


def lower_mask_and_bias(draft: Draft, mask: Mask | None, bias: Bias | None) -> None:
    """Check that they are masks and biases, and write them into the draft."""
    if mask is not None:
        if not isinstance(mask, Mask):
            fail(
                TypeError,
                "mask",
                "a fastattn mask (BoolMask(tensor) for a bool tensor, True = may attend)",
                describe(mask),
            )
        mask.lower(draft)
    if bias is not None:
        if not isinstance(bias, Bias):
            fail(TypeError, "bias", "a fastattn bias (DenseBias(tensor) for a tensor)", describe(bias))
        if torch.is_autocast_enabled(draft.device.type):
            # biases choose their precision themselves: positions are no activations
            with torch.autocast(draft.device.type, enabled=False):
                bias.lower(draft)
        else:
            bias.lower(draft)


def _lower_objects(draft: Draft, mask: Mask | None, bias: Bias | None, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
    """Write all objects into the draft; query and key as the kernel shall have them."""
    if rotary is not None:
        if not isinstance(rotary, Rotary):
            fail(TypeError, "rotary", "a fastattn.Rotary", describe(rotary))
        rotary.check(draft)
    # Biases that depend on the contents see queries and keys as they came, and append columns behind what rotates.
    lower_mask_and_bias(draft, mask, bias)
    if rotary is not None:
        rotary.lower(draft)
    assert draft.query is not None
    assert draft.key is not None
    return draft.query, draft.key


def cast_for_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operands as autocast wants them: in its dtype where it is on, as they are where it is not."""
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    # float64 is left alone, as autocast leaves it.
    if any(x.dtype == torch.float64 for x in (query, key, value)):
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[torch.Size, int] | None:
    """The shape of the queries and the number of keys of operands with nothing wrong, else None."""
    if type(query) is type(key) is type(value) is Tensor and not (query.is_nested or key.is_nested or value.is_nested):
        shape, key_shape, value_shape = query.shape, key.shape, value.shape
        if (
            len(shape) == len(key_shape) == len(value_shape) == 4
            and key.dtype is value.dtype is query.dtype
            and query.dtype in FLOATING
            and query.layout is key.layout is value.layout is torch.strided
            and key.device == value.device == query.device
            and key_shape[0] == value_shape[0] == shape[0]
            and key_shape[3] == shape[3]
            and value_shape[1] == key_shape[1] != 0
            and value_shape[2] == key_shape[2]
            and shape[1] % key_shape[1] == 0
        ):
            return shape, key_shape[2]
    return None


def _check_operands(query: Tensor, key: Tensor, value: Tensor, float8: bool = False) -> tuple[torch.Size, int]:
    """Kind, rank, dtype, device and sizes of query, key and value, with words for what is wrong, which takes twice the
    time of `_sizes`; what that returns."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not float8:
            check_floating(name, x)
        elif check_tensor(name, x).dtype is not FLOAT8:
            fail(TypeError, name, f"dtype {FLOAT8} like another of query, key and value", str(x.dtype))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() != 4:
            fail(ValueError, name, "four dimensions (batch, heads, length, head_dim)", x)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            fail(TypeError, name, f"dtype {query.dtype} like query", str(x.dtype))
        check_device(name, x, query.device)
        if x.shape[0] != query.shape[0]:
            fail(ValueError, name, f"batch size {query.shape[0]} like query", x)
    if key.shape[3] != query.shape[3]:
        fail(ValueError, "key", f"head dimension {query.shape[3]} like query", key)
    if value.shape[1:3] != key.shape[1:3]:
        fail(ValueError, "value", f"heads and length {tuple(key.shape[1:3])} like key", value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if (heads % kv_heads != 0) if kv_heads else heads != 0:
        fail(ValueError, "query", f"a number of heads that is a multiple of key's {kv_heads}", query)
    return query.shape, key.shape[2]

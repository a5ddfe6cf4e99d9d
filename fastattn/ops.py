"""The operators, declared once: schemas built from the problems' fields, and what they return under fake tensors.

Each fused backend has these, with the schemas below; implementations are registered elsewhere (the native libraries
register theirs when they load):

    fastattn::<backend>_forward, _backward                   attention (`Problem`)
    fastattn::cpu_plain_forward                              its output alone, for `PLAIN_FIELDS`
    fastattn::<backend>_softmax_forward, _softmax_backward   masked softmax (`SoftmaxProblem`)
    fastattn::<backend>_rotate, _rotate_                     rotary embedding (`Rotation`), the second in place
    fastattn::<backend>_additive_forward, _additive_backward additive attention (`AdditiveProblem`)

the one of CUDA C++ has

    fastattn::cuda_float8_forward                            attention on 8-bit operands (`QuantizedProblem`)

and the native one for CPUs has

    fastattn::cpu_weights_forward, _weights_backward         attention that gives its weights, too
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from fastattn.additive_problem import ADDITIVE_FIELDS, ADDITIVE_GRADIENT_FIELDS
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, PLAIN_FIELDS, Problem
from fastattn.quantized_problem import OUT_DTYPE, QuantizedProblem
from fastattn.rotation import Rotation
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

FUSED_BACKENDS = ("cuda", "triton", "cpu")

_SCALAR_TYPES = {"float": "float", "bool": "bool", "int": "SymInt"}


def _arguments(kind: type, mutable: frozenset[str] = frozenset(), without: frozenset[str] = frozenset()) -> str:
    """The fields of a problem as an operator's argument list; `mutable` ones are written to."""
    parts = []
    for field in fields(kind):
        annotation = str(field.type)
        if field.name in without:
            continue
        if annotation.startswith("Tensor"):
            alias = f"({chr(ord('a') + len(parts))}!)" if field.name in mutable else ""
            parts.append(f"Tensor{alias}{'?' if 'None' in annotation else ''} {field.name}")
        else:
            parts.append(f"{_SCALAR_TYPES[annotation]} {field.name}")
    return ", ".join(parts)


_NOT_PLAIN = frozenset(FIELD_NAMES) - frozenset(PLAIN_FIELDS)


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


PROBLEM_SCHEMA = _arguments(Problem)
# Beside out and lse, statistics (B, Hq, Sq, 2): what the backend's own backward recomputes the weights from.
FORWARD_SCHEMA = f"({PROBLEM_SCHEMA}) -> (Tensor, Tensor, Tensor)"
FLOAT8_FORWARD_SCHEMA = (
    f"({_arguments(QuantizedProblem, without=frozenset({'attention'}))}, {PROBLEM_SCHEMA}) -> (Tensor, Tensor)"
)
PLAIN_FORWARD_SCHEMA = f"({_arguments(Problem, without=_NOT_PLAIN)}) -> Tensor"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor statistics, int needs, {PROBLEM_SCHEMA}) -> "
    + _tensors(len(GRADIENT_FIELDS))
)
SOFTMAX_FORWARD_SCHEMA = f"({_arguments(SoftmaxProblem)}) -> Tensor"
# The softmax's output says all that its backward needs of the scores, masks of single elements included.
SOFTMAX_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor out, int needs, {_arguments(SoftmaxProblem, without=frozenset({'scores'}))}) -> "
    + _tensors(len(SOFTMAX_GRADIENT_FIELDS))
)
ADDITIVE_FORWARD_SCHEMA = f"(Tensor weight, {PROBLEM_SCHEMA}) -> (Tensor, Tensor, Tensor)"
ADDITIVE_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor statistics, int needs, Tensor weight, "
    f"{PROBLEM_SCHEMA}) -> " + _tensors(len(ADDITIVE_GRADIENT_FIELDS))
)
# The weights (B, Hq, Sq, Sk), or (B, 1, Sq, Sk) with average; `leading` keys at the front have their last columns.
WEIGHTS_FORWARD_SCHEMA = f"(bool average, SymInt leading, {PROBLEM_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
WEIGHTS_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor grad_weights, Tensor out, Tensor statistics, int needs, bool average, SymInt leading, "
    f"{PROBLEM_SCHEMA}) -> " + _tensors(len(GRADIENT_FIELDS))
)
ROTATE_SCHEMA = f"({_arguments(Rotation)}) -> (Tensor, Tensor)"
ROTATE_INPLACE_SCHEMA = f"({_arguments(Rotation, mutable=frozenset({'query', 'key'}))}) -> ()"


def empty_like_layout(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, H, S, D) tensor laid out in memory as (B, S, H, D) if `like` is, else contiguous; None: of
    its dtype."""
    batch, heads, length, dim = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, dim), dtype=dtype).transpose(1, 2)
    return like.new_empty(shape, dtype=dtype)


# Fields, and the weight of additive attention, whose gradients have the dtype of the statistics.
_IN_PARAMETER_DTYPE = frozenset({"slopes", "table", "sink", "row_table", "col_table", "weight"})


def absent_gradient(name: str, grad_out: Tensor, statistics: Tensor) -> Tensor:
    """What stands in the place of a gradient that is not needed: empty, in the dtype the gradient would have."""
    return (statistics if name in _IN_PARAMETER_DTYPE else grad_out).new_empty(0)


def _fake_forward(*args: object) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(**dict(zip(FIELD_NAMES, args, strict=True)))  # type: ignore[arg-type]
    query, value = problem.query, problem.value
    out = empty_like_layout(query, (*query.shape[:3], value.shape[3]))
    rows, dtype = query.shape[:3], problem.parameter_dtype
    return out, query.new_empty(rows, dtype=dtype), query.new_empty((*rows, 2), dtype=dtype)


def _fake_float8_forward(
    query_scale: Tensor | None, key_scale: Tensor | None, value_scale: Tensor | None, *args: object
) -> tuple[Tensor, Tensor]:
    problem = Problem(**dict(zip(FIELD_NAMES, args, strict=True)))  # type: ignore[arg-type]
    query, rows = problem.query, problem.query.shape[:3]
    out = empty_like_layout(query, (*rows, problem.value.shape[3]), OUT_DTYPE)
    return out, query.new_empty(rows, dtype=torch.float32)


def _fake_plain_forward(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    return empty_like_layout(query, (*query.shape[:3], value.shape[3]))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, needs: int, *args: object
) -> tuple[Tensor, ...]:
    given = dict(zip(FIELD_NAMES, args, strict=True))
    return _fake_gradients(GRADIENT_FIELDS, given, grad_out, statistics, needs)


def _fake_weights_forward(average: bool, leading: int, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(**dict(zip(FIELD_NAMES, args, strict=True)))  # type: ignore[arg-type]
    heads = 1 if average else problem.num_heads
    shape = (problem.batch_size, heads, problem.query_length, problem.key_length)
    return (*_fake_forward(*args), problem.query.new_empty(shape))


def _fake_weights_backward(
    grad_out: Tensor,
    grad_weights: Tensor,
    out: Tensor,
    statistics: Tensor,
    needs: int,
    average: bool,
    leading: int,
    *args: object,
) -> tuple[Tensor, ...]:
    return _fake_backward(grad_out, None, out, statistics, needs, *args)


def _fake_additive_forward(weight: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_forward(*args)


def _fake_additive_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, needs: int, *args: object
) -> tuple[Tensor, ...]:
    given = dict(zip(ADDITIVE_FIELDS, args, strict=True))
    return _fake_gradients(ADDITIVE_GRADIENT_FIELDS, given, grad_out, statistics, needs)


def _fake_gradients(
    names: tuple[str, ...], given: dict[str, object], grad_out: Tensor, statistics: Tensor, needs: int
) -> tuple[Tensor, ...]:
    grads = []
    for bit, name in enumerate(names):
        like = given[name]
        if not needs >> bit & 1:
            grads.append(absent_gradient(name, grad_out, statistics))
        elif name in ("query", "key", "value"):
            grads.append(empty_like_layout(like, tuple(like.shape)))  # type: ignore[arg-type, attr-defined]
        else:
            grads.append(like.new_empty(like.shape))  # type: ignore[attr-defined]
    return tuple(grads)


def _fake_softmax_forward(scores: Tensor, *args: object) -> Tensor:
    return scores.new_empty(scores.shape)


def _fake_softmax_backward(grad_out: Tensor, out: Tensor, needs: int, *args: object) -> tuple[Tensor, ...]:
    given = dict(zip(SOFTMAX_FIELDS, (out, *args), strict=True))
    grads = []
    for bit, name in enumerate(SOFTMAX_GRADIENT_FIELDS):
        like = given[name]
        grads.append(like.new_empty(like.shape) if needs >> bit & 1 else out.new_empty(0))  # type: ignore[attr-defined]
    return tuple(grads)


def _fake_rotate(query: Tensor, key: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return empty_like_layout(query, tuple(query.shape)), empty_like_layout(key, tuple(key.shape))  # type: ignore[arg-type]


def _fake_rotate_inplace(*args: object) -> None:
    return None


_library = torch.library.Library("fastattn", "DEF")


def _declare(name: str, schema: str, fake: Callable[..., object]) -> None:
    _library.define(f"{name}{schema}")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_library)


for _name in FUSED_BACKENDS:
    _declare(f"{_name}_forward", FORWARD_SCHEMA, _fake_forward)
    _declare(f"{_name}_backward", BACKWARD_SCHEMA, _fake_backward)
    _declare(f"{_name}_softmax_forward", SOFTMAX_FORWARD_SCHEMA, _fake_softmax_forward)
    _declare(f"{_name}_softmax_backward", SOFTMAX_BACKWARD_SCHEMA, _fake_softmax_backward)
    _declare(f"{_name}_rotate", ROTATE_SCHEMA, _fake_rotate)
    _declare(f"{_name}_rotate_", ROTATE_INPLACE_SCHEMA, _fake_rotate_inplace)
    _declare(f"{_name}_additive_forward", ADDITIVE_FORWARD_SCHEMA, _fake_additive_forward)
    _declare(f"{_name}_additive_backward", ADDITIVE_BACKWARD_SCHEMA, _fake_additive_backward)
_declare("cuda_float8_forward", FLOAT8_FORWARD_SCHEMA, _fake_float8_forward)
_declare("cpu_plain_forward", PLAIN_FORWARD_SCHEMA, _fake_plain_forward)
_declare("cpu_weights_forward", WEIGHTS_FORWARD_SCHEMA, _fake_weights_forward)
_declare("cpu_weights_backward", WEIGHTS_BACKWARD_SCHEMA, _fake_weights_backward)

# What the native libraries would do with a problem, as JSON, for `explain`.
for _name in ("cuda", "cuda_float8", "cpu"):
    _library.define(f"{_name}_plan({PROBLEM_SCHEMA}) -> str")


def implement(name: str, function: Callable[..., object], dispatch_key: str) -> None:
    """Register a Python implementation of fastattn::<name> for one dispatch key ("CUDA", "CPU")."""
    _library.impl(name, function, dispatch_key)

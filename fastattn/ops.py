"""The operators, declared once: schemas built from `Problem`'s fields, and what they return under fake tensors.

Each fused backend has the pair ``fastattn::<backend>_forward`` and ``fastattn::<backend>_backward`` with these
schemas; its implementation is registered elsewhere (the native libraries register theirs when they load).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, TENSOR_FIELDS, Problem

FUSED_BACKENDS = ("triton", "cpu")

_SCALAR_TYPES = {"float": "float", "bool": "bool", "int": "SymInt"}


def _problem_schema() -> str:
    types = {name: Problem.__dataclass_fields__[name].type for name in FIELD_NAMES}
    parts = []
    for name in FIELD_NAMES:
        annotation = str(types[name])
        if name in TENSOR_FIELDS:
            parts.append(f"Tensor{'?' if 'None' in annotation else ''} {name}")
        else:
            parts.append(f"{_SCALAR_TYPES[annotation]} {name}")
    return ", ".join(parts)


PROBLEM_SCHEMA = _problem_schema()
FORWARD_SCHEMA = f"({PROBLEM_SCHEMA}) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, int needs, {PROBLEM_SCHEMA}) -> ("
    + ", ".join("Tensor" for _ in GRADIENT_FIELDS)
    + ")"
)


def empty_like_layout(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised (B, H, S, D) tensor laid out in memory as (B, S, H, D) if `like` is, else contiguous."""
    batch, heads, length, dim = shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return like.new_empty(shape)


def _fake_forward(*args: object) -> tuple[Tensor, Tensor]:
    problem = Problem(**dict(zip(FIELD_NAMES, args, strict=True)))  # type: ignore[arg-type]
    query, value = problem.query, problem.value
    out = empty_like_layout(query, (*query.shape[:3], value.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=problem.parameter_dtype)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: int, *args: object
) -> tuple[Tensor, ...]:
    fields = dict(zip(FIELD_NAMES, args, strict=True))
    grads = []
    for bit, name in enumerate(GRADIENT_FIELDS):
        like = fields[name]
        if not needs >> bit & 1:
            grads.append(grad_out.new_empty(0))
        elif name in ("query", "key", "value"):
            grads.append(empty_like_layout(like, tuple(like.shape)))  # type: ignore[arg-type, attr-defined]
        else:
            grads.append(like.new_empty(like.shape))  # type: ignore[attr-defined]
    return tuple(grads)


_library = torch.library.Library("fastattn", "DEF")
for _name in FUSED_BACKENDS:
    _library.define(f"{_name}_forward{FORWARD_SCHEMA}")
    _library.define(f"{_name}_backward{BACKWARD_SCHEMA}")
    torch.library.register_fake(f"fastattn::{_name}_forward", _fake_forward, lib=_library)
    torch.library.register_fake(f"fastattn::{_name}_backward", _fake_backward, lib=_library)


def implement(name: str, function: Callable[..., object], dispatch_key: str) -> None:
    """Register a Python implementation of fastattn::<name> for one dispatch key ("CUDA", "CPU")."""
    _library.impl(name, function, dispatch_key)

"""The C++ SIMD backend (csrc/cpu): every feature, forward and backward, on CPU tensors."""

from __future__ import annotations

import json
from functools import cache
from math import inf
from operator import attrgetter

import torch
from torch import Tensor

from fastattn import native
from fastattn.additive_autograd import fused_additive
from fastattn.additive_problem import AdditiveProblem
from fastattn.autograd import is_bare
from fastattn.backends.base import WHAT_RUNS, AnyProblem, FusedBackend, tables_of_additive
from fastattn.problem import PLAIN_FIELDS, Problem, default_scale
from fastattn.weights_autograd import fused_with_weights

_CPU = torch.device("cpu")
_plain_forward, _plain_fields = torch.ops.fastattn.cpu_plain_forward.default, attrgetter(*PLAIN_FIELDS)


def plain_forward(problem: Problem) -> Tensor:
    """The output of a plain problem, by an operator that takes half the time of the one of all fields."""
    return _plain_forward(*_plain_fields(problem))


def shortcut(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, query_offset: int | None, causal: bool
) -> Tensor | None:
    """What `attention` returns for usual arguments without a gradient, in half the time of a `Problem`; else None.

    The operator itself refuses operands that do not fit together, as it must; to say what is wrong is left to others.
    """
    if not (
        type(query) is type(key) is type(value) is Tensor
        and query.device == key.device == value.device == _CPU
        and is_bare((query, key, value))
        and not torch._C._is_any_autocast_enabled()
        and query.dim() == key.dim() == 4
        and (scale is None or (type(scale) is float and -inf < scale < inf))
        and (query_offset is None or type(query_offset) is int)
    ):
        return None
    try:
        if not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1:
            return None
        shape = query.shape
        if scale is None:
            scale = default_scale(shape[3])
        if query_offset is None:
            query_offset = key.shape[2] - shape[2]
        return _plain_forward(query, key, value, scale, 0.0, query_offset, -1, 0 if causal else -1)
    except (RuntimeError, IndexError):
        return None


class CpuBackend(FusedBackend):
    name = "cpu"
    gives_weights = True

    @property
    def reason(self) -> str | None:
        return None if native.load_cpu_library() else native.load_error

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        if problem.device != _CPU:  # `type` would make a string of it, in half a microsecond
            return [f"the tensors are on {problem.device}; this backend runs on cpu"]
        return tables_of_additive(problem)

    def run(self, problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        if not with_lse and problem.is_plain() and is_bare((problem.query, problem.key, problem.value)):
            return plain_forward(problem), None
        return super().run(problem)

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        return fused_additive(self.name, problem)

    def run_with_weights(self, problem: Problem, *, average: bool, leading: int) -> tuple[Tensor, Tensor]:
        return fused_with_weights(self.name, problem, average=average, leading=leading)

    def plan(self, problem: Problem) -> dict[str, object]:
        """Query rows and heads of a work item, keys of a tile, work items, scratch memory and threads."""
        return json.loads(torch.ops.fastattn.cpu_plan(*problem.arguments()))

    def kernel(self, problem: AnyProblem) -> str:
        return _kernel(type(problem))


@cache
def _kernel(kind: type[AnyProblem]) -> str:
    return f"cpu {WHAT_RUNS[kind]}, {native.cpu_info()['isa']}"

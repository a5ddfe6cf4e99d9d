"""The C++ SIMD backend (csrc/cpu): every feature, forward and backward, on CPU tensors."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fastattn import native
from fastattn.additive_autograd import fused_additive
from fastattn.additive_problem import AdditiveProblem
from fastattn.backends.base import AnyProblem, FusedBackend, tables_of_additive, what_runs
from fastattn.problem import Problem
from fastattn.weights_autograd import fused_with_weights


class CpuBackend(FusedBackend):
    name = "cpu"
    gives_weights = True

    @property
    def reason(self) -> str | None:
        return None if native.load_cpu_library() else native.load_error

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        if problem.device.type != "cpu":
            return [f"the tensors are on {problem.device}; this backend runs on cpu"]
        return tables_of_additive(problem)

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        return fused_additive(self.name, problem)

    def run_with_weights(self, problem: Problem, *, average: bool, leading: int) -> tuple[Tensor, Tensor]:
        return fused_with_weights(self.name, problem, average=average, leading=leading)

    def plan(self, problem: Problem) -> dict[str, object]:
        """Query rows and heads of a work item, keys of a tile, work items, scratch memory and threads."""
        return json.loads(torch.ops.fastattn.cpu_plan(*problem.arguments()))

    def kernel(self, problem: AnyProblem) -> str:
        return f"cpu {what_runs(problem)}, {native.cpu_info()['isa']}"

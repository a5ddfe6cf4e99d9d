"""The naive formula as a backend: runs everywhere, materialises the scores."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference
from fastattn.additive_problem import AdditiveProblem
from fastattn.backends.base import AnyProblem, Backend
from fastattn.problem import Problem
from fastattn.rotation import Rotation
from fastattn.softmax_problem import SoftmaxProblem


class ReferenceBackend(Backend):
    name = "reference"

    @property
    def reason(self) -> str | None:
        return None

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        return []

    def run(self, problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor]:
        return reference.forward(problem)

    def softmax(self, problem: SoftmaxProblem) -> Tensor:
        return reference.softmax(problem)

    def rotate(self, rotation: Rotation, inplace: bool) -> tuple[Tensor, Tensor]:
        query, key = reference.rotate_pair(rotation)
        if inplace:
            return rotation.query.copy_(query), rotation.key.copy_(key)
        return query, key

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        return reference.additive(problem)

    def kernel(self, problem: AnyProblem) -> str:
        return "reference (plain torch)"

    def plan(self, problem: Problem) -> dict[str, object]:
        size = problem.batch_size * problem.num_heads * problem.query_length * problem.key_length
        return {"score_bytes": size * problem.parameter_dtype.itemsize}

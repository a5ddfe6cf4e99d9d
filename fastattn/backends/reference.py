"""The naive formula as a backend: runs everywhere, materialises the scores."""

from __future__ import annotations

from torch import Tensor

from fastattn import reference
from fastattn.backends.base import Backend
from fastattn.problem import Problem


class ReferenceBackend(Backend):
    name = "reference"

    @property
    def reason(self) -> str | None:
        return None

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        return []

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return reference.forward(problem)

    def kernel(self, problem: Problem) -> str:
        return "reference (plain torch)"

    def plan(self, problem: Problem) -> dict[str, object]:
        size = problem.batch_size * problem.num_heads * problem.query_length * problem.key_length
        return {"score_bytes": size * problem.parameter_dtype.itemsize}

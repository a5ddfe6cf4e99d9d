"""The C++ SIMD backend (csrc/cpu): every feature, forward and backward, on CPU tensors."""

from __future__ import annotations

from torch import Tensor

from fastattn import native
from fastattn.autograd import fused_attention
from fastattn.backends.base import Backend
from fastattn.problem import Problem


class CpuBackend(Backend):
    name = "cpu"

    @property
    def reason(self) -> str | None:
        return None if native.load_cpu_library() else native.load_error

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        if problem.query.device.type != "cpu":
            return [f"the tensors are on {problem.query.device}; this backend runs on cpu"]
        return []

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return fused_attention(self.name, problem)

    def kernel(self, problem: Problem) -> str:
        return f"cpu attention, {native.cpu_info()['isa']}"

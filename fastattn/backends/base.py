"""What a backend is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fastattn.additive_problem import AdditiveProblem
from fastattn.problem import Problem
from fastattn.rotation import Rotation
from fastattn.softmax_problem import SoftmaxProblem

# Everything a backend may be asked to run.
AnyProblem = Problem | SoftmaxProblem | Rotation | AdditiveProblem


def what_runs(problem: AnyProblem) -> str:
    """The name of what a problem asks for."""
    if isinstance(problem, Rotation):
        return "rotary"
    if isinstance(problem, AdditiveProblem):
        return "additive attention"
    return "masked softmax" if isinstance(problem, SoftmaxProblem) else "attention"


class Backend(ABC):
    """A way to run a `Problem`, and the softmax and the rotation by themselves.  It knows nothing of modules or of the
    other backends."""

    name: str

    @property
    def available(self) -> bool:
        """Whether it can run anything at all here."""
        return self.reason is None

    @property
    @abstractmethod
    def reason(self) -> str | None:
        """Why it is not available, and what would make it so; None when it is."""

    @abstractmethod
    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        """Why it cannot run this problem; empty when it can."""

    def volunteers(self, problem: AnyProblem) -> list[str]:
        """Why it does not run this problem unless asked for by name; empty when it may be chosen automatically."""
        return []

    @abstractmethod
    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq), differentiable."""

    def softmax(self, problem: SoftmaxProblem) -> Tensor:
        """Masked softmax (B, H, Sq, Sk), differentiable."""
        raise NotImplementedError(f"the {self.name} backend has no masked softmax")

    def rotate(self, rotation: Rotation, inplace: bool) -> tuple[Tensor, Tensor]:
        """Rotated query and key, differentiable in both; in place, they are the operands themselves and are not."""
        raise NotImplementedError(f"the {self.name} backend has no rotation")

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of additive attention, differentiable."""
        raise NotImplementedError(f"the {self.name} backend has no additive attention")

    @abstractmethod
    def kernel(self, problem: AnyProblem) -> str:
        """The name of the kernel that would run."""

    def plan(self, problem: Problem) -> dict[str, object]:
        """Tiles and other choices for this problem, as `explain` shows them."""
        return {}

    def __repr__(self) -> str:
        return f"<fastattn backend {self.name}: {'available' if self.available else self.reason}>"

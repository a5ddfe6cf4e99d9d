"""What a backend is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fastattn.problem import Problem


class Backend(ABC):
    """A way to run a `Problem`.  It knows nothing of modules or of the other backends."""

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
    def unsupported_reasons(self, problem: Problem) -> list[str]:
        """Why it cannot run this problem; empty when it can."""

    def volunteers(self, problem: Problem) -> list[str]:
        """Why it does not run this problem unless asked for by name; empty when it may be chosen automatically."""
        return []

    @abstractmethod
    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq), differentiable."""

    @abstractmethod
    def kernel(self, problem: Problem) -> str:
        """The name of the kernel that would run."""

    def plan(self, problem: Problem) -> dict[str, object]:
        """Tiles and other choices for this problem, as `explain` shows them."""
        return {}

    def __repr__(self) -> str:
        return f"<fastattn backend {self.name}: {'available' if self.available else self.reason}>"

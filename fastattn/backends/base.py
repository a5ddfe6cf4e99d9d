"""What a backend is to the dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastattn.additive_problem import AdditiveProblem
from fastattn.autograd import fused_attention
from fastattn.problem import Problem
from fastattn.quantized_problem import QuantizedProblem
from fastattn.rotation import Rotation
from fastattn.rotation_autograd import fused_rotation
from fastattn.softmax_autograd import fused_softmax
from fastattn.softmax_problem import SoftmaxProblem

# Everything a backend may be asked to run.
AnyProblem = Problem | SoftmaxProblem | Rotation | AdditiveProblem | QuantizedProblem


# What a problem asks for, in words.
WHAT_RUNS = {
    Problem: "attention",
    SoftmaxProblem: "masked softmax",
    Rotation: "rotary",
    AdditiveProblem: "additive attention",
    QuantizedProblem: "attention on float8 operands",
}


def tables_of_additive(problem: AnyProblem) -> list[str]:
    """The refusal of row and column tables in additive attention, which has no gradient for them."""
    if isinstance(problem, AdditiveProblem):
        attention = problem.attention
        if attention.row_table is not None or attention.col_table is not None:
            return ["row and column tables in additive attention"]
    return []


class Backend(ABC):
    """A way to run a `Problem`, and the softmax and the rotation by themselves.  It knows nothing of modules or of the
    other backends."""

    name: str
    # Whether its attention can give its weights, too.
    gives_weights = False

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
    def run(self, problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq), differentiable; without `with_lse` the second may be None."""

    def run_with_weights(self, problem: Problem, *, average: bool, leading: int) -> tuple[Tensor, Tensor]:
        """Output and weights, (B, Hq, Sq, Sk) or with average (B, Sq, Sk), differentiable in both; `leading` keys at
        the front have the last columns."""
        raise NotImplementedError(f"the {self.name} backend gives no weights")

    def softmax(self, problem: SoftmaxProblem) -> Tensor:
        """Masked softmax (B, H, Sq, Sk), differentiable."""
        raise NotImplementedError(f"the {self.name} backend has no masked softmax")

    def rotate(self, rotation: Rotation, inplace: bool) -> tuple[Tensor, Tensor]:
        """Rotated query and key, differentiable in both; in place, they are the operands themselves and are not."""
        raise NotImplementedError(f"the {self.name} backend has no rotation")

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of additive attention, differentiable."""
        raise NotImplementedError(f"the {self.name} backend has no additive attention")

    def quantized(self, problem: QuantizedProblem) -> tuple[Tensor, Tensor]:
        """Output (B, Hq, Sq, Dv) and lse (B, Hq, Sq) of attention on 8-bit operands, without gradients."""
        raise NotImplementedError(f"the {self.name} backend takes no 8-bit operands")

    @abstractmethod
    def kernel(self, problem: AnyProblem) -> str:
        """The name of the kernel that would run."""

    def plan(self, problem: Problem | QuantizedProblem) -> dict[str, object]:
        """Tiles and other choices for this problem, as `explain` shows them."""
        return {}

    def __repr__(self) -> str:
        return f"<fastattn backend {self.name}: {'available' if self.available else self.reason}>"


class FusedBackend(Backend):
    """A backend whose kernels are operators named after it (fastattn/ops.py)."""

    def run(self, problem: Problem, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
        return fused_attention(self.name, problem)

    def softmax(self, problem: SoftmaxProblem) -> Tensor:
        return fused_softmax(self.name, problem)

    def rotate(self, rotation: Rotation, inplace: bool) -> tuple[Tensor, Tensor]:
        if inplace:
            getattr(torch.ops.fastattn, f"{self.name}_rotate_")(*rotation.arguments())
            return rotation.query, rotation.key
        return fused_rotation(self.name, rotation)


class GpuBackend(FusedBackend):
    """A backend of NVIDIA GPUs, whose kernels also run, slowly, on CPU tensors: that is how they are tested."""

    # Compute capabilities on which a run of the GPU tests has passed, recorded in bench/results.  Elsewhere the backend
    # runs when it is asked for by name, not by itself.
    proven_capabilities: frozenset[tuple[int, int]] = frozenset()
    # What runs the kernels on CPU tensors, in words.
    stand_in: str

    @abstractmethod
    def stands_in(self) -> bool:
        """Whether CPU tensors are taken."""

    def device_reasons(self, device: torch.device) -> list[str]:
        """Why tensors on this device cannot be taken."""
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                return [f"compute capability {capability[0]}.{capability[1]}; it needs 8.0 or newer"]
        elif not (device.type == "cpu" and self.stands_in()):
            return [f"the tensors are on {device}; this backend runs on cuda"]
        return []

    def volunteers(self, problem: AnyProblem) -> list[str]:
        device = problem.device
        if device.type != "cuda":
            return [f"the {self.stand_in} runs only when asked for: backend={self.name!r}"]
        capability = torch.cuda.get_device_capability(device)
        if capability not in self.proven_capabilities:
            return [
                f"no recorded hardware run on compute capability {capability[0]}.{capability[1]} yet; "
                f"ask for it with backend={self.name!r}"
            ]
        return []

    def kernel(self, problem: AnyProblem) -> str:
        stand_in = f" ({self.stand_in})" if problem.device.type == "cpu" and self.stands_in() else ""
        return f"{self.name} {WHAT_RUNS[type(problem)]}{stand_in}"

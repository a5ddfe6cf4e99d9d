"""The Triton backend (triton_kernels): every feature, forward and backward, on GPUs; on the CPU in Triton's
interpreter when TRITON_INTERPRET=1 was set before the kernels were first used (slow: for tests)."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastattn.additive_autograd import fused_additive
from fastattn.additive_problem import ADDITIVE_GRADIENT_FIELDS, AdditiveProblem, additive_problem
from fastattn.backends.base import AnyProblem, GpuBackend, tables_of_additive
from fastattn.ops import absent_gradient, implement
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem
from fastattn.rotation import ROTATION_FIELDS, Rotation
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

MAX_HEAD_DIM = 256


@cache
def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _reason() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; install it with: pip install triton"
    if not torch.cuda.is_available() and not interpreted():
        return "no GPU that torch can use"
    return None


class TritonBackend(GpuBackend):
    name = "triton"
    stand_in = "interpreter"

    @property
    def reason(self) -> str | None:
        return _reason()

    def stands_in(self) -> bool:
        return interpreted()

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        reasons = self.device_reasons(problem.device) + tables_of_additive(problem)
        if problem.device.type == "cpu" and interpreted() and problem.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        if problem.dtype == torch.float64:
            reasons.append("dtype float64; it has float32, float16 and bfloat16")
        if isinstance(problem, AdditiveProblem):
            problem = problem.attention
        if isinstance(problem, Problem):
            for name, dim in (("D", problem.query.shape[3]), ("Dv", problem.value.shape[3])):
                if dim > MAX_HEAD_DIM:
                    reasons.append(f"{name} = {dim}; at most {MAX_HEAD_DIM}")
            if problem.query.shape[3] == 0 or problem.value.shape[3] == 0:
                reasons.append("an empty head dimension")
        return reasons

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        return fused_additive(self.name, problem)

    def plan(self, problem: Problem) -> dict[str, object]:
        from fastattn.triton_kernels.attention import Call

        call = Call(problem, problem.query, problem.key, problem.value)
        return {kernel: call.tile(kernel) for kernel in ("forward", "backward_kv", "backward_q")}


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(function)
    def run(first: Tensor, *rest: Any) -> Any:
        index = first.device.index if first.is_cuda else None
        if index is None or index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(index):
            return function(first, *rest)

    return run


def _problem(args: tuple[Any, ...]) -> Problem:
    return Problem(**dict(zip(FIELD_NAMES, args, strict=True)))


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastattn.triton_kernels.attention import attention_forward

    return attention_forward(_problem(args))


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, needs: int, *args: Any
) -> tuple[Tensor, ...]:
    from fastattn.triton_kernels.attention_gradients import attention_backward

    wanted = frozenset(name for bit, name in enumerate(GRADIENT_FIELDS) if needs >> bit & 1)
    grads = attention_backward(_problem(args), grad_out, grad_lse, out, statistics, wanted)
    return tuple(
        grads[name] if name in grads else absent_gradient(name, grad_out, statistics) for name in GRADIENT_FIELDS
    )


def _softmax_forward(*args: Any) -> Tensor:
    from fastattn.triton_kernels.masked_softmax import softmax_forward

    return softmax_forward(SoftmaxProblem(**dict(zip(SOFTMAX_FIELDS, args, strict=True))))


def _softmax_backward(grad_out: Tensor, out: Tensor, needs: int, *args: Any) -> tuple[Tensor, ...]:
    from fastattn.triton_kernels.softmax_gradients import softmax_backward

    # the output stands for the scores, whose shape, dtype and device it has
    problem = SoftmaxProblem(**dict(zip(SOFTMAX_FIELDS, (out, *args), strict=True)))
    wanted = frozenset(name for bit, name in enumerate(SOFTMAX_GRADIENT_FIELDS) if needs >> bit & 1)
    grads = softmax_backward(problem, grad_out, wanted)
    return tuple(grads[name] if name in grads else grad_out.new_empty(0) for name in SOFTMAX_GRADIENT_FIELDS)


def _rotate(*args: Any) -> tuple[Tensor, Tensor]:
    return _launch_rotation(Rotation(**dict(zip(ROTATION_FIELDS, args, strict=True))))


def _rotate_inplace(*args: Any) -> None:
    rotation = Rotation(**dict(zip(ROTATION_FIELDS, args, strict=True)))
    _launch_rotation(rotation, out=(rotation.query, rotation.key))


def _launch_rotation(rotation: Rotation, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    from fastattn.triton_kernels.rotary import rotate

    tables = (rotation.cos, rotation.sin, rotation.cos, rotation.sin)
    return rotate(
        rotation.query, rotation.key, tables, interleaved=rotation.interleaved, conjugate=rotation.conjugate, out=out,
        query_positions=rotation.positions, key_positions=rotation.positions,
    )  # fmt: skip


def _additive_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastattn.triton_kernels.additive import additive_forward

    return additive_forward(additive_problem(*args))


def _additive_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, needs: int, *args: Any
) -> tuple[Tensor, ...]:
    from fastattn.triton_kernels.additive import additive_backward

    names = ADDITIVE_GRADIENT_FIELDS
    wanted = frozenset(name for bit, name in enumerate(names) if needs >> bit & 1)
    grads = additive_backward(additive_problem(*args), grad_out, grad_lse, out, statistics, wanted)
    return tuple(grads[name] if name in grads else absent_gradient(name, grad_out, statistics) for name in names)


_OPERATORS = {
    "triton_forward": _forward,
    "triton_backward": _backward,
    "triton_softmax_forward": _softmax_forward,
    "triton_softmax_backward": _softmax_backward,
    "triton_additive_forward": _additive_forward,
    "triton_additive_backward": _additive_backward,
    "triton_rotate": _rotate,
    "triton_rotate_": _rotate_inplace,
}
# The CPU registration serves the interpreter; `unsupported_reasons` keeps other calls away from it.
for _name, _function in _OPERATORS.items():
    implement(_name, _on_its_device(_function), "CUDA")
    implement(_name, _function, "CPU")

"""The Triton backend (triton_kernels): every feature, forward and backward, on GPUs; on the CPU in Triton's
interpreter when TRITON_INTERPRET=1 was set before the kernels were first used (slow: for tests)."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastattn.additive_autograd import fused_additive
from fastattn.additive_problem import ADDITIVE_GRADIENT_FIELDS, AdditiveProblem, additive_problem
from fastattn.autograd import fused_attention
from fastattn.backends.base import AnyProblem, Backend, what_runs
from fastattn.ops import absent_gradient, implement
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem
from fastattn.rotation import ROTATION_FIELDS, Rotation
from fastattn.rotation_autograd import fused_rotation
from fastattn.softmax_autograd import fused_softmax
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

MAX_HEAD_DIM = 256
# Compute capabilities on which a run of the GPU tests has passed, recorded in bench/results.  Elsewhere the backend
# runs when it is asked for by name, not by itself.
PROVEN_CAPABILITIES: frozenset[tuple[int, int]] = frozenset()


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


class TritonBackend(Backend):
    name = "triton"

    @property
    def reason(self) -> str | None:
        return _reason()

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        reasons = []
        device = problem.device
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):
                reasons.append(f"compute capability {capability[0]}.{capability[1]}; it needs 8.0 or newer")
        elif not interpreted():
            reasons.append(f"the tensors are on {device}; this backend runs on cuda")
        elif problem.dtype == torch.bfloat16:
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

    def volunteers(self, problem: AnyProblem) -> list[str]:
        device = problem.device
        if device.type != "cuda":
            return ["the interpreter runs only when asked for: backend='triton'"]
        capability = torch.cuda.get_device_capability(device)
        if capability not in PROVEN_CAPABILITIES:
            return [
                f"no recorded hardware run on compute capability {capability[0]}.{capability[1]} yet; "
                "ask for it with backend='triton'"
            ]
        return []

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        return fused_attention(self.name, problem)

    def softmax(self, problem: SoftmaxProblem) -> Tensor:
        return fused_softmax(self.name, problem)

    def rotate(self, rotation: Rotation, inplace: bool) -> tuple[Tensor, Tensor]:
        if inplace:
            torch.ops.fastattn.triton_rotate_(*rotation.arguments())
            return rotation.query, rotation.key
        return fused_rotation(self.name, rotation)

    def additive(self, problem: AdditiveProblem) -> tuple[Tensor, Tensor]:
        return fused_additive(self.name, problem)

    def kernel(self, problem: AnyProblem) -> str:
        return f"triton {what_runs(problem)}{' (interpreter)' if interpreted() else ''}"

    def plan(self, problem: Problem) -> dict[str, object]:
        from fastattn.triton_kernels.attention import Call

        call = Call(problem, problem.query, problem.key, problem.value)
        return {kernel: call.tile(kernel) for kernel in ("forward", "backward_kv", "backward_q")}


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


# The CPU registration serves the interpreter; `unsupported_reasons` keeps other calls away from it.
for _device in ("CUDA", "CPU"):
    implement("triton_forward", _forward, _device)
    implement("triton_backward", _backward, _device)
    implement("triton_softmax_forward", _softmax_forward, _device)
    implement("triton_softmax_backward", _softmax_backward, _device)
    implement("triton_rotate", _rotate, _device)
    implement("triton_rotate_", _rotate_inplace, _device)
    implement("triton_additive_forward", _additive_forward, _device)
    implement("triton_additive_backward", _additive_backward, _device)

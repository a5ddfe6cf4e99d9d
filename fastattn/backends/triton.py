"""The Triton backend (triton_kernels): every feature, forward and backward, on GPUs; on the CPU in Triton's
interpreter when TRITON_INTERPRET=1 was set before the kernels were first used (slow: for tests)."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastattn.autograd import FusedAttention
from fastattn.backends.base import Backend
from fastattn.ops import implement
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem

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

    def unsupported_reasons(self, problem: Problem) -> list[str]:
        reasons = []
        query = problem.query
        if query.device.type == "cuda":
            capability = torch.cuda.get_device_capability(query.device)
            if capability < (8, 0):
                reasons.append(f"compute capability {capability[0]}.{capability[1]}; it needs 8.0 or newer")
        elif not interpreted():
            reasons.append(f"the tensors are on {query.device}; this backend runs on cuda")
        elif query.dtype == torch.bfloat16:
            reasons.append("Triton's interpreter computes bfloat16 wrongly")
        if query.dtype == torch.float64:
            reasons.append("dtype float64; it has float32, float16 and bfloat16")
        for name, dim in (("D", query.shape[3]), ("Dv", problem.value.shape[3])):
            if dim > MAX_HEAD_DIM:
                reasons.append(f"{name} = {dim}; at most {MAX_HEAD_DIM}")
        if query.shape[3] == 0 or problem.value.shape[3] == 0:
            reasons.append("an empty head dimension")
        return reasons

    def volunteers(self, problem: Problem) -> list[str]:
        device = problem.query.device
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
        return FusedAttention.apply(self.name, *problem.arguments())

    def kernel(self, problem: Problem) -> str:
        return f"triton attention{' (interpreter)' if interpreted() else ''}"

    def plan(self, problem: Problem) -> dict[str, object]:
        from fastattn.triton_kernels.attention import Call

        call = Call(problem, problem.query, problem.key, problem.value)
        return {kernel: call.tile(kernel) for kernel in ("forward", "backward_kv", "backward_q")}


def _problem(args: tuple[Any, ...]) -> Problem:
    return Problem(**dict(zip(FIELD_NAMES, args, strict=True)))


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastattn.triton_kernels.attention import attention_forward

    return attention_forward(_problem(args))


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: int, *args: Any
) -> tuple[Tensor, ...]:
    from fastattn.triton_kernels.attention_gradients import attention_backward

    wanted = frozenset(name for bit, name in enumerate(GRADIENT_FIELDS) if needs >> bit & 1)
    grads = attention_backward(_problem(args), grad_out, grad_lse, out, lse, wanted)
    return tuple(grads[name] if name in grads else grad_out.new_empty(0) for name in GRADIENT_FIELDS)


# The CPU registration serves the interpreter; `unsupported_reasons` keeps other calls away from it.
for _device in ("CUDA", "CPU"):
    implement("triton_forward", _forward, _device)
    implement("triton_backward", _backward, _device)

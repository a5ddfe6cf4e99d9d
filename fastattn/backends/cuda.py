"""The CUDA C++ backend (csrc/cuda): operators of libfastattn_cuda.so on GPUs; on the CPU in the simulator when
FASTATTN_CUDA_SIMULATOR=1 was set before the first call (slow: for tests)."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn import native
from fastattn.backends.base import AnyProblem, GpuBackend
from fastattn.ops import absent_gradient, empty_like_layout, implement
from fastattn.problem import FIELD_NAMES, GRADIENT_FIELDS, Problem
from fastattn.quantized_problem import OUT_DTYPE, QuantizedProblem
from fastattn.rotation import ROTATION_FIELDS, Rotation
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16)
BACKWARD_KERNELS = {  # the fields whose gradients each gives
    "backward_q": ("query", "slopes", "table", "row_table"),
    "backward_kv": ("key", "value", "col_table"),
}
# What the kernel for 8-bit operands has beside scale and positions.
FLOAT8_FEATURES = {
    "causal", "window", "key_lengths", "prefix_lengths", "documents", "dense_mask", "sink",
}  # fmt: skip
FLOAT8_MOST_KEYS = 1024  # of heads above D = 128
ROW_DTYPES = (torch.float32, *DTYPES)  # of the masked softmax, the rotation, and of a dense bias


@cache  # every call asks, and the environment would take a microsecond to answer
def simulated() -> bool:
    return os.environ.get("FASTATTN_CUDA_SIMULATOR", "0") == "1"


@cache
def _simulator_reason() -> str | None:
    if find_spec("fastattn._native") is None:
        return (
            "FASTATTN_CUDA_SIMULATOR=1 and fastattn._native is not built; build it in a checkout, where pybind11 is "
            "installed, with: pip install --no-build-isolation -e ."
        )
    return None


def _reason() -> str | None:
    if simulated():
        return _simulator_reason()
    if not native.load_cuda_library():
        return native.cuda_load_error
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return None


# what torch.compiler.assume_constant_result sets (see native.py)
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _missing_code(index: int) -> str | None:
    """Why the library cannot run on this GPU, if it has no code for it."""
    capability, built_for = torch.cuda.get_device_capability(index), str(native.cuda_info()["architectures"])
    if native.has_code_for(capability, built_for):
        return None
    major, minor = capability
    return (
        f"libfastattn_cuda.so is built for the architectures {built_for} and has no code for compute capability "
        f"{major}.{minor}; build it in a checkout with: "
        f"FASTATTN_CUDA_ARCHS={major}{minor} pip install --no-build-isolation -e ."
    )


_missing_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _hopper_asked() -> bool:
    return os.environ.get("FASTATTN_CUDA_HOPPER", "") not in ("", "0")


_hopper_asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _simulated_capability()


def _simulated_capability() -> tuple[int, int]:
    return divmod(_simulator().capability(), 10)


_simulated_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


class CudaBackend(GpuBackend):
    name = "cuda"
    stand_in = "simulator"

    @property
    def reason(self) -> str | None:
        return _reason()

    def stands_in(self) -> bool:
        return simulated()

    def device_reasons(self, device: torch.device) -> list[str]:
        reasons = super().device_reasons(device)
        if not reasons and device.type == "cuda":
            missing = _missing_code(torch.cuda.current_device() if device.index is None else device.index)
            reasons += [missing] if missing else []
        return reasons

    def unsupported_reasons(self, problem: AnyProblem) -> list[str]:
        reasons = self.device_reasons(problem.device)
        if isinstance(problem, QuantizedProblem):
            return reasons or self._reasons_against_float8(problem.attention)
        dtypes = DTYPES if isinstance(problem, Problem) else ROW_DTYPES
        if problem.dtype not in dtypes:
            reasons.append(f"dtype {_names((problem.dtype,))}; it has {_names(dtypes)}")
        bias = None if isinstance(problem, Rotation) else problem.dense_bias
        if bias is not None and bias.dtype not in ROW_DTYPES:
            reasons.append(f"a dense bias of dtype {_names((bias.dtype,))}; it takes {_names(ROW_DTYPES)}")
        if isinstance(problem, Problem):
            for name, dim in (("D", problem.query.shape[3]), ("Dv", problem.value.shape[3])):
                if dim > MAX_HEAD_DIM or dim % 8 or dim == 0:
                    reasons.append(f"{name} = {dim}; it has multiples of 8 up to {MAX_HEAD_DIM}")
        return reasons

    def _reasons_against_float8(self, attention: Problem) -> list[str]:
        """Those of reason_against_e4m3 (csrc/cuda/hopper/launch.h)."""
        query, key, value = attention.query, attention.key, attention.value
        capability = _capability(attention.device)
        reasons = []
        if capability[0] != 9:
            reasons.append(f"compute capability {capability[0]}.{capability[1]}; it needs 9.0")
        elif not simulated() and "90a" not in str(native.cuda_info()["architectures"]):
            reasons.append("libfastattn_cuda.so is built without sm_90a")
        if not _hopper_asked():
            reasons.append("not asked for with FASTATTN_CUDA_HOPPER=1")
        for name, dim in (("D", query.shape[3]), ("Dv", value.shape[3])):
            if dim > MAX_HEAD_DIM or dim % 16 or dim == 0:
                reasons.append(f"{name} = {dim}; it has multiples of 16 up to {MAX_HEAD_DIM}")
        keys, width = key.shape[2], max(query.shape[3], value.shape[3])
        if width > 128 and keys > FLOAT8_MOST_KEYS:
            reasons.append(f"{keys} keys; above D = 128, where sums have 14 bits, it takes {FLOAT8_MOST_KEYS}")
        if not attention.scale > 0:
            reasons.append(f"scale = {attention.scale}; it needs one > 0")
        if keys == 0:
            reasons.append("no keys")
        if any(x.shape[2] > 1 and x.stride(2) == 0 for x in (query, key, value)):
            reasons.append("an operand that is broadcast along its length")
        return reasons + [f"{name}; it has none" for name in attention.features() if name not in FLOAT8_FEATURES]

    def quantized(self, problem: QuantizedProblem) -> tuple[Tensor, Tensor]:
        return torch.ops.fastattn.cuda_float8_forward(*problem.arguments())

    def plan(self, problem: Problem | QuantizedProblem) -> dict[str, object]:
        """Tiles, stages of copies, splits of the keys and shared memory of the forward kernel; where a gradient will be
        needed, "backward_q" and "backward_kv" have those of the kernels for it."""
        if isinstance(problem, QuantizedProblem):
            attention = problem.attention
            if simulated() and problem.device.type == "cpu":
                return json.loads(_simulator().float8_plan(attention))
            return json.loads(torch.ops.fastattn.cuda_float8_plan(*attention.arguments()))
        if simulated() and problem.device.type == "cpu":
            plan = json.loads(_simulator().attention_plan(problem))
        else:
            plan = json.loads(torch.ops.fastattn.cuda_plan(*problem.arguments()))
        for name, fields in BACKWARD_KERNELS.items():
            tensors = [x for x in (getattr(problem, field) for field in fields) if x is not None]
            if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
                del plan[name]
        return plan


def _simulator() -> ModuleType:
    return import_module("fastattn._native")


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = _attention(args)
    query, rows = args[0], problem.query.shape[:3]
    out = empty_like_layout(query, (*rows, problem.value.shape[3]))
    lse, statistics = (query.new_empty(size, dtype=torch.float32) for size in (rows, (*rows, 2)))
    _simulator().attention_forward(problem, out, lse, statistics)
    return out, lse, statistics


def _float8_forward(
    query_scale: Tensor | None, key_scale: Tensor | None, value_scale: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    problem = _attention(args)
    query, rows = args[0], problem.query.shape[:3]
    out = empty_like_layout(query, (*rows, problem.value.shape[3]), OUT_DTYPE)
    lse = query.new_empty(rows, dtype=torch.float32)
    _simulator().float8_forward(problem, query_scale, key_scale, value_scale, out, lse)
    return out, lse


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, statistics: Tensor, needs: int, *args: Any
) -> tuple[Tensor, ...]:
    problem = _attention(args)
    given = dict(zip(FIELD_NAMES, args, strict=True))
    grads: dict[str, Tensor | None] = dict.fromkeys(GRADIENT_FIELDS)
    for bit, name in enumerate(GRADIENT_FIELDS):
        like = given[name]
        if needs >> bit & 1 and like is not None:
            is_operand = name in ("query", "key", "value")
            grads[name] = empty_like_layout(like, tuple(like.shape)) if is_operand else like.new_empty(like.shape)
    _simulator().attention_backward(
        problem,
        _aligned_rows(grad_out),
        grad_lse,
        _aligned_rows(out),
        statistics,
        *grads.values(),
    )
    return tuple(absent_gradient(name, grad_out, statistics) if grad is None else grad for name, grad in grads.items())


def _softmax_forward(*args: Any) -> Tensor:
    problem = SoftmaxProblem(**dict(zip(SOFTMAX_FIELDS, args, strict=True)))
    out = problem.scores.new_empty(problem.scores.shape)
    _simulator().softmax_forward(problem.attention(), problem.scores, out)
    return out


def _softmax_backward(grad_out: Tensor, out: Tensor, needs: int, *args: Any) -> tuple[Tensor, ...]:
    # the output stands for the scores, whose shape, dtype and device it has
    problem = SoftmaxProblem(**dict(zip(SOFTMAX_FIELDS, (out, *args), strict=True)))
    grads: list[Tensor | None] = []
    for bit, name in enumerate(SOFTMAX_GRADIENT_FIELDS):
        like = getattr(problem, name)
        grads.append(like.new_empty(like.shape) if needs >> bit & 1 and like is not None else None)
    _simulator().softmax_backward(problem.attention(), out, _dense_rows(grad_out), *grads)
    return tuple(grad_out.new_empty(0) if grad is None else grad for grad in grads)


def _rotate(*args: Any) -> tuple[Tensor, Tensor]:
    rotation = Rotation(**dict(zip(ROTATION_FIELDS, args, strict=True)))
    query, key = rotation.query, rotation.key
    out = empty_like_layout(query, tuple(query.shape)), empty_like_layout(key, tuple(key.shape))
    _simulate_rotation(rotation, *out)
    return out


def _rotate_inplace(*args: Any) -> None:
    rotation = Rotation(**dict(zip(ROTATION_FIELDS, args, strict=True)))
    _simulate_rotation(rotation, rotation.query, rotation.key)


def _simulate_rotation(rotation: Rotation, query_out: Tensor, key_out: Tensor) -> None:
    _simulator().rotate(
        _dense_rows(rotation.query), _dense_rows(rotation.key), query_out, key_out, rotation.cos, rotation.sin,
        rotation.positions, rotation.interleaved, rotation.conjugate,
    )  # fmt: skip


def _dense_rows(x: Tensor) -> Tensor:
    """What the operators of the library do with a tensor whose last dimension is not dense: a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _aligned_rows(x: Tensor) -> Tensor:
    """The same where a row does not start at a multiple of 16 bytes either, as attention's operands must."""
    dense = x.stride(-1) == 1 and x.data_ptr() % 16 == 0
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
    return (
        x
        if dense and all(stride * x.element_size() % 16 == 0 for stride in strides)
        else x.clone(memory_format=torch.contiguous_format)
    )


def _attention(args: tuple[Any, ...]) -> Problem:
    problem = Problem(**dict(zip(FIELD_NAMES, args, strict=True)))
    return replace(problem, **{name: _aligned_rows(getattr(problem, name)) for name in ("query", "key", "value")})


# CPU tensors come here in the simulator alone: `unsupported_reasons` keeps other calls away.  CUDA tensors go to
# libfastattn_cuda.so, which registers its own when it is loaded.
implement("cuda_forward", _forward, "CPU")
implement("cuda_float8_forward", _float8_forward, "CPU")
implement("cuda_backward", _backward, "CPU")
implement("cuda_softmax_forward", _softmax_forward, "CPU")
implement("cuda_softmax_backward", _softmax_backward, "CPU")
implement("cuda_rotate", _rotate, "CPU")
implement("cuda_rotate_", _rotate_inplace, "CPU")

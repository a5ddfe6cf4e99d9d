"""Checks of user input that are shared by the public functions.

Every error names the argument, what was expected and what came.  Values of tensors are looked at only where that
is free: on the CPU, in eager mode, outside functorch transforms.  Elsewhere the kernels clamp instead of reading
out of bounds.
"""

from __future__ import annotations

import math
import numbers
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(x: object) -> str:
    """What came, in a few words."""
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def fail(kind: type[Exception], name: str, expected: str, got: object) -> NoReturn:
    raise kind(f"{name}: expected {expected}, got {got if isinstance(got, str) else describe(got)}")


def is_readable(x: Tensor) -> bool:
    """Whether the values of x can be looked at without a device sync, a graph break or a functorch error."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not isinstance(x, torch._subclasses.FakeTensor)
    )


def check_tensor(name: str, x: object) -> Tensor:
    """A dense, strided, non-nested, non-quantized tensor."""
    if not isinstance(x, Tensor):
        fail(TypeError, name, "a torch.Tensor", describe(x))
    if x.is_nested:
        fail(
            NotImplementedError,
            name,
            "a dense tensor (pad it and use KeyLengths, or pack it and use Documents)",
            "a nested tensor",
        )
    if x.layout != torch.strided:
        fail(NotImplementedError, name, "a dense strided tensor", f"layout {x.layout}")
    if x.is_quantized:
        fail(NotImplementedError, name, "a floating tensor (dequantize() it first)", f"a quantized {x.dtype} tensor")
    return x


def check_floating(name: str, x: object) -> Tensor:
    x = check_tensor(name, x)
    if x.dtype not in FLOATING:
        fail(TypeError, name, "dtype float32, float64, bfloat16 or float16", str(x.dtype))
    return x


def check_integer(name: str, x: object) -> Tensor:
    x = check_tensor(name, x)
    if x.dtype not in INTEGERS:
        fail(TypeError, name, "an integer dtype", str(x.dtype))
    return x


def check_number(name: str, x: object) -> float:
    """A finite real number, as a float."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        fail(TypeError, name, "a number", describe(x))
    if not -math.inf < x < math.inf:  # by comparison: torch.compile traces it for symbolic numbers too
        fail(ValueError, name, "a finite number", x)
    return float(x)


def check_index(name: str, x: object, least: int | None = None) -> int:
    """An int (or a symbolic int), at least `least`."""
    if type(x) is not int and (isinstance(x, bool) or not isinstance(x, (int, torch.SymInt))):
        fail(TypeError, name, "an int", describe(x))
    if least is not None and x < least:
        fail(ValueError, name, f"an int >= {least}", x)
    return x  # type: ignore[return-value]


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        fail(ValueError, name, f"a tensor on {device} like query", f"one on {x.device}")


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype: itself where it has it, since an operator that changes nothing takes as long as another."""
    return x if x.dtype == dtype else x.to(dtype)


def check_shape(name: str, x: Tensor, *allowed: tuple[int, ...]) -> None:
    if tuple(x.shape) not in allowed:
        fail(ValueError, name, "shape " + " or ".join(map(str, allowed)), str(tuple(x.shape)))


def check_broadcast(name: str, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """x viewed as four dimensions, each equal to that of `shape` or 1."""
    if x.dim() > 4:
        fail(
            ValueError,
            name,
            f"at most 4 dimensions broadcastable to (B, Hq, Sq, Sk) = {shape}",
            f"shape {tuple(x.shape)}",
        )
    if x.dim() < 4:
        x = x[(None,) * (4 - x.dim())]
    for have, want in zip(x.shape, shape, strict=True):
        if have != 1 and have != want:
            fail(ValueError, name, f"a shape broadcastable to (B, Hq, Sq, Sk) = {shape}", str(tuple(x.shape)))
    return x


def check_range(name: str, x: Tensor, low: int, high: int | None, what: str) -> None:
    """Every value in [low, high], where the values can be read for free."""
    if not is_readable(x) or x.numel() == 0:
        return
    least, most = int(x.min()), int(x.max())
    if least < low or (high is not None and most > high):
        fail(ValueError, name, what, f"values in [{least}, {most}]")

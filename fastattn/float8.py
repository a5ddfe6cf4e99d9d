"""What `attention` does with float8_e4m3fn operands: checks their scales, dequantises where no kernel takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.biases import Bias
from fastattn.quantized_problem import FLOAT8, OUT_DTYPE
from fastattn.rotary import Rotary
from fastattn.validation import check_device, check_shape, check_tensor, fail, is_readable


class Scales(NamedTuple):
    """The arguments query_scale, key_scale and value_scale."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None

    def named(self) -> list[tuple[str, Tensor]]:
        """Those that are given, with the names of their arguments."""
        return [(f"{side}_scale", x) for side, x in zip(self._fields, self, strict=True) if x is not None]

    def refuse(self, dtype: torch.dtype) -> None:
        """The error of scales beside operands of another dtype."""
        for name, _ in self.named():
            fail(TypeError, name, f"None, as it belongs to {FLOAT8} operands", f"a scale for {dtype}")

    def checked(self, query: Tensor, key: Tensor) -> Scales:
        """Each as (B|1, H), dense."""
        sides = (("query_scale", self.query, query), ("key_scale", self.key, key), ("value_scale", self.value, key))
        return Scales(*(x if x is None else _checked(name, x, like) for name, x, like in sides))


def _checked(name: str, scale: object, like: Tensor) -> Tensor:
    scale = check_tensor(name, scale)
    batch, heads = like.shape[:2]
    if scale.dtype != torch.float32:
        fail(TypeError, name, "dtype float32", str(scale.dtype))
    check_device(name, scale, like.device)
    check_shape(name, scale, (heads,), (batch, heads))
    if is_readable(scale) and not bool(((scale >= 0) & (scale < torch.inf)).all()):
        fail(ValueError, name, "finite numbers >= 0", f"values in [{float(scale.min())}, {float(scale.max())}]")
    return (scale if scale.dim() == 2 else scale[None]).contiguous()


def is_float8(*operands: object) -> bool:
    """Whether any of them is a float8_e4m3fn tensor."""
    return any(isinstance(x, Tensor) and x.dtype is FLOAT8 for x in operands)


def check_without_gradients(operands: list[tuple[str, Tensor]]) -> None:
    if torch.is_grad_enabled():
        for name, x in operands:
            if x.requires_grad:
                fail(NotImplementedError, name, f"a tensor that needs no gradient beside {FLOAT8} operands", x)


def stages_without_kernel(
    bias: Bias | None, rotary: Rotary | None, softcap: float | None, dropout_p: float, sink: Tensor | None
) -> list[str]:
    """What of a call's arguments the kernel for 8-bit operands has not."""
    reasons = [name for name, x in (("bias", bias), ("rotary", rotary), ("softcap", softcap)) if x is not None]
    if dropout_p != 0.0:
        reasons.append("dropout_p")
    if sink is not None and torch.is_grad_enabled() and isinstance(sink, Tensor) and sink.requires_grad:
        reasons.append("the gradient of sink")
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        reasons.append("a functorch transform")
    return reasons


def stand_in(x: Tensor) -> Tensor:
    """A tensor of the output's dtype in the shape of x, for what a call says beside its operands to be checked with."""
    return torch.empty(x.shape[-1], dtype=OUT_DTYPE, device=x.device).expand(x.shape)


def dequantized(query: Tensor, key: Tensor, value: Tensor, scales: Scales, fold: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operands in bfloat16, which has every number of float8_e4m3fn: without scales nothing is rounded.

    `fold`: the key's scale goes to the query, so that it and the query's are one rounding of the query; else key and
    query are rounded once each, and mean what they say to biases that read them.  The value is rounded once.  Scales
    that are powers of two round nothing.
    """
    query_scale, key_scale = scales.query, scales.key
    if fold and key_scale is not None:
        shared = key_scale.repeat_interleave(query.shape[1] // key.shape[1], dim=1) if key.shape[1] else key_scale
        query_scale, key_scale = shared if query_scale is None else query_scale * shared, None
    return _times(query, query_scale), _times(key, key_scale), _times(value, scales.value)


def _times(x: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return x.to(OUT_DTYPE)
    return (x.to(torch.float32) * scale[:, :, None, None]).to(OUT_DTYPE)


def note(query: Tensor, key: Tensor, value: Tensor, scales: Scales, reasons: list[str]) -> str:
    """A note for `explain` that the operands are dequantised, in which memory and why."""
    megabytes = sum(x.numel() * OUT_DTYPE.itemsize for x in (query, key, value)) / 1e6
    times = "".join(f", {name}" for name, _ in scales.named())
    what = f"float8_e4m3fn operands{times and f' times {times[2:]}'} as bfloat16 of {megabytes:.3g} MB"
    return f"{what}; the float8 kernel does not run: {'; '.join(reasons)}"

"""Compiles launches for a GPU that is not there, and reads what the compiler made of them.

Host functions run as usual on CPU tensors while `record_launches` catches every kernel launch; `compile_launch` then
compiles one for any target, and `resources` reads registers, stack and instruction counts from the machine code.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from . import launcher
from .machine_code import read_machine_code

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Launch:
    """A kernel launch that was caught instead of run."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Catch every Triton launch inside the block instead of running it."""
    caught: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        caught.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", run), launcher.ordinary():
        yield caught


def _describe(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """Triton's signature entry of a run-time argument; fills in constants and alignment like a launch would."""
    if isinstance(value, tuple):
        described = [_describe(item, (*path, n), constants, attributes) for n, item in enumerate(value)]
        return type(value)(*described) if hasattr(value, "_fields") else tuple(described)
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile a caught launch for a target such as GPUTarget("cuda", 90, 32)."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[(n,)] = value
        else:
            signature[param.name] = _describe(value, (n,), constants, attributes)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.  Bytes and counts as the disassembler prints them."""

    registers: int
    stack: int
    shared: int
    instructions: int
    mma: int  # HMMA or HGMMA (wgmma) or tcgen05 products


def resources(kernel: CompiledKernel) -> Resources:
    """Read the resources of a kernel compiled for an NVIDIA target."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        code = read_machine_code(Path(cubin.name))
    return Resources(code.registers, code.stack, kernel.metadata.shared, code.instructions, code.products)

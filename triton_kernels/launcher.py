"""The one way to launch a kernel of this package, with as little work on the host as a launch allows.

Triton's own launch binds every argument, describes it, writes the description out as text and hashes that, at every
call: about 23 µs for these kernels, whose arguments are named tuples of pointers and strides.  Here the first call with
a kind of arguments goes that way and keeps what was compiled; later ones compute a key that is the same for two calls
only where Triton's description is, and hand the arguments to the compiled kernel.

The ordinary way stays for what the short one does not know: a Triton version it was not tested with, the interpreter,
AMD GPUs (Triton looks at more there), and while something is hooked into Triton's launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# Versions whose `CompiledKernel.run` takes (grid, stream, function, packed metadata, launch metadata, two hooks, and
# every parameter of the kernel); the tests pass with the first and the last.
OLDEST, NEWEST = (3, 6), (3, 9)

_INT32, _INT64 = 2**31, 2**63
# Kernels by id: every kernel that was launched.
launched: dict[int, Any] = {}
# (id of kernel, device, constants, names of scalars, specialization) ->
# (run, function, packed metadata, constants in the kernel's order, and what must live as long as they are used)
_compiled: dict[tuple, tuple] = {}


_REMEMBERING: set[type] = set()


def remembers(cls: type) -> type:
    """A named tuple whose instances keep their `specialization`: one that several launches take is described once."""
    # Triton looks for the fields in the class itself
    own = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_fields": cls._fields}  # type: ignore[attr-defined]
    wider = type(cls.__name__, (cls,), own)
    _REMEMBERING.add(wider)
    return wider


class Constants:
    """Compile-time arguments and options (num_warps, ...) of a kernel.  `constants` makes one object per set of values,
    so identity stands for equality."""

    __slots__ = ("values",)

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


@lru_cache(maxsize=None, typed=True)
def constants(**values: Any) -> Constants:
    return Constants(values)


def specialization(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles arguments into a kernel by, the same for two calls only where their kernels are the same.

    Tensors by dtype and whether their address is a multiple of 16; integers by width, by being 1, and by being a
    multiple of 16; floats and booleans by type alone; None as itself; tuples by their type and item by item.

    Raises:
        TypeError: something else.
    """
    found: list[Any] = []
    _describe(arguments, found)
    return tuple(found)


def _describe(values: tuple[Any, ...], found: list[Any]) -> None:
    # A call has some fifty values: one loop, and no call for the two kinds that most of them are.
    add = found.append
    for value in values:
        kind = type(value)
        if kind is int:
            if value == 1:
                add(1)
            elif -_INT32 <= value < _INT32:
                add(32 if value & 15 else -32)
            else:
                width = 64 if -_INT64 <= value < _INT64 else 65
                add(width if value & 15 else -width)
        elif value is None:
            add(None)
        elif isinstance(value, tuple):
            known = getattr(value, "described", None)
            if known is None:
                known = [kind, len(value)]
                _describe(value, known)
                if kind in _REMEMBERING:
                    value.described = known
            found += known
        elif kind is float or kind is bool:
            add(kind)
        elif isinstance(value, torch.Tensor):
            add(value.dtype)
            add(value.data_ptr() & 15 == 0)
        else:
            raise TypeError(
                f"a kernel's argument: expected a tensor, a number, None or a tuple of them, got {kind.__name__}"
            )


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], compile_time: Constants, **scalars: int) -> None:
    """Run `programs` programs of a kernel on the current device and stream.

    Args:
        arguments: the kernel's first parameters, in its order.
        compile_time: its last parameters, and launch options.
        scalars: the integers between them, in the kernel's order.

    Raises:
        TypeError: the names of `scalars` are not the kernel's next parameters.
    """
    key = None
    if short() and not _hooked(kernel):
        device = driver.active.get_current_device()
        values = (*arguments, *scalars.values())
        key = (id(kernel), device, compile_time, *scalars, *specialization(values))
        found = _compiled.get(key)
        if found is not None:
            run, function, metadata, rest, _ = found
            stream = driver.active.get_current_stream(device)
            run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *rest)
            return
    _check_order(kernel, len(arguments), tuple(scalars))
    launched[id(kernel)] = kernel
    compiled = kernel[(programs,)](*arguments, **scalars, **compile_time.values)
    if key is not None and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
        rest = tuple(compile_time.values[name] for name in kernel.arg_names[len(values) :])
        _compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, rest, compiled)


@lru_cache(maxsize=1)
def _known_version() -> bool:
    release = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:2])
    return OLDEST <= release <= NEWEST


_ordinary_blocks: list[None] = []


def short() -> bool:
    """Whether launches may take the short way (in this version of Triton, outside the interpreter)."""
    return not _ordinary_blocks and _known_version() and not knobs.runtime.interpret


@contextmanager
def ordinary() -> Iterator[None]:
    """Every launch inside the block, in any thread, goes Triton's own way."""
    _ordinary_blocks.append(None)
    try:
        yield
    finally:
        _ordinary_blocks.pop()


def _hooked(kernel: Any) -> bool:
    """Whether somebody watches or changes launches or compilations."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # a chain of hooks, of nothing by default; or a function that was put in its place
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(
        kernel.pre_run_hooks
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def _check_order(kernel: Any, first: int, names: tuple[str, ...]) -> None:
    expected = tuple(kernel.arg_names[first : first + len(names)])
    if names != expected:
        raise TypeError(f"{kernel.__name__}: expected the scalars {expected}, got {names}")


def forget() -> None:
    """Drop what was compiled: for a change of Triton's driver, in tests."""
    _compiled.clear()

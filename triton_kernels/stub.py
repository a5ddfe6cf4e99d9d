"""A Triton driver that launches nothing, so that what a launch costs the host can be run and timed without a GPU.

Kernels are compiled for sm_90 as ever, by the compiler inside the triton package; only loading and running them is left
out.  Results are whatever was in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import launcher

TARGET = GPUTarget("cuda", 90, 32)


class _Utils:
    """Of an H100: what Triton asks its driver before it loads a kernel."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


class _Driver:
    utils = _Utils()

    def __init__(self, on_launch: Callable[..., None]) -> None:
        self.on_launch = on_launch

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return self.on_launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


def _nothing(*arguments: Any) -> None:
    pass


@contextmanager
def stubbed_driver(on_launch: Callable[..., None] = _nothing) -> Iterator[None]:
    """Inside the block, Triton's launches, of tensors anywhere, end in a call of `on_launch` with what a launch is
    given: three grid sizes, stream, function, packed metadata, launch metadata, two hooks, and the kernel's parameters.
    """
    before = driver._active
    caches = {name: kernel.device_caches for name, kernel in launcher.launched.items()}
    for kernel in launcher.launched.values():
        kernel.device_caches = defaultdict(kernel.create_binder)
    launcher.forget()
    driver.set_active(_Driver(on_launch))
    try:
        yield
    finally:
        for name, kernel in launcher.launched.items():
            for compiled, *_ in kernel.device_caches.values():
                for each in compiled.values():
                    each.module = None  # nothing that the real driver should unload
            kernel.device_caches = caches.get(name) or defaultdict(kernel.create_binder)
        launcher.forget()
        driver.set_active(before)

"""What every test runs under: poisoned allocations, a fixed seed, one thread, and the backends to run on."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from devices import GPU_BACKENDS
from hypothesis import HealthCheck, settings

import fastattn
from fastattn import dispatch
from fastattn.backends import cuda

# Examples are the same on every run, so that a red run is a change in the code; HYPOTHESIS_PROFILE=explore looks for
# new ones.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", derandomize=True, max_examples=40, database=None, **_COMMON)
settings.register_profile("explore", derandomize=False, max_examples=400, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _backends() -> list[object]:
    listed = [b for b in fastattn.backends() if b.name not in GPU_BACKENDS]
    return [pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=b.reason)]) for b in listed]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every CPU backend's name, skipped with the backend's own reason where it cannot run."""
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Where the tensors of the backend live."""
    return "cpu"


@pytest.fixture
def only_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """For functions without a `backend` argument: the one backend there is."""
    monkeypatch.setattr(dispatch, "_BACKENDS", {backend: dispatch._BACKENDS[backend]})
    return backend


def _poison_native_memory() -> None:
    """Fill with garbage what native code allocates, on CPUs: tensors made through the stable ABI, which
    `fill_uninitialized_memory` does not reach, and scratch from malloc."""
    c10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(c10, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = True  # 0x7fedbeef, a float32 NaN
    if sys.platform == "linux":
        m_perturb, pattern = -6, 0x01  # glibc writes the complement, 0xfe: -1.7e38 in float32
        ctypes.CDLL(None).mallopt(m_perturb, pattern)


_poison_native_memory()


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    """Seeds; NaN in every fresh tensor; one thread; gradients still enabled after.

    `use_deterministic_algorithms` is what makes ATen honour `fill_uninitialized_memory`: aten::empty and its kin then
    fill with NaN (integers with their largest value).
    """
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    assert torch.is_grad_enabled(), "the test left gradients disabled"


@pytest.fixture
def cuda_simulator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The CUDA backend takes CPU tensors, in the simulator; the module that runs it."""
    module = pytest.importorskip("fastattn._native", reason="fastattn._native is not built")
    monkeypatch.setattr(cuda, "simulated", lambda: True)
    return module

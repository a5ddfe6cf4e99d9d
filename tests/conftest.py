"""What every test runs under: poisoned allocations, a fixed seed, one thread, and the backends to run on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import fastattn
from fastattn import dispatch

# Examples are the same on every run, so that a red run is a change in the code; HYPOTHESIS_PROFILE=explore looks for
# new ones.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", derandomize=True, max_examples=40, database=None, **_COMMON)
settings.register_profile("explore", derandomize=False, max_examples=400, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Where the tensors of a backend's tests live; a backend that is not named here runs on CPU tensors.
BACKEND_DEVICES = {"triton": "cuda", "cuda": "cuda"}


def _backends() -> list[object]:
    marks = {b.name: [] if b.available else [pytest.mark.skip(reason=b.reason)] for b in fastattn.backends()}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


@pytest.fixture(params=_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend's name, skipped with the backend's own reason where it cannot run."""
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return BACKEND_DEVICES.get(backend, "cpu")


@pytest.fixture
def only_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """For functions without a `backend` argument: the one backend there is."""
    monkeypatch.setattr(dispatch, "_BACKENDS", {backend: dispatch._BACKENDS[backend]})
    return backend


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    """Seeds; NaN in every fresh allocation, native ones included; one thread; no grad-mode or thread leak.

    `use_deterministic_algorithms` is what makes ATen honour `fill_uninitialized_memory`: aten::empty and its kin,
    which torch.empty and the stable ABI both call, then fill with NaN (integers with their largest value).
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

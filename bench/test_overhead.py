"""Host overhead under pytest-benchmark: ``pytest bench/test_overhead.py``.  What a call costs with nothing to compute.

``--benchmark-autosave`` keeps a baseline, ``--benchmark-compare`` holds the next run against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from fastattn.bench.peers import prepare
from fastattn.bench.scenarios import Case, make_inputs
from fastattn.bench.suites import overhead

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SUITE = overhead("cpu", quick=False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking other threads up is none of a call's own cost, and on a busy machine would be all of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("peer", SUITE.peers)
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_forward(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    benchmark.group = f"forward, {case.name}"
    prepared = prepare(peer, make_inputs(case, "cpu"))
    with torch.no_grad():
        out = benchmark(prepared.forward)
    assert out.shape[-1] == case.shape.value_dim


@pytest.mark.parametrize("peer", SUITE.peers)
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_training_step(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    benchmark.group = f"forward + backward, {case.name}"
    prepared = prepare(peer, make_inputs(case, "cpu"))
    assert len(benchmark(prepared.step)) == len(prepared.leaves)

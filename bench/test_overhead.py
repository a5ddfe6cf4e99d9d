"""Host overhead under pytest-benchmark: ``pytest bench/test_overhead.py``.  What a call costs with nothing to compute.

The last test holds the calls to the stored baseline (overhead_baseline.py: ratios to SDPA's call in the same run, so
that another machine can be held to it as well); ``OVERHEAD_UPDATE=1`` writes it.  pytest-benchmark's own
``--benchmark-autosave`` and ``--benchmark-compare`` are for absolute times on one machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from fastattn.bench import overhead_baseline
from fastattn.bench.peers import prepare
from fastattn.bench.results import environment
from fastattn.bench.scenarios import Case, make_inputs
from fastattn.bench.suites import overhead

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SUITE = overhead("cpu", quick=False)
SECONDS: dict[tuple[str, str], float] = {}  # least time of each test that has run, by group and peer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking other threads up is none of a call's own cost, and on a busy machine would be all of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _keep(benchmark: BenchmarkFixture, peer: str) -> None:
    if benchmark.enabled:
        SECONDS[str(benchmark.group), peer] = benchmark.stats.stats.min


@pytest.mark.parametrize("peer", SUITE.peers)
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_forward(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    benchmark.group = f"forward, {case.name}"
    prepared = prepare(peer, make_inputs(case, "cpu"))
    with torch.no_grad():
        out = benchmark(prepared.forward)
    assert out.shape[-1] == case.shape.value_dim
    _keep(benchmark, peer)


@pytest.mark.parametrize("peer", SUITE.peers)
@pytest.mark.parametrize("case", SUITE.cases, ids=lambda case: case.name)
def test_training_step(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    benchmark.group = f"forward + backward, {case.name}"
    prepared = prepare(peer, make_inputs(case, "cpu"))
    assert len(benchmark(prepared.step)) == len(prepared.leaves)
    _keep(benchmark, peer)


def test_no_call_costs_more_than_in_the_stored_baseline() -> None:
    now = overhead_baseline.ratios(SECONDS)
    if not now:
        pytest.skip("nothing was timed: run it with the other tests of this file, and benchmarks enabled")
    if os.environ.get(overhead_baseline.UPDATE) == "1":
        where = environment("cpu")
        overhead_baseline.write(now, {"device": where.device, "torch": where.torch, "commit": where.commit})
        return
    stored = overhead_baseline.read()
    assert stored, f"no baseline in {overhead_baseline.path()}; {overhead_baseline.UPDATE}=1 writes one"
    assert set(now) <= set(stored), f"not in the baseline: {sorted(set(now) - set(stored))}"
    found = overhead_baseline.slower(now, stored)
    assert not found, "; ".join(map(str, found))

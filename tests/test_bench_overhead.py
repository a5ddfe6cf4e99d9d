"""The stored baseline of host overhead: what counts as slower, and that the benchmark fails when something is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.bench import overhead_baseline
from fastattn.bench.suites import overhead


def test_another_machine_is_no_regression() -> None:
    here = {("g", "sdpa"): 8e-6, ("g", "fastattn"): 24e-6, ("g", "naive"): 9e-6, ("h", "fastattn"): 1e-6}
    stored = overhead_baseline.ratios(here)
    assert stored == {"g, fastattn": pytest.approx(3.0)}
    slow = {key: 5 * time for key, time in here.items()}
    assert overhead_baseline.slower(overhead_baseline.ratios(slow), stored) == []
    worse = here | {("g", "fastattn"): 40e-6}
    (found,) = overhead_baseline.slower(overhead_baseline.ratios(worse), stored)
    assert str(found) == "g, fastattn: 5.00 times SDPA's, 3.00 in the baseline"


def test_the_stored_baseline_knows_every_call() -> None:
    if not overhead_baseline.path().exists():
        pytest.skip("not a checkout: a wheel has no stored baseline")
    suite = overhead("cpu", quick=False)
    expected = {
        f"{direction}, {case.name}, {peer}"
        for direction in ("forward", "forward + backward")
        for case in suite.cases
        for peer in suite.peers
        if peer.startswith("fastattn")
    }
    stored = overhead_baseline.read()
    assert set(stored) == expected
    assert all(0.1 < ratio < 100 for ratio in stored.values())


def test_the_benchmark_holds_calls_to_the_baseline(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    file = Path(overhead_baseline.__file__).with_name("test_overhead.py")
    if not file.exists():
        pytest.skip("not a checkout: the benchmark is not part of the wheel")
    stored = tmp_path / "overhead.json"
    stored.write_text(json.dumps({"ratios": {"forward, plain, fastattn": 1e-3, "forward, plain, fastattn-sdpa": 1e3}}))
    # as a worker of pytest-xdist, pytest-benchmark would measure nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "--benchmark-max-time=0.01",
         "--benchmark-min-rounds=3", "-k", "stored or (forward and plain and not training)"],
        capture_output=True, text=True, env={**environment, "OVERHEAD_BASELINE": str(stored), "OVERHEAD_UPDATE": ""},
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "in the baseline" in done.stdout and "1 failed" in done.stdout
    assert "fastattn-sdpa: " not in done.stdout.split("AssertionError")[1].splitlines()[0]

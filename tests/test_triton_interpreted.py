"""Runs tests/triton in a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton"


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # two processes of its own, also where this one is a worker: the longest files would outlast everything else
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    # and one thread each: NumPy would take them all, and wait for them
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(FOLDER / file)]
    root = FOLDER.parent.parent
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]

"""The CUDA library as a file: what it needs from outside.  It is built on request only, so this runs where it was."""

from __future__ import annotations

import re
import subprocess

import pytest

from fastattn import native

LIBRARY = native.cuda_library_path
pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(),
    reason="libfastattn_cuda.so is not built (FASTATTN_CUDA=1 pip install --no-build-isolation -e .)",
)
# The CUDA runtime is inside; libtorch_cuda.so is there by name alone.
NEEDED = {
    "libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2",
    "libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip


def _run(*command: str) -> str:
    return subprocess.run([*command, str(LIBRARY)], check=True, capture_output=True, text=True).stdout


def test_needs_torch_and_the_system_only() -> None:
    needed = set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", _run("readelf", "--dynamic", "--wide")))
    assert needed <= NEEDED
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= needed, "without their names loading fails on the first shim"


def test_touches_torch_through_its_stable_abi() -> None:
    """Every symbol from outside is a C shim of torch, or versioned: of the C and C++ libraries."""
    symbols = [line.split()[-1] for line in _run("nm", "--dynamic", "--undefined-only").splitlines()]
    foreign = [
        name for name in symbols if "@" not in name and not re.match(r"(aoti_)?torch_|_ITM_|__gmon_start__", name)
    ]
    assert symbols and not foreign


def test_shows_nothing() -> None:
    """Operators register themselves; a symbol of its own could be taken for one of another library."""
    shown = [line.split()[-1] for line in _run("nm", "--dynamic", "--defined-only").splitlines()]
    assert not [name for name in shown if "fastattn" in name or "cuda" in name]

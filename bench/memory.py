"""How big: the peak of memory during a call above what was held before it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _trim() -> None:
    """Hand freed memory back to the kernel; without it a call would reuse what the last one left, and weigh nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # not glibc


def _resident_peak(call: Callable[[], object]) -> int:
    _trim()
    before = _status_bytes("VmRSS")
    try:
        _CLEAR.write_text("5")  # resets the high-water mark of the resident set
    except OSError:
        return _sampled_peak(call, before)
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _sampled_peak(call: Callable[[], object], before: int) -> int:
    """For kernels that do not let the mark be reset: watch the resident set from a second thread."""
    peak, running = before, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, _status_bytes("VmRSS"))
            time.sleep(2e-4)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        running = False
        thread.join()
    return peak - before


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes above the level before `call`: CUDA's allocator, or on a CPU the resident set of the process.

    The resident set counts the private scratch of every library alike; its grain is pages, and a fresh thread's stack
    shows once, so `call` must have run before.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _resident_peak(call)

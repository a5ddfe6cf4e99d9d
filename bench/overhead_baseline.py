"""The stored baseline of what a call costs the host, in units of SDPA's own call in the same run.

Microseconds of another machine say nothing here, but SDPA's call is Python, dispatcher and allocator as ours is: on a
slower machine both cost more.  What is stored and compared is the ratio of the least times of many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import fastattn

CALIBRATION = "sdpa"
# Two runs of one build on a machine with other load differ by up to a tenth; another CPU by as much again.
TOLERANCE = 1.3
UPDATE = "OVERHEAD_UPDATE"  # 1: write the baseline instead of comparing with it


def path() -> Path:
    """bench/results/overhead.json of the checkout, or what OVERHEAD_BASELINE names."""
    inside = Path(fastattn.__file__).resolve().parents[1] / "bench" / "results" / "overhead.json"
    return Path(os.environ.get("OVERHEAD_BASELINE") or inside)


@dataclass(frozen=True)
class Slower:
    """A call that costs more than it did, in units of SDPA's."""

    name: str
    before: float
    now: float

    def __str__(self) -> str:
        return f"{self.name}: {self.now:.2f} times SDPA's, {self.before:.2f} in the baseline"


def ratios(seconds: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Least times by (group, peer) as multiples of SDPA's in the same group, by "group, peer"; fastattn's alone."""
    return {
        f"{group}, {peer}": time / seconds[group, CALIBRATION]
        for (group, peer), time in seconds.items()
        if peer.startswith("fastattn") and (group, CALIBRATION) in seconds
    }


def slower(now: Mapping[str, float], stored: Mapping[str, float], tolerance: float = TOLERANCE) -> list[Slower]:
    """What is in both and beyond the tolerance, the worst first."""
    found = [Slower(name, stored[name], ratio) for name, ratio in now.items() if name in stored]
    return sorted((one for one in found if one.now > tolerance * one.before), key=lambda one: one.before / one.now)


def read() -> dict[str, float]:
    """The stored ratios; empty where nothing is stored."""
    file = path()
    return json.loads(file.read_text())["ratios"] if file.exists() else {}


def write(now: Mapping[str, float], where: Mapping[str, str]) -> None:
    """Replace the baseline; `where` says what it was measured on, for a reader."""
    rounded = {name: round(ratio, 3) for name, ratio in sorted(now.items())}
    path().write_text(json.dumps({"measured on": dict(where), "ratios": rounded}, indent=2) + "\n")

"""What a suite is."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.bench.scenario import Case


@dataclass(frozen=True)
class Suite:
    """Cases, and who runs them.  `baseline` is the peer that ratios are taken against."""

    name: str
    title: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    baseline: str = "sdpa"
    per_call: bool = False  # microseconds per call are the point: time many calls per sample
    memory: bool = True  # peak memory is measured as well, which takes one more run of each variant
    only_memory: bool = False  # one step of each variant, after a gate at a small size: nothing is timed

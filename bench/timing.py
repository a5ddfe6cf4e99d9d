"""How fast: variants take turns in one process, so that drift of clocks and neighbours hits all of them alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastattn.bench.peers import Prepared

# One measurement: direction -> seconds, and where the device has a queue HOST + direction -> seconds until the host was
# free again.
Sample = Callable[[], dict[str, float]]
HOST = "host "
FLUSH_BYTES = 256 << 20  # more than any GPU's L2


@dataclass(frozen=True)
class Spread:
    """Median and 20/80 quantiles of a list of seconds."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


class CpuClock:
    """Wall-clock seconds between marks."""

    def start(self) -> None:
        self._marks = [time.perf_counter()]

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def stop(self) -> list[float]:
        return _steps(self._marks)

    def host(self) -> list[float]:
        """None: the host is the device."""
        return []


class CudaClock:
    """Device seconds between events, after the L2 cache has been overwritten, and the host's beside them.

    The device is still overwriting the cache while the host hands it the first kernels, so the host's time has no wait
    for the device in it, and the device's none for the host unless the host is much the slower.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def start(self) -> None:
        torch.cuda.synchronize()  # an empty queue: the host never waits for room in it
        self._flush.zero_()
        self._marks, self._host_marks = [], []
        self.mark()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)
        self._host_marks.append(time.perf_counter())

    def stop(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(self._marks)]

    def host(self) -> list[float]:
        return _steps(self._host_marks)


def _steps(marks: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(marks)]


Clock = CpuClock | CudaClock


def make_clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def forward_sample(prepared: Prepared, clock: Clock, calls: int = 1) -> Sample:
    """Inference: no graph is recorded."""

    def sample() -> dict[str, float]:
        with torch.no_grad():
            clock.start()
            for _ in range(calls):
                prepared.forward()
            clock.mark()
        found = {"forward": clock.stop()[0] / calls}
        host = clock.host()
        return found | ({HOST + "forward": host[0] / calls} if host else {})

    return sample


def training_sample(prepared: Prepared, clock: Clock, calls: int = 1) -> Sample:
    """Forward with a graph, then backward; `both` is their sum, each timed in the same pass."""

    def sample() -> dict[str, float]:
        device, host = [0.0, 0.0], [0.0, 0.0]
        for _ in range(calls):
            clock.start()
            out = prepared.forward()
            clock.mark()
            prepared.gradients(out)
            clock.mark()
            device = [a + b / calls for a, b in zip(device, clock.stop(), strict=True)]
            host = [a + b / calls for a, b in zip(host, clock.host(), strict=False)]
        found = {"backward": device[1], "both": sum(device)}
        return found | ({HOST + "backward": host[1], HOST + "both": sum(host)} if host else {})

    return sample


def interleave(
    samples: Mapping[str, Sample], *, budget: float, least: int = 3, most: int = 60, warm: bool = False
) -> dict[str, dict[str, list[float]]]:
    """Seconds per variant and direction, at most one sample of each variant per round.

    Each variant has an equal share of `budget` seconds and takes as many samples as fit into it, between `least` and
    `most`, in rounds spread over the whole time: one that takes a hundred times as long does not leave the others with
    three samples.  The order is reversed every other round, so that no variant always runs in the cache that another
    one left.  The first round warms up and counts for nothing, unless the variants are `warm`, as they are behind the
    gate, and it takes a variant's whole share.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in samples}
    counts: dict[str, int] = {}
    share = budget / len(samples)
    for name, sample in samples.items():
        began = time.perf_counter()
        found = sample()
        once = max(time.perf_counter() - began, 1e-9)
        counts[name] = max(least, min(most, int(share / once)))
        if warm and share < once:
            seconds[name] = {direction: [value] for direction, value in found.items()}
            counts[name] -= 1
    order, rounds = list(samples), max(counts.values())
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else reversed(order):
            if (turn + 1) * counts[name] // rounds == turn * counts[name] // rounds:
                continue
            for direction, value in samples[name]().items():
                seconds[name].setdefault(direction, []).append(value)
    return seconds

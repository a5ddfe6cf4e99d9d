"""Two sets of rows against each other: what became slower, what faster.

Absolute times of two runs do not count, because clocks and neighbours differ: where a case has a baseline, a variant's
time is taken in units of the baseline's, which was timed in turns with it.  A change counts when it is beyond the
threshold and the 20/80 quantiles of the two runs do not overlap.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fastattn.bench.report import seconds, size
from fastattn.bench.results import Row
from fastattn.cli.console import Console, escape

# What two rows must share to be about the same thing; versions, commit and date are what may differ.
SAME = (
    "device", "isa", "threads", "suite", "case", "variant", "direction", "dtype", "batch", "heads", "kv_heads",
    "query_length", "key_length", "head_dim", "value_dim",
)  # fmt: skip
THRESHOLD = 0.1


@dataclass(frozen=True)
class Time:
    """A variant's time with its quantiles, in units of the baseline's median or in seconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, row: Row, relative: bool) -> Time:
        assert row.median_s is not None
        # the row's own ratio is the baseline's median over this one's
        unit = row.median_s * row.ratio if relative and row.ratio is not None else 1.0
        return cls(row.median_s / unit, (row.p20_s or row.median_s) / unit, (row.p80_s or row.median_s) / unit)


@dataclass(frozen=True)
class Change:
    """One variant of one case, before and after."""

    before: Row
    after: Row
    factor: float  # time after over time before: above 1 is slower
    relative: bool  # in units of the baseline
    apart: bool  # the quantiles do not overlap

    def slower(self, threshold: float) -> bool:
        return self.apart and self.factor > 1 + threshold

    def faster(self, threshold: float) -> bool:
        return self.apart and self.factor < 1 / (1 + threshold)


def identity(row: Row) -> tuple[object, ...]:
    return tuple(getattr(row, name) for name in SAME)


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Every variant of fastattn that was timed in both; of rows about the same thing the last one counts."""
    first = {identity(row): row for row in before if _timed(row)}
    found = []
    for key, new in {identity(row): row for row in after if _timed(row)}.items():
        old = first.get(key)
        if old is None:
            continue
        relative = new.variant != new.baseline and None not in (old.ratio, new.ratio) and old.baseline == new.baseline
        a, b = Time.of(old, relative), Time.of(new, relative)
        apart = b.p20 > a.p80 or b.p80 < a.p20
        found.append(Change(old, new, b.median / a.median, relative, apart))
    return found


def merge(rounds: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows of several rounds as one: medians of the rounds' medians, their spread as the quantiles.

    Times are brought to the first round's clock by the baseline, so that the spread is that of the ratios.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for one in rounds:
        for row in one:
            groups.setdefault(identity(row), []).append(row)
    merged = []
    for members in groups.values():
        timed = [row for row in members if row.status == "ok" and row.median_s is not None]
        if len(timed) < len(members) or not timed:
            merged.append(next((row for row in members if row.status != "ok"), members[-1]))
            continue
        bases = [row.median_s * row.ratio for row in timed if row.median_s and row.ratio is not None]
        scale = statistics.median(bases) if len(bases) == len(timed) else None
        values = sorted(scale / row.ratio if scale and row.ratio else row.median_s or 0.0 for row in timed)
        median = statistics.median(values)
        merged.append(
            replace(
                timed[-1], median_s=median, p20_s=values[0], p80_s=values[-1], ratio=scale / median if scale else None,
                samples=sum(row.samples for row in timed),
            )
        )  # fmt: skip
    return merged


def _timed(row: Row) -> bool:
    return row.status == "ok" and row.median_s is not None and row.variant.startswith("fastattn")


def print_changes(found: list[Change], threshold: float, console: Console) -> int:
    """The table of what changed, and the exit code: 1 with a regression, 2 when nothing could be compared."""
    if not found:
        console.print("[red]nothing to compare:[/red] no variant of fastattn was timed in both, on one device")
        return 2
    slower = sorted((c for c in found if c.slower(threshold)), key=lambda c: -c.factor)
    faster = sorted((c for c in found if c.faster(threshold)), key=lambda c: c.factor)
    lines = []
    for colour, members in (("red", slower), ("green", faster)):
        for one in members:
            row = one.after
            ratio = "" if one.before.ratio is None or row.ratio is None else f"{one.before.ratio:.2f} → {row.ratio:.2f}"
            lines.append(
                [
                    escape(f"{row.suite}: {row.case} {size(row)} {row.dtype}"),
                    f"{row.variant}, {row.direction}",
                    seconds(one.before.median_s or 0.0),
                    seconds(row.median_s or 0.0),
                    ratio,
                    f"[{colour}]{one.factor:.2f}x[/{colour}]" + ("" if one.relative else " *"),
                ]
            )
    a, b = found[0].before, found[0].after
    versions = [f"{row.commit or 'no commit'}, torch {row.torch}" for row in (a, b)]
    console.print(f"before: {versions[0]}; after: {versions[1]}")
    if lines:
        console.table(["case", "variant", "before", "after", "ratio", "time"], lines, title="changes", left=2)
        if any(not c.relative for c in (*slower, *faster)):
            console.print("* absolute times: the case has no baseline")
    middle = statistics.median(c.factor for c in found)
    console.print(
        f"{len(found)} compared, {len(slower)} slower and {len(faster)} faster by more than {threshold:.0%}; "
        f"median {middle:.3f}x"
    )
    return 1 if slower else 0

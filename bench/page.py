"""One HTML page of everything that was measured: goals, figures and tables for each device, with nothing to load.

``python -m fastattn.bench.page [--out report.html] [FOLDER]`` writes it from a folder's cpu.csv and cuda.csv
(default bench/results); so does every run of the bench, and ``make report``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jinja2
from markupsafe import Markup

import fastattn
from fastattn.bench import figures
from fastattn.bench.goal_report import case_of
from fastattn.bench.goals import Outcome, Summary, evaluate, summarize
from fastattn.bench.report import case_key, groups, seconds, size
from fastattn.bench.results import Row, latest, read
from fastattn.bench.suites import SUITES

RESULTS = ("cpu.csv", "cuda.csv")
SPAN = 2.0  # doublings to either side of a goal that its strip shows


@dataclass(frozen=True)
class Plot:
    """A figure with what stands over it."""

    title: str
    picture: Markup


@dataclass(frozen=True)
class Cell:
    """What a table shows of one variant."""

    time: str = ""
    ratio: str = ""
    tone: str = ""  # good | even | bad: of the ratio
    beside: str = ""  # share of a ceiling, memory
    title: str = ""  # on hover: quantiles, samples, which kernel ran, or why it could not


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    lines: list[tuple[str, str, list[Cell]]]


@dataclass(frozen=True)
class Section:
    """The plots and tables of a suite."""

    name: str
    title: str
    plots: list[Plot]
    tables: list[Table]


@dataclass(frozen=True)
class Strip:
    """A goal's cases on a line with the goal in its middle; right is better."""

    summary: Summary
    marks: list[tuple[float, str, bool]]  # place in percent, what it is, met


@dataclass
class Device:
    """All that is known about one device."""

    name: str
    isa: str
    rows: list[Row]
    outcomes: list[Outcome]

    @property
    def anchor(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in f"{self.name} {self.isa}").lower().split())

    @property
    def facts(self) -> list[tuple[str, str]]:
        timed = [row for row in self.rows if row.status == "ok"]
        newest = max(timed or self.rows, key=lambda row: row.date)
        threads = max(row.threads for row in self.rows)
        commits = list(dict.fromkeys(row.commit or "no commit" for row in self.rows))
        facts = [
            ("instruction set" if not self.isa.startswith("sm_") else "architecture", self.isa or "no native kernels"),
            ("threads", str(threads)),
            ("torch", newest.torch),
            ("fastattn", f"{newest.fastattn} ({', '.join(commits)})"),
            ("measured", f"{newest.date}, {len(timed)} timings"),
        ]
        return [*facts, *((f"{row.case} {row.dtype}", _rate(row)) for row in self.ceilings)]

    @property
    def ceilings(self) -> list[Row]:
        return [row for row in self.rows if row.suite == "ceilings" and row.status == "ok"]

    @cached_property
    def strips(self) -> list[Strip]:
        found = []
        for summary in summarize(self.outcomes):
            members = [o for o in self.outcomes if (o.claim, o.threshold) == (summary.claim, summary.threshold)]
            measured = [one for one in members if one.measured is not None]
            marks = [(_place(one), f"{case_of(one)}: {one.text}", one.met == "yes") for one in measured]
            found.append(Strip(summary, marks))
        return found

    @property
    def held(self) -> str:
        return f"{sum(strip.summary.holds for strip in self.strips)} of {len(self.strips)}"

    @cached_property
    def roofline(self) -> Markup | None:
        chosen = [
            row
            for row in self.rows
            if row.status == "ok" and row.direction == "forward" and row.variant in ("fastattn", "sdpa", "flash-attn")
        ]
        picture = figures.roofline(chosen, self.ceilings)
        return None if picture is None else Markup(picture)

    @cached_property
    def sections(self) -> list[Section]:
        names = list(dict.fromkeys(row.suite for row in self.rows if row.suite != "ceilings"))
        names.sort(key=lambda name: list(SUITES).index(name) if name in SUITES else len(SUITES))
        return [_section(name, [row for row in self.rows if row.suite == name]) for name in names]

    @property
    def refusals(self) -> list[tuple[str, str, str]]:
        """Variant, its words, and where it said them."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.status != "ok":
                found.setdefault((row.variant, f"{row.status}: {row.note}"), []).append(f"{row.suite}: {row.case}")
        return [(who, words, ", ".join(dict.fromkeys(where))) for (who, words), where in found.items()]


def _place(one: Outcome) -> float:
    """Percent from the left; 50 is the goal itself."""
    number = float(one.threshold.lstrip("≥≤ ").rstrip("xus% "))
    number = number / 100 if one.threshold.endswith("%") else number
    value = one.measured or 0.0
    better = value / number if one.threshold.startswith("≥") else number / value if value > 0 else 2**SPAN
    return 50 + 50 / SPAN * max(-SPAN, min(SPAN, math.log2(max(better, 1e-9))))


def _rate(row: Row) -> str:
    return f"{row.tflops * 1e3:.0f} GFLOP/s" if row.tflops else f"{row.gb_per_s or 0.0:.1f} GB/s"


def _section(name: str, rows: list[Row]) -> Section:
    title = SUITES[name]("cuda" if rows[0].isa.startswith("sm_") else "cpu", False).title if name in SUITES else name
    timed = [row for row in rows if row.status == "ok" and row.median_s is not None]
    plots = []
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in timed:
        lines.setdefault((row.case, row.dtype, row.heads, row.kv_heads, row.head_dim), []).append(row)
    single: list[Row] = []
    for (case, dtype, heads, kv_heads, dim), members in lines.items():
        if len({row.key_length for row in members}) > 1:
            grouped = f", {heads} heads on {kv_heads}" if heads != kv_heads else f", {heads} heads"
            width = f", D = {dim}" if dim else ""
            plots.append(Plot(f"{case}, {dtype}{grouped}{width}", Markup(figures.sweep(members))))
        else:
            single += members
    single = [row for row in single if row.direction != "backward"]
    if single:
        plots.append(Plot(title, Markup(figures.dots(single))))
    return Section(name, title, plots, [_table(key[1], key[2], members) for key, members in groups(rows).items()])


def _table(direction: str, dtype: str, rows: Sequence[Row]) -> Table:
    variants = [v for v in dict.fromkeys(row.variant for row in rows) if any(_shown(r) for r in rows if r.variant == v)]
    lines: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault(case_key(row), {})[row.variant] = row
    body = []
    for found in lines.values():
        first = next(iter(found.values()))
        body.append((first.case, size(first), [_cell(found.get(variant)) for variant in variants]))
    return Table(f"{figures.DIRECTIONS[direction]}, {dtype}", variants, body)


def _shown(row: Row) -> bool:
    return row.status in ("ok", "wrong")


def _cell(row: Row | None) -> Cell:
    if row is None:
        return Cell()
    if row.status != "ok":
        return Cell(time=row.status, tone="bad" if row.status == "wrong" else "", title=row.note)
    beside = [] if row.fraction is None else [f"{row.fraction:.0%} {row.ceiling}"]
    beside += [] if row.host_s is None else [f"host {seconds(row.host_s)}"]
    beside += [] if row.peak_gb is None else [_bytes(row.peak_gb * 1e9)]
    if row.median_s is None:
        return Cell(beside=", ".join(beside), title=row.note)
    ratio, tone = "", ""
    if row.ratio is not None and row.variant != row.baseline:
        ratio = f"{row.ratio:.2f}×"
        tone = "good" if row.ratio >= 1.05 else "even" if row.ratio >= 0.95 else "bad"
    spread = f"{seconds(row.p20_s or row.median_s)} to {seconds(row.p80_s or row.median_s)}, {row.samples} samples"
    title = "; ".join(part for part in (spread, row.kernel, row.note) if part)
    return Cell(seconds(row.median_s), ratio, tone, ", ".join(beside), title)


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def devices(rows: Iterable[Row]) -> list[Device]:
    """Rows by device, the newest of each case, with the goals that they speak of; devices with goals first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in latest(rows):
        found.setdefault((row.device, row.isa), []).append(row)
    result = [Device(name, isa, mine, evaluate(mine)) for (name, isa), mine in found.items()]
    return sorted(result, key=lambda device: not device.outcomes)


def render(rows: Iterable[Row]) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(devices=devices(rows), version=fastattn.__version__)


def write(folder: Path, out: Path | None = None, rows: Iterable[Row] | None = None) -> Path:
    """The page of a folder's result files, or of other rows."""
    out = out or folder / "report.html"
    found = [row for name in RESULTS for row in read(folder / name)] if rows is None else rows
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render(found), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the report of a folder of results.")
    default = Path(fastattn.__file__).resolve().parents[1] / "bench" / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=default, help="with cpu.csv, cuda.csv")
    parser.add_argument("--out", type=Path, help="default: report.html in the folder")
    options = parser.parse_args()
    out = write(options.folder, options.out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

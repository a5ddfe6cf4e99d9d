"""What the CPU kernels are held to: every goal as data, and what a run's rows say about it.

A goal selects rows, says how a number is made of each, and which threshold it must keep.  The number comes from rows of
one case of one run, whose variants took turns; nothing is compared across runs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastattn.bench.report import case_key, size
from fastattn.bench.results import Row, replace_csv

Same = dict[str, Row]  # the other variants of a row's case and direction, by name
OURS = ("fastattn", "fastattn-mha")


def _speedup(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Time of the fastest of `against` over ours."""
    times = [same[name].median_s for name in against if name in same]
    found = [time for time in times if time is not None]
    return min(found) / row.median_s if found and row.median_s else None


def _share(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Our time over that of `against`."""
    ratio = _speedup(row, same, against)
    return None if ratio is None else 1 / ratio


def _per_pair(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Our time per visible pair over that of `against`; FLOPs count visible pairs alone."""
    other = same.get(against[0])
    return other.tflops / row.tflops if other is not None and other.tflops and row.tflops else None


def _extra_us(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Microseconds above `against`."""
    other = same.get(against[0])
    return (row.median_s - other.median_s) * 1e6 if other and other.median_s and row.median_s else None


def _fraction(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Share of the ceiling named by `against`, measured in the same run; None where another one is lower."""
    return row.fraction if row.ceiling in against else None


def _memory(row: Row, same: Same, against: tuple[str, ...]) -> float | None:
    """Our peak over that of `against`."""
    other = same.get(against[0])
    return row.peak_gb / other.peak_gb if other and other.peak_gb and row.peak_gb is not None else None


METRICS: dict[str, tuple[Callable[[Row, Same, tuple[str, ...]], float | None], str]] = {
    "speedup": (_speedup, "{:.2f}x"),
    "share": (_share, "{:.2f}x"),
    "time per visible pair": (_per_pair, "{:.2f}x"),
    "extra time": (_extra_us, "{:.1f} us"),
    "fraction": (_fraction, "{:.0%}"),
    "memory": (_memory, "{:.2%}"),
}


@dataclass(frozen=True)
class Goal:
    """A claim, the rows it is about, and the threshold their number must keep."""

    claim: str
    metric: str
    least: float | None = None  # the number has to be this or more
    most: float | None = None  # ... or this or less
    suites: tuple[str, ...] = ()
    direction: str = "forward"
    against: tuple[str, ...] = ("sdpa", "sdpa-flash", "sdpa-math")
    cases: tuple[str, ...] = ()  # empty: all
    dtypes: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()
    shortest: int = 0  # key length

    def selects(self, row: Row) -> bool:
        return (
            row.suite in self.suites
            and row.variant in OURS
            and row.direction == self.direction
            and (not self.cases or row.case in self.cases)
            and (not self.dtypes or row.dtype in self.dtypes)
            and (not self.head_dims or row.head_dim in self.head_dims)
            and row.key_length >= self.shortest
        )

    @property
    def threshold(self) -> str:
        return f"≥ {self.text(self.least)}" if self.least is not None else f"≤ {self.text(self.most)}"

    def text(self, value: float | None) -> str:
        return "" if value is None else METRICS[self.metric][1].format(value)

    def met(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)


WITHOUT = ("fastattn-without",)
F32, BF16, F16 = ("float32",), ("bfloat16",), ("float16",)
# Everything that a kernel does in proportion to the pairs that are visible, with room for the edges of its tiles.
PROPORTIONAL = 1.25


def _dense(suites: tuple[str, ...], dtype: tuple[str, ...], forward: float, backward: float) -> list[Goal]:
    name = dtype[0]
    return [
        Goal(f"{name} forward", "speedup", forward, suites=suites, dtypes=dtype),
        Goal(f"{name} backward", "speedup", backward, suites=suites, direction="backward", dtypes=dtype),
    ]


CPU_GOALS: tuple[Goal, ...] = (
    *_dense(("cpu-dense",), F32, 1.25, 1.3),
    Goal("float32 forward, D = 128: of the FMA peak", "fraction", 0.88, suites=("cpu-dense",), dtypes=F32,
         head_dims=(128,), against=("fma",)),
    *_dense(("cpu-dense",), BF16, 2.2, 1.8),
    *_dense(("cpu-half", "cpu-dense"), F16, 2.5, 10.0),
    Goal("float16 backward, against SDPA's own choice", "speedup", 10.0, suites=("cpu-half",), direction="backward",
         against=("sdpa",)),
    Goal("causal forward, float32", "speedup", 1.7, suites=("cpu-causal",), dtypes=F32),
    Goal("causal forward, bfloat16", "speedup", 2.7, suites=("cpu-causal",), dtypes=BF16),
    Goal("causal against our own without it, S ≥ 2048", "share", most=0.56, suites=("cpu-causal",), against=WITHOUT,
         shortest=2048),
    Goal("windows, documents, lengths, padding: time by visible area", "time per visible pair", most=PROPORTIONAL,
         suites=("cpu-sparse",), against=WITHOUT),
    Goal("window of 256 at S = 8192 against SDPA's dense mask", "speedup", 5.0, suites=("cpu-sparse",),
         cases=("window",), shortest=8192),
    Goal("biases forward, against our own plain", "share", most=1.08, suites=("cpu-bias",), against=WITHOUT),
    Goal("biases forward, against SDPA, dense bias built once", "speedup", 2.5, suites=("cpu-bias",),
         against=("sdpa-built",)),
    Goal("biases forward, against SDPA, counting the building", "speedup", 2.5, suites=("cpu-bias",),
         against=("sdpa",)),
    Goal("biases training step, against our own plain", "share", most=1.15, suites=("cpu-bias",),
         direction="both", against=WITHOUT),
    Goal("biases training step, against SDPA, bias gathered", "speedup", 4.0, suites=("cpu-bias",), direction="both",
         against=("sdpa",)),
    Goal("rotary against our own without it", "share", most=1.05, suites=("cpu-rotary",), against=WITHOUT),
    Goal("rotary against SDPA and a rotation in torch", "speedup", 1.3, suites=("cpu-rotary",)),
    Goal("short sequences, B = 32, forward", "speedup", 1.1, suites=("cpu-short",)),
    Goal("short sequences, B = 32, training step", "speedup", 1.1, suites=("cpu-short",), direction="both"),
    Goal("decode, 4 query heads a key head", "speedup", 1.1, suites=("cpu-decode",)),
    Goal("decode, 32768 keys: of the read bandwidth", "fraction", 0.7, suites=("cpu-decode",), against=("read",),
         shortest=32768),
    Goal("module, eval", "speedup", 1.0, suites=("cpu-module",), against=("nn-mha",), cases=("self", "padding")),
    Goal("module, training", "speedup", 1.0, suites=("cpu-module",), direction="both", against=("nn-mha",),
         cases=("self", "padding")),
    Goal("module with need_weights, eval", "speedup", 1.5, suites=("cpu-module",), against=("nn-mha",),
         cases=("weights", "padding-weights")),
    Goal("module with need_weights, training", "speedup", 1.5, suites=("cpu-module",), direction="both",
         against=("nn-mha",), cases=("weights", "padding-weights")),
    Goal("encoder after replace_attention, eval", "speedup", 1.0, suites=("cpu-module",), against=("nn-mha",),
         cases=("encoder", "encoder-padding")),
    Goal("encoder after replace_attention, training", "speedup", 1.0, suites=("cpu-module",), direction="both",
         against=("nn-mha",), cases=("encoder", "encoder-padding", "encoder-padding-skip")),
    Goal("eager forward call above SDPA's", "extra time", most=10.0, suites=("cpu-overhead",), against=("sdpa",)),
    Goal("T5 training step: memory against SDPA's", "memory", most=0.01, suites=("cpu-memory",), direction="both",
         against=("sdpa",)),
    Goal("all threads against one, forward", "speedup", 1.85, suites=("cpu-threads",), against=("fastattn-1-thread",)),
    Goal("all threads against one, backward", "speedup", 1.85, suites=("cpu-threads",), direction="backward",
         against=("fastattn-1-thread",)),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One goal at one case: a line of goals.csv."""

    date: str
    device: str
    isa: str
    threads: int
    torch: str
    fastattn: str
    commit: str
    claim: str
    metric: str
    against: str
    threshold: str
    case: str
    direction: str
    dtype: str
    size: str
    measured: float | None  # None: not measured, with the reason in `note`
    text: str  # `measured` as a reader wants it
    met: str  # yes | no | "" where nothing was measured
    note: str = ""
    # Of a speedup: the share of the ceiling in `ceiling` that it would take.  Above 1 the goal asks for more than the
    # machine can do by this measure.
    needed: float | None = None
    ceiling: str = ""

    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in OUTCOME_KEY)


OUTCOME_KEY = (
    "device", "isa", "threads", "torch", "fastattn", "commit", "claim", "against", "case", "direction", "dtype", "size",
)  # fmt: skip
OUTCOME_FIELDS = tuple(field.name for field in fields(Outcome))
NUMBERS = ("measured", "needed")


def evaluate(rows: Iterable[Row], goals: Iterable[Goal] = CPU_GOALS) -> list[Outcome]:
    """Every goal at every case that the rows hold; a goal without rows gives nothing."""
    rows = list(rows)
    groups: dict[tuple[object, ...], Same] = {}
    for row in rows:
        groups.setdefault(_group(row), {})[row.variant] = row
    found = []
    for goal in goals:
        metric = METRICS[goal.metric][0]
        for row in rows:
            if not goal.selects(row):
                continue
            same = groups[_group(row)]
            value = metric(row, same, goal.against) if row.status == "ok" else None
            if value is None and row.status == "ok" and goal.metric == "fraction":
                continue  # another ceiling is the lower one for this case
            missing = [row, *(same[name] for name in goal.against if name in same and same[name].status != "ok")]
            note = "" if value is not None else "; ".join(r.note or f"{r.variant} {r.status}" for r in missing)
            found.append(
                Outcome(
                    row.date, row.device, row.isa, row.threads, row.torch, row.fastattn, row.commit, goal.claim,
                    goal.metric, " ".join(goal.against), goal.threshold, row.case, row.direction, row.dtype, size(row),
                    value, goal.text(value), "" if value is None else "yes" if goal.met(value) else "no", note,
                    _needed(goal, row, value), row.ceiling,
                )
            )  # fmt: skip
    return found


def _needed(goal: Goal, row: Row, value: float | None) -> float | None:
    if goal.metric != "speedup" or goal.least is None or not value or row.fraction is None:
        return None
    return row.fraction * goal.least / value


def _group(row: Row) -> tuple[object, ...]:
    return (row.device, row.isa, row.threads, row.commit, row.suite, row.direction, row.dtype, *case_key(row))


def read_outcomes(path: Path) -> list[Outcome]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            Outcome(
                **{
                    **{name: record.get(name) or "" for name in OUTCOME_FIELDS},
                    "threads": int(record["threads"]),
                    **{name: float(record[name]) if record.get(name) else None for name in NUMBERS},
                }  # type: ignore[arg-type]
            )
            for record in csv.DictReader(file)
        ]


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Merge into the file, as results.write does with rows: the newest of equal keys stays."""
    merged = {one.key(): one for one in read_outcomes(path)}
    merged |= {one.key(): one for one in outcomes}
    lines = [asdict(one) for one in merged.values()]
    for line in lines:
        for name in NUMBERS:
            line[name] = "" if line[name] is None else f"{line[name]:.6g}"
    replace_csv(path, OUTCOME_FIELDS, lines)


@dataclass(frozen=True)
class Summary:
    """One goal over all of its cases."""

    claim: str
    threshold: str
    worst: Outcome | None  # of those measured
    best: Outcome | None
    met: int
    measured: int
    unmeasured: int
    beyond: int  # of those missed, how many ask for more than the ceiling

    @property
    def holds(self) -> bool:
        return self.measured > 0 and self.met == self.measured and not self.unmeasured


def summarize(outcomes: Iterable[Outcome]) -> list[Summary]:
    """One line per goal, in the order of the outcomes."""
    by_claim: dict[tuple[str, str], list[Outcome]] = {}
    for one in outcomes:
        by_claim.setdefault((one.claim, one.threshold), []).append(one)
    found = []
    for (claim, threshold), members in by_claim.items():
        measured = sorted((m for m in members if m.measured is not None), key=lambda m: m.measured or 0.0)
        if threshold.startswith("≤"):
            measured.reverse()
        met = sum(m.met == "yes" for m in measured)
        worst, best = (measured[0], measured[-1]) if measured else (None, None)
        beyond = sum(m.met == "no" and (m.needed or 0.0) > 1 for m in measured)
        found.append(Summary(claim, threshold, worst, best, met, len(measured), len(members) - len(measured), beyond))
    return found

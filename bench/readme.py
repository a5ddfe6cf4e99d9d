"""The README's performance section, written from the committed rows and from nothing else.

``python -m fastattn.bench.readme`` rewrites the part between the markers; a test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

import fastattn
from fastattn.bench.goals import Summary, evaluate, summarize
from fastattn.bench.report import case_key, seconds, size
from fastattn.bench.results import Row, latest, read

OPENING = "<!-- performance: written by `python -m fastattn.bench.readme`, do not edit -->"
CLOSING = "<!-- /performance -->"
ROOT = Path(fastattn.__file__).resolve().parents[1]
REPORT = "bench/results/report.html"
OURS = ("fastattn", "fastattn-mha", "fastattn-hf")
# What a reader asks first, as suite and case; each dtype at its longest length.
SELECTED = (
    ("attention", "plain"), ("attention", "causal"), ("mask", "window"), ("mask", "documents"),
    ("bias", "alibi-learned"), ("bias", "t5"), ("bias", "rotary"), ("bias", "dense-bias"), ("module", "self"),
    ("module", "weights"), ("huggingface", "bert"), ("huggingface", "llama"), ("huggingface", "mistral-window"),
    ("huggingface", "t5"), ("additive", "additive"), ("overhead", "causal"),
)  # fmt: skip


def section(rows: list[Row]) -> str:
    """Markdown: for each device the goals that its rows speak of, and a few times; of the newest run of each case."""
    rows = latest(rows)
    devices = list(dict.fromkeys((row.device, row.isa) for row in rows))
    if not devices:
        return ""
    parts = [
        "## Performance",
        "",
        "Medians of runs in which all variants take turns, each held against the float64 formula first. A ratio is the",
        "baseline's time over fastattn's: above 1, fastattn is faster. The baseline is SDPA, `nn.MultiheadAttention`",
        "for modules, SDPA inside models of transformers, the formula for additive attention. Plots, memory and all",
        f"peers: [the report]({REPORT}), one file for a browser; every row: `bench/results/*.csv`.",
    ]
    for device, isa in devices:
        mine = [row for row in rows if (row.device, row.isa) == (device, isa)]
        commits = ", ".join(dict.fromkeys(row.commit for row in mine))
        versions = f"torch {mine[-1].torch}, fastattn {mine[-1].fastattn} ({commits})"
        parts += ["", f"**{device}**, {isa}, {max(row.threads for row in mine)} threads, {versions}"]
        found = summarize(evaluate(mine))
        if found:
            held = sum(one.holds for one in found)
            parts += [
                "",
                f"{held} of {len(found)} goals hold at every case of `bench --suite cpu`. A case above the peak could",
                "meet its goal only with more multiply-adds (or bytes) a second than the machine was measured to do.",
                "",
                "| goal | asked | worst case | best case | cases |",
                "|---|---|---|---|---|",
                *(goal_line(one) for one in found),
            ]
        times = lines(mine)
        if times:
            parts += [
                "",
                "| case | size | dtype | inference | ratio | training step | ratio |",
                "|---|---|---|---|---|---|---|",
                *times,
            ]
    return "\n".join(parts)


def goal_line(one: Summary) -> str:
    """A goal over all of its cases; bold where it does not hold."""
    total = one.measured + one.unmeasured
    cases = f"all {total}" if one.holds else f"**{one.met} of {total}**"
    if one.beyond:
        cases += f"; {one.beyond} above the peak"
    worst = f"{one.worst.text} ({one.worst.case} {one.worst.size})" if one.worst else "not measured"
    return f"| {one.claim} | {one.threshold} | {worst} | {one.best.text if one.best else ''} | {cases} |"


def lines(rows: list[Row]) -> list[str]:
    """A table line for each selected case that fastattn ran, inference beside training."""
    found = []
    for suite, case in SELECTED:
        members = [row for row in rows if (row.suite, row.case) == (suite, case) and row.variant in OURS]
        members = [row for row in members if row.status == "ok"]
        for dtype in dict.fromkeys(row.dtype for row in members):
            longest = max((row for row in members if row.dtype == dtype), key=lambda row: row.key_length)
            same = [row for row in members if row.dtype == dtype and case_key(row) == case_key(longest)]
            by_direction = {row.direction: row for row in same}
            name = f"{suite}: {case}" if suite in ("module", "huggingface", "overhead") else case
            cells = [name, size(longest), dtype]
            for direction in ("forward", "both"):
                cells += _time(by_direction.get(direction))
            found.append("| " + " | ".join(cells) + " |")
    return found


def _time(row: Row | None) -> list[str]:
    if row is None or row.median_s is None:
        return ["", ""]
    return [seconds(row.median_s), f"{row.ratio:.2f}" if row.ratio else ""]


def rewritten(text: str, rows: list[Row]) -> str:
    """The README with its section replaced."""
    before, _, rest = text.partition(OPENING)
    _, _, after = rest.partition(CLOSING)
    body = section(rows)
    return before + OPENING + "\n" + (body + "\n" if body else "") + CLOSING + after


def committed_rows() -> list[Row]:
    """Rows of the checkout's own result files."""
    return [row for name in ("cpu.csv", "cuda.csv") for row in read(ROOT / "bench" / "results" / name)]


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(), committed_rows()))
    print(f"{path}: performance section written")


if __name__ == "__main__":
    main()

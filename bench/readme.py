"""The README's performance section, written from the committed rows and from nothing else.

``python -m fastattn.bench.readme`` rewrites the part between the markers; a test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

import fastattn
from fastattn.bench.report import case_key, seconds, size
from fastattn.bench.results import Row, read

OPENING = "<!-- performance: written by `python -m fastattn.bench.readme`, do not edit -->"
CLOSING = "<!-- /performance -->"
ROOT = Path(fastattn.__file__).resolve().parents[1]
DIRECTIONS = {"forward": "inference", "both": "training"}
# what a reader compares first: the longest length of each sweep, and every feature
SUITES = ("attention", "sweep", "mask", "bias", "positional", "additive", "module", "overhead")


def section(rows: list[Row]) -> str:
    """Markdown: one table per device, of the newest run of each case there."""
    devices = list(dict.fromkeys((row.device, row.isa) for row in rows))
    if not devices:
        return ""
    parts = [
        "## Performance",
        "",
        "Medians of interleaved runs. The baseline is SDPA, `nn.MultiheadAttention` for modules and the naive formula",
        "for additive attention; the ratio is its time over fastattn's: above 1, fastattn is faster. Training is",
        "forward and backward. Every variant passed the float64 gate first. All rows, with quantiles and the other",
        "peers, are in `bench/results/`.",
    ]
    for device, isa in devices:
        mine = [row for row in rows if (row.device, row.isa) == (device, isa)]
        newest = mine[-1]
        # the newest run of each case: suites are measured when what they measure has changed
        latest = {(row.suite, row.case, row.dtype): row.commit for row in mine}
        mine = [row for row in mine if row.commit == latest[row.suite, row.case, row.dtype]]
        commits = ", ".join(dict.fromkeys(latest.values()))
        threads = max(row.threads for row in mine)
        versions = f"torch {newest.torch}, fastattn {newest.fastattn} ({commits})"
        parts += [
            "",
            f"**{device}**, {isa}, {threads} threads, {versions}:",
            "",
            "| case | size | dtype | | fastattn | ratio | memory | baseline | memory | naive formula |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *lines(mine),
        ]
    return "\n".join(parts)


def lines(rows: list[Row]) -> list[str]:
    """A table line per case and direction that fastattn ran."""
    found = []
    for suite in SUITES:
        members = [row for row in rows if row.suite == suite]
        longest: dict[tuple[str, str], int] = {}
        for row in members:
            longest[row.case, row.dtype] = max(longest.get((row.case, row.dtype), 0), row.key_length)
        for row in members:
            ours = row.variant in ("fastattn", "fastattn-mha") and row.status == "ok" and row.direction in DIRECTIONS
            if not ours or row.key_length != longest[row.case, row.dtype]:
                continue
            same = {
                other.variant: other
                for other in members
                if case_key(other) == case_key(row) and (other.direction, other.dtype) == (row.direction, row.dtype)
            }
            baseline = same.get(row.baseline or "sdpa")
            cells = [
                f"{suite}: {row.case}" if suite in ("module", "overhead") else row.case,
                size(row),
                row.dtype,
                DIRECTIONS[row.direction],
                seconds(row.median_s or 0.0),
                f"{row.ratio:.2f}" if row.ratio else "",
                _memory(row),
                _time(baseline),
                _memory(baseline),
                _time(same.get("naive")),
            ]
            found.append("| " + " | ".join(cells) + " |")
    return found


def _memory(row: Row | None) -> str:
    return "" if row is None or row.peak_gb is None else f"{row.peak_gb * 1e3:.1f} MB"


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return seconds(row.median_s) if row.status == "ok" and row.median_s is not None else row.status


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

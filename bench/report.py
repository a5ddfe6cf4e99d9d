"""Rows as tables for a terminal: one line per case, one column per variant."""

from __future__ import annotations

from collections.abc import Iterable

from fastattn.bench.results import Row
from fastattn.cli.console import Console, escape

Group = tuple[str, str, str]  # suite, direction, dtype


def seconds(value: float) -> str:
    """1.23 s, 4.56 ms or 7.8 us."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def size(row: Row) -> str:
    """Sizes of a case: what a reader needs to tell two lines apart."""
    length = f"{row.query_length}" if row.query_length == row.key_length else f"{row.query_length}/{row.key_length}"
    heads = f"{row.heads}" if row.heads == row.kv_heads else f"{row.heads}/{row.kv_heads}"
    width = f" D{row.head_dim}" if row.head_dim else ""
    return f"B{row.batch} H{heads} S{length}{width}"


def case_key(row: Row) -> tuple[object, ...]:
    return (row.case, row.batch, row.heads, row.kv_heads, row.query_length, row.key_length, row.head_dim, row.value_dim)


def groups(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """Rows by table: suite, direction, dtype, in order of appearance."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row.suite, row.direction, row.dtype), []).append(row)
    return found


def cell(row: Row | None) -> str:
    """Time, ratio to the baseline and peak memory, or why there are none."""
    if row is None:
        return ""
    if row.status == "ok" and row.median_s is None:
        return "" if row.peak_gb is None else f"{row.peak_gb * 1e3:.0f} MB"
    if row.status != "ok" or row.median_s is None:
        return f"[dim]{row.status}[/dim]" if row.status == "cannot" else f"[bold red]{row.status}[/bold red]"
    text = seconds(row.median_s)
    if row.ratio is not None and row.variant != row.baseline:
        colour = "green" if row.ratio >= 1 else "yellow" if row.ratio >= 0.7 else "red"
        text += f"\n[{colour}]{row.ratio:.2f}x[/{colour}]"
    else:
        text += "\n"
    if row.fraction is not None:
        text += f" {row.fraction:.0%} {row.ceiling}"
    elif row.gb_per_s is not None:
        text += f" {row.gb_per_s:.1f} GB/s"
    if row.peak_gb is not None:
        text += f" {row.peak_gb * 1e3:.0f} MB"
    return text


def print_ceilings(rows: list[Row], console: Console) -> None:
    """What the machine itself did in this run."""
    found = [row for row in rows if row.suite == "ceilings" and row.status == "ok"]
    if found:
        console.print("\nceilings: " + ", ".join(f"{row.case} {_rate(row)}" for row in found))


def _rate(row: Row) -> str:
    return f"{row.dtype} {row.tflops * 1e3:.0f} GFLOP/s" if row.tflops else f"{row.gb_per_s or 0.0:.1f} GB/s"


def print_report(rows: list[Row], console: Console) -> None:
    """Every table, then the reasons of everything that could not run or was wrong."""
    print_ceilings(rows, console)
    for (suite, direction, dtype), members in groups(row for row in rows if row.suite != "ceilings").items():
        variants = list(dict.fromkeys(row.variant for row in members))
        # a peer that could do nothing at all has its line in the list below, and no empty column here
        shown = [v for v in variants if any(r.variant == v and r.status in ("ok", "wrong") for r in members)]
        if not shown:
            continue
        lines: dict[tuple[object, ...], dict[str, Row]] = {}
        for row in members:
            lines.setdefault(case_key(row), {})[row.variant] = row
        table = [
            [next(iter(found.values())).case, size(next(iter(found.values()))), *(cell(found.get(v)) for v in shown)]
            for found in lines.values()
        ]
        title = f"{suite}, {direction}, {dtype}  (median, ratio to the baseline's time, share of a ceiling, memory)"
        console.print()
        console.table(["case", "size", *shown], table, title=title, left=2)
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            notes.setdefault(f"{row.variant} {row.status}: {row.note}", []).append(f"{row.case} {row.direction}")
    if notes:
        console.heading("Could not, and why")
        for note, where in notes.items():
            names = list(dict.fromkeys(where))
            listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            console.print(f"  {escape(note)}\n    [dim]{escape(listed)}[/dim]")

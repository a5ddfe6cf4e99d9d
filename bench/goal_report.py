"""Goals as a table for a terminal: what was asked, what was measured, whether it holds."""

from __future__ import annotations

from fastattn.bench.goals import Outcome, summarize
from fastattn.cli.console import Console, escape


def print_goals(outcomes: list[Outcome], console: Console) -> None:
    """Every goal with its worst and best case; then each case that misses, with the reason where there is one."""
    if not outcomes:
        return
    lines = []
    for one in summarize(outcomes):
        colour = "green" if one.holds else "red" if one.measured else "yellow"
        verdict = "met" if one.holds else f"{one.met} of {one.measured + one.unmeasured}"
        worst = f"{one.worst.text}  ({case_of(one.worst)})" if one.worst else "not measured"
        best = one.best.text if one.best else ""
        lines.append([escape(one.claim), one.threshold, escape(worst), best, f"[{colour}]{verdict}[/{colour}]"])
    console.print()
    console.table(["goal", "", "worst", "best", "met"], lines, title="goals", left=3)
    missed = [one for one in outcomes if one.met != "yes"]
    if missed:
        console.heading("Goals missed, case by case")
        for one in missed:
            note = f" [dim]{escape(one.note)}[/dim]" if one.note else ""
            measured = one.text or "not measured"
            if one.needed is not None:
                note = f", which takes {one.needed:.0%} of what the machine can do ({one.ceiling}){note}"
            console.print(f"  {escape(one.claim)}, {case_of(one)}: {measured} instead of {one.threshold}{note}")


def case_of(one: Outcome) -> str:
    """The case of an outcome in a few words."""
    return f"{one.case} {one.size} {one.dtype}"

"""``python -m fastattn bench``: who is how fast, in tables, in CSV rows and on a page."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastattn
from fastattn.cli.console import Console, escape

if TYPE_CHECKING:
    from fastattn.bench.measure import Options
    from fastattn.bench.results import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--suite", action="append", help="a suite or group, may be repeated (default: cpu or gpu)")
    parser.add_argument("--quick", action="store_true", help="small shapes, short samples: a smoke test, not a result")
    parser.add_argument("--out", type=Path, help="folder of the rows and the report (default: bench/results)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--peers", help="comma-separated: only these of each suite's peers")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing per case and kind of sample")
    parser.add_argument("--deadline", type=float, help="seconds after which no further case begins")
    parser.add_argument("--redraw", type=Path, metavar="CSV", help="measure nothing: tables and report of these rows")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="CSV", help="measure nothing: what changed from A to B"
    )
    parser.add_argument("--against", metavar="GITREF", help="measure this checkout and that commit in turns")
    parser.add_argument("--threshold", type=float, default=0.1, help="slowdown that fails --compare and --against")
    parser.add_argument("--no-report", action="store_true", help="rows and tables only, no HTML page")
    parser.add_argument("--list", action="store_true", help="print suites, peers and cases, and run nothing")


def default_folder() -> Path:
    """bench/results of the checkout, or a folder here when the package is not run from one."""
    inside = Path(fastattn.__file__).resolve().parents[1] / "bench"
    return inside / "results" if (inside / "runner.py").exists() else Path("fastattn-bench")


def main(options: argparse.Namespace) -> int:
    from fastattn.bench import compare, goal_report, goals, measure, report, results, runner
    from fastattn.bench.peers import PEERS
    from fastattn.bench.suites import GROUPS, SUITES, resolve

    console = Console()
    if options.redraw is not None:
        rows = results.read(options.redraw)
        report.print_report(rows, console)
        goal_report.print_goals(goals.evaluate(rows), console)
        if not options.no_report:
            write_page(rows, options.out or options.redraw.parent, console)
        return 0 if rows else 2
    if options.compare is not None:
        missing = [path for path in options.compare if not path.exists()]
        if missing:
            console.print(f"[red]error:[/red] {missing[0]} does not exist")
            return 2
        before, after = (results.read(path) for path in options.compare)
        return compare.print_changes(compare.changes(before, after), options.threshold, console)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        names = resolve(options.suite or ["gpu" if device == "cuda" else "cpu"])
        peers = options.peers.split(",") if options.peers else None
        unknown = [peer for peer in peers or [] if peer not in PEERS]
        if unknown:
            raise ValueError(f"unknown peer {unknown[0]!r}; choose from {', '.join(PEERS)}")
    except ValueError as error:
        console.print(f"[red]error:[/red] {error}")
        return 2
    if options.list:
        for name in names:
            suite = SUITES[name](device, options.quick)
            console.heading(f"{name}: {suite.title}")
            console.print("  peers: " + ", ".join(suite.peers))
            for case in suite.cases:
                console.print(f"  {case.name:<16} {str(case.dtype).removeprefix('torch.'):<9} {case.shape}")
        console.print("\ngroups: " + "; ".join(f"{name} = {', '.join(members)}" for name, members in GROUPS.items()))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    where = results.environment(device)
    console.print(
        f"fastattn {where.fastattn} ({where.commit or 'no commit'}), torch {where.torch}, {where.device}, "
        f"{where.isa or 'no native kernels'}, {where.threads} threads"
    )
    folder = options.out or default_folder()
    chosen = measure.Options(
        suites=names,
        device=device,
        quick=options.quick,
        peers=peers,
        budget=options.budget,
        deadline=options.deadline,
    )
    if options.against is not None:
        return against(options.against, chosen, folder / "against.csv", options.threshold, console)
    # quick rows are no measurements: they never mix with those that are
    path = folder / ("quick.csv" if options.quick else f"{device}.csv")
    with console.progress() as step:
        rows = runner.run(replace(chosen, progress=step, sink=lambda found: results.write(path, found)))
    report.print_report(rows, console)
    outcomes = goals.evaluate(rows)
    if outcomes:
        judged = folder / ("quick-goals.csv" if options.quick else "goals.csv")
        goals.write_outcomes(judged, outcomes)
        goal_report.print_goals(outcomes, console)
        console.print(f"\n{len(outcomes)} outcomes in {judged}")
    console.print(f"\n{len(rows)} rows in {path}")
    if not options.no_report:
        write_page(rows if options.quick else None, folder, console)
    wrong = [row for row in rows if row.status == "wrong" and row.variant.startswith("fastattn")]
    if wrong:
        console.print(f"[bold red]{len(wrong)} of fastattn's own results are wrong[/bold red]")
    return 1 if wrong else 0


def against(ref: str, chosen: Options, path: Path, threshold: float, console: Console) -> int:
    """Both versions in turns, their rows, and what changed; the exit code."""
    from fastattn.bench import against, compare, results

    try:
        with console.progress() as step:
            before, after = against.run(ref, chosen, step)
    except against.AgainstError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2
    results.write(path, [*before, *after])
    code = compare.print_changes(compare.changes(before, after), threshold, console)
    wrong = [row for row in after if row.status == "wrong" and row.variant.startswith("fastattn")]
    if wrong:
        console.print(f"[bold red]{len(wrong)} of fastattn's own results are wrong[/bold red]")
    console.print(f"{len(before) + len(after)} rows in {path}")
    return 1 if wrong else code


def write_page(rows: list[Row] | None, folder: Path, console: Console) -> None:
    """The report of the folder's files, or of other rows; or the command that would make it possible."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("[yellow]no report:[/yellow] " + escape("pip install 'fastattn[bench]'"))
        return
    from fastattn.bench import page

    console.print(f"report: {page.write(folder, rows=rows)}")

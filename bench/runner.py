"""The loop over suites and cases: ceilings first, then every case, its rows handed on as they come."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from fastattn.bench.breakdown import breakdown_rows
from fastattn.bench.ceilings import measure
from fastattn.bench.launches import VARIANTS as LAUNCH_VARIANTS
from fastattn.bench.launches import launch_rows
from fastattn.bench.measure import Options, free, run_case
from fastattn.bench.results import Row, environment, make_row
from fastattn.bench.roofline import Roof, ceiling_rows, roof
from fastattn.bench.suites import SUITES


def run(options: Options) -> list[Row]:
    """All rows of the chosen suites; `options.sink` has them as they come, so that a run that is cut short is kept."""
    began = time.monotonic()
    suites = [SUITES[name](options.device, options.quick) for name in options.suites]
    total = sum(len(suite.cases) for suite in suites)
    rows: list[Row] = []
    done = 0
    threads = torch.get_num_threads()
    top: Roof | None = None
    begun = environment(options.device)  # once: what is checked out may change while it runs, what is loaded does not
    if options.ceilings:
        options.progress("ceilings", 0, total)
        small = {"seconds": 0.1, "size": 512} if options.quick else {}
        found = measure(options.device, **small)
        top = roof(found, options.device, threads)
        rows = ceiling_rows(begun, found, options.device)
        options.sink(rows)
        free(options.device)
    for suite in suites:
        # where the call itself is measured, waking other threads up is none of its cost
        torch.set_num_threads(1 if suite.per_call else threads)
        where = replace(begun, threads=torch.get_num_threads())
        for case in suite.cases:
            shape = case.shape
            options.progress(f"{suite.name}: {case.name}, {shape.batch}x{shape.query_length}", done, total)
            done += 1
            if options.deadline is not None and time.monotonic() - began > options.deadline:
                found = [make_row(where, case, "fastattn", "both", status="skipped", note="past the deadline")]
            else:
                found = run_case(suite, case, options, where, top)
                if suite.name == "overhead" and (options.peers is None or set(LAUNCH_VARIANTS) & set(options.peers)):
                    found += launch_rows(where, case, options.device, options.budget)
                if suite.per_call and options.device == "cpu":
                    found += breakdown_rows(where, case, options.budget)
            options.sink(found)
            rows += found
    torch.set_num_threads(threads)
    options.progress("done", total, total)
    return rows

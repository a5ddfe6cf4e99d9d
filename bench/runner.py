"""The loop: for every case the gate, the interleaved clock, the memory, and its rows."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import fastattn
from fastattn.bench.additive import ADDITIVE_SCENARIOS, make_additive_inputs
from fastattn.bench.gate import WrongResultError, expect, gate
from fastattn.bench.launches import VARIANTS as LAUNCH_VARIANTS
from fastattn.bench.launches import launch_rows
from fastattn.bench.memory import peak_bytes
from fastattn.bench.modules import make_module_inputs
from fastattn.bench.peers import AnyInputs, CannotError, Prepared, prepare
from fastattn.bench.results import Environment, Row, environment, make_row
from fastattn.bench.rows import ROW_SCENARIOS, RowInputs, make_row_inputs, moved_bytes
from fastattn.bench.scenarios import FLOP_FACTOR, SCENARIOS, Case, Inputs, forward_flops, make_inputs
from fastattn.bench.suites import MODULE_SCENARIOS, SUITES, Suite
from fastattn.bench.timing import Clock, Spread, forward_sample, interleave, make_clock, training_sample

TRAINING = ("backward", "both")
OVERHEAD_CALLS = 100  # calls per sample where one call takes microseconds


@dataclass
class Options:
    """What to run and for how long."""

    suites: list[str]
    device: str = "cpu"
    quick: bool = False
    peers: list[str] | None = None  # None: those of the suite
    budget: float = 1.0  # seconds of timing per case and kind of sample
    deadline: float | None = None  # seconds after the start at which no new case begins
    progress: Callable[[str, int, int], None] = field(default=lambda text, done, total: None)
    sink: Callable[[list[Row]], None] = field(default=lambda rows: None)  # given the rows of each case when it is done


def make_case_inputs(case: Case, device: str) -> AnyInputs:
    if case.scenario in ROW_SCENARIOS:
        return make_row_inputs(case, device)
    if case.scenario in ADDITIVE_SCENARIOS:
        return make_additive_inputs(case, device)
    if case.scenario in MODULE_SCENARIOS:
        return make_module_inputs(case, device)
    return make_inputs(case, device)


def reason(error: BaseException, warned: list[warnings.WarningMessage] | None = None) -> str:
    """One line: the peer's own words, with the warnings in which SDPA hides its reasons."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[0] if lines else ""
    if not isinstance(error, (CannotError, WrongResultError)):
        words = f"{type(error).__name__}: {words}"
    hints = [str(w.message).split(" (Triggered")[0] for w in warned or [] if "ernel" in str(w.message)]
    return " | ".join([words, *dict.fromkeys(hints)])[:400]


def run(options: Options) -> list[Row]:
    """All rows of the chosen suites; `options.sink` has them as they come, so that a run that is cut short is kept."""
    began = time.monotonic()
    suites = [SUITES[name](options.device, options.quick) for name in options.suites]
    total = sum(len(suite.cases) for suite in suites)
    rows: list[Row] = []
    done = 0
    threads = torch.get_num_threads()
    for suite in suites:
        # where the call itself is measured, waking other threads up is none of its cost
        torch.set_num_threads(1 if suite.per_call else threads)
        where = environment(options.device)
        for case in suite.cases:
            shape = case.shape
            options.progress(f"{suite.name}: {case.name}, {shape.batch}x{shape.query_length}", done, total)
            done += 1
            if options.deadline is not None and time.monotonic() - began > options.deadline:
                found = [make_row(where, case, "fastattn", "both", status="skipped", note="past the deadline")]
            else:
                found = run_case(suite, case, options, where)
                if suite.per_call and (options.peers is None or set(LAUNCH_VARIANTS) & set(options.peers)):
                    found += launch_rows(where, case, options.device, options.budget)
            options.sink(found)
            rows += found
    torch.set_num_threads(threads)
    options.progress("done", total, total)
    return rows


def run_case(suite: Suite, case: Case, options: Options, where: Environment) -> list[Row]:
    """Rows of one case: every peer that passes the gate, and the reasons of those that do not."""
    peers = [peer for peer in options.peers or suite.peers if options.peers is None or peer in suite.peers]
    inputs = make_case_inputs(case, options.device)
    torch.compiler.reset()  # every case compiles anew, instead of running into the limit on recompilations
    training = "both" in case.directions
    ready: dict[str, dict[str, Prepared]] = {"forward": {}, "both": {}}
    errors: dict[str, float] = {}
    kernels: dict[str, str] = {}
    rows: list[Row] = []
    kv_head = case.shape.kv_heads - 1 if isinstance(inputs, Inputs) else None
    expected = expect(inputs, gradients=training, kv_head=kv_head)
    for peer in peers:
        for direction in ("forward", "both") if training else ("forward",):
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    prepared = ready["forward"].get(peer) or prepare(peer, inputs)
                    gradients = direction == "both"
                    error = gate(peer, inputs, prepared, expected, gradients=gradients)
            except WrongResultError as failure:
                rows.append(make_row(where, case, peer, direction, status="wrong", note=reason(failure)))
            except Exception as failure:  # a peer may refuse with anything: its words are the result
                rows.append(make_row(where, case, peer, direction, status="cannot", note=reason(failure, warned)))
                del failure  # it holds the frames, and with them the tensors, of what failed
                _free(options.device)
            else:
                ready[direction][peer] = prepared
                errors[peer] = max(error, errors.get(peer, 0.0))
                if peer.startswith("fastattn"):
                    call = fastattn.last_call()
                    kernels[peer] = f"{call.backend}:{call.kernel}" if call else ""
    del expected
    _free(options.device)
    clock = make_clock(options.device)
    for direction, variants in ready.items():
        if not variants:
            continue
        try:
            rows += _measure(suite, case, inputs, direction, variants, clock, options, where, errors, kernels)
        except torch.OutOfMemoryError as failure:  # each fits alone, as the gate has shown, but not beside the others
            rows += [make_row(where, case, v, direction, status="cannot", note=reason(failure)) for v in variants]
    _free(options.device)
    return rows


def _measure(
    suite: Suite,
    case: Case,
    inputs: AnyInputs,
    direction: str,
    variants: dict[str, Prepared],
    clock: Clock,
    options: Options,
    where: Environment,
    errors: dict[str, float],
    kernels: dict[str, str],
) -> list[Row]:
    make_sample = forward_sample if direction == "forward" else training_sample
    calls = OVERHEAD_CALLS if suite.per_call else 1
    budget = options.budget / 4 if options.quick else options.budget
    seconds = interleave({peer: make_sample(p, clock, calls) for peer, p in variants.items()}, budget=budget)
    peaks = {peer: _peak(p, direction, options.device) for peer, p in variants.items()} if not suite.per_call else {}
    flops = forward_flops(inputs) if isinstance(inputs, Inputs) and not suite.per_call else None
    spreads = {peer: {d: Spread.of(s) for d, s in found.items()} for peer, found in seconds.items()}
    rows = []
    for peer, found in spreads.items():
        for measured, spread in found.items():
            base = spreads.get(suite.baseline, {}).get(measured)
            moved = moved_bytes(inputs, measured) if isinstance(inputs, RowInputs) else None
            peak = None if measured == "backward" else peaks.get(peer)
            rows.append(
                make_row(
                    where,
                    case,
                    peer,
                    measured,
                    status="ok",
                    median_s=spread.median,
                    p20_s=spread.p20,
                    p80_s=spread.p80,
                    samples=spread.samples,
                    ratio=base.median / spread.median if base else None,
                    baseline=suite.baseline if base else "",
                    tflops=flops * FLOP_FACTOR[measured] / spread.median / 1e12 if flops else None,
                    gb_per_s=moved / spread.median / 1e9 if moved else None,
                    peak_gb=None if peak is None else peak / 1e9,
                    error=errors[peer],
                    kernel=kernels.get(peer, ""),
                )
            )
    return rows


def _peak(prepared: Prepared, direction: str, device: str) -> int:
    def infer() -> None:
        with torch.no_grad():
            prepared.forward()

    return peak_bytes(infer if direction == "forward" else prepared.step, device)


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def features_of(case: Case) -> str:
    """The scenario's title, for tables."""
    return SCENARIOS[case.scenario].title if case.scenario in SCENARIOS else case.scenario

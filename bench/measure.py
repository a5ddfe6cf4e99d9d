"""One case: its inputs, the gate that every peer has to pass, the interleaved clock, the memory, and its rows."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import fastattn
from fastattn.bench.additive import ADDITIVE_SCENARIOS, make_additive_inputs
from fastattn.bench.gate import WrongResultError, expect, gate
from fastattn.bench.memory import peak_bytes
from fastattn.bench.models import ModelInputs, make_model_inputs, model_flops
from fastattn.bench.modules import MODULE_SCENARIOS, ModuleInputs, make_module_inputs, module_flops
from fastattn.bench.peers import PEERS, AnyInputs, CannotError, Prepared, prepare
from fastattn.bench.results import Environment, Row, make_row
from fastattn.bench.roofline import Roof
from fastattn.bench.rows import ROW_SCENARIOS, RowInputs, make_row_inputs, moved_bytes
from fastattn.bench.scenarios import (
    FLOP_FACTOR,
    SCENARIOS,
    Case,
    Inputs,
    attention_bytes,
    forward_flops,
    make_inputs,
)
from fastattn.bench.suite import Suite
from fastattn.bench.timing import HOST, Spread, forward_sample, interleave, make_clock, training_sample

OVERHEAD_CALLS = 100  # calls per sample where one call takes microseconds


@dataclass
class Options:
    """What to run and for how long."""

    suites: list[str]
    device: str = "cpu"
    quick: bool = False
    peers: list[str] | None = None  # None: those of the suite
    budget: float = 1.0  # seconds of timing per case and kind of sample
    ceilings: bool = True  # measure the machine's own product, copy, read and multiply-adds first
    deadline: float | None = None  # seconds after the start at which no new case begins
    progress: Callable[[str, int, int], None] = field(default=lambda text, done, total: None)
    sink: Callable[[list[Row]], None] = field(default=lambda rows: None)  # given the rows of each case when it is done


def make_case_inputs(case: Case, device: str) -> AnyInputs:
    if case.scenario in ROW_SCENARIOS:
        return make_row_inputs(case, device)
    if case.scenario in ADDITIVE_SCENARIOS:
        return make_additive_inputs(case, device)
    if case.suite == "huggingface":
        return make_model_inputs(case, device)
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


def inputs_of(peer: str, inputs: AnyInputs) -> AnyInputs:
    """What the peer is given: the case's inputs, or the same queries, keys and values without the case's feature."""
    if not isinstance(inputs, Inputs) or not PEERS[peer].without:
        return inputs
    case = replace(inputs.case, scenario=SCENARIOS[inputs.case.scenario].without)
    extras = {"_device": inputs.extras["_device"]}  # what is left, plain or causal, has no tensors of its own
    return replace(inputs, case=case, extras=extras)


@dataclass
class _Gate:
    """What has passed so far."""

    ready: dict[str, dict[str, Prepared]] = field(default_factory=lambda: {"forward": {}, "both": {}})
    errors: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    refused: list[Row] = field(default_factory=list)


def _pass_gate(
    suite: Suite, case: Case, inputs: AnyInputs, options: Options, where: Environment, checked: Case | None = None
) -> _Gate:
    """Prepare every peer and hold it against the formula.  `checked` is the case that rows are about, if another."""
    gated, about = _Gate(), checked or case
    peers = [peer for peer in options.peers or suite.peers if options.peers is None or peer in suite.peers]
    training = "both" in case.directions
    kv_head = case.shape.kv_heads - 1 if isinstance(inputs, Inputs) else None
    expected = {False: expect(inputs, gradients=training, kv_head=kv_head)}
    directions = tuple(d for d in ("forward", "both") if d == "forward" or training)
    for peer in peers:
        given, without = inputs_of(peer, inputs), PEERS[peer].without
        if without not in expected:
            expected[without] = expect(given, gradients=training, kv_head=kv_head)
        for direction in directions:
            try:
                with warnings.catch_warnings(record=True) as warned:
                    warnings.simplefilter("always")
                    prepared = gated.ready["forward"].get(peer) or prepare(peer, given)
                    error = gate(peer, given, prepared, expected[without], gradients=direction == "both")
            except WrongResultError as failure:
                gated.refused.append(make_row(where, about, peer, direction, status="wrong", note=reason(failure)))
            except Exception as failure:  # a peer may refuse with anything: its words are the result
                note = reason(failure, warned)
                gated.refused.append(make_row(where, about, peer, direction, status="cannot", note=note))
                del failure  # it holds the frames, and with them the tensors, of what failed
                free(options.device)
            else:
                gated.ready[direction][peer] = prepared
                gated.errors[peer] = max(error, gated.errors.get(peer, 0.0))
                if peer.startswith("fastattn"):
                    call = fastattn.last_call()
                    gated.kernels[peer] = f"{call.backend}:{call.kernel}" if call else ""
    return gated


@dataclass
class ReadyCase:
    """A case whose variants have passed the gate; may be measured several times."""

    suite: Suite
    case: Case
    inputs: AnyInputs
    gated: _Gate


def ready_case(suite: Suite, case: Case, options: Options, where: Environment) -> ReadyCase:
    """Inputs drawn, every peer prepared and held against the formula."""
    inputs = make_case_inputs(case, options.device)
    torch.compiler.reset()  # every case compiles anew, instead of running into the limit on recompilations
    gated = _pass_gate(suite, case, inputs, options, where)
    free(options.device)
    return ReadyCase(suite, case, inputs, gated)


def measure_case(ready: ReadyCase, options: Options, where: Environment, top: Roof | None = None) -> list[Row]:
    """Rows of every variant that passed, timed in turns."""
    rows = []
    for direction, variants in ready.gated.ready.items():
        if not variants or direction not in ready.case.directions:
            continue
        try:
            rows += _measure(ready, direction, variants, options, where, top)
        except torch.OutOfMemoryError as failure:  # each fits alone, as the gate has shown, but not beside the others
            note = reason(failure)
            rows += [make_row(where, ready.case, v, direction, status="cannot", note=note) for v in variants]
    free(options.device)
    return rows


def run_case(suite: Suite, case: Case, options: Options, where: Environment, top: Roof | None = None) -> list[Row]:
    """Rows of one case: every peer that passes the gate, and the reasons of those that do not."""
    if suite.only_memory:
        return _weigh_case(suite, case, options, where)
    ready = ready_case(suite, case, options, where)
    return ready.gated.refused + measure_case(ready, options, where, top)


GATE_LENGTH = 512  # of cases that are too long for the formula


def _weigh_case(suite: Suite, case: Case, options: Options, where: Environment) -> list[Row]:
    """Peak memory of one step of each peer, where the formula and a second step would take too long or too much.

    The gate is passed at a length of 512, which also starts every thread before it is counted.
    """
    length = min(GATE_LENGTH, case.shape.query_length)
    small = replace(case, shape=replace(case.shape, query_length=length, key_length=length))
    gated = _pass_gate(suite, small, make_case_inputs(small, options.device), options, where, checked=case)
    rows, peaks = gated.refused, {}
    inputs = make_case_inputs(case, options.device)
    note = f"gate passed at {length}"
    for direction, variants in gated.ready.items():
        if direction not in case.directions:
            continue
        for peer in variants:
            prepared = prepare(peer, inputs_of(peer, inputs))
            free(options.device)
            try:
                peaks[peer] = _peak(prepared, direction, options.device)
            except (RuntimeError, MemoryError) as failure:
                rows.append(make_row(where, case, peer, direction, status="cannot", note=reason(failure)))
        for peer, peak in peaks.items():
            rows.append(
                make_row(
                    where, case, peer, direction, status="ok", baseline=suite.baseline, peak_gb=peak / 1e9,
                    error=gated.errors[peer], kernel=gated.kernels.get(peer, ""), note=note,
                )
            )  # fmt: skip
    return rows


def work(inputs: AnyInputs, direction: str) -> tuple[float | None, float | None]:
    """FLOPs and bytes of a case by the field's formulas, None where it has none: see `forward_flops`,
    `attention_bytes`, `module_flops`, `model_flops` and `moved_bytes`."""
    if isinstance(inputs, Inputs):
        return forward_flops(inputs) * FLOP_FACTOR[direction], attention_bytes(inputs, direction)
    if isinstance(inputs, ModelInputs):
        return model_flops(inputs, direction), None
    if isinstance(inputs, ModuleInputs):
        return module_flops(inputs, direction), None
    if isinstance(inputs, RowInputs):
        return None, moved_bytes(inputs, direction)
    return None, None


def _measure(
    ready: ReadyCase,
    direction: str,
    variants: dict[str, Prepared],
    options: Options,
    where: Environment,
    top: Roof | None,
) -> list[Row]:
    suite, case, inputs, gated = ready.suite, ready.case, ready.inputs, ready.gated
    clock = make_clock(options.device)
    make_sample = forward_sample if direction == "forward" else training_sample
    calls = OVERHEAD_CALLS if suite.per_call else 1
    budget = options.budget / 4 if options.quick else options.budget
    samples = {peer: make_sample(p, clock, calls) for peer, p in variants.items()}
    seconds = interleave(samples, budget=budget, warm=True)
    weighed = suite.memory and not suite.per_call
    peaks = {peer: _peak(p, direction, options.device) for peer, p in variants.items()} if weighed else {}
    spreads = {peer: {d: Spread.of(s) for d, s in found.items()} for peer, found in seconds.items()}
    rows = []
    for peer, found in spreads.items():
        given = inputs_of(peer, inputs)
        for measured, spread in found.items():
            if measured.startswith(HOST):
                continue
            host = found.get(HOST + measured)
            base = spreads.get(suite.baseline, {}).get(measured)
            flops, moved = (None, None) if suite.per_call else work(given, measured)
            least, ceiling = (0.0, "")
            if top is not None and (flops or moved):
                least, ceiling = top.seconds(flops or 0.0, moved or 0.0, str(case.dtype).removeprefix("torch."))
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
                    host_s=host.median if host else None,
                    ratio=base.median / spread.median if base else None,
                    baseline=suite.baseline if base else "",
                    tflops=flops / spread.median / 1e12 if flops else None,
                    gb_per_s=moved / spread.median / 1e9 if moved else None,
                    fraction=least / spread.median if ceiling else None,
                    ceiling=ceiling,
                    peak_gb=None if peak is None else peak / 1e9,
                    error=gated.errors[peer],
                    kernel=gated.kernels.get(peer, ""),
                )
            )
    return rows


def _peak(prepared: Prepared, direction: str, device: str) -> int:
    def infer() -> None:
        with torch.no_grad():
            prepared.forward()

    return peak_bytes(infer if direction == "forward" else prepared.step, device)


def free(device: str) -> None:
    """Give back what is held by nobody."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()

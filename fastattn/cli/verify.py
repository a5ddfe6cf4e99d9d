"""``python -m fastattn verify``: every feature, dtype and backend against the float64 formula, on this machine."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

import fastattn
from fastattn.bench.gate import Check, budgets, compare, evaluate, expect, stand_in
from fastattn.bench.peers import Prepared
from fastattn.bench.scenarios import SCENARIOS, Case, Inputs, Shape, make_inputs
from fastattn.cli.console import Console, Step, escape

# odd lengths, more keys than queries, GQA, a value dimension of its own, and a length past one tile
SHAPES = {
    "odd": Shape(batch=2, heads=4, query_length=65, key_length=65, head_dim=40),
    "cross, GQA": Shape(batch=3, heads=6, kv_heads=2, query_length=33, key_length=129, head_dim=64, value_dim=24),
    "long": Shape(batch=1, heads=2, query_length=387, key_length=387, head_dim=64),
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = 1234


@dataclass(frozen=True)
class Verdict:
    """One feature in one dtype on one backend: the worst of its tensors over all shapes."""

    feature: str
    dtype: str
    backend: str
    worst: float  # error over budget
    where: str
    refusal: str = ""  # why the backend does not run it, in its own words

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--backend", help="only this backend")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="only this dtype")
    parser.add_argument("--feature", choices=tuple(SCENARIOS), help="only this feature")
    parser.add_argument("--all", action="store_true", help="list every line, not only the summary per feature")


def verify_case(case: Case, device: str, backend: str) -> list[Check]:
    """Forward and every gradient of one case against the formula.

    Dropout's oracle is the reference backend in float64 with the same seed: the mask is a function of seed and
    position alone, so the two must agree element by element.
    """
    inputs = make_inputs(case, device)
    if SCENARIOS[case.scenario].dropout_p:
        return _verify_dropout(inputs, backend)
    return compare(inputs, expect(inputs, gradients=True), _run(inputs, backend))


def _run(inputs: Inputs, backend: str) -> dict[str, torch.Tensor]:
    scenario = SCENARIOS[inputs.case.scenario]
    query, key, value = inputs.query, inputs.key, inputs.value

    def forward() -> torch.Tensor:
        torch.manual_seed(SEED)
        arguments = scenario.arguments(inputs.case.shape, inputs.extras)
        return scenario.function(query, key, value, backend=backend, **arguments)

    return evaluate(Prepared(forward, inputs.leaves(), inputs.grad_out), gradients=True)


def _verify_dropout(inputs: Inputs, backend: str) -> list[Check]:
    measured, _ = stand_in(inputs.case.dtype)
    exact = _run(_in_dtype(inputs, torch.float64), "reference")
    allowed = budgets(exact, _run(_in_dtype(inputs, measured), "reference"), inputs.case)
    got = _run(inputs, backend)
    return [Check(name, (got[name].double() - v).abs().max().item(), allowed[name]) for name, v in exact.items()]


def _in_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    leaves = (t.detach().to(dtype).requires_grad_() for t in (inputs.query, inputs.key, inputs.value))
    return Inputs(inputs.case, *leaves, inputs.grad_out.to(dtype), inputs.extras)


def verify(device: str, backends: list[str], dtypes: list[str], features: list[str], step: Step) -> list[Verdict]:
    """Verdicts of the whole product; `step(text, done, total)` is told of each."""
    verdicts = []
    total = len(backends) * len(dtypes) * len(features)
    for backend in backends:
        for dtype in dtypes:
            for feature in features:
                step(f"{backend} {dtype} {feature}", len(verdicts), total)
                verdicts.append(_worst(feature, dtype, backend, device))
    return verdicts


def _worst(feature: str, dtype: str, backend: str, device: str) -> Verdict:
    worst, where = 0.0, ""
    for shape_name, shape in SHAPES.items():
        case = Case("verify", feature, shape, DTYPES[dtype])
        try:
            checks = verify_case(case, device, backend)
        except fastattn.UnsupportedError as error:
            return Verdict(feature, dtype, backend, float("nan"), shape_name, str(error))
        for check in checks:
            share = check.error / check.budget if check.budget else (0.0 if check.error == 0 else float("inf"))
            if not (share <= worst or math.isnan(worst)):  # a NaN comes in and stays
                worst, where = share, f"{check.name}, {shape_name}"
    return Verdict(feature, dtype, backend, worst, where)


def main(options: argparse.Namespace) -> int:
    console = Console()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    known = {backend.name: backend for backend in fastattn.backends()}
    if options.backend and options.backend not in known:
        console.print(f"[red]error:[/red] unknown backend {options.backend!r}; choose from {', '.join(known)}")
        return 2
    chosen = [known[options.backend]] if options.backend else list(known.values())
    names = [b.name for b in chosen if b.available and not (device == "cuda" and b.name == "cpu")]
    if not options.backend and len(names) > 1:
        names.remove("reference")  # the formula against the formula: on request, or where there is nothing else
    dtypes = [options.dtype] if options.dtype else list(DTYPES)
    features = [options.feature] if options.feature else list(SCENARIOS)
    for backend in chosen:
        if not backend.available:
            console.print(f"[yellow]{backend.name} is not available[/yellow]: {escape(backend.reason)}")
    with console.progress() as step:
        verdicts = verify(device, names, dtypes, features, step)

    columns = ["feature", "backend", *dtypes]
    rows = []
    for feature in features:
        for name in names:
            found = {v.dtype: v for v in verdicts if v.feature == feature and v.backend == name}
            rows.append([SCENARIOS[feature].title, name, *(_cell(found[dtype]) for dtype in dtypes)])
    console.table(columns, rows, title="worst error over its budget (passes up to 1)", left=2)
    console.print(
        "  forward and every gradient, against the formula in float64; the budget is twice the error of the same\n"
        "  formula in the tested dtype, plus a few roundings of the result"
    )
    ran = [v for v in verdicts if not v.refusal]
    bad = [v for v in ran if not v.passed]
    for v in bad if not options.all else ran:
        colour = "green" if v.passed else "red"
        console.print(f"  [{colour}]{v.backend} {v.dtype} {v.feature}[/{colour}]: {v.worst:.2f} at {v.where}")
    # a backend is not wrong about what it refuses in words; nothing else may be left out
    for refusal in sorted({v.refusal for v in verdicts if v.refusal}):
        console.print(f"  refused: {escape(refusal)}")
    checked = f"{len(ran) - len(bad)} of {len(ran)} passed on {device}"
    console.print(f"[green]{checked}[/green]" if not bad and ran else f"[bold red]{checked}[/bold red]")
    return 0 if ran and not bad else 1


def _cell(verdict: Verdict) -> str:
    if verdict.refusal:
        return "refused"
    return f"[{'green' if verdict.passed else 'bold red'}]{verdict.worst:.2f}[/]"

"""Where the microseconds of a tiny eager call on the CPU go: its arguments, its operator, and what lies between.

    part: objects     masks and biases constructed, as a caller writes them
    part: lower       arguments checked and lowered to a `Problem`, where the call makes one
    part: operator    the operator that runs: torch's dispatcher, unpacking, the kernel, allocating the results
    part: rest        what is left of the whole call: checks where there is no `Problem`, choosing the backend, the
                      autograd boundary, recording what ran

The parts are timed in turns in one process; `rest` is the difference of medians.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.backends.cpu import plain_forward
from fastattn.bench.results import Environment, Row, make_row
from fastattn.bench.scenarios import SCENARIOS, Case, make_inputs
from fastattn.bench.timing import CpuClock, Sample, Spread, interleave
from fastattn.functional import lower

CALLS = 200  # a sample
WHOLE, REST = "fastattn", "part: rest"
PARTS = ("part: objects", "part: lower", "part: operator", REST)


def breakdown_rows(where: Environment, case: Case, budget: float) -> list[Row]:
    """Rows of the parts of one forward call; none where the call is not the CPU backend's."""
    inputs = make_inputs(case, "cpu")
    scenario, shape = SCENARIOS[case.scenario], case.shape
    query, key, value = inputs.query, inputs.key, inputs.value
    with torch.no_grad():
        fastattn.attention(query, key, value, **scenario.arguments(shape, inputs.extras))
        call = fastattn.last_call()
        if call is None or call.backend != "cpu":
            return []
        arguments = scenario.arguments(shape, inputs.extras)
        problem = lower(query, key, value, **arguments)
    operator, flat = torch.ops.fastattn.cpu_forward, problem.arguments()
    if problem.is_plain():
        operator, flat = plain_forward, (problem,)
    parts: dict[str, Callable[[], object]] = {
        WHOLE: lambda: fastattn.attention(query, key, value, **scenario.arguments(shape, inputs.extras)),
        "part: objects": lambda: scenario.arguments(shape, inputs.extras),
        "part: lower": lambda: lower(query, key, value, **arguments),
        "part: operator": lambda: operator(*flat),
    }
    if _makes_no_problem(query, key, value, arguments):
        del parts["part: lower"]
    seconds = interleave({name: _sample(part) for name, part in parts.items()}, budget=budget)
    spreads = {name: Spread.of(found["forward"]) for name, found in seconds.items()}
    whole = spreads.pop(WHOLE)
    rest = whole.median - sum(spread.median for spread in spreads.values())
    spreads[REST] = Spread(rest, rest, rest, whole.samples)
    return [
        make_row(
            where, case, name, "forward", status="ok", median_s=spread.median, p20_s=spread.p20, p80_s=spread.p80,
            samples=spread.samples, note=f"of {whole.median * 1e6:.1f} us",
        )
        for name, spread in spreads.items()
    ]  # fmt: skip


def _makes_no_problem(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether the call goes the shorter way of `attention`."""
    mask = arguments.get("mask")
    if not arguments.keys() <= {"mask"} or not (mask is None or type(mask) is fastattn.Causal):
        return False
    with torch.no_grad():
        return dispatch.run_shortcut(query, key, value, None, None, mask is not None) is not None


def _sample(part: Callable[[], object]) -> Sample:
    clock = CpuClock()

    def sample() -> dict[str, float]:
        with torch.no_grad():
            clock.start()
            for _ in range(CALLS):
                part()
            clock.mark()
        return {"forward": clock.stop()[0] / CALLS}

    return sample

"""What a Triton call costs the host: microseconds until the last kernel is handed to the driver.

Two ways in turns in one process: `triton-launch` as it is, `triton-launch-ordinary` with every launch through Triton's
own JITFunction.run.  On a GPU the driver is the real one; elsewhere it is a stub that launches nothing, so what the
driver itself takes is not in the figure.  The column `kernel` says which.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import torch

from fastattn.bench.results import Environment, Row, make_row
from fastattn.bench.scenarios import SCENARIOS, Case, make_inputs
from fastattn.bench.timing import CpuClock, Sample, Spread, interleave
from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS

VARIANTS = ("triton-launch", "triton-launch-ordinary")
CALLS = 100  # a sample; at most three kernels each, which is less than a stream takes before it makes the host wait


def launch_rows(where: Environment, case: Case, device: str, budget: float) -> list[Row]:
    """Rows of a case of the overhead suite, forward and training step; none where Triton cannot compile."""
    if find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    from fastattn.triton_kernels.stub import stubbed_driver

    stub = device != "cuda"
    rows = []
    with stubbed_driver() if stub else nullcontext():
        for direction, call in _calls(case, device).items():
            call()  # compiled here, so that the first round is like the others
            ways = {VARIANTS[0]: nullcontext, VARIANTS[1]: _ordinary}
            seconds = interleave({n: _sample(call, direction, way, device) for n, way in ways.items()}, budget=budget)
            spreads = {name: Spread.of(found[direction]) for name, found in seconds.items()}
            base = spreads[VARIANTS[1]].median
            for name, spread in spreads.items():
                rows.append(
                    make_row(
                        where, case, name, direction, status="ok", median_s=spread.median, p20_s=spread.p20,
                        p80_s=spread.p80, samples=spread.samples, ratio=base / spread.median, baseline=VARIANTS[1],
                        kernel="triton, stubbed driver" if stub else "triton, real driver",
                        note="host time alone" + (", nothing is launched" if stub else ""),
                    )
                )  # fmt: skip
    return rows


@contextmanager
def _ordinary() -> Iterator[None]:
    from fastattn.triton_kernels import launcher

    with launcher.ordinary():
        yield


def _calls(case: Case, device: str) -> dict[str, Callable[[], object]]:
    from fastattn.triton_kernels.attention import attention_forward
    from fastattn.triton_kernels.attention_gradients import attention_backward

    inputs = make_inputs(case, device)
    with torch.no_grad():
        arguments = SCENARIOS[case.scenario].arguments(case.shape, inputs.extras)
        problem = lower(inputs.query, inputs.key, inputs.value, **arguments)
    wanted = frozenset(name for name in GRADIENT_FIELDS if name in ("query", "key", "value"))

    def step() -> None:
        out, _, statistics = attention_forward(problem)
        attention_backward(problem, inputs.grad_out, None, out, statistics, wanted)

    return {"forward": lambda: attention_forward(problem), "both": step}


def _sample(call: Callable[[], object], direction: str, way: Callable, device: str) -> Sample:
    clock = CpuClock()

    def sample() -> dict[str, float]:
        with torch.no_grad(), way():
            if device == "cuda":
                torch.cuda.synchronize()  # an empty queue: the host never waits for the device
            clock.start()
            for _ in range(CALLS):
                call()
            clock.mark()
        return {direction: clock.stop()[0] / CALLS}

    return sample

"""Goals: what they select, what they make of rows, and that a run of the cpu suite speaks of every one of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastattn.bench import breakdown, cpu_suites, goal_report, measure, readme, results, suites
from fastattn.bench.ceilings import Ceilings
from fastattn.bench.goals import CPU_GOALS, Goal, Outcome, evaluate, read_outcomes, summarize, write_outcomes
from fastattn.bench.peers import PEERS, CannotError, on_threads, prepare
from fastattn.bench.results import Row
from fastattn.bench.roofline import Roof, ceiling_rows, roof
from fastattn.bench.scenario import Case, Shape
from fastattn.bench.scenarios import make_inputs
from fastattn.cli.console import Console

WHERE = results.Environment("2026-01-01", "cpu", "avx2", 2, "2.13", "3.7", "0.1", "abc")


def row(
    variant: str, seconds: float | None = 1.0, *, length: int = 64, direction: str = "forward", **more: object
) -> Row:
    case = Case("suite", "causal", Shape(1, 8, length, length, 64))
    found = results.make_row(WHERE, case, variant, direction, status="ok", median_s=seconds)
    return dataclasses.replace(found, **more)


def test_every_goal_speaks_of_cases_that_the_suites_have() -> None:
    """A goal that selects nothing would never be missed."""
    for goal in CPU_GOALS:
        for name in goal.suites:
            suite = suites.SUITES[name]("cpu", False)
            ours = [peer for peer in suite.peers if peer in ("fastattn", "fastattn-mha")]
            rows = [
                results.make_row(WHERE, case, peer, goal.direction, status="ok")
                for case in suite.cases
                for peer in ours
                if goal.direction in case.directions or (goal.direction == "backward" and "both" in case.directions)
            ]
            assert any(goal.selects(each) for each in rows) or name != goal.suites[0], goal.claim
            assert goal.metric == "fraction" or set(goal.against) & set(suite.peers), goal.claim
        assert (goal.least is None) != (goal.most is None), goal.claim


def test_the_cpu_group_has_the_sizes_that_its_goals_speak_of() -> None:
    cases = [case for build in cpu_suites.CPU_SUITES.values() for case in build("cpu", False).cases]
    dense = [case.shape for case in cases if case.suite == "cpu-dense"]
    assert {shape.head_dim for shape in dense} == {64, 128}
    assert {512, 8192} <= {shape.query_length for shape in dense}
    assert all(shape.batch * shape.heads >= 8 for shape in dense)
    decode = [case.shape for case in cases if case.suite == "cpu-decode"]
    assert {shape.key_length for shape in decode} == {512, 2048, 8192, 32768}
    assert all(shape.query_length == 1 and shape.heads == 4 * shape.kv_heads for shape in decode)
    assert min(shape.batch * shape.kv_heads for shape in decode) == 1, "nothing has to be split over its keys"


@pytest.mark.parametrize(
    ("goal", "rows", "expected"),
    [
        # the fastest of those named
        (Goal("", "speedup", 1.5), [row("fastattn", 2.0), row("sdpa", 4.0), row("sdpa-math", 3.0)], [(1.5, "yes")]),
        (Goal("", "speedup", 1.6), [row("fastattn", 2.0), row("sdpa", 4.0), row("sdpa-math", 3.0)], [(1.5, "no")]),
        (Goal("", "share", most=0.5, against=("fastattn-without",)),
         [row("fastattn", 1.0), row("fastattn-without", 2.0)], [(0.5, "yes")]),
        (Goal("", "time per visible pair", most=1.25, against=("fastattn-without",)),
         [row("fastattn", tflops=0.1), row("fastattn-without", tflops=0.13)], [(1.3, "no")]),
        (Goal("", "extra time", most=10.0, against=("sdpa",)),
         [row("fastattn", 18e-6), row("sdpa", 8e-6 + 1e-9)], [(9.999, "yes")]),
        (Goal("", "fraction", 0.88, against=("fma",)), [row("fastattn", fraction=0.9, ceiling="fma")], [(0.9, "yes")]),
        # another ceiling is the lower one: no statement
        (Goal("", "fraction", 0.88, against=("fma",)), [row("fastattn", fraction=0.9, ceiling="read")], []),
        (Goal("", "memory", most=0.01, against=("sdpa",)),
         [row("fastattn", None, peak_gb=0.02), row("sdpa", None, peak_gb=4.0)], [(0.005, "yes")]),
        # other lengths, directions and dtypes are other cases
        (Goal("", "speedup", 1.5),
         [row("fastattn", 2.0), row("sdpa", length=32), row("sdpa", direction="both"), row("sdpa", dtype="bfloat16")],
         [(None, "")]),
        (Goal("", "speedup", 1.5, shortest=128), [row("fastattn", 2.0), row("sdpa", 4.0)], []),
        # what could not be measured is no success
        (Goal("", "speedup", 1.5), [row("fastattn", 2.0), row("sdpa", None, status="cannot", note="no")], [(None, "")]),
        (Goal("", "speedup", 1.5), [row("fastattn", None, status="wrong", note="off"), row("sdpa")], [(None, "")]),
    ],
)  # fmt: skip
def test_metrics(goal: Goal, rows: list[Row], expected: list[tuple[float | None, str]]) -> None:
    found = evaluate(rows, [dataclasses.replace(goal, suites=("suite",))])
    assert [
        (one.measured if one.measured is None else pytest.approx(one.measured), one.met) for one in found
    ] == expected
    assert all(one.note for one in found if one.measured is None and any(r.status != "ok" for r in rows))


def test_what_a_goal_would_take_of_the_machine() -> None:
    rows = [row("fastattn", 2.0, fraction=0.8, ceiling="fma"), row("sdpa", 3.0)]
    goals = [Goal("near", "speedup", 1.8, suites=("suite",)), Goal("far", "speedup", 2.0, suites=("suite",))]
    near, far = evaluate(rows, goals)
    assert (near.needed, far.needed) == pytest.approx((0.96, 0.8 * 2.0 / 1.5)) and far.ceiling == "fma"
    assert [one.beyond for one in summarize([near, far])] == [0, 1]
    assert "1 above the peak" in readme.goal_line(summarize([far])[0])


def test_other_runs_are_not_compared() -> None:
    goal = Goal("", "speedup", 1.0, suites=("suite",))
    (one,) = evaluate([row("fastattn", 2.0), row("sdpa", 4.0, commit="other")], [goal])
    assert one.measured is None


def test_outcomes_survive_the_file_and_replace_their_elders(tmp_path: Path) -> None:
    goal = Goal("claim", "speedup", 1.5, suites=("suite",))
    first = evaluate([row("fastattn", 2.0), row("sdpa", 4.0)], [goal])
    other = evaluate([row("fastattn", 2.0, length=32)], [goal])
    path = tmp_path / "goals.csv"
    write_outcomes(path, [*first, *other])
    assert read_outcomes(path) == [*first, *other]
    again = evaluate([row("fastattn", 4.0), row("sdpa", 4.0)], [goal])
    write_outcomes(path, again)
    assert read_outcomes(path) == [*again, *other]
    assert [one.met for one in read_outcomes(path)] == ["no", ""]


def test_summary_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("fastattn", 1.0), row("sdpa", 3.0), row("fastattn", 1.0, length=32), row("sdpa", 1.2, length=32)]
    high = Goal("faster", "speedup", 1.5, suites=("suite",))
    low = Goal("cheap", "share", most=0.9, suites=("suite",), against=("sdpa",))
    outcomes: list[Outcome] = evaluate(rows, [high, low])
    faster, cheap = summarize(outcomes)
    assert (faster.met, faster.measured, faster.unmeasured, faster.holds) == (1, 2, 0, False)
    assert faster.worst is not None and faster.worst.measured == pytest.approx(1.2)
    assert cheap.holds and cheap.worst is not None and cheap.worst.measured == pytest.approx(1 / 1.2)
    goal_report.print_goals(outcomes, Console())
    shown = capsys.readouterr().out
    assert "1 of 2" in shown and "met" in shown
    assert "1.20x instead of ≥ 1.50x" in shown


def test_roof_is_the_slower_of_arithmetic_and_memory() -> None:
    top = Roof({"float32": 100.0}, "fma", 10.0, "read")
    assert top.seconds(200.0, 10.0, "float32") == (2.0, "fma")
    assert top.seconds(50.0, 10.0, "float32") == (1.0, "read")
    assert top.seconds(50.0, 10.0, "float64") == (1.0, "read"), "nothing was measured for it"


def test_ceilings_of_a_cpu_are_those_of_its_cores() -> None:
    core = {"float32": {"peak_flops": 100e9}, "bfloat16": {"peak_flops": 50e9}}
    found = Ceilings(150e9, 512, "float32", 20e9, 30e9, core)
    top = roof(found, "cpu", 2)
    # bfloat16 is computed in float32 where its own instructions are slower
    assert top.flops == {"float32": 200e9, "bfloat16": 200e9, "float16": 200e9}
    rows = ceiling_rows(WHERE, found, "cpu")
    assert {(one.case, one.dtype): one.tflops or one.gb_per_s for one in rows} == pytest.approx(
        {("matmul", "float32"): 0.15, ("copy", "float32"): 20.0, ("read", "float32"): 30.0, ("fma", "float32"): 0.2,
         ("fma", "bfloat16"): 0.2, ("fma", "float16"): 0.2}
    )  # fmt: skip
    assert roof(found, "cuda", 2).flops == {"bfloat16": 150e9, "float16": 150e9}


def test_the_call_without_the_feature_has_the_same_operands() -> None:
    case = Case("test", "rotary", Shape(1, 2, 16, 16, 8))
    inputs = make_inputs(case, "cpu")
    bare = measure.inputs_of("fastattn-without", inputs)
    assert bare.case.scenario == "causal" and bare.query is inputs.query
    assert measure.inputs_of("fastattn", inputs) is inputs


def test_a_run_with_its_yardsticks() -> None:
    """Ours with and without the bias, SDPA with the bias built once: each passes a gate of its own."""
    suite = suites.Suite("test", "", (), ("fastattn", "fastattn-without", "sdpa", "sdpa-built", "fastattn-1-thread"))
    case = Case("test", "t5", Shape(1, 2, 32, 32, 16))
    top = Roof({"float32": 1e12}, "fma", 1e12, "read")
    rows = measure.run_case(suite, case, measure.Options([], budget=0.0), WHERE, top)
    status = {(one.variant, one.direction): one.status for one in rows}
    assert status.pop(("sdpa-built", "both")) == "cannot"
    assert set(status.values()) == {"ok"}
    assert all(one.fraction and one.ceiling for one in rows if one.status == "ok")


def test_a_bias_built_once_is_refused_where_it_needs_a_gradient() -> None:
    prepared = prepare("sdpa-built", make_inputs(Case("test", "t5", Shape(1, 2, 16, 16, 8)), "cpu"))
    with torch.no_grad():
        prepared.forward()
    with pytest.raises(CannotError, match="gradient"):
        prepared.forward()


def test_one_thread_is_one_thread_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inputs = make_inputs(Case("test", "plain", Shape(1, 2, 16, 16, 8)), "cpu")
    original = PEERS["fastattn-1-thread"].prepare(inputs)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return grad

    peer = dataclasses.replace(PEERS["fastattn-1-thread"], prepare=lambda inputs: lambda: Watched.apply(original()))
    monkeypatch.setitem(PEERS, "fastattn-1-thread", peer)
    with on_threads(2):
        prepare("fastattn-1-thread", inputs).step()
        assert torch.get_num_threads() == 2
    assert seen == [1, 1]


def test_memory_alone() -> None:
    """The whole bias is in SDPA's step, and in none of ours."""
    suite = suites.Suite("test", "", (), ("fastattn", "sdpa"), only_memory=True)
    case = Case("test", "t5", Shape(1, 1, 1024, 1024, 16), torch.float32, ("both",))
    rows = {one.variant: one for one in measure.run_case(suite, case, measure.Options([]), WHERE)}
    assert set(rows) == {"fastattn", "sdpa"}
    assert all(one.status == "ok" and one.median_s is None and "512" in one.note for one in rows.values())
    assert rows["sdpa"].peak_gb > 4 * 1024**2 / 1e9
    assert rows["fastattn"].peak_gb < rows["sdpa"].peak_gb / 2


@pytest.mark.parametrize(("scenario", "without"), [("causal", {"part: lower"}), ("alibi", set()), ("window", set())])
def test_parts_of_a_call_sum_to_the_call(scenario: str, without: set[str]) -> None:
    rows = breakdown.breakdown_rows(WHERE, Case("test", scenario, Shape(1, 2, 8, 8, 16)), 0.01)
    assert [one.variant for one in rows] == [part for part in breakdown.PARTS if part not in without]
    whole = float(rows[0].note.split()[1]) * 1e-6
    assert sum(one.median_s for one in rows) == pytest.approx(whole, abs=1e-7)
    assert all(one.median_s > 0 for one in rows[:-1])

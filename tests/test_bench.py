"""The bench itself: its registry, its gate, its clock, its rows.  What a wrong number could hide behind."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import runpy
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastattn
from fastattn.bench import launches, measure, peers, readme, results, runner, suites
from fastattn.bench.additive import ADDITIVE_SCENARIOS, make_additive_inputs
from fastattn.bench.gate import WrongResultError, expect, gate
from fastattn.bench.memory import peak_bytes
from fastattn.bench.models import FUNCTIONS, LAYERS, MODEL_SCENARIOS, make_model_inputs, model_flops
from fastattn.bench.modules import MODULE_SCENARIOS, make_module_inputs, module_flops
from fastattn.bench.peers import Prepared, prepare
from fastattn.bench.report import print_report
from fastattn.bench.results import Row
from fastattn.bench.rows import ROTARY_SCENARIOS, ROW_SCENARIOS, SOFTMAX_SCENARIOS, make_row_inputs, moved_bytes
from fastattn.bench.scenarios import SCENARIOS, Case, Shape, attention_bytes, dense_terms, forward_flops, make_inputs
from fastattn.bench.timing import Spread, interleave
from fastattn.cli.bench import add_arguments
from fastattn.cli.console import Console

SMALL = Shape(batch=2, heads=4, kv_heads=2, query_length=21, key_length=37, head_dim=16)
SQUARE = Shape(batch=2, heads=4, kv_heads=2, query_length=37, key_length=37, head_dim=16)


def small(scenario: str, dtype: torch.dtype = torch.float32, shape: Shape = SMALL) -> Case:
    return Case("test", scenario, shape, dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_case_of_every_suite_can_be_built(device: str, quick: bool) -> None:
    for name, build in suites.SUITES.items():
        suite = build(device, quick)
        assert suite.name == name
        assert suite.cases
        assert suite.baseline in suite.peers
        assert set(suite.peers) <= set(peers.PEERS)
        for case in suite.cases:
            known = {
                "module": MODULE_SCENARIOS,
                "cpu-module": MODULE_SCENARIOS,
                "huggingface": MODEL_SCENARIOS,
                "softmax": SOFTMAX_SCENARIOS,
                "rotary": ROTARY_SCENARIOS,
                "additive": ADDITIVE_SCENARIOS,
            }.get(name, SCENARIOS)
            assert case.scenario in known
            assert case.suite == name


@pytest.mark.parametrize("installed", [True, False])
def test_all_is_what_can_be_measured_here(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench does not need transformers, whose models one suite is about."""
    there = importlib.util.find_spec
    missing = None if not installed else object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: missing if name == "transformers" else there(name))
    own = runpy.run_path(suites.__file__)
    assert ("huggingface" in own["GROUPS"]["all"]) == installed
    assert "huggingface" in own["SUITES"]


def test_gpu_script_calls_the_bench_as_it_is() -> None:
    script = Path(__file__).parent.parent / "bench" / "gpu.sh"
    if not script.exists():
        pytest.skip("not in a checkout")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    calls = re.findall(r"-m fastattn bench ((?:.*\\\n)*.*)", script.read_text())
    assert len(calls) >= 2
    for call in calls:
        options = dict(re.findall(r"(--[a-z-]+)(?: ([a-z0-9]+))?", call))
        assert options.keys() <= parser._option_string_actions.keys()
        for name in re.findall(r"--suite ([a-z0-9]+)", call):
            assert name in suites.SUITES or name in suites.GROUPS


def test_groups_resolve_to_suites() -> None:
    assert suites.resolve(["overhead", "cpu", "overhead"])[0] == "overhead"
    assert set(suites.resolve(["all"])) | set(suites.resolve(["cpu"])) == set(suites.SUITES)
    with pytest.raises(ValueError, match="unknown suite 'speed'"):
        suites.resolve(["speed"])


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if SCENARIOS[s].dense_mask])
def test_dense_masks_agree_with_the_objects(scenario: str) -> None:
    """The bench writes every mask a second time, on purpose: a mistake in one of the two shows here."""
    inputs = make_inputs(small(scenario), "cpu")
    mask = SCENARIOS[scenario].arguments(SMALL, inputs.extras)["mask"]
    ours = mask.materialize(SMALL.query_length, SMALL.key_length, SMALL.offset)
    full = (SMALL.batch, SMALL.heads, SMALL.query_length, SMALL.key_length)
    assert torch.equal(dense_terms(inputs)[0].expand(full), ours.expand(full))


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if SCENARIOS[s].dense_bias and not SCENARIOS[s].of_content])
def test_dense_biases_agree_with_the_objects(scenario: str) -> None:
    """Those of content have no dense form of their own; the gate compares their outputs."""
    inputs = make_inputs(small(scenario), "cpu")
    bias = SCENARIOS[scenario].arguments(SMALL, inputs.extras)["bias"]
    ours = bias.materialize(SMALL.query_length, SMALL.key_length, SMALL.offset)
    assert torch.allclose(dense_terms(inputs)[1].double(), ours.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scenario", list(SCENARIOS))
@pytest.mark.parametrize("peer", ["fastattn", "sdpa", "naive"])
def test_gate_passes_what_is_right(peer: str, scenario: str) -> None:
    # dropout is held by its statistics, which need a few thousand weights
    shape = Shape(batch=2, heads=4, query_length=96, key_length=96, head_dim=16) if scenario == "dropout" else SMALL
    inputs = make_inputs(small(scenario, shape=shape), "cpu")
    if peer == "sdpa" and scenario in ("softcap", "sink", "shaw"):
        with pytest.raises(peers.CannotError):
            prepare(peer, inputs)
        return
    expected = expect(inputs, gradients=True, kv_head=1)
    assert 0 <= gate(peer, inputs, prepare(peer, inputs), expected, gradients=True) <= 1


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if s != "dropout"])
@pytest.mark.parametrize("name", ["out", "query", "value", "parameter"])
def test_gate_stops_what_is_wrong_by_little(name: str, scenario: str) -> None:
    """A hundredth of one output, or of one gradient, is far more than float32 may be off."""
    inputs = make_inputs(small(scenario), "cpu")
    prepared = prepare("fastattn", inputs)
    if name == "parameter":
        names = list(SCENARIOS[scenario].parameters)
        if not names:
            return  # the other three cover it
        name = names[0]
    expected = expect(inputs, gradients=True)
    forward, gradients = prepared.forward, prepared.gradients

    class Off(Prepared):
        def gradients(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = dict(zip(self.leaves, gradients(out), strict=True))
            if name in found:
                found[name] = found[name] * 1.01
            return tuple(found.values())

    wrong = Off(lambda: forward() * (1.01 if name == "out" else 1.0), prepared.leaves, prepared.grad_out)
    with pytest.raises(WrongResultError, match=name):
        gate("fastattn", inputs, wrong, expected, gradients=True)


@pytest.mark.parametrize("factor", [0.9, math.nan])
def test_gate_stops_dropout_without_its_rescale(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(batch=2, heads=4, query_length=96, key_length=96, head_dim=16)
    inputs = make_inputs(small("dropout", shape=shape), "cpu")
    plain = fastattn.attention
    monkeypatch.setattr(fastattn, "attention", lambda *a, **k: plain(*a, **k) * factor)
    with pytest.raises(WrongResultError, match="mean"):
        gate("fastattn", inputs, prepare("fastattn", inputs), expect(inputs, gradients=False), gradients=False)


def test_gate_sees_one_wrong_head_only_where_it_looks() -> None:
    """The gate of a long case looks at one KV head: the restriction must select exactly its queries."""
    inputs = make_inputs(small("plain"), "cpu")
    prepared = prepare("fastattn", inputs)

    def spoil(head: int) -> Callable[[], torch.Tensor]:
        return lambda: prepared.forward() + torch.eye(4)[head][:, None, None]

    for head, seen in ((0, False), (1, False), (2, True), (3, True)):
        wrong = Prepared(spoil(head), prepared.leaves, prepared.grad_out)
        expected = expect(inputs, gradients=False, kv_head=1)
        if seen:
            with pytest.raises(WrongResultError):
                gate("fastattn", inputs, wrong, expected, gradients=False)
        else:
            gate("fastattn", inputs, wrong, expected, gradients=False)


@pytest.mark.parametrize("scenario", MODULE_SCENARIOS)
@pytest.mark.parametrize("peer", ["fastattn-mha", "nn-mha"])
def test_module_gate(peer: str, scenario: str) -> None:
    inputs = make_module_inputs(small(scenario, shape=Shape(2, 4, 24, 24, 8)), "cpu")
    gate(peer, inputs, prepare(peer, inputs), expect(inputs, gradients=True), gradients=True)


@pytest.mark.parametrize("scenario", MODEL_SCENARIOS)
@pytest.mark.parametrize("peer", FUNCTIONS)
def test_model_gate(peer: str, scenario: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    inputs = make_model_inputs(small(scenario, shape=Shape(2, 4, 24, 24, 8)), "cpu")
    if (peer, scenario) == ("hf-sdpa", "gemma2"):
        with pytest.raises(ValueError, match="does not support"):  # in its own words
            prepare(peer, inputs)
    else:
        gate(peer, inputs, prepare(peer, inputs), expect(inputs, gradients=True), gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scenario", ROW_SCENARIOS)
@pytest.mark.parametrize("peer", ["fastattn", "naive"])
def test_row_gate(peer: str, scenario: str, dtype: torch.dtype) -> None:
    inputs = make_row_inputs(small(scenario, dtype, SQUARE), "cpu")
    gate(peer, inputs, prepare(peer, inputs), expect(inputs, gradients=True), gradients=True)


@pytest.mark.parametrize("scenario", ROW_SCENARIOS)
def test_row_gate_stops_what_is_wrong(scenario: str) -> None:
    inputs = make_row_inputs(small(scenario, shape=SQUARE), "cpu")
    prepared = prepare("fastattn", inputs)
    wrong = Prepared(lambda: tuple(out + 1e-3 for out in prepared.forward()), prepared.leaves, prepared.grad_out)
    with pytest.raises(WrongResultError):
        gate("fastattn", inputs, wrong, expect(inputs, gradients=False), gradients=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scenario", ADDITIVE_SCENARIOS)
@pytest.mark.parametrize("peer", ["fastattn", "naive"])
def test_additive_gate(peer: str, scenario: str, dtype: torch.dtype) -> None:
    inputs = make_additive_inputs(small(scenario, dtype, dataclasses.replace(SQUARE, kv_heads=4)), "cpu")
    gate(peer, inputs, prepare(peer, inputs), expect(inputs, gradients=True), gradients=True)


@pytest.mark.parametrize("scenario", ADDITIVE_SCENARIOS)
def test_additive_gate_stops_what_is_wrong(scenario: str) -> None:
    inputs = make_additive_inputs(small(scenario, shape=dataclasses.replace(SQUARE, kv_heads=4)), "cpu")
    prepared = prepare("fastattn", inputs)
    wrong = Prepared(lambda: prepared.forward() * 1.01, prepared.leaves, prepared.grad_out)
    with pytest.raises(WrongResultError):
        gate("fastattn", inputs, wrong, expect(inputs, gradients=False), gradients=False)


def test_moved_bytes() -> None:
    """By hand for one case each."""
    shape = Shape(batch=2, heads=4, query_length=8, key_length=8, head_dim=16, kv_heads=2)
    scores = 2 * 4 * 8 * 8 * 4
    for scenario, forward, backward in (
        ("softmax", 2 * scores, 3 * scores),
        ("softmax-causal", 1.5 * scores, 2 * scores),
        ("softmax-documents", 1.25 * scores, 1.5 * scores),
        ("softmax-mask", 2 * scores + 2 * 8 * 8, 3 * scores),
        ("softmax-bias", 2.5 * scores, 3.5 * scores),
        ("rotary-half", 2 * 2 * 6 * 8 * 16 * 4 + 2 * 8 * 8 * 4, 2 * 2 * 6 * 8 * 16 * 4 + 2 * 8 * 8 * 4),
    ):
        inputs = make_row_inputs(small(scenario, shape=shape), "cpu")
        found = [moved_bytes(inputs, direction) for direction in ("forward", "backward", "both")]
        assert found == [forward, backward, forward + backward], scenario


def test_flops_count_what_the_mask_lets_through() -> None:
    shape = Shape(batch=2, heads=4, query_length=512, key_length=512, head_dim=64)
    pairs = 4 * 2 * 4 * 512 * 512 * 64
    assert forward_flops(make_inputs(small("plain", shape=shape), "cpu")) == pairs
    assert forward_flops(make_inputs(small("causal", shape=shape), "cpu")) == pairs / 2
    assert forward_flops(make_inputs(small("window", shape=shape), "cpu")) == pairs / 2  # 256 of 512 keys
    lengths = make_inputs(small("lengths", shape=shape), "cpu")
    share = lengths.extras["lengths"].double().mean().item() / 512
    assert forward_flops(lengths) == pytest.approx(pairs * share)


def test_interleaving_takes_turns() -> None:
    order: list[str] = []

    def sample(name: str) -> Callable[[], dict[str, float]]:
        return lambda: (order.append(name), {"forward": 1.0})[1]

    found = interleave({"a": sample("a"), "b": sample("b")}, budget=0.0, least=4)
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert found == {"a": {"forward": [1.0] * 4}, "b": {"forward": [1.0] * 4}}


@pytest.mark.parametrize(("warm", "expected"), [(False, "ababba"), (True, "abab")])
def test_a_round_that_takes_the_whole_budget_counts_behind_the_gate(warm: bool, expected: str) -> None:
    order: list[str] = []

    def sample(name: str) -> Callable[[], dict[str, float]]:
        return lambda: (order.append(name), time.sleep(1e-3), {"forward": 1.0})[2]

    found = interleave({"a": sample("a"), "b": sample("b")}, budget=1e-6, least=2, warm=warm)
    assert "".join(order) == expected
    assert {name: len(times["forward"]) for name, times in found.items()} == {"a": 2, "b": 2}


def test_a_slow_variant_leaves_the_others_their_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [0.0]
    monkeypatch.setattr("fastattn.bench.timing.time.perf_counter", lambda: now[0])

    def sample(name: str, takes: float) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            order.append(name)
            now[0] += takes
            return {"forward": takes}

        return run

    found = interleave({"fast": sample("fast", 1e-3), "slow": sample("slow", 0.03)}, budget=0.1, least=3, most=12)
    assert {name: len(times["forward"]) for name, times in found.items()} == {"fast": 12, "slow": 3}
    first, second, third = (i for i, name in enumerate(order[2:]) if name == "slow")
    assert first >= 3  # spread over the whole time
    assert second - first == third - second == 5


def test_attention_bytes() -> None:
    """Q, K, V and O once; three of them and dO read again, the gradients written."""
    shape = Shape(batch=2, heads=4, kv_heads=2, query_length=8, key_length=16, head_dim=16)
    inputs = make_inputs(small("table", shape=shape), "cpu")
    q, kv, table = 2 * 4 * 8 * 16 * 4, 2 * 2 * 16 * 16 * 4, 4 * 129 * 4
    assert attention_bytes(inputs, "forward") == 2 * q + 2 * kv + table
    assert attention_bytes(inputs, "both") == 3 * (2 * q + 2 * kv) + 2 * table


def test_module_flops() -> None:
    inputs = make_module_inputs(small("self", shape=Shape(2, 4, 24, 24, 8)), "cpu")
    projections, attention = 4 * 2 * 2 * 24 * 32 * 32, 2 * 2 * 2 * 24 * 24 * 32
    assert module_flops(inputs, "forward") == projections + attention
    assert module_flops(inputs, "both") == 3 * projections + 3.5 * attention
    encoder = make_module_inputs(dataclasses.replace(inputs.case, scenario="encoder"), "cpu")
    assert module_flops(encoder, "forward") == 6 * projections + 2 * attention


def test_model_flops() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    inputs = make_model_inputs(small("llama", shape=Shape(2, 4, 24, 24, 8)), "cpu")
    weights = 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 128  # of a layer: queries and outputs, keys and values, a gated MLP
    products, scores = 2 * 2 * 24 * weights, 4 * 2 * 24 * 24 * 32
    assert model_flops(inputs, "forward") == LAYERS * (products + scores)
    assert model_flops(inputs, "both") == LAYERS * (3 * products + 3.5 * scores)


def test_spread() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Spread(median=3.5, p20=2.0, p80=5.0, samples=6)


def test_peak_memory_sees_a_temporary_that_is_gone_at_the_end() -> None:
    def call() -> torch.Tensor:
        return torch.ones(16 << 20).sum()

    call()
    assert 60e6 < peak_bytes(call, "cpu") < 110e6
    assert peak_bytes(lambda: torch.ones(10).sum(), "cpu") < 10e6


def _row(**changes: object) -> Row:
    case = small("causal", shape=Shape(1, 2, 64, 64, 16))
    where = results.Environment("2026-01-01", "cpu", "avx2", 2, "2.13", "3.7", "0.1", "abc")
    return dataclasses.replace(results.make_row(where, case, "sdpa", "forward", status="ok", median_s=0.5), **changes)


def test_rows_survive_the_file_and_replace_their_elders(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    first, other = _row(), _row(variant="naive", median_s=None, status="cannot", note="words, with a comma\nand a line")
    results.write(path, [first, other])
    assert results.read(path) == [first, other]
    again = _row(median_s=0.25, date="2026-02-02")
    results.write(path, [again])
    assert results.read(path) == [again, other]


def test_rows_of_another_version_of_the_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.write(path, [_row()])
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    records[0].pop("kernel")
    records[0]["column_of_the_future"] = "1"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    assert results.read(path) == [_row()]


def test_the_latest_run_of_each_case_counts() -> None:
    old, new = _row(commit="old"), _row(commit="new", median_s=0.1)
    elsewhere, other = _row(commit="old", device="another"), _row(commit="old", dtype="bfloat16")
    assert results.latest([old, elsewhere, new, other]) == [elsewhere, new, other]


def test_dedup_key_names_real_columns() -> None:
    assert set(results.KEY) <= set(results.FIELDS)


def test_a_run_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows for every peer, ratios against the baseline, reasons of what cannot, table."""

    def tiny(device: str, quick: bool) -> suites.Suite:
        cases = tuple(
            Case("tiny", scenario, Shape(1, 2, length, length, 16))
            for scenario in ("causal", "softcap")
            for length in (16, 32)
        )
        return suites.Suite("tiny", "tiny", cases, ("fastattn", "sdpa", "naive"))

    monkeypatch.setitem(suites.SUITES, "tiny", tiny)
    kept: list[Row] = []
    rows = runner.run(measure.Options(suites=["tiny"], quick=True, budget=0.01, sink=kept.extend, ceilings=False))
    assert kept == rows
    measured = [row for row in rows if row.status == "ok"]
    assert {(r.case, r.variant, r.direction) for r in measured} == {
        *(("causal", v, d) for v in ("fastattn", "sdpa", "naive") for d in ("forward", "backward", "both")),
        *(("softcap", v, d) for v in ("fastattn", "naive") for d in ("forward", "backward", "both")),
    }
    refused = {(row.case, row.variant) for row in rows if row.status == "cannot"}
    assert refused == {("softcap", "sdpa")}
    for row in measured:
        assert row.median_s is not None
        assert 0 < row.median_s < 5
        assert row.p20_s <= row.median_s <= row.p80_s
        assert (row.ratio is None) == (row.case == "softcap")
        assert row.error is not None
        assert row.error <= 1
    base = {(r.case, r.key_length, r.direction): r.median_s for r in measured if r.variant == "sdpa"}
    for row in measured:
        if row.ratio is not None:
            assert row.ratio == pytest.approx(base[row.case, row.key_length, row.direction] / row.median_s)
    assert all(row.kernel for row in measured if row.variant == "fastattn")
    print_report(rows, Console())
    shown = capsys.readouterr().out
    assert "no softcap and no sink" in shown


def test_a_wrong_variant_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lying(inputs: object) -> Callable[[], torch.Tensor]:
        right = peers.PEERS["naive"].prepare(inputs)
        return lambda: right() + 1

    monkeypatch.setitem(peers.PEERS, "sdpa", peers.Peer("sdpa", "", lying))
    case = small("plain")
    suite = suites.Suite("test", "", (case,), ("fastattn", "sdpa"))
    rows = measure.run_case(suite, case, measure.Options(suites=[], budget=0.0), results.environment("cpu"))
    lies = [row for row in rows if row.variant == "sdpa"]
    assert {row.status for row in lies} == {"wrong"}
    assert all(row.median_s is None for row in lies)
    assert all(row.ratio is None for row in rows), "ratios against a baseline that is wrong"


def test_past_the_deadline_cases_are_skipped_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = runner.run(measure.Options(suites=["overhead"], quick=True, deadline=-1.0, ceilings=False))
    assert {row.status for row in rows} == {"skipped"}
    assert all(row.note for row in rows)


def test_readme_shows_the_committed_rows() -> None:
    """No number in the README that is not in a CSV: `python -m fastattn.bench.readme` writes the section."""
    path = readme.ROOT / "README.md"
    if not path.exists():
        pytest.skip("not a checkout: a wheel has no README beside it")
    text = path.read_text()
    assert text.count(readme.OPENING) == text.count(readme.CLOSING) == 1
    assert readme.rewritten(text, readme.committed_rows()) == text


def test_readme_section_of_some_rows() -> None:
    rows = [_row(), _row(variant="fastattn", suite="attention", median_s=0.25, ratio=2.0, baseline="sdpa")]
    rows.append(_row(suite="attention"))
    assert readme.section([]) == ""
    (line,) = readme.lines(rows)
    assert line == "| causal | B1 H2 S64 D16 | float32 | 250.00 ms | 2.00 |  |  |"
    text = f"before\n{readme.OPENING}\nold\n{readme.CLOSING}\nafter"
    once = readme.rewritten(text, rows)
    assert line in once
    assert "old" not in once
    assert once.startswith("before\n")
    assert once.endswith("\nafter")
    assert readme.rewritten(once, rows) == once


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on: nothing is launched")
def test_host_time_of_a_triton_call() -> None:
    """Two ways in turns; the ordinary one really is Triton's own, the other is not, and each row says what it timed."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton.runtime.jit import JITFunction

    calls = {"ordinary": 0}
    original = JITFunction.run

    def run(self: JITFunction, *args: object, **kwargs: object) -> object:
        calls["ordinary"] += 1
        return original(self, *args, **kwargs)

    case = suites.overhead("cpu", quick=True).cases[1]
    with mock.patch.object(JITFunction, "run", run):
        rows = launches.launch_rows(results.environment("cpu"), case, "cpu", 0.01)
    assert {(row.variant, row.direction) for row in rows} == set(
        itertools.product(launches.VARIANTS, ("forward", "both"))
    )
    assert all(row.status == "ok" and row.median_s > 0 and "stub" in row.kernel for row in rows)
    ratios = {row.direction: row.ratio for row in rows if row.variant == "triton-launch"}
    assert ratios.keys() == {"forward", "both"} and all(ratio is not None for ratio in ratios.values())
    ordinary = [row for row in rows if row.variant == "triton-launch-ordinary"]
    # a warm-up round beside the samples, and the first call of each kernel, which compiles it
    launched = sum((row.samples + 1) * launches.CALLS * {"forward": 1, "both": 4}[row.direction] for row in ordinary)
    assert launched < calls["ordinary"] <= launched + 20

"""Comparing runs: what counts as a regression, and both versions of a checkout measured in turns."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from fastattn.__main__ import main
from fastattn.bench import against, results
from fastattn.bench.compare import changes, merge, print_changes
from fastattn.bench.measure import Options
from fastattn.bench.results import Row
from fastattn.bench.scenario import Case, Shape
from fastattn.cli.console import Console


def rows(
    ours: float, base: float | None = 1.0, *, spread: float = 0.01, commit: str = "a", length: int = 64
) -> list[Row]:
    """fastattn and, unless it is None, its baseline, as one case of one run."""
    where = results.Environment("2026-01-01", "cpu", "avx2", 2, "2.13", "3.7", "0.1", commit)
    case = Case("suite", "causal", Shape(1, 8, length, length, 64))

    def one(variant: str, seconds: float) -> Row:
        return results.make_row(
            where, case, variant, "forward", status="ok", median_s=seconds, p20_s=seconds * (1 - spread),
            p80_s=seconds * (1 + spread), samples=5, ratio=base / seconds if base else None,
            baseline="sdpa" if base else "",
        )  # fmt: skip

    return [one("fastattn", ours), *([one("sdpa", base)] if base else [])]


@pytest.mark.parametrize(
    ("before", "after", "factor", "slower"),
    [
        (rows(1.0), rows(1.3, commit="b"), 1.3, True),
        # the whole machine was slower: no change of ours
        (rows(1.0), rows(1.3, 1.3, commit="b"), 1.0, False),
        # ... or faster, which hides one
        (rows(1.0), rows(1.0, 0.5, commit="b"), 2.0, True),
        (rows(1.0), rows(1.05, commit="b"), 1.05, False),
        (rows(1.0, spread=0.3), rows(1.3, spread=0.3, commit="b"), 1.3, False),
        # without a baseline it is the time itself
        (rows(1.0, None), rows(1.5, None, commit="b"), 1.5, True),
        # of several runs in a file the last counts
        ([*rows(9.0, commit="old"), *rows(1.0)], rows(1.3, commit="b"), 1.3, True),
    ],
)
def test_what_is_a_regression(before: list[Row], after: list[Row], factor: float, slower: bool) -> None:
    (found,) = changes(before, after)
    assert found.factor == pytest.approx(factor)
    assert found.slower(0.1) == slower
    (other_way,) = changes(after, before[-2:] if before[-1].variant == "sdpa" else before[-1:])
    assert other_way.faster(0.1) == slower


def test_exit_codes_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    assert print_changes(changes(rows(1.0), rows(1.3, commit="b")), 0.1, console) == 1
    shown = capsys.readouterr().out
    assert "1.30x" in shown and "1.00 → 0.77" in shown and "1 slower" in shown
    assert print_changes(changes(rows(1.0), rows(1.3, commit="b")), 0.5, console) == 0
    assert print_changes(changes(rows(1.3), rows(1.0, commit="b")), 0.1, console) == 0
    assert "1 faster" in capsys.readouterr().out
    assert print_changes(changes(rows(1.0), rows(1.0, length=32)), 0.1, console) == 2
    assert "nothing to compare" in capsys.readouterr().out


def test_the_command_compares_two_files(tmp_path: Path) -> None:
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    results.write(a, rows(1.0))
    results.write(b, rows(1.3, commit="b"))
    assert main(["bench", "--compare", str(a), str(b)]) == 1
    assert main(["bench", "--compare", str(a), str(b), "--threshold", "0.5"]) == 0
    assert main(["bench", "--compare", str(b), str(a)]) == 0
    assert main(["bench", "--compare", str(a), str(tmp_path / "none.csv")]) == 2


def test_rounds_become_one_row_with_the_spread_of_their_ratios() -> None:
    """The second round's machine was half as fast, and says nothing about us."""
    rounds = [rows(1.0), rows(2.0, 2.0), rows(1.1)]
    ours, base = merge(rounds)
    assert (ours.variant, base.variant) == ("fastattn", "sdpa")
    assert (ours.median_s, ours.p20_s, ours.p80_s, ours.ratio) == pytest.approx((1.0, 1.0, 1.1, 1.0))
    assert ours.samples == 15
    assert base.median_s == 1.0
    refused = [dataclasses.replace(row, status="wrong", median_s=None) for row in rows(1.0)]
    assert {row.status for row in merge([rows(1.0), refused])} == {"wrong"}


def test_a_commit_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    if subprocess.run(["git", "-C", str(against.ROOT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    assert main(["bench", "--against", "no-such-commit", "--suite", "cpu-short", "--quick", "--device", "cpu"]) == 2
    assert "no-such-commit" in capsys.readouterr().out


@pytest.mark.slow
def test_this_checkout_against_its_head(tmp_path: Path) -> None:
    """Two processes, two versions of the package, one bench, a worktree that is gone afterwards."""
    if subprocess.run(["git", "-C", str(against.ROOT), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    chosen = Options(["cpu-overhead"], quick=True, budget=0.02)
    trees: list[Path] = []
    start = against.Side.start

    def watched(name: str, tree: Path, options: Options) -> against.Side:
        trees.append(tree)
        return start(name, tree, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(against.Side, "start", watched)
        before, after = against.run("HEAD", chosen, lambda text, done, total: None, rounds=2)
    assert {row.variant for row in before} == {row.variant for row in after} == {"fastattn", "fastattn-sdpa", "sdpa"}
    assert all(row.status == "ok" for row in (*before, *after))
    assert len({row.commit.rstrip("+") for row in (*before, *after)}) == 1
    assert not before[0].commit.endswith("+"), "the worktree is the commit itself"
    assert trees[1] == against.ROOT != trees[0]
    assert not trees[0].exists()
    listed = subprocess.run(["git", "-C", str(against.ROOT), "worktree", "list"], capture_output=True, text=True)
    assert str(trees[0]) not in listed.stdout
    assert changes(before, after)


def test_a_side_that_dies_is_an_error(tmp_path: Path) -> None:
    side = against.Side.start(
        "nobody", tmp_path, Options([])
    )  # fastattn is not in that folder, and the process says so
    with pytest.raises(against.AgainstError, match="nobody: the process ended"):
        side.measure("cpu-overhead", 0)
    side.stop()

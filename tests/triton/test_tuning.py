"""The tile search: it times only what is right, picks the fastest, and what it writes is what the table reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastattn.functional import lower
from fastattn.triton_kernels import tiles, tuning
from fastattn.triton_kernels.tiles import Tile


def test_search_rejects_wrong_tiles_and_picks_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = lower(*(torch.randn(1, 1, 40, 16) for _ in range(3)))
    wrong, broken, slow, fast = Tile(16, 32, 4, 1), Tile(32, 64, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)
    times = {slow: 2.0, fast: 1.0}
    real = tuning.attention_forward

    def attention_forward(problem: object) -> tuple[torch.Tensor, ...]:
        chosen = tiles.tile("forward", 16, 4)
        if chosen == broken:
            raise RuntimeError("out of resource: shared memory")
        out, *rest = real(problem)
        return (out + 1.0 if chosen == wrong else out, *rest)

    monkeypatch.setattr(tuning, "attention_forward", attention_forward)

    def timer(call: Callable[[], object]) -> float:
        return times[tiles.tile("forward", 16, 4)]

    trials = tuning.search("forward", problem, [wrong, broken, slow, fast], timer)
    assert [trial.tile for trial in trials[:2]] == [fast, slow]
    reasons = {trial.tile: trial.reason for trial in trials[2:]}
    assert "wrong" in reasons[wrong]
    assert "out of resource" in reasons[broken]


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_every_kernel_can_be_searched(kernel: str) -> None:
    torch.manual_seed(0)
    problem = lower(*(torch.randn(1, 1, 20, 16) for _ in range(3)))
    trials = tuning.search(kernel, problem, [Tile(16, 16, 4, 1)], lambda call: 1.0)
    assert trials[0].seconds == 1.0, trials[0].reason


def test_candidates_fit() -> None:
    found = list(tuning.candidates(128, 2, tiles.LARGE))
    assert len(found) > 10
    assert all(2 * 128 * (2 * t.BM + 2 * t.BN * t.num_stages) <= tiles.LARGE for t in found)
    assert set(tuning.candidates(128, 2, tiles.SMALL)) < set(found)


def test_the_table_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kernel": "forward", "head_dim": 64, "itemsize": 2, "shared_memory": tiles.LARGE, "tile": [32, 128, 4, 2]}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([row]))
    before = tiles.tile("forward", 64, 2)
    monkeypatch.setenv("FASTATTN_TILES", str(path))
    assert tiles.tile("forward", 64, 2) == Tile(32, 128, 4, 2) != before
    assert tiles.tile("forward", 64, 2, tiles.SMALL) != Tile(32, 128, 4, 2)
    path.with_name("other.json").write_text("{}x")
    monkeypatch.setenv("FASTATTN_TILES", str(path.with_name("other.json")))
    with pytest.raises(ValueError, match="FASTATTN_TILES"):
        tiles.tile("forward", 64, 2)

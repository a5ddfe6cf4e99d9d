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
    row = {"kernel": "forward", "head_dim": 64, "itemsize": 2, "capability": [9, 0], "shared_memory": tiles.LARGE}
    row |= {"tile": [32, 128, 4, 2]}
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([row]))
    before = tiles.tile("forward", 64, 2)
    monkeypatch.setenv("FASTATTN_TILES", str(path))
    assert tiles.tile("forward", 64, 2) == Tile(32, 128, 4, 2) != before
    assert tiles.tile("forward", 40, 2) == Tile(32, 128, 4, 2)  # padded to 64
    assert tiles.tile("forward", 64, 2, (10, 0)) == before
    assert tiles.tile("forward", 64, 2, (9, 0), tiles.SMALL) != Tile(32, 128, 4, 2)
    path.with_name("other.json").write_text("{}x")
    monkeypatch.setenv("FASTATTN_TILES", str(path.with_name("other.json")))
    with pytest.raises(ValueError, match="FASTATTN_TILES"):
        tiles.tile("forward", 64, 2)


def test_the_class_of_a_device_is_that_of_its_capability_and_memory() -> None:
    known = {(9, 0): tiles.LARGE, (10, 0): tiles.LARGE, (8, 0): tiles.MEDIUM, (8, 6): tiles.SMALL, (12, 0): tiles.SMALL}
    for capability, memory in known.items():
        assert tiles.device_class(capability, memory) == memory
    # operands in registers gain nothing from more shared memory; less of it is too little for the large tiles
    assert tiles.device_class((12, 1), tiles.LARGE) == tiles.MEDIUM
    assert tiles.device_class((9, 0), tiles.MEDIUM) == tiles.MEDIUM


@pytest.mark.parametrize("kernel", [*tuning.KERNELS, "bias_gradient"])
def test_every_head_dimension_has_a_row(kernel: str) -> None:
    for itemsize in (2, 4):
        for capability, memory in (((9, 0), tiles.LARGE), ((8, 0), tiles.MEDIUM), ((8, 9), tiles.SMALL)):
            found = [tiles.tile(kernel, dim, itemsize, capability, memory) for dim in range(1, 257)]
            assert all(min(tile.BM, tile.BN) >= 16 for tile in found)
            if kernel == "bias_gradient":
                assert all(tile.BM == tile.BN for tile in found), "a block diagonal needs square tiles"

"""What blocks of rows see by ids and dense masks, in the simulator: kernels compute no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from features import MASKS, Shape
from float8_oracle import Float8Call, check_float8
from oracle import Call, check
from torch import Tensor

import fastattn
from fastattn.backends.cuda import CudaBackend
from fastattn.functional import lower

HALF = torch.float16
SHARED_BYTES = 232448  # what an H100 gives a block
# Long enough to be worth a look (kLeastForSpans), not multiples of any tile, several of each.
SHAPE = Shape(batch=2, heads=4, kv_heads=2, query_length=261, key_length=307, head_dim=32, value_dim=32)
MASKED = tuple(name for name in MASKS if name.startswith(("documents", "bool")))
KERNELS = {
    80: {"forward": "forward", "backward_q": "backward_q", "backward_kv": "backward_kv"},
    90: {kernel: f"hopper_{kernel}" for kernel in ("forward", "backward_q", "backward_kv")},
}


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90a"])
def capability(
    request: pytest.FixtureRequest, cuda_simulator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[int]:
    """Of the simulated device, which is asked for the kernels of sm_90a where it has them."""
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    if request.param == 90:
        cuda_simulator.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=3, capability=90)
    else:
        cuda_simulator.set_device()
    cuda_simulator.clear_reports()
    yield request.param
    cuda_simulator.set_device()


@pytest.mark.parametrize("name", MASKED)
def test_masks(capability: int, cuda_simulator: ModuleType, name: str) -> None:
    """Heads with masks of their own share tiles of keys, and on sm_90a those of rows as well."""
    check(Call((name,), SHAPE, HALF), "cuda")
    ran = [report["kernel"] for report in cuda_simulator.reports()]
    assert ran.count("attention_spans") == 3  # the forward's, and two for the backward


@pytest.mark.parametrize(
    "other", ["causal", "window", "prefix_lm", "key_lengths", "t5_decoder", "alibi", "dense_heads", "sink"]
)
@pytest.mark.parametrize("name", ["documents_sorted", "bool_blocks"])
def test_with_other_features(capability: int, name: str, other: str) -> None:
    check(Call((name, other), replace(SHAPE, batch=1), HALF), "cuda")


@pytest.mark.parametrize("name", MASKED)
def test_operands_of_8_bits(cuda_simulator: ModuleType, capability: int, name: str) -> None:
    if capability == 80:
        pytest.skip("sm_80 has no kernel for operands of 8 bits")
    check_float8(Float8Call((name,), replace(SHAPE, head_dim=64, value_dim=64)), "cuda")
    assert "attention_spans" in [report["kernel"] for report in cuda_simulator.reports()]


LENGTH = 512


def _documents(*starts: int) -> Tensor:
    ids = torch.zeros(LENGTH, dtype=torch.int64)
    ids[list(starts)] = 1
    return ids.cumsum(0)


def _causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


WRITTEN_OUT = {
    "documents": (
        lambda: fastattn.Documents(_documents(130, 400)),
        lambda: _documents(130, 400)[:, None] == _documents(130, 400),
    ),
    "causal": (lambda: fastattn.BoolMask(_causal()), _causal),
}


def _counts(simulator: ModuleType, mask: fastattn.Mask | None) -> dict[str, tuple[int, int]]:
    """Of each kernel: products, and looks at ids or mask bytes."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, LENGTH, 64, dtype=HALF, requires_grad=True) for _ in range(3))
    simulator.clear_reports()
    fastattn.attention(query, key, value, mask=mask, backend="cuda").sum().backward()
    counts = {}
    for report in simulator.reports():
        looks = [line["requests"] for line in report["lines"] if "visible_bits" in line["function"]]
        counts[report["kernel"]] = report["products"] + report["warpgroup_products"], sum(looks)
    return counts


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_tiles_that_nobody_sees_are_not_computed(capability: int, cuda_simulator: ModuleType, name: str) -> None:
    """As many products as tiles that some pair is seen in, and no look at masks in tiles that see everything."""
    mask, dense = WRITTEN_OUT[name]
    seen = dense()
    masked, everything = (
        _counts(cuda_simulator, m) for m in (mask(), fastattn.BoolMask(torch.ones(1, LENGTH, dtype=torch.bool)))
    )
    query = torch.empty(1, 1, LENGTH, 64, dtype=HALF, requires_grad=True)
    plan = CudaBackend().plan(lower(query, query, query, mask=mask()))
    for kernel, ours in KERNELS[capability].items():
        tile = plan if kernel == "forward" else plan[kernel]
        tiles = seen.unflatten(0, (-1, tile["rows"])).unflatten(2, (-1, tile["keys"])).transpose(1, 2)  # type: ignore[index]
        some, total = tiles.flatten(2).any(2), tiles.shape[0] * tiles.shape[1]
        (ran,) = (found for found in masked if found.startswith(ours + "_"))
        assert masked[ran][0] * total == everything[ran][0] * int(some.sum()), ran
        assert everything[ran][1] == 0, ran
        assert masked[ran][1] > 0, ran

"""The Triton attention kernels in the interpreter: every feature and random compositions, forward and gradients.

float32 and float16 only: the interpreter computes bfloat16 wrongly.  Tiles are small, so that small shapes have full,
partial, near and far tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import bodies
import pytest
import torch
from features import BIASES, CONTENT, FEATURES, MASKS, ROTARY, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Call, check
from test_determinism import COMBINATIONS as DETERMINISTIC

import fastattn
from fastattn.functional import lower
from fastattn.triton_kernels import attention, attention_gradients, tiles
from fastattn.triton_kernels.attention import attention_forward
from fastattn.triton_kernels.attention_gradients import attention_backward
from fastattn.triton_kernels.tiles import Tile

SMALL = {
    "forward": Tile(32, 16, 4, 2),
    "backward_kv": Tile(16, 32, 4, 1),
    "backward_q": Tile(32, 16, 4, 1),
    "bias_gradient": Tile(16, 16, 4, 1),
}
DTYPES = (torch.float32, torch.float16)
SHAPE = Shape(heads=2, kv_heads=1, query_length=40, key_length=52)


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    with tiles.override(**SMALL):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype) -> None:
    check(Call((feature,), SHAPE, dtype), "triton")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=6, kv_heads=1, query_length=17, key_length=33),
        Shape(head_dim=8, value_dim=40, query_length=31, key_length=16),
        Shape(head_dim=40, value_dim=1, query_length=33, key_length=15),
        Shape(heads=2, query_length=40, key_length=20),
        Shape(query_length=1, key_length=80),
        Shape(query_length=40, key_length=1),
        Shape(query_length=0),
        Shape(key_length=0),
        Shape(batch=0),
    ],
    ids=lambda s: f"{s.batch}x{s.heads}x{s.query_length}x{s.head_dim}-{s.kv_heads}x{s.key_length}x{s.value_dim}",
)
def test_shapes(shape: Shape) -> None:
    check(Call(("causal", "alibi", "sink"), shape), "triton")


@pytest.mark.parametrize("offset", [0, 16, -7, torch.tensor([3, -5])], ids=str)
@pytest.mark.parametrize("features", [("causal",), ("window", "table"), ("prefix_lm", "t5_decoder")], ids="+".join)
def test_query_offset(features: tuple[str, ...], offset: int | torch.Tensor) -> None:
    check(Call(features, SHAPE, offset=offset), "triton")


@pytest.mark.parametrize("feature", ["causal", "window_left", "window_right"])
def test_every_alignment_of_mask_and_tiles(feature: str) -> None:
    """A bound of the tiles without masks that is off by one shows only where it lies next to a tile's edge."""
    for offset in range(13, 17):
        check(Call((feature,), Shape(1, 1, 1, 33, 49), offset=offset), "triton")


@settings(max_examples=15)
@given(
    features=st.tuples(
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *BIASES, *CONTENT]),
        st.sampled_from([None, *BIASES, *CONTENT]),
        st.sampled_from([None, *ROTARY]),
        st.sampled_from([None, "softcap", "sink"]),
    ),
    dropout_p=st.sampled_from([0.0, 0.25]),
    query_length=st.integers(1, 40),
    key_length=st.integers(1, 40),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
)
def test_composition(
    features: tuple[str | None, ...],
    dropout_p: float,
    query_length: int,
    key_length: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    names = tuple(dict.fromkeys(name for name in features if name))
    if any(name in ROTARY for name in names):
        key_length = max(key_length, query_length)  # a rotation has no negative positions
    shape = Shape(heads=2, kv_heads=1, query_length=query_length, key_length=key_length)
    check(Call(names, shape, dtype, seed=seed, dropout_p=dropout_p), "triton")


def test_same_dropout_as_the_cpu_backend() -> None:
    bodies.same_dropout_as_the_cpu_backend("triton", "cpu")


def test_same_result_for_any_tile() -> None:
    """A split of the work that loses or doubles a tile shows as more than rounding."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 75, 16, dtype=torch.float32) for _ in range(3))
    table = fastattn.DistanceTable(torch.randn(2, 21), left=12)
    problem = lower(query, key, value, mask=fastattn.SlidingWindow(30, 25), bias=table)
    grad = torch.randn(1, 2, 75, 16)
    wanted = frozenset({"query", "key", "value", "table"})
    results = []
    for block in (16, 32, 64):
        with tiles.override(**{kernel: Tile(block, block, 4, 1) for kernel in SMALL}):
            out, _, statistics = attention_forward(problem)
            grads = attention_backward(problem, grad, None, out, statistics, wanted)
            results.append({"out": out, **grads})
    for name, first in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", DETERMINISTIC, ids="+".join)
def test_gradients_are_bit_identical(features: tuple[str, ...]) -> None:
    bodies.the_same_bits_on_every_run("triton", "cpu", Call(features, SHAPE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_stay_inside(dtype: torch.dtype) -> None:
    bodies.reads_and_writes_stay_inside("triton", "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views(dtype: torch.dtype) -> None:
    bodies.strided_views("triton", "cpu", dtype)


def test_offsets_beyond_32_bits() -> None:
    bodies.offsets_beyond_32_bits("triton", "cpu")


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dim": 264}, "at most 256"),
    ],
)
def test_refusals(problem: dict, words: str) -> None:
    x = torch.zeros(1, 1, 4, problem.get("dim", 16), dtype=problem.get("dtype", torch.float32))
    with pytest.raises(fastattn.UnsupportedError, match=words):
        fastattn.attention(x, x, x, backend="triton")


def test_explain_names_tiles() -> None:
    x = torch.zeros(1, 1, 4, 64)
    explanation = fastattn.explain(x, x, x, backend="triton")
    assert explanation.backend == "triton"
    assert explanation.plan["forward"] == SMALL["forward"]


def test_writes_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients are slices of larger tensors of NaN, which are the same NaN afterwards."""
    wholes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def guarded(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        whole = like.new_full([n + 4 for n in shape], float("nan"))
        inner = whole[tuple(slice(2, 2 + n) for n in shape)]
        wholes.append((whole, inner))
        return inner

    for module in (attention, attention_gradients):
        monkeypatch.setattr(module, "empty_like_layout", guarded)
    query, key, value = torch.randn(2, 2, 33, 24), torch.randn(2, 1, 41, 24), torch.randn(2, 1, 41, 20)
    problem = lower(query, key, value, mask=fastattn.Causal())
    out, _, statistics = attention_forward(problem)
    attention_backward(problem, torch.randn(out.shape), None, out, statistics, frozenset({"query", "key", "value"}))
    assert len(wholes) == 4
    for whole, inner in wholes:
        assert inner.isfinite().all()
        assert whole.isnan().sum() == whole.numel() - inner.numel()

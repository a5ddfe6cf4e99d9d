"""The Triton attention kernels in the interpreter: every feature and random compositions, forward and gradients.

float32 and float16 only: the interpreter computes bfloat16 wrongly.  Tiles are small, so that small shapes have full,
partial, near and far tiles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from features import BIASES, FEATURES, MASKS, ROTARY, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Call, check

import fastattn
from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS
from fastattn.triton_kernels import tiles
from fastattn.triton_kernels.attention import attention_forward
from fastattn.triton_kernels.attention_gradients import attention_backward
from fastattn.triton_kernels.tiles import Tile

SMALL = {
    "forward": Tile(32, 16, 4, 2),
    "backward_kv": Tile(16, 32, 4, 1),
    "backward_q": Tile(32, 16, 4, 1),
    "bias_gradient": Tile(16, 16, 4, 1),
}
SHAPE = Shape(heads=2, kv_heads=1, query_length=40, key_length=52)


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    with tiles.override(**SMALL):
        yield


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str) -> None:
    check(Call((feature,), SHAPE), "triton")


@pytest.mark.parametrize(
    "features", [("causal", "t5_encoder"), ("window", "alibi", "rotary"), ("dense_full", "sink")], ids="+".join
)
def test_float16(features: tuple[str, ...]) -> None:
    check(Call(features, SHAPE, torch.float16), "triton")


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


@settings(max_examples=15)
@given(
    features=st.tuples(
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *BIASES]),
        st.sampled_from([None, *BIASES]),
        st.sampled_from([None, *ROTARY]),
        st.sampled_from([None, "softcap", "sink"]),
    ),
    dropout_p=st.sampled_from([0.0, 0.25]),
    query_length=st.integers(1, 40),
    key_length=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_composition(
    features: tuple[str | None, ...], dropout_p: float, query_length: int, key_length: int, seed: int
) -> None:
    names = tuple(dict.fromkeys(name for name in features if name))
    if any(name in ROTARY for name in names):
        key_length = max(key_length, query_length)  # a rotation has no negative positions
    shape = Shape(heads=2, kv_heads=1, query_length=query_length, key_length=key_length)
    check(Call(names, shape, seed=seed, dropout_p=dropout_p), "triton")


def test_same_dropout_as_the_cpu_backend() -> None:
    query, key = torch.zeros(2, 3, 40, 16), torch.zeros(2, 3, 37, 16)
    value = torch.eye(37, 64).expand(2, 3, 37, 64)  # the output is the weights themselves
    outs = []
    for name in ("triton", "cpu", "reference"):
        torch.manual_seed(5)
        outs.append(fastattn.attention(query, key, value, dropout_p=0.3, backend=name))
    kept = [out[..., :37] > 0 for out in outs]
    assert 0.6 < kept[0].float().mean() < 0.8
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


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


def test_gradients_are_bit_identical() -> None:
    call = Call(("causal", "table", "alibi", "dense_full"), SHAPE)
    problem = lower(**_arguments(call))
    out, _, statistics = attention_forward(problem)
    wanted = frozenset(name for name in GRADIENT_FIELDS if getattr(problem, name) is not None)
    grad = torch.randn_like(out)
    runs = [attention_backward(problem, grad, None, out, statistics, wanted) for _ in range(2)]
    for name in wanted:
        assert torch.equal(runs[0][name], runs[1][name]), name


def _arguments(call: Call) -> dict[str, object]:
    mask, bias = fastattn.Causal(), fastattn.ALiBi(fastattn.alibi_slopes(call.shape.heads))
    return {**{name: call.leaves[name].detach() for name in ("query", "key", "value")}, "mask": mask, "bias": bias}


def test_reads_and_writes_stay_inside() -> None:
    """Operands are slices of larger tensors whose surroundings are NaN; nothing of it may reach the result."""
    torch.manual_seed(0)

    def guarded(*shape: int) -> torch.Tensor:
        whole = torch.full([n + 6 for n in shape[:-1]] + [shape[-1] + 8], float("nan"))
        inner = whole[tuple(slice(3, 3 + n) for n in shape[:-1])][..., 4 : 4 + shape[-1]]
        inner.copy_(torch.randn(shape))
        return inner

    query, key, value = guarded(2, 2, 33, 24), guarded(2, 2, 41, 24), guarded(2, 2, 41, 24)
    bias = guarded(1, 2, 33, 41)
    problem = lower(query, key, value, bias=fastattn.DenseBias(bias), mask=fastattn.Causal())
    copies = {name: getattr(problem, name).contiguous() for name in ("query", "key", "value", "dense_bias")}
    plain = dataclasses.replace(problem, **copies)
    wanted = frozenset({"query", "key", "value", "dense_bias"})
    grad = guarded(2, 2, 33, 24)
    results = []
    for each in (problem, plain):
        out, _, statistics = attention_forward(each)
        results.append([out, statistics, *attention_backward(each, grad, None, out, statistics, wanted).values()])
    for sliced, whole in zip(*results, strict=True):
        assert sliced.isfinite().all()
        assert torch.equal(sliced, whole)


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

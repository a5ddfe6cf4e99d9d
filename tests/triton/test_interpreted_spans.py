"""What blocks of rows see by ids and dense masks, and that the attention kernels go by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from additive_oracle import AdditiveCall
from features import FEATURES, MASKS, Scene, Shape
from oracle import Call, check
from test_interpreted_attention import SMALL
from torch import Tensor

import fastattn
from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS, Problem
from fastattn.triton_kernels import additive, attention, attention_gradients, spans, tiles
from fastattn.triton_kernels.arguments import Mask, Spans
from fastattn.triton_kernels.attention import attention_forward
from fastattn.triton_kernels.attention_gradients import attention_backward
from fastattn.triton_kernels.features import Features
from fastattn.triton_kernels.tiles import Tile

MASKED = tuple(name for name in MASKS if name.startswith(("documents", "bool")))
SHAPE = Shape(heads=4, kv_heads=2, query_length=70, key_length=83)


@pytest.fixture(autouse=True)
def _spans_of_short_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spans, "LEAST_LENGTH", 1)
    with tiles.override(**SMALL):
        yield


def _problem(shape: Shape, **keywords: object) -> Problem:
    query = torch.randn(shape.batch, shape.heads, shape.query_length, shape.head_dim)
    key, value = (torch.randn(shape.batch, shape.kv_heads, shape.key_length, shape.head_dim) for _ in range(2))
    return lower(query, key, value, **keywords)


def _span(seen: Tensor) -> list[int]:
    """Of the rows of seen (rows, columns), by the definition."""
    columns = seen.shape[1]
    places = [row.nonzero().flatten().tolist() for row in seen]
    ends = [(p[0], p[-1] + 1) if p and p == list(range(p[0], p[-1] + 1)) else (columns, 0) for p in places]
    lo, hi = min((p[0] for p in places if p), default=columns), max((p[-1] + 1 for p in places if p), default=0)
    return [lo, hi, max(low for low, _ in ends), min(high for _, high in ends)]


def _check_spans(found: Spans, seen: Tensor) -> None:
    batch, heads = seen.shape[:2]
    for b in range(batch):
        for h in range(heads):
            for n, block in enumerate(seen[b, h].split(16)):
                at = b * found.sb + h * found.sh + 4 * n
                assert found.ptr.flatten()[at : at + 4].tolist() == _span(block), (b, h, n)


@pytest.mark.parametrize("names", [*[(name,) for name in MASKED], ("documents", "bool_blocks")], ids="+".join)
@pytest.mark.parametrize("shape", [SHAPE, Shape(query_length=16, key_length=300), Shape(1, 1, 1, 33, 1)], ids=str)
def test_spans_are_what_blocks_see(names: tuple[str, ...], shape: Shape) -> None:
    scene = Scene(shape, torch.float32, 0, torch.Generator().manual_seed(3))
    features = [FEATURES[name](scene) for name in names]
    masks = [feature.public({})["mask"] for feature in features]
    mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]  # type: ignore[operator]
    problem = _problem(shape, mask=mask)
    found = spans.with_spans(Features(problem).mask, problem, of_keys=True)
    seen = torch.ones(shape.batch, shape.heads, shape.query_length, shape.key_length, dtype=torch.bool)
    for feature in features:
        seen = seen & feature.mask
    _check_spans(found.key_spans, seen)
    _check_spans(found.query_spans, seen.mT)


@pytest.mark.parametrize("name", MASKED)
def test_masks(name: str) -> None:
    check(Call((name,), SHAPE, torch.float16), "triton")


@pytest.mark.parametrize(
    "other", ["causal", "window", "prefix_lm", "t5_decoder", "table", "alibi", "dense_heads", "shaw"]
)
@pytest.mark.parametrize("name", ["documents_sorted", "bool_blocks"])
def test_with_what_has_loops_of_its_own(name: str, other: str) -> None:
    check(Call((name, other), SHAPE), "triton")


def _ids(length: int, *starts: int) -> Tensor:
    ids = torch.zeros(length, dtype=torch.int64)
    ids[list(starts)] = 1
    return ids.cumsum(0)


LENGTH = 128


def _run(problem: Problem) -> list[Tensor]:
    wanted = frozenset(name for name in GRADIENT_FIELDS if getattr(problem, name) is not None)
    out, _, statistics = attention_forward(problem)
    grads = attention_backward(problem, torch.ones_like(out), None, out, statistics, wanted)
    return [out, *grads.values()]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[slice, list[int]], None]:
    """A function that makes the spans of some blocks what they are not."""
    honest = spans.with_spans

    def plant(blocks: slice, span: list[int]) -> None:
        def with_spans(*args: object, **keywords: object) -> Mask:
            mask = honest(*args, **keywords)  # type: ignore[arg-type]
            for kind in (mask.key_spans, mask.query_spans):
                if kind is not None:
                    kind.ptr[:, :, blocks] = torch.tensor(span, dtype=torch.int32)
            return mask

        for module in (attention, attention_gradients, additive):
            monkeypatch.setattr(module, "with_spans", with_spans)

    return plant


@pytest.mark.parametrize(
    "mask",
    [fastattn.Documents(_ids(LENGTH, 64)), fastattn.BoolMask(torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())],
    ids=["documents", "causal"],
)
def test_kernels_go_by_them(mask: fastattn.Mask, planted: Callable[[slice, list[int]], None]) -> None:
    problem = _problem(Shape(1, 2, 1, LENGTH, LENGTH), mask=mask)
    right = _run(problem)
    planted(slice(4, None), [LENGTH, 0, LENGTH, 0])  # the second half of the rows sees nothing
    for less, whole in zip(_run(problem), right, strict=True):
        assert not less[:, :, 64:].any()
        assert whole[:, :, 64:].any()
    planted(slice(None), [0, LENGTH, 0, LENGTH])  # all of them see all
    plain = _run(lower(problem.query, problem.key, problem.value))
    for unmasked, whole, expected in zip(_run(problem), right, plain, strict=True):
        assert torch.equal(unmasked, expected)
        assert not torch.equal(whole, expected)


SHORT = replace(SHAPE, query_length=35, key_length=50, head_dim=3, value_dim=5)


@pytest.mark.parametrize("features", [("documents_sorted", "table"), ("bool_blocks", "dense_heads")], ids="+".join)
def test_additive(features: tuple[str, ...]) -> None:
    with tiles.override(additive=Tile(16, 16, 4, 1)):
        check(AdditiveCall(features, SHORT), "triton")


def test_additive_kernels_go_by_them(planted: Callable[[slice, list[int]], None]) -> None:
    shape = Shape(1, 2, 1, 32, 32, 3, 5)
    leaves = AdditiveCall((), shape).leaves
    mask = fastattn.Documents(_ids(32, 16))

    def run() -> list[Tensor]:
        operands = [leaves[name].clone().requires_grad_() for name in ("query", "key", "value", "weight")]
        out = fastattn.additive_attention(*operands, mask=mask, backend="triton")
        return [out, *torch.autograd.grad(out.sum(), operands[:3])]

    right = run()
    planted(slice(1, None), [32, 0, 32, 0])
    for less, whole in zip(run(), right, strict=True):
        assert not less[:, :, 16:].any()
        assert whole[:, :, 16:].any()


def test_short_calls_have_none() -> None:
    spans.LEAST_LENGTH = 84
    problem = _problem(SHAPE, mask=fastattn.Documents(_ids(70, 20), _ids(83, 20)))
    mask = Features(problem).mask
    assert spans.with_spans(mask, problem) is mask

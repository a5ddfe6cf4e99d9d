"""Mask objects: what they materialize to, how they join, what they print."""

from __future__ import annotations

import pickle

import pytest
import torch
from features import MASKS, Shape
from oracle import Call

import fastattn
from fastattn import BoolMask, Causal, Documents, KeyLengths, PrefixLM, SlidingWindow

SHAPES = [Shape(), Shape(query_length=5, key_length=3), Shape(query_length=1, key_length=7), Shape(query_length=0)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.query_length}x{s.key_length}")
@pytest.mark.parametrize("offset", [None, 0, 4, torch.tensor([2, -1])], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_materialize(name: str, offset: int | torch.Tensor | None, shape: Shape) -> None:
    call = Call((name,), shape, offset=offset)
    mask = call.keywords(call.leaves)["mask"]
    got = mask.materialize(shape.query_length, shape.key_length, offset)
    assert got.dtype == torch.bool
    full = (shape.batch, shape.heads, shape.query_length, shape.key_length)
    assert torch.equal(got.expand(full), call.visible(call.leaves))


def test_causal_pictures() -> None:
    """The two pictures of the docstring of `fastattn.attention`."""
    last = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    first = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert Causal().materialize(3, 5)[0, 0].int().tolist() == last
    assert Causal().materialize(3, 5, query_offset=0)[0, 0].int().tolist() == first


def test_window_is_inclusive_on_both_sides() -> None:
    rows = SlidingWindow(1, 2).materialize(4, 4)[0, 0].int().tolist()
    assert rows == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert SlidingWindow(None, None).materialize(3, 3).all()


def test_prefix_lm() -> None:
    rows = PrefixLM(torch.tensor([2])).materialize(4, 4)[0, 0].int().tolist()
    assert rows == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


CONJUNCTIONS = [
    ("causal", "window_left"),
    ("window", "window_left"),
    ("window_right", "causal"),
    ("key_lengths", "prefix_lm"),
    ("prefix_lm", "window"),
    ("documents", "documents_sorted"),
    ("bool_full", "bool_keys"),
    ("causal", "key_lengths", "documents", "bool_matrix", "window"),
]


@pytest.mark.parametrize("names", CONJUNCTIONS, ids="&".join)
def test_conjunction(names: tuple[str, ...]) -> None:
    call = Call(names)
    mask = call.keywords(call.leaves)["mask"]
    got = mask.materialize(call.shape.query_length, call.shape.key_length)
    assert torch.equal(got.expand(2, 4, -1, -1), call.visible(call.leaves))
    # joined in any order and nesting
    parts = [feature.public({})["mask"] for feature in call.features]
    reverse = parts[-1]
    for part in reversed(parts[:-1]):
        reverse = part & reverse
    assert torch.equal(reverse.materialize(33, 49).expand(2, 4, -1, -1), call.visible(call.leaves))


def test_two_of_a_kind() -> None:
    """Two masks of the same kind narrow each other; the second does not replace the first."""
    a, b = torch.tensor([3, 6]), torch.tensor([5, 1])
    both = KeyLengths(a) & KeyLengths(b)
    assert both.materialize(8, 8)[:, 0, 0].sum(-1).tolist() == [3, 1]
    both = PrefixLM(a) & PrefixLM(b)
    want = PrefixLM(a).materialize(8, 8) & PrefixLM(b).materialize(8, 8)
    assert torch.equal(both.materialize(8, 8), want)
    ids_a, ids_b = torch.tensor([[0, 0, 1, 1, 2]]), torch.tensor([[5, 6, 5, 5, 5], [1, 1, 1, 2, 2]])
    both = Documents(ids_a) & Documents(ids_b)
    want = Documents(ids_a).materialize(5, 5) & Documents(ids_b).materialize(5, 5)
    assert torch.equal(both.materialize(5, 5), want)
    three = both & Documents(torch.tensor([1, 1, 1, 1, 0]))
    assert torch.equal(three.materialize(5, 5), want & Documents(torch.tensor([1, 1, 1, 1, 0])).materialize(5, 5))


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal(), "Causal()"),
        (SlidingWindow(3, None), "SlidingWindow(left=3, right=None)"),
        (KeyLengths(torch.tensor([1, 2])), "KeyLengths(batch=2)"),
        (PrefixLM(torch.tensor([1, 2, 3])), "PrefixLM(batch=3)"),
        (Documents(torch.zeros(4, dtype=torch.int64)), "Documents(query_ids=(1, 4), key_ids=(1, 4))"),
        (BoolMask(torch.ones(2, 1, 1, 5, dtype=torch.bool)), "BoolMask((2, 1, 1, 5))"),
        (Causal() & SlidingWindow(2, 0) & KeyLengths(torch.tensor([1])),
         "Causal() & SlidingWindow(left=2, right=0) & KeyLengths(batch=1)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_repr(mask: fastattn.Mask, text: str) -> None:
    assert repr(mask) == text


def test_and_with_something_else() -> None:
    with pytest.raises(TypeError, match="&"):
        Causal() & torch.ones(1, dtype=torch.bool)  # type: ignore[operator]


def test_pickle() -> None:
    for name in MASKS:
        call = Call((name,))
        mask = call.keywords(call.leaves)["mask"]
        again = pickle.loads(pickle.dumps(mask & Causal()))
        assert torch.equal(again.materialize(33, 49), (mask & Causal()).materialize(33, 49))
        assert repr(again) == repr(mask & Causal())


def test_lengths_may_be_of_any_integer_dtype(backend: str, device: str) -> None:
    q = torch.randn(2, 1, 4, 8, device=device)
    want = fastattn.attention(q, q, q, mask=KeyLengths(torch.tensor([3, 2], device=device)), backend=backend)
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        mask = KeyLengths(torch.tensor([3, 2], dtype=dtype, device=device))
        assert torch.equal(fastattn.attention(q, q, q, mask=mask, backend=backend), want)

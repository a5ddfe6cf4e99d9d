"""scaled_dot_product_attention against torch's: ranks, masks, gradients, gqa, scale, broadcasting, errors."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

pytestmark = pytest.mark.usefixtures("only_backend")


def _compare(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **keywords: Any) -> None:
    """Output and gradients of both, in float64.

    torch runs its documented formula: its fused CPU kernel gives NaN for a causal mask with a scale <= 0, and reads a
    value that is longer than key without a word.
    """
    mask_grad = attn_mask is not None and attn_mask.dtype.is_floating_point
    results = []
    for function in (fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        mask = attn_mask.detach().clone().requires_grad_() if mask_grad else attn_mask
        with sdpa_kernel(SDPBackend.MATH):
            out = function(*leaves, mask, **keywords)
        torch.manual_seed(1)
        if mask_grad:
            leaves.append(mask)
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape, dtype=out.dtype))
        results.append((out, *grads))
    for name, got, want in zip(("out", "dq", "dk", "dv", "dmask"), *results, strict=False):
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, torch gives {tuple(want.shape)}"
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def _randn(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def test_signature_is_that_of_torch() -> None:
    ours = inspect.signature(fastattn.scaled_dot_product_attention).parameters
    assert list(ours) == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    kinds = [p.kind for p in ours.values()]
    assert kinds[:6] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 6
    assert kinds[6:] == [inspect.Parameter.KEYWORD_ONLY] * 2
    defaults = [p.default for p in ours.values()][3:]
    assert defaults == [None, 0.0, False, None, False]


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "bool_full", "float_full"])
def test_ranks(lead: tuple[int, ...], kind: str) -> None:
    q, k, v = _randn(*lead, 5, 4), _randn(*lead, 7, 4), _randn(*lead, 7, 6)
    size = (*lead, 5, 7) if kind.endswith("full") else (5, 7)
    mask = torch.rand(size) < 0.7 if kind.startswith("bool") else _randn(*size) if kind.startswith("float") else None
    _compare(q, k, v, mask, is_causal=kind == "causal")


MASK_SHAPES = [
    (),
    (7,),
    (1, 7),
    (5, 1),
    (5, 7),
    (3, 5, 7),
    (1, 5, 7),
    (3, 1, 7),
    (2, 1, 1, 7),
    (2, 3, 5, 7),
    (1, 3, 5, 7),
    (2, 1, 5, 7),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_mask_shapes(shape: tuple[int, ...]) -> None:
    q, k, v = _randn(2, 3, 5, 4), _randn(2, 3, 7, 4), _randn(2, 3, 7, 4)
    # torch's fused CPU kernel takes no 0-dimensional mask; the formula does
    wide = shape if len(shape) >= 2 else (1,) * (2 - len(shape)) + shape
    for mask in (torch.rand(shape) < 0.7, _randn(*shape)):
        got = fastattn.scaled_dot_product_attention(q, k, v, mask)
        want = F.scaled_dot_product_attention(q, k, v, mask.reshape(wide))
        torch.testing.assert_close(got, want)
    _compare(q, k, v, _randn(*wide))


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 3, 1, 7), (4, 2, 1, 5, 7)], ids=str)
def test_a_mask_with_leading_dimensions_of_its_own(shape: tuple[int, ...]) -> None:
    """Where torch's formula raises, they broadcast like the others'."""
    operands = _randn(1, 3, 5, 4), _randn(1, 3, 7, 4), _randn(1, 3, 7, 4)
    for mask in (torch.rand(shape) < 0.7, _randn(*shape)):
        got = fastattn.scaled_dot_product_attention(*operands, mask)
        want = F.scaled_dot_product_attention(*(x.expand(*shape[:-3], -1, -1, -1) for x in operands), mask)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 5), (3, 9), (9, 3), (1, 8), (8, 1)])
def test_causal_is_top_left(length: int, keys: int) -> None:
    _compare(_randn(2, 3, length, 4), _randn(2, 3, keys, 4), _randn(2, 3, keys, 4), is_causal=True)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0, -0.5, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_scale(scale: float | None, is_causal: bool) -> None:
    _compare(_randn(2, 3, 5, 4), _randn(2, 3, 7, 4), _randn(2, 3, 7, 4), scale=scale, is_causal=is_causal)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (8, 2)])
def test_enable_gqa(heads: int, kv_heads: int) -> None:
    q, k, v = _randn(2, heads, 5, 4), _randn(2, kv_heads, 7, 4), _randn(2, kv_heads, 7, 4)
    _compare(q, k, v, enable_gqa=True)
    _compare(q, k, v, is_causal=True, enable_gqa=True)
    _compare(q, k, v, _randn(2, heads, 5, 7), enable_gqa=True)
    _compare(q[0], k[0], v[0], enable_gqa=True)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4)),
        ((1, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 4)),
        ((2, 1, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        ((2, 3, 5, 4), (3, 7, 4), (3, 7, 4)),
        ((2, 3, 5, 4), (7, 4), (7, 4)),
        ((5, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 1, 7, 6)),
        ((4, 1, 3, 5, 4), (1, 2, 3, 7, 4), (1, 2, 3, 7, 4)),
    ],
    ids=str,
)
def test_broadcast_leading_dimensions(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    _compare(_randn(*q), _randn(*k), _randn(*v))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 4)),
        ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 4)),
        ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 4)),
        ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 4)),
        ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 0)),
    ],
    ids=str,
)
def test_empty(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    _compare(_randn(*q), _randn(*k), _randn(*v))


def test_wholly_masked_rows_are_zero() -> None:
    q, k, v = _randn(2, 3, 5, 4), _randn(2, 3, 7, 4), _randn(2, 3, 7, 4)
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[[0, 3]] = False
    _compare(q, k, v, keep)
    out = fastattn.scaled_dot_product_attention(q, k, v, torch.zeros(5, 7).masked_fill(~keep, -math.inf))
    assert (out[:, :, [0, 3]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_float32_masks(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, s, 8).to(dtype) for s in (5, 7, 7))
    mask = torch.randn(5, 7)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    for m in (mask, mask.to(dtype)):
        got = fastattn.scaled_dot_product_attention(q, k, v, m)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, atol=8 * torch.finfo(dtype).eps, rtol=0)


def test_dropout() -> None:
    q = torch.zeros(2, 3, 64, 4)
    v = torch.eye(64).expand(2, 3, 64, 64)
    out = fastattn.scaled_dot_product_attention(q, q, v, dropout_p=0.25) * 64
    kept = out != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 4 / 3))
    assert (fastattn.scaled_dot_product_attention(q, q, v, dropout_p=1.0) == 0).all()


def test_memory_layout_follows_the_query() -> None:
    q, k, v = (torch.randn(2, s, 3, 4).transpose(1, 2) for s in (5, 7, 7))
    got, want = (f(q, k, v) for f in (fastattn.scaled_dot_product_attention, F.scaled_dot_product_attention))
    if fastattn.last_call().backend != "reference":
        assert got.stride() == want.stride()


ERRORS: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = {
    "mask and is_causal": ((_randn(2, 5, 4),) * 3, {"attn_mask": _randn(5, 5), "is_causal": True}),
    "mask and is_causal, four dimensions": ((_randn(2, 3, 5, 4),) * 3, {"attn_mask": _randn(5, 5), "is_causal": True}),
    "one dimension": ((_randn(4), _randn(4), _randn(4)), {}),
    "integer mask": ((_randn(2, 5, 4),) * 3, {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}),
    "half mask of a double query": ((_randn(2, 5, 4),) * 3, {"attn_mask": torch.ones(5, 5).half()}),
    "half mask of a double query, four dimensions": ((_randn(2, 3, 5, 4),) * 3, {"attn_mask": torch.ones(5, 5).half()}),
    "mixed dtypes": ((_randn(2, 5, 4), _randn(2, 5, 4).float(), _randn(2, 5, 4)), {}),
    "head dimensions": ((_randn(2, 3, 5, 4), _randn(2, 3, 5, 6), _randn(2, 3, 5, 4)), {}),
    "key and value lengths": ((_randn(2, 3, 5, 4), _randn(2, 3, 5, 4), _randn(2, 3, 6, 4)), {}),
    "batches": ((_randn(2, 3, 5, 4), _randn(4, 3, 5, 4), _randn(4, 3, 5, 4)), {}),
    "heads without gqa": ((_randn(2, 4, 5, 4), _randn(2, 2, 5, 4), _randn(2, 2, 5, 4)), {}),
    "heads with gqa": ((_randn(2, 4, 5, 4), _randn(2, 3, 5, 4), _randn(2, 3, 5, 4)), {"enable_gqa": True}),
    "mask shape": ((_randn(2, 3, 5, 4),) * 3, {"attn_mask": _randn(4, 5)}),
    "dropout below 0": ((_randn(2, 3, 5, 4),) * 3, {"dropout_p": -0.1}),
    "dropout above 1": ((_randn(2, 3, 5, 4),) * 3, {"dropout_p": 1.1}),
    "integer query": ((torch.ones(2, 3, 5, 4, dtype=torch.int64),) * 3, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_raises_where_torch_does(name: str) -> None:
    operands, keywords = ERRORS[name]
    # the fused CPU kernel accepts a value longer than key, the plain formula a negative dropout_p
    torch_raises = 0
    for backends in ([SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        with sdpa_kernel(backends):
            try:
                F.scaled_dot_product_attention(*operands, **keywords)
            except (RuntimeError, ValueError, TypeError):
                torch_raises += 1
    assert torch_raises
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        fastattn.scaled_dot_product_attention(*operands, **keywords)


def test_torch_function_subclasses_reach_torch() -> None:
    """CausalBias, nested tensors and subclasses are torch's to handle."""
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = (torch.randn(2, 3, s, 4) for s in (5, 7, 7))
    got = fastattn.scaled_dot_product_attention(q, k, v, causal_lower_right(5, 7))
    want = fastattn.attention(q, k, v, mask=fastattn.Causal())
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    nested = torch.nested.nested_tensor([torch.randn(3, 5, 4), torch.randn(3, 2, 4)])
    assert fastattn.scaled_dot_product_attention(nested, nested, nested).is_nested


@given(data=st.data())
def test_random(data: st.DataObject) -> None:
    """Any ranks, sizes, mask and flags that torch accepts."""
    draw = data.draw
    lead = draw(st.sampled_from([(), (2,), (2, 3), (1, 3), (2, 1, 3)]))
    length, keys, dim, value_dim = (draw(st.sampled_from([1, 2, 5, 9, 33])) for _ in range(4))
    torch.manual_seed(draw(st.integers(0, 1000)))
    q, k, v = _randn(*lead, length, dim), _randn(*lead, keys, dim), _randn(*lead, keys, value_dim)
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    shape = [n if draw(st.booleans()) else 1 for n in (*lead, length, keys)]
    mask = None
    if kind in ("bool", "float"):
        mask = torch.rand(shape) < 0.7 if kind == "bool" else _randn(*shape)
    _compare(q, k, v, mask, is_causal=kind == "causal", scale=draw(st.sampled_from([None, 0.3, -1.0, 0.0])))

"""What is masked is as if it were not there: wholly masked rows, NaN and infinity behind a mask, extreme biases."""

from __future__ import annotations

import math

import pytest
import torch
from features import Shape
from oracle import Call, check
from torch import Tensor

import fastattn

BAD = [math.nan, math.inf, -math.inf]
S = 40


def _masks() -> dict[str, tuple[fastattn.Mask, Tensor]]:
    """Each kind of mask with the keys, of 40, that no query of 40 sees."""
    keys = torch.arange(S)
    dense = torch.rand(2, 3, S, S, generator=torch.Generator().manual_seed(0)) < 0.7
    dense[..., 17:29] = False
    ids = torch.where((keys >= 17) & (keys < 29), 9, 1)
    middle = (keys >= 17) & (keys < 29)
    return {
        "key_lengths": (fastattn.KeyLengths(torch.tensor([23, 23])), keys >= 23),
        "key_lengths+causal": (fastattn.KeyLengths(torch.tensor([23, 23])) & fastattn.Causal(), keys >= 23),
        "documents": (fastattn.Documents(torch.ones(S, dtype=torch.int64), ids), middle),
        "bool": (fastattn.BoolMask(dense), middle),
        "bool_rows": (fastattn.BoolMask((keys < 23) & (keys >= keys[:, None] - 9)), keys >= 23),
        "bool_keys": (fastattn.BoolMask(~middle), middle),
        "bool+window": (fastattn.BoolMask(~middle) & fastattn.SlidingWindow(30, 5), middle),
    }


def _grads(
    backend: str, leaves: list[Tensor], mask: fastattn.Mask | None, grad_out: Tensor, **keywords: object
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    q, k, v, *biases = leaves
    if biases:
        keywords["bias"] = fastattn.DenseBias(biases[0])
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend, **keywords)
    seen = lse.isfinite()
    grads = torch.autograd.grad([out, lse], leaves, [grad_out, torch.where(seen, 1.0, math.nan).to(lse)])
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kind", list(_masks()))
@pytest.mark.parametrize("features", ["plain", "softcap", "rotary", "table"])
def test_masked_keys_do_not_leak(kind: str, features: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """NaN and infinities in K, V and the bias where nothing sees them change no bit of any result."""
    mask, hidden = _masks()[kind]
    torch.manual_seed(3)
    q, k, v, grad_out = (torch.randn(2, 3, S, 8, dtype=dtype) for _ in range(4))
    bias = torch.randn(2, 3, S, S, dtype=dtype)
    keywords: dict[str, object] = {
        "plain": {},
        "softcap": {"softcap": 2.0},
        "rotary": {"rotary": fastattn.Rotary(torch.randn(S, 4).cos(), torch.randn(S, 4).sin())},
        "table": {"sink": torch.zeros(3)},
    }[features]
    clean = _grads(backend, [q, k, v, bias], mask, grad_out, **keywords)
    for bad in BAD:
        k[:, :, hidden, 0::3], v[:, :, hidden, 1::3], bias[..., hidden] = bad, bad, bad
        spoiled = _grads(backend, [q, k, v, bias], mask, grad_out, **keywords)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), clean, spoiled, strict=True):
            assert a.isfinite().all() or name == "lse"
            assert torch.equal(a, b), f"{name} changed with {bad} in masked keys"
        assert (spoiled[3][:, :, hidden] == 0).all()
        assert (spoiled[4][:, :, hidden] == 0).all()
        assert (spoiled[5][..., hidden] == 0).all()


def test_causal_future_does_not_leak(backend: str, device: str) -> None:
    """NaN in the last key: only the last query sees it."""
    torch.manual_seed(4)
    q, k, v, grad_out = (torch.randn(1, 2, S, 8) for _ in range(4))
    clean = _grads(backend, [q, k, v], fastattn.Causal(), grad_out)
    for bad in BAD:
        for spoil_key in (True, False):
            k2, v2 = k.clone(), v.clone()
            (k2 if spoil_key else v2)[:, :, -1, 3] = bad
            out, lse, dq, *_ = _grads(backend, [q, k2, v2], fastattn.Causal(), grad_out)
            assert torch.equal(out[:, :, :-1], clean[0][:, :, :-1])
            assert torch.equal(lse[:, :, :-1], clean[1][:, :, :-1])
            assert torch.equal(dq[:, :, :-1], clean[2][:, :, :-1])
            if not spoil_key or math.isnan(bad):
                assert not out[:, :, -1].isfinite().all(), "what a query does see propagates"


def test_visible_nan_reaches_the_rows_that_see_it(backend: str, device: str) -> None:
    torch.manual_seed(4)
    q, k, v = (torch.randn(1, 2, S, 8) for _ in range(3))
    for x in (k, v):
        spoiled = x.clone()
        spoiled[:, :, 10, 3] = math.nan
        args = (q, spoiled, v) if x is k else (q, k, spoiled)
        out = fastattn.attention(*args, mask=fastattn.Causal(), backend=backend)
        assert out[:, :, 10:].isnan().any(-1).all()
        assert out[:, :, :10].isfinite().all()


EMPTY_ROWS = {
    "bool": lambda rows: {"mask": fastattn.BoolMask(~rows[:, None])},
    "bool_full": lambda rows: {"mask": fastattn.BoolMask((~rows[:, None]).expand(2, 3, S, S).contiguous())},
    "documents": lambda rows: {"mask": fastattn.Documents(torch.where(rows, 7, 1), torch.ones(S, dtype=torch.int64))},
    "bias": lambda rows: {"bias": fastattn.DenseBias(torch.zeros(S, S).masked_fill(rows[:, None], -math.inf))},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", EMPTY_ROWS)
def test_wholly_masked_rows(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Their output is 0 and lse +inf, and NaN in their q, grad_out and grad_lse reaches nothing."""
    rows = torch.zeros(S, dtype=torch.bool)
    rows[[0, 5, 6, 7, 39]] = True
    keywords = EMPTY_ROWS[kind](rows)
    torch.manual_seed(5)
    q, k, v, grad_out = (torch.randn(2, 3, S, 8, dtype=dtype) for _ in range(4))
    clean = _grads(backend, [q, k, v], keywords.pop("mask", None), grad_out, **keywords)
    for bad in BAD:
        q[:, :, rows], grad_out[:, :, rows] = bad, bad
        keywords = EMPTY_ROWS[kind](rows)
        spoiled = _grads(backend, [q, k, v], keywords.pop("mask", None), grad_out, **keywords)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), clean, spoiled, strict=True):
            assert torch.equal(a, b), f"{name} changed with {bad} in wholly masked rows"
        assert (spoiled[0][:, :, rows] == 0).all()
        assert (spoiled[1][:, :, rows] == math.inf).all()
        assert (spoiled[2][:, :, rows] == 0).all()


def test_everything_masked(backend: str, device: str) -> None:
    q, k, v, grad_out = (torch.randn(2, 3, S, 8) for _ in range(4))
    for mask in (
        fastattn.KeyLengths(torch.zeros(2, dtype=torch.int64)),
        fastattn.BoolMask(torch.zeros(1, dtype=torch.bool)),
        fastattn.SlidingWindow(0, 3) & fastattn.KeyLengths(torch.tensor([0, 0])),
    ):
        out, lse, *grads = _grads(backend, [q, k, v], mask, grad_out)
        assert (out == 0).all()
        assert (lse == math.inf).all()
        assert all((g == 0).all() for g in grads)


def test_wholly_masked_rows_with_a_sink(backend: str, device: str) -> None:
    """All the weight is on the sink: out 0, lse = sink, d sink = sum of grad_lse over the empty rows."""
    q, k, v = (torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3))
    sink = torch.randn(3, requires_grad=True)
    out, lse = fastattn.attention(
        q, k, v, mask=fastattn.KeyLengths(torch.tensor([0, 0])), sink=sink, return_lse=True, backend=backend
    )
    assert (out == 0).all()
    torch.testing.assert_close(lse, sink[None, :, None].expand_as(lse), rtol=0, atol=1e-6)
    grad_lse = torch.randn_like(lse)
    grads = torch.autograd.grad([out, lse], [q, k, v, sink], [torch.full_like(out, 2.0), grad_lse])
    assert all((g == 0).all() for g in grads[:3])
    torch.testing.assert_close(grads[3], grad_lse.sum((0, 2)))


@pytest.mark.parametrize("shape", [Shape(query_length=70, key_length=20), Shape(query_length=129, key_length=65)])
@pytest.mark.parametrize(
    "features", [("causal",), ("causal", "sink"), ("window", "alibi"), ("window_diagonal", "table")]
)
def test_more_queries_than_keys(features: tuple[str, ...], shape: Shape, backend: str, device: str) -> None:
    """With the last query on the last key the first Sq - Sk queries see nothing."""
    call = Call(features, shape)
    check(call, backend, device)
    out = call.fused(backend, device).out
    assert (out[:, :, : shape.query_length - shape.key_length - 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_finfo_min_is_a_number(dtype: torch.dtype, backend: str, device: str) -> None:
    """finfo.min masks a key beside a real score, and a row of nothing else is the uniform average."""
    torch.manual_seed(6)
    q, k, v = (torch.randn(2, 2, 12, 8, dtype=dtype) for _ in range(3))
    low = torch.finfo(dtype).min
    bias = torch.zeros(12, 12, dtype=dtype)
    bias[3], bias[:, 7] = low, low
    out, lse = fastattn.attention(q, k, v, bias=fastattn.DenseBias(bias), return_lse=True, backend=backend)
    assert lse.isfinite().all()
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    uniform = dtype in (torch.float32, torch.float64, torch.bfloat16)  # a float16 score still shows beside -65504
    if uniform:
        torch.testing.assert_close(out[:, :, 3].double(), v.double().mean(2), **tolerance)
    seen = torch.ones(12, dtype=torch.bool)
    seen[7] = False
    want = fastattn.attention(q, k, v, mask=fastattn.BoolMask(seen), backend="reference")
    rows = torch.arange(12) != 3
    torch.testing.assert_close(out[:, :, rows].double(), want[:, :, rows].double(), **tolerance)


def test_minus_infinity_equals_a_bool_mask(backend: str, device: str) -> None:
    torch.manual_seed(7)
    q, k, v, grad_out = (torch.randn(2, 3, S, 8) for _ in range(4))
    seen = torch.rand(2, 1, S, S) < 0.5
    bias = torch.zeros(2, 1, S, S).masked_fill(~seen, -math.inf)
    *a, dbias = _grads(backend, [q, k, v, bias], None, grad_out)
    b = _grads(backend, [q, k, v], fastattn.BoolMask(seen), grad_out)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert (dbias[~seen] == 0).all()
    assert dbias.isfinite().all()


@pytest.mark.parametrize("heads", [1, 3])
def test_what_minus_infinity_hides_does_not_leak(heads: int, backend: str, device: str) -> None:
    """A dense bias hides keys, and rows from all keys, in tiles that no mask touches."""
    torch.manual_seed(8)
    q, k, v, grad_out = (torch.randn(2, 3, S, 8) for _ in range(4))
    keys, rows = (torch.arange(S) >= 17) & (torch.arange(S) < 29), torch.arange(S) == 5
    bias = torch.randn(2, heads, S, S).masked_fill(keys | rows[:, None], -math.inf)
    clean = _grads(backend, [q, k, v, bias], None, grad_out)
    for bad in BAD:
        k[:, :, keys, 0::3], v[:, :, keys, 1::3], q[:, :, rows], grad_out[:, :, rows] = bad, bad, bad, bad
        spoiled = _grads(backend, [q, k, v, bias], None, grad_out)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dbias"), clean, spoiled, strict=True):
            assert a.isfinite().all() or name == "lse"
            assert torch.equal(a, b), f"{name} changed with {bad} in what is hidden"
        for x in (spoiled[3], spoiled[4]):
            assert (x[:, :, keys] == 0).all()
        assert (spoiled[2][:, :, rows] == 0).all()


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [(), ("causal", "sink"), ("dense_full",)], ids="+".join)
def test_large_logits(features: tuple[str, ...], dtype: torch.dtype, size: float, backend: str, device: str) -> None:
    """Scores up to 1e4 overflow exp in every dtype if the maximum is not subtracted."""
    call = Call(features, dtype=dtype)
    call.leaves["query"] = call.leaves["query"] * (size / 4)
    check(call, backend, device)
    result = call.fused(backend, device)
    assert result.out.isfinite().all()
    assert all(g.isfinite().all() for g in result.grads.values())


def test_a_constant_added_to_all_scores_changes_nothing(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, 3, S, 8) for _ in range(3))
    a, lse_a = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    shift = fastattn.DenseBias(torch.tensor(64.0))
    b, lse_b = fastattn.attention(q, k, v, bias=shift, return_lse=True, backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse_a + 64.0, lse_b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min])
def test_gradients_of_a_row_of_equal_huge_scores(low: float, backend: str, device: str) -> None:
    """Every key of such a row weighs 1 / n, also in the backward: beside -1e9, log(n) is less than rounding."""
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, 40, 16, device=device) for _ in range(3)]
    bias = torch.randn(40, 40, device=device)
    bias[3] = low
    bias[9, :20], bias[9, 20:] = low, float("-inf")
    grad = torch.randn(2, 2, 40, 16, device=device)

    def gradients(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v, b = (x.to(dtype).requires_grad_() for x in (*leaves, bias))
        out = fastattn.attention(q, k, v, bias=fastattn.DenseBias(b), backend=name)
        return torch.autograd.grad(out, (q, k, v, b), grad.to(dtype))

    for ours, exact in zip(gradients(backend, torch.float32), gradients("reference", torch.float32), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=2e-5)

"""NaN and infinities among the operands of the native CPU kernels: packed as zeros, and put right where seen."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastattn import Causal, attention, native
from tests.test_cpu_backend import DTYPES, native_run, plain, random

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))

LEAKS = ("key", "value", "query", "grad_out", "dense_bias")


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("size", [(70, 130, 40), (140, 200, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", LEAKS)
def test_masked_rows_never_leak(dtype: torch.dtype, where: str, size: tuple[int, int, int], rotated: bool) -> None:
    """NaN and infinity in rows nobody sees change no bit of anything that is seen."""
    sq, sk, d = size
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    visible[..., 100] = visible[..., 3] = False  # hidden keys
    visible[:, :, 11] = visible[:, :, 64] = False  # rows that see nothing
    bias = random(1, 1, sq, sk, seed=30, dtype=parameter)
    problem = plain(dtype, sq, sk, d=d, dense_mask=visible, dense_bias=bias)
    if rotated:
        cos, sin = (random(1, sk, d // 2, seed=seed, dtype=parameter) for seed in (32, 33))
        problem = dataclasses.replace(problem, query_cos=cos, query_sin=sin, key_cos=cos, key_sin=sin)
    grad_out = random(2, 4, sq, d, seed=31, dtype=dtype)
    clean = native_run(problem, grad_out, None)
    poisoned = {name: getattr(problem, name).clone() for name in ("query", "key", "value", "dense_bias")}
    poisoned["grad_out"] = grad_out.clone()
    if where in ("key", "value"):
        poisoned[where][:, :, 100, 5], poisoned[where][:, :, 3] = float("nan"), float("inf")
    elif where == "dense_bias":
        poisoned[where][..., 100], poisoned[where][..., 3] = float("nan"), float("inf")
    else:
        poisoned[where][:, :, 11], poisoned[where][:, :, 64, 0] = float("nan"), float("-inf")
    grad_out = poisoned.pop("grad_out")
    out, lse, grads = native_run(dataclasses.replace(problem, **poisoned), grad_out, None)
    assert torch.equal(out, clean[0])
    assert torch.equal(lse, clean[1])
    for name, grad in grads.items():
        assert torch.equal(grad, clean[2][name]), name


@pytest.mark.parametrize("field", ["key", "value", "query"])
def test_visible_rows_propagate(field: str) -> None:
    """A NaN reaches the rows that see it, and those alone."""
    problem = plain(torch.float32, 40, 40, window_right=0)
    tensor = getattr(problem, field).clone()
    tensor[:, :, 25, 2] = float("nan")
    problem = dataclasses.replace(problem, **{field: tensor})
    out, _, _ = torch.ops.fastattn.cpu_forward(*problem.arguments())
    touched = out.isnan().any(dim=-1)
    rows = torch.arange(40)
    assert torch.equal(touched, (rows == 25 if field == "query" else rows >= 25).expand_as(touched))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("column", [0, 13, 16, 31, 63])
def test_one_bad_number_of_a_query_stays_with_the_keys_it_sees(column: int, dtype: torch.dtype) -> None:
    """NaN and infinities in one column of a query or an output gradient, among enough rows to be packed in blocks: the
    gradients of keys that it does not see change by no bit."""
    torch.manual_seed(5)
    q, k, v, grad_out = (torch.randn(1, 2, 160, 64, dtype=dtype) for _ in range(4))

    def key_grads(query: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in (k, v)]
        out = attention(query, *leaves, mask=Causal(), backend="cpu")
        return torch.autograd.grad(out, leaves, grad)

    clean = key_grads(q, grad_out)
    for bad in (math.nan, math.inf, -math.inf):
        for spoil_query in (True, False):
            query, grad = q.clone(), grad_out.clone()
            (query if spoil_query else grad)[:, :, 70, column] = bad
            found = key_grads(query, grad)
            assert not found[0][:, :, :71].isfinite().all(), "what a query does see propagates"
            for a, b in zip(clean, found, strict=True):
                assert torch.equal(a[:, :, 71:], b[:, :, 71:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_bad_numbers_among_keys_that_everyone_sees(name: str, dtype: torch.dtype) -> None:
    """In whatever tile and block of rows they are, they reach what the formula takes them to: a query its row, a value
    its column, a key the rows for which its score is NaN or +inf.  A query changes no bit of the rest."""
    problem = plain(dtype, 200, 600, b=1, hq=2, hk=2, d=64)
    nothing = torch.zeros_like(problem.query)
    clean = native_run(problem, nothing, None)[0]
    for bad in (math.nan, -math.inf):
        for row in (5, 77, 199):
            tensor = getattr(problem, name).clone()
            tensor[:, 1, row, 13] = bad
            out = native_run(dataclasses.replace(problem, **{name: tensor}), nothing, None)[0]
            reached = torch.zeros(1, 2, 200, 64, dtype=torch.bool)
            if name == "query":
                reached[:, 1, row] = True
            elif name == "value":
                reached[:, 1, :, 13] = True
            else:
                reached[:, 1] = math.isnan(bad) | (problem.query[:, 1, :, 13:14] < 0)
            assert not out[reached].isfinite().any()
            if name == "key":  # the other rows are as if it were not there
                rest = torch.arange(600) != row
                fewer = dataclasses.replace(problem, key=problem.key[:, :, rest], value=problem.value[:, :, rest])
                expected = torch.cat((clean[:, :1], native_run(fewer, nothing, None)[0][:, 1:]), dim=1)
            else:
                expected = clean
            tolerance = 0.0 if name == "query" else 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(out[~reached], expected[~reached], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_numbers_out_of_reach_of_a_slope(dtype: torch.dtype) -> None:
    """Zero times infinity is NaN in the formula, however far away; what nobody sees changes no bit."""
    slopes = torch.tensor([[4.0, 4.0]])
    problem = plain(dtype, 300, 1500, b=1, hq=2, hk=2, d=32, slopes=slopes, key_lengths=torch.tensor([1400]))
    nothing = torch.zeros_like(problem.query)
    clean = native_run(problem, nothing, None)[0]
    for name in ("key", "value"):
        for bad in (math.nan, math.inf):
            tensor = getattr(problem, name).clone()
            tensor[:, 1, 1390, 7] = bad
            out = native_run(dataclasses.replace(problem, **{name: tensor}), nothing, None)[0]
            if name == "value":
                assert out[:, 1, :, 7].isnan().all()
                assert torch.equal(out[:, 1, :, :7], clean[:, 1, :, :7])
            elif math.isnan(bad):
                assert out[:, 1].isnan().all()
            assert torch.equal(out[:, 0], clean[:, 0])
            tensor = getattr(problem, name).clone()
            tensor[:, :, 1400:] = bad
            out = native_run(dataclasses.replace(problem, **{name: tensor}), nothing, None)[0]
            assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_lse", [False, True], ids=["output", "lse"])
def test_bad_gradients_out_of_reach_of_a_slope(of_lse: bool, dtype: torch.dtype) -> None:
    """Zero times what is not finite, backward: a row's reaches every key it sees and no other row."""
    slopes = torch.tensor([[4.0, 4.0]])
    problem = plain(dtype, 300, 1500, b=1, hq=2, hk=2, d=32, slopes=slopes, key_lengths=torch.tensor([1400]))
    grad_out, grad_lse = random(1, 2, 300, 32, seed=40, dtype=dtype), random(1, 2, 300, seed=41)
    clean = native_run(problem, grad_out, grad_lse)[2]
    others = torch.arange(300) != 100
    for bad in (math.nan, math.inf):
        if of_lse:
            spoiled = grad_lse.clone()
            spoiled[:, 1, 100] = bad
            grads = native_run(problem, grad_out, spoiled)[2]
            assert torch.equal(grads["value"], clean["value"])
        else:
            spoiled = grad_out.clone()
            spoiled[:, 1, 100, 7] = bad
            grads = native_run(problem, spoiled, grad_lse)[2]
            assert not grads["value"][:, 1, :1400, 7].isfinite().any()
            torch.testing.assert_close(grads["value"][:, 1, :, :7], clean["value"][:, 1, :, :7])
        assert not grads["key"][:, 1, :1400].isfinite().any()
        assert (grads["key"][:, 1, 1400:] == 0).all()
        assert not grads["query"][:, 1, 100].isfinite().any()
        assert torch.equal(grads["query"][:, 1, others], clean["query"][:, 1, others])
        assert grads["slopes"].isfinite().tolist() == [[True, False]]
        for name in ("query", "key", "value"):
            assert torch.equal(grads[name][:, 0], clean[name][:, 0]), name

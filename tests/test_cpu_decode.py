"""A few queries against many keys: what the kernel that reads keys where they lie can get wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastattn import native, reference
from fastattn.problem import Problem
from tests.test_cpu_backend import DTYPES, check, everything, plain, random, widened

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_every_field_at_once(dtype: torch.dtype, queries: int) -> None:
    check(everything(dtype, queries, 700))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_query_heads_that_share_a_key_head(dtype: torch.dtype, rows: int) -> None:
    check(plain(dtype, 1, 300, b=1, hq=rows, hk=1, d=40))
    check(plain(dtype, rows, 300, b=1, hq=1, hk=1, d=64, window_right=0, query_offset=300 - rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 2, 31, 32, 33, 255, 256, 257, 512, 600, 1300])
def test_borders_of_chunks(dtype: torch.dtype, keys: int) -> None:
    check(plain(dtype, 1, keys, b=1, hq=2, hk=1, d=24))
    check(plain(dtype, 1, keys, b=1, hq=2, hk=2, d=64, window_left=290, query_offset=keys - 1))


def test_lengths_from_short_to_long_chunks() -> None:
    """More heads and keys make longer chunks; each size, and keys the chunk is no multiple of."""
    for heads, keys in ((2, 3000), (64, 1500), (64, 2500)):
        problem = plain(torch.float32, 1, keys, b=1, hq=heads, hk=heads, d=16)
        out, lse, _ = torch.ops.fastattn.cpu_forward(*problem.arguments())
        exact, exact_lse = reference.forward(widened(problem))
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_the_thread_count() -> None:
    before = torch.get_num_threads()
    for dtype in DTYPES:
        problem = everything(dtype, 2, 2000)
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(torch.ops.fastattn.cpu_forward(*problem.arguments()))
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hide", ["mask", "bias", "ids"])
def test_hidden_rows_never_leak(dtype: torch.dtype, hide: str) -> None:
    """A hidden key or value of NaN or infinity changes no bit, also where the next head or query sees it."""
    queries, keys = 2, 520
    visible = random(1, 4, queries, keys, seed=7) > -1.0
    visible[..., 40], visible[..., 300], visible[:, 1:, :, 7] = False, False, False
    visible[:, :, 1] = False  # a query that sees nothing
    fields: dict[str, object] = {}
    if hide == "mask":
        fields["dense_mask"] = visible
    elif hide == "bias":
        fields["dense_bias"] = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).to(dtype)
    else:
        visible = visible[:, :1, :1].expand_as(visible)
        fields["query_ids"] = torch.zeros(1, queries, dtype=torch.int64)
        fields["key_ids"] = (~visible[:, 0, 0]).long()
    problem = plain(dtype, queries, keys, b=1, hq=4, hk=2, d=40, **fields)
    clean = torch.ops.fastattn.cpu_forward(*problem.arguments())
    for name in ("key", "value"):
        poisoned = getattr(problem, name).clone()
        poisoned[:, :, 40, 3], poisoned[:, :, 300] = float("nan"), float("inf")
        result = torch.ops.fastattn.cpu_forward(*dataclasses.replace(problem, **{name: poisoned}).arguments())
        # the repaired chunk takes its sums in another order
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 4e-3)
        assert result[0].isfinite().all()
        torch.testing.assert_close(result[0], clean[0], rtol=tolerance, atol=tolerance)
        assert torch.equal(result[1], clean[1])
    seen = problem.value.clone()
    seen[:, :, int(visible[0, 0, 0].nonzero()[0])] = float("nan")
    out, *_ = torch.ops.fastattn.cpu_forward(*dataclasses.replace(problem, value=seen).arguments())
    assert out[:, 0, 0].isnan().all()
    if hide != "ids":
        assert (out[:, :, 1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 20], ids=["in place", "in place, a part left", "copied"])
@pytest.mark.parametrize("features", [{}, {"window_left": 70}, {"key_lengths": [150, 3]}, {"sink": True}], ids=str)
def test_from_a_cache(features: dict, head_dim: int, dtype: torch.dtype) -> None:
    """From a cache laid out (B, S, H, D); what no query may see is NaN."""
    query = random(2, 3, 1, head_dim, seed=1, dtype=dtype)
    cache = [random(2, 300, 3, head_dim, seed=seed, dtype=dtype).transpose(1, 2) for seed in (2, 3)]
    fields: dict[str, object] = {"scale": head_dim**-0.5, "query_offset": 299}
    if "window_left" in features:
        fields["window_left"] = 70
    if "key_lengths" in features:
        fields["key_lengths"] = torch.tensor(features["key_lengths"])
    if "sink" in features:
        fields["sink"] = random(1, 3, seed=4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    problem = Problem(query=query, key=cache[0], value=cache[1], **fields)
    out, lse, _ = torch.ops.fastattn.cpu_forward(*problem.arguments())
    exact, exact_lse = reference.forward(widened(problem))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=tolerance, atol=tolerance)
    hidden = ~reference.visible(problem) if features.keys() & {"window_left", "key_lengths"} else None
    if hidden is not None:
        rows = hidden.expand(2, 3, 1, 300).transpose(-1, -2)
        poisoned = [x.masked_fill(rows, float("nan")) for x in cache]
        again, *_ = torch.ops.fastattn.cpu_forward(
            *dataclasses.replace(problem, key=poisoned[0], value=poisoned[1]).arguments()
        )
        torch.testing.assert_close(again, out, rtol=tolerance, atol=tolerance)

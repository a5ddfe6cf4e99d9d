"""Dropout: its exact mask on every backend, its statistics, and what it depends on."""

from __future__ import annotations

import math

import pytest
import torch
from features import Shape
from oracle import Call

import fastattn
from fastattn import functional, reference


def _weights(backend: str, dropout_p: float, length: int = 64, **keywords: object) -> torch.Tensor:
    """The (B, H, S, S) weights after dropout of a uniform attention, read off with an identity for V."""
    q = torch.zeros(3, 4, length, 8, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64).expand(3, 4, length, length)
    return fastattn.attention(q, q, v, dropout_p=dropout_p, backend=backend, **keywords)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("length", [1, 3, 66, 200])
def test_exact_mask(dropout_p: float, length: int, backend: str, device: str) -> None:
    """Element by element the mask the reference draws from the same seed."""
    torch.manual_seed(11)
    got = _weights(backend, dropout_p, length) != 0
    torch.manual_seed(11)
    assert torch.equal(got, _weights("reference", dropout_p, length) != 0)


def test_statistics(backend: str, device: str) -> None:
    """Rate and scale: 12 * 256^2 draws, so 5 sigma of the rate is 0.3% at p = 0.5."""
    for dropout_p in (0.05, 0.1, 0.5, 0.9):
        w = _weights(backend, dropout_p, 256) * 256
        kept = (w != 0).double()
        sigma = math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
        assert abs(kept.mean().item() - (1 - dropout_p)) < 5 * sigma
        torch.testing.assert_close(w[w != 0], torch.full_like(w[w != 0], 1 / (1 - dropout_p)))
        # neighbours in any direction are independent
        centred = kept - (1 - dropout_p)
        for axis in range(4):
            n = kept.shape[axis] - 1
            product = (centred.narrow(axis, 0, n) * centred.narrow(axis, 1, n)).mean().item()
            assert abs(product) < 6 * sigma**2 * math.sqrt(kept.numel()), axis


@pytest.mark.parametrize("features", [("causal", "sink"), ("dense_full", "table", "rotary")], ids="+".join)
def test_same_for_any_number_of_threads(features: tuple[str, ...], backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("the threads of the reference formula are torch's own")
    call = Call(features, Shape(batch=3, query_length=150, key_length=150), dropout_p=0.3)
    torch.set_num_threads(1)
    want = call.fused(backend, device)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        got = call.fused(backend, device)
        assert torch.equal(got.out, want.out)
        assert torch.equal(got.lse, want.lse)
        for name, grad in want.grads.items():
            assert torch.equal(got.grads[name], grad), name


def test_manual_seed_reproduces_and_calls_differ(backend: str, device: str) -> None:
    torch.manual_seed(21)
    first, second = _weights(backend, 0.5), _weights(backend, 0.5)
    torch.manual_seed(21)
    assert torch.equal(_weights(backend, 0.5), first)
    assert not torch.equal(first != 0, second != 0)
    state = torch.get_rng_state()
    third = _weights(backend, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(_weights(backend, 0.5), third)


def test_no_dropout_draws_no_random_numbers(backend: str, device: str) -> None:
    state = torch.get_rng_state()
    _weights(backend, 0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_expectation_is_the_output_without_dropout(backend: str, device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64) for _ in range(3))
    batch = 4000
    many = [x.expand(batch, 1, 6, 4) for x in (q, k, v)]
    mean = fastattn.attention(*many, dropout_p=0.3, backend=backend).mean(0, keepdim=True)
    torch.testing.assert_close(mean, fastattn.attention(q, k, v, backend=backend), atol=0.08, rtol=0)


def test_masked_keys_are_not_drawn_into_the_scale(backend: str, device: str) -> None:
    """The mask is a function of (b, h, i, j) alone: a mask or an offset moves nothing."""
    torch.manual_seed(5)
    plain = _weights(backend, 0.4)
    torch.manual_seed(5)
    causal = _weights(backend, 0.4, mask=fastattn.Causal())
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    assert torch.equal((causal != 0), (plain != 0) & seen)


def test_one_drops_everything(backend: str, device: str) -> None:
    q, k, v = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    out, lse = fastattn.attention(q, k, v, dropout_p=1.0, return_lse=True, backend=backend)
    assert (out == 0).all()
    torch.testing.assert_close(lse, fastattn.attention(q, k, v, return_lse=True, backend=backend)[1])
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_seed_reaches_the_backend_as_64_bits() -> None:
    """Both words of the Philox key vary from call to call."""
    q = torch.zeros(1, 1, 1, 4)
    seeds = torch.stack([functional.lower(q, q, q, dropout_p=0.5).dropout_seed for _ in range(64)])
    assert seeds.shape == (64, 2)
    assert len(seeds[:, 0].bitwise_and(0xFFFFFFFF).unique()) == 64
    assert len((seeds[:, 0] >> 32).unique()) == 64
    assert (seeds < 0).any()


def test_dropout_is_before_the_value_product_and_after_the_softmax() -> None:
    """lse and the weights' denominator do not see dropout."""
    q, k, v = (torch.randn(1, 1, 7, 4) for _ in range(3))
    problem = functional.lower(q, k, v, dropout_p=0.5)
    plain = functional.lower(q, k, v)
    assert torch.equal(reference.forward(problem)[1], reference.forward(plain)[1])

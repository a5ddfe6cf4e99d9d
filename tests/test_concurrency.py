"""Calls from several threads and processes at once."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from features import Shape
from oracle import Call

import fastattn

FEATURES = ("causal", "table", "sink")
SHAPE = Shape(query_length=130, key_length=130)


def test_threads(backend: str, device: str) -> None:
    """Eight Python threads with different inputs get what each gets alone, forward and backward."""
    calls = [Call(FEATURES, SHAPE, seed=seed) for seed in range(8)]
    want = [call.fused(backend, device) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, expected in zip(pool.map(lambda c: c.fused(backend, device), calls), want, strict=True):
                assert torch.equal(got.out, expected.out)
                for name, grad in expected.grads.items():
                    assert torch.equal(got.grads[name], grad), name


def test_threads_of_different_dtypes_and_features(backend: str, device: str) -> None:
    calls = [
        Call(("causal",), SHAPE, torch.float32),
        Call(("dense_heads", "softcap"), SHAPE, torch.bfloat16),
        Call(("alibi", "rotary"), SHAPE, torch.float64),
        Call(("key_lengths", "bool_full"), SHAPE, torch.float16),
    ]
    want = [call.fused(backend, device) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(lambda c: c.fused(backend, device), calls * 4), want * 4, strict=True):
            assert torch.equal(got.out, expected.out)


def _in_a_process(backend: str) -> float:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    q = torch.randn(2, 2, 70, 8, requires_grad=True)
    out = fastattn.attention(q, q, q, mask=fastattn.Causal(), dropout_p=0.2, backend=backend)
    out.sum().backward()
    return float(out.detach().double().sum() + q.grad.double().sum())


def test_processes(backend: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("one process per GPU")
    want = _in_a_process(backend)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_in_a_process, [backend] * 3) == [want] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="fork with a live thread pool")
def test_after_fork(backend: str, device: str) -> None:
    """A data loader's worker: forked from a process that already ran the kernel, on one thread."""
    if device != "cpu":
        pytest.skip("CUDA does not survive a fork")
    want = _in_a_process(backend)
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_forked, (backend,)).get(timeout=60) == want


def _forked(backend: str) -> float:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    q = torch.randn(2, 2, 70, 8, requires_grad=True)
    out = fastattn.attention(q, q, q, mask=fastattn.Causal(), dropout_p=0.2, backend=backend)
    out.sum().backward()
    return float(out.detach().double().sum() + q.grad.double().sum())

"""Two runs give the same bits, whatever the number of threads or what else the process does."""

from __future__ import annotations

import pytest
import torch
from features import Shape
from oracle import Call, Result

SHAPE = Shape(batch=3, heads=4, kv_heads=2, query_length=150, key_length=170)
COMBINATIONS = [
    ("causal", "table", "sink"),
    ("window", "alibi_batch", "softcap"),
    ("dense_heads", "key_lengths"),
    ("dense_keys", "rotary"),
    ("dense_scalar", "t5_encoder"),
    ("dense_rows", "documents_sorted"),
    ("shaw", "causal"),
    ("deberta", "key_lengths"),
]


def _assert_equal(a: Result, b: Result) -> None:
    assert torch.equal(a.out, b.out), "out"
    assert torch.equal(a.lse, b.lse), "lse"
    for name, grad in a.grads.items():
        assert torch.equal(b.grads[name], grad), f"gradient of {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_two_runs(features: tuple[str, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    call = Call(features, SHAPE, dtype)
    _assert_equal(call.fused(backend, device), call.fused(backend, device))


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_any_number_of_threads(features: tuple[str, ...], backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("the threads of the reference formula are torch's own")
    call = Call(features, SHAPE)
    torch.set_num_threads(1)
    want = call.fused(backend, device)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        _assert_equal(want, call.fused(backend, device))


def test_a_sequence_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    """Sequence b of a batch has the bits it has alone."""
    if backend == "reference":
        pytest.skip("torch's matmul picks its kernel by the batch size")
    call = Call(("causal", "table"), SHAPE)
    together = call.fused(backend, device)
    for b in range(SHAPE.batch):
        alone = Call(("causal", "table"), Shape(**{**vars(SHAPE), "batch": 1}))
        alone.leaves = {n: t[b : b + 1] if n in ("query", "key", "value") else t for n, t in call.leaves.items()}
        alone.grad_out, alone.grad_lse = call.grad_out[b : b + 1], call.grad_lse[b : b + 1]
        got = alone.fused(backend, device)
        assert torch.equal(got.out[0], together.out[b])
        assert torch.equal(got.grads["query"][0], together.grads["query"][b])
        assert torch.equal(got.grads["value"][0], together.grads["value"][b])

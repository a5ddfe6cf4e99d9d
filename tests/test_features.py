"""Every feature alone: output, lse and all gradients on every backend and dtype against the float64 formula."""

from __future__ import annotations

import pytest
import torch
from features import FEATURES, Shape
from oracle import Call, check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _id(x: object) -> str | None:
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else None


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, dtype: torch.dtype, backend: str, device: str) -> None:
    check(Call((feature,), dtype=dtype), backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(heads=4, kv_heads=4),
        Shape(heads=6, kv_heads=1),
        Shape(heads=6, kv_heads=2, head_dim=64, value_dim=64),
        Shape(head_dim=8, value_dim=40),
        Shape(head_dim=40, value_dim=1),
        Shape(head_dim=1, value_dim=7),
        Shape(head_dim=80, value_dim=96, query_length=17, key_length=17),
        Shape(head_dim=128, value_dim=128, query_length=9),
        Shape(head_dim=256, value_dim=256, query_length=5, key_length=70),
        Shape(query_length=70, key_length=20),
        Shape(query_length=1, key_length=300),
        Shape(query_length=300, key_length=1),
        Shape(batch=1, heads=1, kv_heads=1, query_length=200, key_length=260),
    ],
    ids=lambda s: f"q{s.heads}x{s.query_length}x{s.head_dim}-k{s.kv_heads}x{s.key_length}x{s.value_dim}",
)
def test_shapes(shape: Shape, dtype: torch.dtype, backend: str, device: str) -> None:
    check(Call((), shape, dtype), backend, device)


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.5, 3.0, 1e-6])
def test_scale(scale: float | None, backend: str, device: str) -> None:
    check(Call(("causal", "alibi"), scale=scale), backend, device)


@pytest.mark.parametrize(
    "offset", [0, 1, 16, 40, -3, 1000, -1000, torch.tensor([3, -5]), torch.tensor([0, 16])], ids=str
)
@pytest.mark.parametrize(
    "features", [("causal",), ("window", "table"), ("prefix_lm", "alibi"), ("t5_decoder",)], ids="+".join
)
def test_query_offset(features: tuple[str, ...], offset: int | torch.Tensor, backend: str, device: str) -> None:
    check(Call(features, offset=offset), backend, device)


@pytest.mark.parametrize("offset", [0, 1, 16, torch.tensor([3, 0])], ids=str)
@pytest.mark.parametrize(
    "feature", ["rotary", "rotary_interleaved", "rotary_batch", "rotary_separate", "rotary_learned"]
)
def test_rotary_offset(feature: str, offset: int | torch.Tensor, backend: str, device: str) -> None:
    check(Call((feature, "causal"), offset=offset), backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=_id)
@pytest.mark.parametrize(
    "features", [(), ("causal", "table"), ("sink", "softcap"), ("dense_heads", "key_lengths")], ids="+".join
)
def test_dropout(features: tuple[str, ...], dtype: torch.dtype, backend: str, device: str) -> None:
    check(Call(features, dtype=dtype, dropout_p=0.3), backend, device)


def test_gradient_of_lse_alone(backend: str, device: str) -> None:
    call = Call(("sink", "alibi", "causal"))
    call.grad_out.zero_()
    check(call, backend, device)
    call = Call(("sink", "alibi", "causal"), with_lse=False)
    check(call, backend, device)

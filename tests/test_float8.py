"""float8_e4m3fn operands without a kernel of their own: dequantised, on every backend of this machine."""

from __future__ import annotations

import pytest
import torch
from features import MASKS, SINKS, Shape
from float8_oracle import BFLOAT16, FLOAT8, Float8Call, check_float8

import fastattn

SHAPE = Shape(2, 4, 2, 33, 49, 24, 16)


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if not {b.name: b for b in fastattn.backends()}[request.param].available:
        pytest.skip(f"no {request.param} backend here")
    return request.param


@pytest.mark.parametrize("per", ["none", "head", "batch"])
@pytest.mark.parametrize("feature", [*MASKS, *SINKS])
def test_feature(feature: str, per: str, backend: str) -> None:
    check_float8(Float8Call((feature,), SHAPE, per=per), backend, kernel=False)


@pytest.mark.parametrize("dim", [8, 64, 128, 200])
def test_head_dims(dim: int, backend: str) -> None:
    check_float8(Float8Call(("causal",), Shape(1, 2, 1, 70, 90, dim, dim)), backend, kernel=False)


def _operands() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    operands = [torch.randn(2, heads, length, 16).to(FLOAT8) for heads, length in ((4, 9), (2, 11), (2, 11))]
    return operands, {f"{name}_scale": torch.rand(2, heads) + 0.5 for name, heads in (("query", 4), ("key", 2))}


STAGES = {
    "alibi": lambda: {"bias": fastattn.ALiBi(fastattn.alibi_slopes(4))},
    "shaw": lambda: {"bias": fastattn.ShawKeys(torch.randn(7, 16))},
    "rotary": lambda: {"rotary": fastattn.Rotary(*torch.randn(2, 11, 8))},
    "softcap": lambda: {"softcap": 2.0},
    "dropout": lambda: {"dropout_p": 0.5},
    "negative scale": lambda: {"scale": -0.5},
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_take_the_numbers_meant(stage: str, backend: str) -> None:
    """With scales that are powers of two nothing is rounded: the bits of a bfloat16 call on the numbers meant."""
    (query, key, value), _ = _operands()
    options = STAGES[stage]()
    scales = {
        "query_scale": torch.tensor([0.5, 1, 2, 4]), "key_scale": torch.tensor([[0.25, 1], [2, 0.5]]),
        "value_scale": torch.tensor([8, 0.125]),
    }  # fmt: skip
    torch.manual_seed(1)
    out = fastattn.attention(query, key, value, **scales, **options, backend=backend)
    meant = [
        (x.float() * (scale if scale.dim() == 2 else scale[None])[:, :, None, None]).to(BFLOAT16)
        for x, scale in zip((query, key, value), scales.values(), strict=True)
    ]
    torch.manual_seed(1)
    expected = fastattn.attention(*meant, **options, backend=backend)
    assert out.dtype == BFLOAT16
    # the same numbers where the key's scale stays with it, a power of two moved to the query where not
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-6)


def test_without_scales_the_bits_of_bfloat16(backend: str) -> None:
    operands, _ = _operands()
    out, lse = fastattn.attention(*operands, mask=fastattn.Causal(), return_lse=True, backend=backend)
    expected, expected_lse = fastattn.attention(
        *(x.to(BFLOAT16) for x in operands), mask=fastattn.Causal(), return_lse=True, backend=backend
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_explain_and_last_call() -> None:
    operands, scales = _operands()
    explanation = fastattn.explain(*operands, **scales)
    (note,) = explanation.notes
    assert note.startswith("float8_e4m3fn operands times query_scale, key_scale as bfloat16 of 0.00")
    assert "the float8 kernel does not run: " in note
    assert "cuda" not in explanation.kernel
    fastattn.attention(*operands, **scales)
    assert fastattn.last_call().kernel == explanation.kernel


def test_gradients_of_what_has_them() -> None:
    """A sink's, through the kernels for bfloat16; scales and operands have none, and need none under no_grad."""
    operands, scales = _operands()
    sink = torch.zeros(4, requires_grad=True)
    (grad,) = torch.autograd.grad(fastattn.attention(*operands, **scales, sink=sink).float().sum(), sink)
    assert grad.isfinite().all()
    assert grad.any()
    scales["key_scale"].requires_grad_()
    with torch.no_grad():
        fastattn.attention(*operands, **scales)


def test_autocast_leaves_them() -> None:
    operands, scales = _operands()
    expected = fastattn.attention(*operands, **scales)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(fastattn.attention(*operands, **scales), expected)


def test_compiled() -> None:
    operands, scales = _operands()

    def call(*operands: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(*operands, mask=fastattn.Causal(), **scales)

    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, backend="eager")(*operands), call(*operands), rtol=2**-7, atol=1e-6
    )


def test_functorch() -> None:
    operands, _ = _operands()
    mapped = torch.vmap(lambda q, k, v: fastattn.attention(q[None], k[None], v[None])[0])(
        *(x.view(torch.uint8).view(FLOAT8) for x in operands)
    )
    torch.testing.assert_close(mapped, fastattn.attention(*operands), rtol=2**-7, atol=1e-6)


def test_other_functions_take_none() -> None:
    (query, key, value), _ = _operands()
    with pytest.raises(TypeError, match="query: expected dtype float32"):
        fastattn.additive_attention(query, key, value, torch.ones(16))

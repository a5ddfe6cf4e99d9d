"""Position embeddings that are added to the input."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.nn import LearnedEmbedding, SinusoidalEmbedding
from fastattn.positional.sinusoid import sinusoidal_embedding


def test_vaswani_number_by_number() -> None:
    table = sinusoidal_embedding(torch.arange(50), 8)
    for p in range(50):
        for k in range(4):
            angle = p / 10000 ** (2 * k / 8)
            assert table[p, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[p, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)


def test_layouts_are_a_permutation() -> None:
    interleaved = sinusoidal_embedding(torch.arange(9), 6)
    concatenated = sinusoidal_embedding(torch.arange(9), 6, layout="concatenated")
    assert torch.equal(concatenated, torch.cat((interleaved[:, 0::2], interleaved[:, 1::2]), -1))


def test_whisper() -> None:
    whisper = pytest.importorskip("transformers.models.whisper.modeling_whisper", reason="compares with transformers")
    ours = sinusoidal_embedding(torch.arange(1500), 64, layout="concatenated", endpoint=True)
    torch.testing.assert_close(ours, whisper.sinusoids(1500, 64), rtol=0, atol=3e-4)  # float32 angles up to 1500


def test_x_transformers() -> None:
    x = pytest.importorskip("x_transformers.x_transformers", reason="compares with x-transformers")
    theirs = x.ScaledSinusoidalEmbedding(32)
    ours = sinusoidal_embedding(torch.arange(20) + 3, 32, layout="concatenated")
    torch.testing.assert_close(ours * theirs.scale, theirs(torch.zeros(1, 20, 32), offset=3), rtol=0, atol=1e-5)


def test_products_depend_on_the_distance() -> None:
    """PE[p] . PE[p + d] = sum of cos(d w_k)."""
    table = sinusoidal_embedding(torch.arange(40), 16, dtype=torch.float64)
    products = table @ table.T
    for d in (0, 1, 7):
        torch.testing.assert_close(products.diagonal(d), products[0, d].expand(40 - d))


def test_module() -> None:
    x = torch.randn(2, 7, 8)
    module = SinusoidalEmbedding(8)
    table = sinusoidal_embedding(torch.arange(12), 8)
    assert list(module.state_dict()) == []
    torch.testing.assert_close(module(x), x + table[:7])
    torch.testing.assert_close(module(x, offset=5), x + table[5:12])
    positions = torch.randint(0, 12, (2, 7))
    torch.testing.assert_close(module(x, positions), x + table[positions])
    assert module(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(module.half()(x), x + table[:7])  # nothing of it becomes half


def test_learned_and_its_gradient() -> None:
    module = LearnedEmbedding(10, 4).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[0, 1, 1, 9, 0, 3], [2, 2, 2, 2, 2, 2]])
    grad_out = torch.randn(2, 6, 4, dtype=torch.float64)
    grad_x, grad = torch.autograd.grad(module(x, positions), (x, module.weight), grad_out)
    assert torch.equal(grad_x, grad_out)
    want = torch.zeros(10, 4, dtype=torch.float64).index_add(0, positions.flatten(), grad_out.flatten(0, 1))
    torch.testing.assert_close(grad, want)
    sliced = torch.autograd.grad(module(x, offset=4), module.weight, grad_out)[0]
    looked_up = torch.autograd.grad(module(x, torch.arange(4, 10)), module.weight, grad_out)[0]
    torch.testing.assert_close(sliced, looked_up)


def test_learned_loads_gpt2() -> None:
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2", reason="compares with transformers")
    model = gpt2.GPT2Model(gpt2.GPT2Config(n_embd=16, n_head=2, n_layer=1, n_positions=12, vocab_size=5))
    module = LearnedEmbedding(12, 16)
    module.load_state_dict(model.wpe.state_dict())
    x = torch.randn(1, 9, 16)
    assert torch.equal(module(x), x + model.wpe(torch.arange(9)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SinusoidalEmbedding(7), "dim"),
        (lambda: SinusoidalEmbedding(8, layout="stacked"), "layout"),
        (lambda: SinusoidalEmbedding(2, endpoint=True), "dim"),
        (lambda: SinusoidalEmbedding(8)(torch.zeros(2, 7)), "x"),
        (lambda: LearnedEmbedding(4, 8)(torch.zeros(5, 8)), "offset"),
        (lambda: LearnedEmbedding(4, 8)(torch.zeros(3, 8), offset=2), "offset"),
        (lambda: LearnedEmbedding(4, 8)(torch.zeros(1, 8), torch.tensor([4])), "positions"),
        (lambda: LearnedEmbedding(4, 8)(torch.zeros(1, 8), torch.tensor([0.5])), "positions"),
        (lambda: LearnedEmbedding(0, 8), "max_length"),
    ],
)
def test_bad_input(call: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        call()  # type: ignore[operator]

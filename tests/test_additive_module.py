"""`fastattn.nn.AdditiveAttention` against the paper's formula: contexts, gradients, padding, what must be refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.nn import AdditiveAttention


def formula(module: AdditiveAttention, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
    """v^T tanh(W s + U h), softmax over the annotations, weighted mean."""
    states, annotations = module.query_projection(query), module.key_projection(key)
    scores = torch.tanh(states[:, :, None] + annotations[:, None]) @ module.weight
    if padding is not None:
        scores = scores.masked_fill(padding[:, None], float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("steps", [1, 7])
def test_formula(steps: int, padded: bool, bias: bool) -> None:
    module = AdditiveAttention(12, 20, 16, bias=bias, dtype=torch.float64)
    query, key = torch.randn(3, steps, 12, dtype=torch.float64), torch.randn(3, 11, 20, dtype=torch.float64)
    padding = torch.arange(11) >= torch.tensor([11, 4, 1])[:, None] if padded else None
    results = []
    for run in (
        lambda q, k: module(q, k, key_padding_mask=padding),
        lambda q, k: formula(module, q, k, k, padding),
    ):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_(), *module.parameters()]
        out = run(*leaves[:2])
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    assert results[0][0].shape == (3, steps, 20)
    torch.testing.assert_close(results[0], results[1])


def test_values_of_their_own_and_a_mask() -> None:
    module = AdditiveAttention(4, 6, 5)
    query, key, value = torch.randn(2, 3, 4), torch.randn(2, 8, 6), torch.randn(2, 8, 9)
    out = module(query, key, value, mask=fastattn.KeyLengths(torch.tensor([8, 3])))
    padding = torch.arange(8) >= torch.tensor([8, 3])[:, None]
    torch.testing.assert_close(out, formula(module, query, key, value, padding))
    both = module(query, key, value, mask=fastattn.KeyLengths(torch.tensor([8, 3])), key_padding_mask=padding)
    assert torch.equal(both, out)


def test_dropout_only_while_training() -> None:
    module = AdditiveAttention(4, 4, 5, dropout=0.5)
    x = torch.randn(1, 30, 4)
    assert not torch.equal(module(x, x), module(x, x))
    module.eval()
    assert torch.equal(module(x, x), module(x, x))
    assert "dropout=0.5" in repr(module)


def test_it_is_a_module_like_any_other() -> None:
    module = AdditiveAttention(4, 6, 5, bias=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "weight": (5,), "query_projection.weight": (5, 4), "key_projection.weight": (5, 6), "key_projection.bias": (5,)
    }  # fmt: skip
    other = AdditiveAttention(4, 6, 5, bias=True)
    other.load_state_dict(module.state_dict())
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 6)
    assert torch.equal(other(query, key), module(query, key))
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(query.bfloat16(), key.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.Sequential(module)[0](query, key).dtype == torch.bfloat16


X = torch.zeros(2, 3, 4)
MODULE = AdditiveAttention(4, 4, 4)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: AdditiveAttention(0, 4, 4), ValueError, "query_dim: expected an int >= 1"),
    (lambda: AdditiveAttention(4, 4.0, 4), TypeError, "key_dim: expected an int"),
    (lambda: AdditiveAttention(4, 4, 4, dropout=1.5), ValueError, "dropout: expected a probability"),
    (lambda: MODULE(X[0], X), ValueError, "query: expected three dimensions"),
    (lambda: MODULE(X, X, X[0]), ValueError, "value: expected three dimensions"),
    (lambda: MODULE(X, X, key_padding_mask=X[..., 0]), TypeError, "key_padding_mask: expected dtype bool"),
    (lambda: MODULE(X, X, key_padding_mask=X[0] > 0), ValueError, r"key_padding_mask: expected shape \(2, 3\)"),
]


@pytest.mark.parametrize("row", range(len(BAD)))
def test_bad_input(row: int) -> None:
    call, kind, message = BAD[row]
    with pytest.raises(kind, match=message):
        call()

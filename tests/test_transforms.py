"""Derivatives beyond .backward(): gradcheck, double backward, torch.func, vmap, per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from features import FEATURES, Shape
from oracle import Call
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vjp, vmap

import fastattn

TINY = Shape(batch=2, heads=2, kv_heads=1, query_length=3, key_length=4, head_dim=4, value_dim=3)


def _function(call: Call, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        named = dict(zip(call.leaves, leaves, strict=True))
        out, lse = fastattn.attention(
            named["query"], named["key"], named["value"], **call.keywords(named), return_lse=True, backend=backend
        )
        return out, lse.where(lse.isfinite(), 0.0)  # the +inf of an empty row has no difference quotient

    return run


def _leaves(call: Call) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in call.leaves.values()]


@pytest.mark.parametrize("feature", FEATURES)
def test_gradcheck(feature: str, backend: str, device: str) -> None:
    """The gradients are those of difference quotients."""
    call = Call((feature,), TINY, torch.float64)
    if feature == "dense_infinite":  # -inf +- eps is -inf; the quotient of the finite entries is what counts
        call.leaves["dense_infinite"] = call.leaves["dense_infinite"].clamp(min=-50)
    torch.autograd.gradcheck(
        _function(call, backend), _leaves(call), fast_mode=feature in ("rotary_learned", "table_wide")
    )


@pytest.mark.parametrize("features", [("causal", "alibi", "sink"), ("dense_heads", "softcap", "rotary")], ids="+".join)
def test_gradcheck_of_compositions_with_dropout(features: tuple[str, ...], backend: str, device: str) -> None:
    call = Call(features, TINY, torch.float64, dropout_p=0.4)
    torch.autograd.gradcheck(_function(call, backend), _leaves(call))


@pytest.mark.parametrize("features", [(), ("causal", "alibi", "sink"), ("table", "softcap")], ids="+".join)
def test_double_backward_on_the_reference(features: tuple[str, ...]) -> None:
    call = Call(features, TINY, torch.float64)
    torch.autograd.gradgradcheck(_function(call, "reference"), _leaves(call))


def test_double_backward_elsewhere_names_the_backend(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("has a second derivative")
    q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"the {backend} backend has no second derivative.*reference"):
        torch.autograd.grad(dq.sum(), v)


def test_create_graph_gives_the_same_first_derivative(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, backend=backend)
    a = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
    b = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


COMBINATIONS = [("causal", "alibi"), ("dense_heads", "key_lengths"), ("table_batch", "sink_batch", "rotary")]


@pytest.mark.parametrize("features", COMBINATIONS, ids="+".join)
def test_func_grad(features: tuple[str, ...], backend: str, device: str) -> None:
    call = Call(features, TINY, torch.float64)
    run = _function(call, backend)

    def loss(*leaves: Tensor) -> Tensor:
        out, lse = run(*leaves)
        return out.sin().sum() + lse.cos().sum()

    leaves = _leaves(call)
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = grad(loss, argnums=tuple(range(len(leaves))))(*leaves)
    for name, a, b in zip(call.leaves, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_vjp_and_jacrev(backend: str, device: str) -> None:
    q, k, v = (torch.randn(1, 1, 2, 3, dtype=torch.float64) for _ in range(3))

    def run(q: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, backend=backend)

    jacobian = jacrev(run)(q)
    want = torch.autograd.functional.jacobian(lambda q: fastattn.attention(q, k, v, backend="reference"), q)
    torch.testing.assert_close(jacobian, want)
    out, pull = vjp(run, q)
    torch.testing.assert_close(pull(out)[0], torch.einsum("abcd,abcdefgh->efgh", out, want))


IN_DIMS = [(0, 0, 0), (1, 0, 2), (0, None, None), (None, 0, 0), (-1, None, 1)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap(batch: int, in_dims: tuple[int | None, ...], backend: str, device: str) -> None:
    """A mapped call is the loop over it, whichever operands are mapped and where."""
    samples = 3
    plain = [torch.randn(batch, h, s, 4, dtype=torch.float64) for h, s in ((4, 5), (2, 7), (2, 7))]
    mapped = [
        torch.stack([x * (i + 1) for i in range(samples)], dim) if dim is not None else x
        for x, dim in zip(plain, in_dims, strict=True)
    ]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.attention(q, k, v, mask=fastattn.Causal(), return_lse=True, backend=backend)

    out, lse = vmap(run, in_dims)(*mapped)
    for i in range(samples):
        want = run(*[x if d is None else x.select(d, i) for x, d in zip(mapped, in_dims, strict=True)])
        torch.testing.assert_close(out[i], want[0])
        torch.testing.assert_close(lse[i], want[1])


@pytest.mark.parametrize("mapped", ["slopes", "table", "bias", "sink", "mask", "lengths", "everything"])
@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_over_parameters(batch: int, mapped: str, backend: str, device: str) -> None:
    """Forward and gradients mapped over a parameter, a mask or all of them."""
    samples, h, s = 3, 2, 5
    torch.manual_seed(0)
    tensors = {
        "qkv": torch.randn(3, batch, h, s, 4), "slopes": torch.rand(h), "table": torch.randn(h, 7),
        "bias": torch.randn(h, s, s), "sink": torch.randn(h), "mask": torch.rand(batch, 1, s, s) < 0.8,
        "lengths": torch.randint(1, s, (batch,)),
    }  # fmt: skip
    stacked = {n: torch.stack([t] * samples) for n, t in tensors.items()}
    for n, t in stacked.items():
        if t.is_floating_point():
            stacked[n] = t * torch.arange(1.0, samples + 1).view(-1, *[1] * (t.dim() - 1))
    stacked["mask"] = torch.rand(samples, batch, 1, s, s) < 0.8
    stacked["lengths"] = torch.randint(1, s, (samples, batch))
    dims = {n: 0 if n == mapped or mapped == "everything" else None for n in tensors}
    given = {n: stacked[n] if dims[n] == 0 else tensors[n] for n in tensors}

    def loss(x: dict[str, Tensor]) -> Tensor:
        bias = fastattn.ALiBi(x["slopes"]) + fastattn.DistanceTable(x["table"]) + fastattn.DenseBias(x["bias"])
        mask = fastattn.BoolMask(x["mask"]) & fastattn.KeyLengths(x["lengths"])
        q, k, v = x["qkv"].unbind(0)
        out, lse = fastattn.attention(q, k, v, bias=bias, mask=mask, sink=x["sink"], return_lse=True, backend=backend)
        return out.sin().sum() + lse.where(lse.isfinite(), 0.0).sum()

    def differentiate(x: dict[str, Tensor]) -> dict[str, Tensor]:
        floats = {n: t for n, t in x.items() if t.is_floating_point()}
        rest = {n: t for n, t in x.items() if not t.is_floating_point()}
        return grad(lambda f: loss({**f, **rest}))(floats)

    values = vmap(loss, (dims,))(given)
    grads = vmap(differentiate, (dims,))(given)
    for i in range(samples):
        one = {n: t[i] if dims[n] == 0 else t for n, t in given.items()}
        torch.testing.assert_close(values[i], loss(one), atol=1e-4, rtol=1e-5)
        for n, want in differentiate(one).items():
            torch.testing.assert_close(grads[n][i], want, atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


class Model(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(8, 24)
        self.slopes = torch.nn.Parameter(fastattn.alibi_slopes(2))
        self.table = torch.nn.Parameter(torch.randn(2, 5))
        self.sink = torch.nn.Parameter(torch.zeros(2))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = fastattn.ALiBi(self.slopes) + fastattn.DistanceTable(self.table)
        return fastattn.attention(q, k, v, bias=bias, mask=fastattn.Causal(), sink=self.sink, backend=self.backend)


def test_per_sample_gradients(backend: str, device: str) -> None:
    """vmap(grad) of a model's loss gives each sample the gradient it has alone, shared parameters included."""
    model = Model(backend).double()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    x = torch.randn(4, 6, 8, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).sin().sum()

    together = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(4):
        alone = grad(loss)(parameters, x[i])
        for name, want in alone.items():
            torch.testing.assert_close(together[name][i], want, msg=lambda m, name=name: f"{name}: {m}")


def test_vmap_with_dropout(backend: str, device: str) -> None:
    """randomness="different" drops differently in each sample, "same" alike, and both at the asked rate."""
    q = torch.zeros(3, 1, 2, 32, 4)
    v = torch.eye(32).expand(3, 1, 2, 32, 32)

    def run(q: Tensor, v: Tensor) -> Tensor:
        return fastattn.attention(q, q, v, dropout_p=0.5, backend=backend)

    different = vmap(run, randomness="different")(q, v) != 0
    assert not torch.equal(different[0], different[1])
    assert not torch.equal(different[1], different[2])
    assert abs(different.float().mean().item() - 0.5) < 0.05
    same = vmap(run, randomness="same")(q, v) != 0
    assert abs(same.float().mean().item() - 0.5) < 0.05
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    for randomness in ("same", "different"):
        torch.manual_seed(3)
        weights = vmap(run, randomness=randomness)(q, v)
        torch.manual_seed(3)
        got = vmap(grad(lambda v, q: run(q, v).square().sum()), randomness=randomness)(v.clone(), q)
        torch.testing.assert_close(got, 2 * weights.transpose(-1, -2) @ weights)


def test_nested_vmap(backend: str, device: str) -> None:
    x = torch.randn(2, 3, 1, 2, 4, 4, dtype=torch.float64)

    def run(x: Tensor) -> Tensor:
        return fastattn.attention(x, x, x, backend=backend)

    got = vmap(vmap(run))(x)
    want = run(x.flatten(0, 2)).view_as(x)
    torch.testing.assert_close(got, want)


def test_forward_mode_says_what_is_missing(backend: str, device: str) -> None:
    if backend == "reference":
        pytest.skip("plain torch operations have forward mode")
    q, k, v = (torch.randn(1, 1, 3, 4) for _ in range(3))
    with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
        torch.func.jvp(lambda q: fastattn.attention(q, k, v, backend=backend), (q,), (q,))

"""The weights `MultiheadAttention` returns: dropout, memory, tiles, derivatives, and the operators behind them."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import dispatch
from fastattn.nn import MultiheadAttention, weights
from fastattn.nn.weights import WeightArguments, attention_weights

E, H = 8, 2


def arguments(batch: int, heads: int, rows: int, cols: int, **changes: Any) -> WeightArguments:
    dtype = changes.pop("dtype", torch.float64)
    args = WeightArguments(
        query=torch.randn(batch, heads, rows, 4, dtype=dtype),
        key=torch.randn(batch, heads, cols, 4, dtype=dtype),
        dense_mask=None,
        dense_bias=None,
        dropout_seed=None,
        scale=0.5,
        dropout_p=0.0,
        causal=False,
        leading=0,
        average=False,
    )
    return args._replace(**changes)


def naive(args: WeightArguments) -> Tensor:
    """The formula on whole tensors, without dropout."""
    scores = args.query @ args.key.transpose(-2, -1) * args.scale
    if args.dense_bias is not None:
        scores = scores + args.dense_bias
    rows, cols = scores.shape[-2:]
    if args.causal:
        hidden = torch.ones(rows, cols, dtype=torch.bool).triu(1 + args.leading)
        scores = scores.masked_fill(hidden, float("-inf"))
    if args.dense_mask is not None:
        scores = scores.masked_fill(~args.dense_mask, float("-inf"))
    p = scores.softmax(-1)
    p = torch.cat((p[..., args.leading :], p[..., : args.leading]), dim=-1)
    return p.mean(1) if args.average else p


@pytest.fixture(params=[1 << 18, 40, 1], ids=["one-tile", "some-tiles", "row-tiles"])
def _tile_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of all sizes down to single rows of single heads."""
    monkeypatch.setattr(weights, "TILE_ELEMENTS", request.param)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "leading": 2},
    "mask": {"dense_mask": torch.ones(3, 1, 5, 7, dtype=torch.bool).tril(3)},
    "padding": {"dense_mask": (torch.arange(7) < torch.tensor([7, 3, 1])[:, None])[:, None, None, :]},
    "bias": {"dense_bias": torch.randn(1, 2, 5, 7, dtype=torch.float64)},
    "row bias": {"dense_bias": torch.randn(3, 1, 1, 7, dtype=torch.float64)},
}


@pytest.mark.usefixtures("_tile_elements")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("feature", FEATURES)
def test_tiles_agree_with_the_formula(feature: str, average: bool) -> None:
    args = arguments(3, 2, 5, 7, average=average, **FEATURES[feature])
    leaves = [args.query.requires_grad_(), args.key.requires_grad_()]
    if args.dense_bias is not None:
        args = args._replace(dense_bias=args.dense_bias.clone().requires_grad_())
        leaves.append(args.dense_bias)
    got, expected = attention_weights(args), naive(args)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    grad = torch.randn_like(expected)
    for x, y in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("average", [True, False])
def test_nothing_leaks_through_masked_places(average: bool) -> None:
    """NaN in masked keys, in queries that see nothing, and in gradients of masked weights changes no gradient."""
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[:, :, 3] = False
    mask[1, :, :, 5:] = False
    clean = arguments(2, 3, 5, 7, average=average, dense_mask=mask)
    query, key = clean.query.clone(), clean.key.clone()
    query[:, :, 3] = float("nan")
    key[1, :, 5] = float("inf")
    key[1, :, 6] = float("nan")
    grad = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    poison = grad.masked_fill(~mask, float("nan"))
    results = []
    for args, g in ((clean, grad), (clean._replace(query=query, key=key), poison)):
        leaves = [args.query.requires_grad_(), args.key.requires_grad_()]
        result = attention_weights(args)
        results.append([result, *torch.autograd.grad(result, leaves, g[:, 0] if average else g)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("average", [True, False])
def test_dropout_does_not_depend_on_tiles(average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(2, 3, 9, 11, average=average, dropout_p=0.4, dropout_seed=torch.tensor([5, 7]))
    whole = attention_weights(args)
    for elements in (1, 30, 100):
        monkeypatch.setattr(weights, "TILE_ELEMENTS", elements)
        torch.testing.assert_close(attention_weights(args), whole, atol=1e-14, rtol=1e-12)


def test_gradcheck() -> None:
    seed = torch.tensor([1, 2])
    bias = torch.randn(2, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    for average, dropout_p in ((True, 0.0), (False, 0.3), (True, 0.3)):
        base = arguments(2, 2, 3, 4, average=average, dropout_p=dropout_p, dropout_seed=seed, causal=True, leading=1)

        def run(query: Tensor, key: Tensor, bias: Tensor, base: WeightArguments = base) -> Tensor:
            return attention_weights(base._replace(query=query, key=key, dense_bias=bias))

        torch.autograd.gradcheck(run, (base.query.requires_grad_(), base.key.requires_grad_(), bias))


@pytest.mark.parametrize("average", [True, False])
def test_opcheck(average: bool) -> None:
    args = arguments(2, 2, 3, 4, average=average, dense_bias=torch.randn(1, 2, 3, 4, dtype=torch.float64), leading=1)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastattn.attention_weights.default, tuple(args), test_utils=utilities)
    grad = torch.randn(2, 3, 4, dtype=torch.float64) if average else torch.randn(2, 2, 3, 4, dtype=torch.float64)
    for bias_needed in (True, False):
        torch.library.opcheck(
            torch.ops.fastattn.attention_weights_backward.default, (grad, bias_needed, *args), test_utils=utilities
        )


class _LiveBytes(TorchDispatchMode):
    """The most bytes of tensor storage alive at once that were allocated while the mode was on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: dict[int, int] = {}

    def _freed(self, address: int, size: int) -> None:
        self.storages[address] -= 1
        if not self.storages[address]:
            del self.storages[address]
            self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            address, size = storage.data_ptr(), storage.nbytes()
            if address in inputs and address not in self.storages:
                continue  # a view of something older than the mode
            if address not in self.storages:
                self.storages[address] = 0
                self.live += size
            self.storages[address] += 1
            weakref.finalize(x, self._freed, address, size)
            self.peak = max(self.peak, self.live)
        return result


@pytest.mark.parametrize("average", [True, False])
def test_memory_is_the_returned_tensor(average: bool) -> None:
    """Forward: the result and a few tiles.  Backward: the gradients and a few tiles.  Never (B, H, L, S) beside it."""
    args = arguments(1, 8, 1024, 1024, average=average, dtype=torch.float32)
    result_bytes = 4 * 1024 * 1024 * (1 if average else 8)
    tiles = 6 * 4 * weights.TILE_ELEMENTS
    with _LiveBytes() as forward:
        result = weights._fill(*args)
    assert result_bytes <= forward.peak <= result_bytes + tiles
    grad = torch.ones_like(result)
    with _LiveBytes() as backward:
        weights._fill_backward(grad, False, *args)
    assert backward.peak <= tiles + 4 * (args.query.numel() + args.key.numel())
    if average:
        assert result_bytes + tiles < 4 * 8 * 1024 * 1024  # the bound excludes one tensor of all heads


# Through the module ---------------------------------------------------------------------------------------------


class _Operators(TorchDispatchMode):
    """The names of fastattn's operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn" and func._opname != "cpu_info":  # asked once a process
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not dispatch._BACKENDS["cpu"].available, reason="the CPU kernels are not built")
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("used", ["output", "weights", "both"])
def test_weights_cost_what_is_made_of_them(average: bool, used: str) -> None:
    """One operator gives both; nothing as large as the weights is saved; weights that nobody differentiates leave the
    backward as it is without them."""
    module = MultiheadAttention(E, H, dropout=0.2, batch_first=True)
    x = torch.randn(2, 200, E)
    saved: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with _Operators() as ran, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out, attention = module(x, x, x, average_attn_weights=average)
        loss = out.sum() if used != "weights" else out.new_zeros(())
        loss = loss + attention.square().mul(torch.arange(200)).sum() if used != "output" else loss
        forward = ran.names.copy()
        if used == "output":
            assert max(saved) < 200 * 200
        loss.backward()
    assert forward == ["cpu_weights_forward"]
    assert ran.names[1:] == ["cpu_backward" if used == "output" else "cpu_weights_backward"]
    assert fastattn.last_call().kernel == f"{dispatch._BACKENDS['cpu'].kernel(_any_problem())} with weights"


def _any_problem() -> Any:
    q = torch.zeros(1, 1, 1, 1)
    return fastattn.functional.lower(q, q, q)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("call", ["plain", "causal", "masks", "padding"])
def test_kernel_and_torch_operations_agree(
    call: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What GPUs get, by plain torch operations, is what the CPU kernel gives: output, weights, gradients."""
    module = MultiheadAttention(E, H, dropout=0.3, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(3, 9, E, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(9, 9, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(9) >= torch.tensor([9, 4, 1])[:, None]
    keywords: dict[str, Any] = {
        "plain": {}, "causal": {"is_causal": True}, "masks": {"attn_mask": bias, "key_padding_mask": padding},
        "padding": {"key_padding_mask": padding},
    }[call]  # fmt: skip
    leaves = [x, *module.parameters(), *([bias] if call == "masks" else [])]
    for average in (True, False):
        results = []
        for names in (list(dispatch._BACKENDS), ["reference"]):
            with monkeypatch.context() as patched:
                patched.setattr(dispatch, "_BACKENDS", {name: dispatch._BACKENDS[name] for name in names})
                torch.manual_seed(4)
                out, attention = module(x, x, x, average_attn_weights=average, **keywords)
                kernel = fastattn.last_call().kernel
            assert ("torch operations" in kernel) == (names == ["reference"]), kernel
            torch.manual_seed(5)
            loss = (out * torch.randn_like(out)).sum() + (attention * torch.randn_like(attention)).sum()
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
            results.append((out, attention, *[g for g in grads if g is not None]))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_weights_are_those_of_the_call(options: dict[str, bool]) -> None:
    """Post-dropout, as torch returns them: the output is exactly their product with the projected values."""
    module = MultiheadAttention(E, H, dropout=0.5, batch_first=True, dtype=torch.float64, **options)
    x = torch.randn(3, 50, E, dtype=torch.float64)
    out, attention = module(x, x, x, average_attn_weights=False)
    kept = attention != 0
    assert 0.45 < kept.double().mean() < 0.55
    values = torch.nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    if options:
        values = torch.cat((values, module.bias_v.expand(3, 1, E), torch.zeros(3, 1, E, dtype=torch.float64)), dim=1)
    heads = values.unflatten(-1, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(out, module.out_proj((attention @ heads).transpose(1, 2).flatten(-2)))
    averaged = module(x, x, x)[1]
    assert not torch.equal(averaged, attention.mean(1))  # a new call, a new draw
    torch.manual_seed(3)
    first = module(x, x, x)
    torch.manual_seed(3)
    second = module(x, x, x, average_attn_weights=False)
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1].mean(1))
    # The draw does not depend on whether weights are returned.
    torch.manual_seed(3)
    assert torch.equal(module(x, x, x, need_weights=False)[0], first[0])
    assert torch.equal(module.eval()(x, x, x)[0], module(x, x, x)[0])


def test_dropout_keeps_the_expectation() -> None:
    module = MultiheadAttention(E, H, dropout=0.3, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 6, E, dtype=torch.float64)
    mean = torch.stack([module(x, x, x)[1].detach() for _ in range(2000)]).mean(0)
    exact = module.eval()(x, x, x)[1]
    # Standard error of a weight w: w * sqrt(p / (1 - p) / 2000 / H) ~ 0.01 w; six of them.
    torch.testing.assert_close(mean, exact, atol=0.0, rtol=0.065)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_of_everything(need_weights: bool) -> None:
    module = MultiheadAttention(E, H, dropout=1.0, batch_first=True)
    x = torch.randn(2, 5, E)
    out, attention = module(x, x, x, need_weights=need_weights)
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
    assert attention is None or (attention == 0).all()


def test_gradients_of_output_and_weights_through_dropout() -> None:
    """With the seed fixed the call is a smooth function; its gradient must be that of finite differences."""
    module = MultiheadAttention(4, 2, dropout=0.4, batch_first=True, dtype=torch.float64)

    def run(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        return module(x, x, x, attn_mask=mask)

    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(run, (x, torch.randn(3, 3, dtype=torch.float64, requires_grad=True)))


def test_second_and_forward_derivatives_are_errors() -> None:
    module = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x, x, x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastattn: attention weights have no second derivative"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(lambda x: module(x, x, x)[1], (x.detach(),), (x.detach(),))

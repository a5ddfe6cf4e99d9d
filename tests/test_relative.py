"""Relative biases as modules, FIRE, and the identities; KERPLE, Sandwich and sided ALiBi are features as well."""

from __future__ import annotations

import pytest
import torch
from scheme_oracle import DTYPES, Inputs, attend, check_scheme
from torch import Tensor

import fastattn
from fastattn import nn as fnn
from fastattn.positional import fire as fire_module
from fastattn.positional.fire import FIRE
from fastattn.positional.relative import KERPLE, Sandwich


def _operands(heads: int = 4, query_length: int = 23, key_length: int = 31, dim: int = 16) -> dict[str, Tensor]:
    return {
        "query": torch.randn(2, heads, query_length, dim, dtype=torch.float64),
        "key": torch.randn(2, heads, key_length, dim, dtype=torch.float64),
        "value": torch.randn(2, heads, key_length, 8, dtype=torch.float64),
    }


def _fire_bias(t: Inputs, position: Tensor, key_length: int) -> Tensor:
    """Dense (B|1, H, Sq, Sk), from the paper."""
    j = torch.arange(key_length)
    distance = (position[..., None] - j).abs()
    top = torch.maximum(position.to(t["c"].dtype), t["threshold"])[..., None]
    x = torch.log((t["c"] * distance).abs() + 1) / (torch.log((t["c"] * top).abs() + 1) + 1e-6)
    hidden = torch.relu(x[..., None] * t["w1"] + t["b1"])
    return torch.movedim(hidden @ t["w2"].T + t["b2"], -1, -3)


def _network(t: Inputs) -> object:
    return lambda x: torch.relu(x * t["w1"] + t["b1"]) @ t["w2"].T + t["b2"]


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("offset", [None, 0, -4, 20, torch.tensor([3, 8])], ids=str)
@pytest.mark.parametrize("window", [(99, 99), (99, 0), (5, 3)], ids=["all", "causal", "window"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fire(
    dtype: torch.dtype, window: tuple[int, int], offset: int | Tensor | None, blocks: int, backend: str, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if blocks > 1:
        monkeypatch.setattr(fire_module, "PAIRS_AT_ONCE", 31 * 7)
    inputs = _operands() | {
        "c": torch.tensor(0.3, dtype=torch.float64), "threshold": torch.tensor(14.0, dtype=torch.float64),
        "w1": torch.randn(6, dtype=torch.float64), "b1": torch.randn(6, dtype=torch.float64),
        "w2": torch.randn(4, 6, dtype=torch.float64), "b2": torch.randn(4, dtype=torch.float64),
    }  # fmt: skip
    first = torch.tensor([8]) if offset is None else torch.as_tensor(offset).reshape(-1)
    position = first[:, None] + torch.arange(23)
    distance = torch.arange(31) - position[..., None]
    seen = ((distance >= -window[0]) & (distance <= window[1]))[:, None]

    def fast(t: Inputs) -> Tensor:
        bias = FIRE(_network(t), t["c"], t["threshold"])
        return fastattn.attention(
            t["query"], t["key"], t["value"], bias=bias, mask=fastattn.SlidingWindow(*window), query_offset=offset,
            backend=backend,
        )  # fmt: skip

    def formula(t: Inputs) -> tuple[Tensor, Tensor]:
        scores = t["query"] @ t["key"].mT * 0.25 + _fire_bias(t, position, 31).to(t["query"].dtype)
        return attend(scores, t["value"], seen), scores

    check_scheme(fast, formula, inputs, dtype)


def test_fire_passes_over_what_a_causal_mask_hides() -> None:
    pairs = []
    network = torch.nn.Linear(1, 4)
    network.register_forward_hook(lambda _, inputs, __: pairs.append(inputs[0].numel()))
    q = torch.randn(1, 4, 256, 8)
    for mask in (None, fastattn.Causal(), fastattn.SlidingWindow(31, 0)):
        with torch.no_grad():
            fastattn.attention(q, q, q, bias=FIRE(network, torch.ones(()), torch.ones(())), mask=mask)
    assert pairs[0] == 256 * 256
    assert sum(pairs[1:9]) == 32 * 32 * (8 * 9) // 2
    assert sum(pairs[9:]) == 32 * 32 + 7 * 32 * 63


def test_fire_says_what_it_costs() -> None:
    q = torch.randn(1, 4, 9, 8)
    notes = fastattn.explain(q, q, q, bias=fnn.FIRE(4)()).notes
    assert notes == ["FIRE: its network at every pair, as a dense bias (1, 4, 9, 9) of 0.0013 MB"]


MODULES = {
    "T5Bias": lambda: fnn.T5Bias(4, 8, 20),
    "T5Bias-decoder": lambda: fnn.T5Bias(4, 8, 20, bidirectional=False),
    "ALiBi": lambda: fnn.ALiBi(4),
    "ALiBi-learned": lambda: fnn.ALiBi(4, learned=True),
    "ALiBi-asymmetric": lambda: fnn.ALiBi(4, learned=True, sides="asymmetric"),
    "ClippedBias": lambda: fnn.ClippedBias(4, 5),
    "ClippedBias-one-sided": lambda: fnn.ClippedBias(4, 5, 0),
    "KERPLE-log": lambda: fnn.KERPLE(4),
    "KERPLE-power": lambda: fnn.KERPLE(4, "power"),
    "FIRE": lambda: fnn.FIRE(4, initial_threshold=8.0),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_and_agrees_with_its_dense_form(name: str, backend: str, device: str) -> None:
    """The module's bias in the kernel, and the same bias written out; every parameter gets the same gradient."""
    module = MODULES[name]().double()
    q, k, v = _operands().values()
    results = []
    for dense in (False, True):
        bias = module()
        bias = fastattn.DenseBias(bias.materialize(23, 31)) if dense else bias
        out = fastattn.attention(q, k, v, bias=bias, backend="reference" if dense else backend)
        grads = torch.autograd.grad(out.square().sum(), list(module.parameters())) if list(module.parameters()) else ()
        results.append((out, *grads))
    for ours, written in zip(*results, strict=True):
        torch.testing.assert_close(ours, written)
    assert all(grad.abs().max() > 0 for grad in results[0][1:] if grad.shape != (4,) or name != "FIRE")


@pytest.mark.parametrize("name", MODULES)
def test_module_state_and_repr(name: str) -> None:
    module = MODULES[name]()
    again = MODULES[name]()
    again.load_state_dict(module.state_dict())
    assert len(module.state_dict()) == len(list(module.parameters()))
    q = torch.randn(1, 4, 9, 8)
    assert torch.equal(fastattn.attention(q, q, q, bias=again()), fastattn.attention(q, q, q, bias=module()))
    assert repr(again) == repr(module)


@pytest.mark.parametrize("learned", [False, True])
def test_alibi_slopes_stay_in_float32(learned: bool) -> None:
    """bfloat16 keeps 8 bits of a slope."""
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16):
        module = fnn.ALiBi(12, learned=learned)
        cast(module)
        assert torch.equal(module.slopes, fastattn.alibi_slopes(12))


def test_asymmetric_alibi_looks_one_way() -> None:
    bias = fnn.ALiBi(4, sides="asymmetric")().materialize(6, 6)[0]
    distance = torch.arange(6) - torch.arange(6)[:, None]
    slopes = fastattn.alibi_slopes(2)
    for head in range(4):
        seen = distance <= 0 if head < 2 else distance >= 0
        want = (-slopes[head % 2] * distance.abs()).masked_fill(~seen, float("-inf"))
        assert torch.equal(bias[head], want)


def test_kerple_can_come_back_into_its_range() -> None:
    module = fnn.KERPLE(2, "power")
    with torch.no_grad():
        module.r1.fill_(-1.0)
        module.r2.fill_(3.0)
    bias = module()
    torch.testing.assert_close(bias.r1, torch.full((2,), 0.01))
    torch.testing.assert_close(bias.r2, torch.full((2,), 2.0))
    bias.materialize(3, 3).sum().backward()
    assert (module.r1.grad != 0).all()
    assert (module.r2.grad != 0).all()


# -- public implementations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("decoder", [False, True])
def test_t5_of_transformers_with_a_cache(decoder: bool, past: int) -> None:
    """compute_bias with the queries after `past` cached tokens, in both directions."""
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="compares with transformers")
    config = t5.T5Config(d_model=32, d_kv=8, num_heads=4, relative_attention_num_buckets=16, is_decoder=decoder)
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    module = fnn.T5Bias(4, 16, config.relative_attention_max_distance, bidirectional=not decoder)
    module.load_state_dict(layer.relative_attention_bias.state_dict())
    want = layer.compute_bias(5, 150, past_seen_tokens=past)
    assert torch.equal(module().materialize(5, 150, past), want)


@pytest.mark.parametrize("causal", [False, True])
def test_t5_and_alibi_of_x_transformers(causal: bool) -> None:
    x = pytest.importorskip("x_transformers.x_transformers", reason="compares with x-transformers")
    theirs = x.RelativePositionBias(1.0, causal=causal, heads=4)
    ours = fastattn.T5Bias(theirs.relative_attention_bias.weight, bidirectional=not causal)
    assert torch.equal(ours.materialize(40, 170)[0], theirs(40, 170))
    for heads in (4, 12):
        assert torch.allclose(fnn.ALiBi(heads)().materialize(9, 20)[0], x.AlibiPositionalBias(heads)(9, 20), rtol=1e-6)


def test_alibi_of_bloom_and_mpt(backend: str, device: str) -> None:
    """They add slope * j, which differs from -slope * distance by a constant of the row."""
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="compares with transformers")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt", reason="compares with transformers")
    q, k, v = (torch.randn(1, 8, 17, 8) for _ in range(3))
    ours = fastattn.attention(q, k, v, bias=fnn.ALiBi(8)(), mask=fastattn.Causal(), backend=backend)
    hidden = torch.full((17, 17), float("-inf")).triu(1)
    for dense in (
        bloom.build_alibi_tensor(torch.ones(1, 17), 8, torch.float32).view(1, 8, 1, 17),
        mpt.build_mpt_alibi_tensor(8, 17),
    ):
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense + hidden)
        torch.testing.assert_close(ours, theirs)


# -- identities -------------------------------------------------------------------------------------------------------

DISTANCE_ONLY = {
    "kerple": lambda heads: KERPLE(torch.rand(heads) + 0.1, torch.rand(heads) + 0.1),
    "sandwich": Sandwich,
    "alibi": lambda heads: fastattn.ALiBi(torch.rand(heads), after=torch.rand(heads)),
}


@pytest.mark.parametrize("name", DISTANCE_ONLY)
def test_shift_invariance(name: str, backend: str, device: str) -> None:
    """Queries and keys moved along by the same number of (hidden) positions see the same."""
    bias = DISTANCE_ONLY[name](2)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    want = fastattn.attention(q, k, v, bias=bias, backend=backend)
    front = torch.zeros(1, 2, 5, 8)
    seen = fastattn.BoolMask(torch.arange(14) >= 5)
    got = fastattn.attention(
        q, torch.cat((front, k), 2), torch.cat((front, v), 2), bias=bias, mask=seen, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(got, want)


def test_offsets_that_cannot_be_read_reach_the_whole_call() -> None:
    """Under compile a tensor of offsets has no values yet: the table covers offsets 0 ... Sk."""
    bias = KERPLE(torch.rand(2) + 0.1, torch.rand(2) + 0.1)
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 9, 8)
    offsets = torch.tensor([0, 9])
    compiled = torch.compile(lambda x, o: fastattn.attention(x, k, k, bias=bias, query_offset=o))
    torch.testing.assert_close(compiled(q, offsets), fastattn.attention(q, k, k, bias=bias, query_offset=offsets))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KERPLE(torch.ones(2), torch.ones(3)), "r2"),
        (lambda: KERPLE(torch.ones(2, 2), torch.ones(2, 2)), "r1"),
        (lambda: KERPLE(torch.ones(2), torch.ones(2), "cubic"), "kind"),
        (lambda: Sandwich(0), "num_heads"),
        (lambda: Sandwich(2, 7), "dim"),
        (lambda: fastattn.ALiBi(torch.ones(2), after=torch.ones(3)), "after"),
        (lambda: FIRE(torch.nn.Linear(1, 4), torch.ones(2), torch.ones(())), "c"),
        (lambda: fnn.ALiBi(3, sides="asymmetric"), "num_heads"),
        (lambda: fnn.ALiBi(4, sides="left"), "sides"),
        (lambda: fnn.T5Bias(4, 7), "weight"),
        (lambda: fnn.ClippedBias(4, -1), "left"),
        (
            lambda: fastattn.attention(*[torch.ones(1, 3, 2, 4)] * 3, bias=KERPLE(torch.ones(2), torch.ones(2))),
            "KERPLE",
        ),
        (lambda: fastattn.attention(*[torch.ones(1, 3, 2, 4)] * 3, bias=fnn.FIRE(2)()), "FIRE"),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()  # type: ignore[operator]


def test_one_bias_for_all_layers(backend: str, device: str) -> None:
    """Layers that share a module add up their gradients in its table."""
    module = fnn.T5Bias(2, 8, 20).double()
    layers = [torch.randn(3, 1, 2, 9, 8, dtype=torch.float64) for _ in range(2)]
    each = []
    for q, k, v in layers:
        out = fastattn.attention(q, k, v, bias=module(), scale=1.0, backend=backend)
        each.append(torch.autograd.grad(out.square().sum(), module.weight)[0])
    shared = module()
    outs = [fastattn.attention(q, k, v, bias=shared, scale=1.0, backend=backend).square().sum() for q, k, v in layers]
    torch.testing.assert_close(torch.autograd.grad(sum(outs), module.weight)[0], each[0] + each[1])

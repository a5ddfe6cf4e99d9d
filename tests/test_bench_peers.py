"""Peers that are not installed here, against stand-ins with their public signatures: layouts, arguments, refusals."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastattn.bench import measure, peers, results, suites
from fastattn.bench.gate import expect, gate
from fastattn.bench.peers import CannotError, prepare
from fastattn.bench.rows import make_row_inputs
from fastattn.bench.scenario import Case, Shape
from fastattn.bench.scenarios import SCENARIOS, make_inputs

SHAPE = Shape(2, 4, 32, 32, 16)


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: object) -> None:
    """A module of that name, with its parents, for as long as the test runs."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        module = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, path, module)
    for key, value in contents.items():
        setattr(module, key, value)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, window: int | None, cap: float) -> Tensor:
    """(B, S, H, D), fewer key heads allowed."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if cap:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(key.shape[2])[None, :] - torch.arange(query.shape[2])[:, None]
    hidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden |= distance < -window
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def flash_attn(no_limit: int | None, *words: str, tupled: bool = False) -> Callable[..., object]:
    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, **given: object) -> object:
        assert set(given) <= {"causal", "window_size", *words}
        left, right = given["window_size"]  # type: ignore[misc]
        assert right in (0, no_limit)
        window = None if left == no_limit else left
        out = attention(
            query, key, value, causal=bool(given["causal"]), window=window, cap=float(given.get("softcap", 0.0))
        )  # type: ignore[arg-type]
        return (out, None) if tupled else out

    return flash_attn_func


@pytest.mark.parametrize("scenario", ["plain", "causal", "window", "softcap"])
@pytest.mark.parametrize("generation", [2, 3, 4])
def test_flash_attn_is_called_as_its_generation_wants(
    generation: int, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, words, no_limit = peers.FLASH_ATTN[generation]
    install(monkeypatch, module, flash_attn_func=flash_attn(no_limit, *words, tupled=generation == 4))
    name = "flash-attn" if generation == 2 else f"flash-attn-{generation}"
    inputs = make_inputs(Case("test", scenario, Shape(2, 4, 300, 300, 16, kv_heads=2)), "cpu")
    gate(name, inputs, prepare(name, inputs), expect(inputs, gradients=True), gradients=True)


@pytest.mark.parametrize(
    ("peer", "scenario"),
    [("flash-attn", "t5"), ("flash-attn", "sink"), ("flash-attn-3", "dropout"), ("flash-attn-3", "alibi"),
     ("flash-attn-4", "alibi"), ("flash-attn-4", "documents")],
)  # fmt: skip
def test_flash_attn_cannot_do_everything(peer: str, scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for generation, (module, words, no_limit) in peers.FLASH_ATTN.items():
        if (peer == "flash-attn" and generation == 2) or peer.endswith(str(generation)):
            install(monkeypatch, module, flash_attn_func=flash_attn(no_limit, *words))
    with pytest.raises(CannotError, match="no argument for"):
        prepare(peer, make_inputs(Case("test", scenario, SHAPE), "cpu"))


@pytest.mark.parametrize("scenario", ["plain", "causal", "window", "t5", "rotary", "bool-mask"])
def test_xformers_is_given_what_it_takes(scenario: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class LowerTriangularMask:
        pass

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: object = None, p: float = 0.0
    ) -> Tensor:
        causal = isinstance(attn_bias, LowerTriangularMask)
        if attn_bias is None or causal:
            return attention(query, key, value, causal=causal, window=None, cap=0.0)
        assert isinstance(attn_bias, Tensor) and attn_bias.shape == (2, 4, 32, 32) and attn_bias.is_floating_point()
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias)
        return out.transpose(1, 2)

    install(
        monkeypatch,
        "xformers.ops",
        memory_efficient_attention=memory_efficient_attention,
        LowerTriangularMask=LowerTriangularMask,
    )
    inputs = make_inputs(Case("test", scenario, SHAPE), "cpu")
    gate("xformers", inputs, prepare("xformers", inputs), expect(inputs, gradients=True), gradients=True)


def test_liger_turns_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            ctx.save_for_backward(cos, sin)
            return tuple(x.copy_(InPlace.turn(x, cos, sin)) for x in (query, key))

        @staticmethod
        def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
            cos, sin = ctx.saved_tensors
            return *(InPlace.turn(grad, cos, -sin) for grad in grads), None, None

    install(monkeypatch, "liger_kernel.transformers.rope", liger_rotary_pos_emb=InPlace.apply)
    inputs = make_row_inputs(Case("test", "rotary-half", Shape(2, 4, 32, 32, 16, kv_heads=2)), "cpu")
    before = {name: leaf.detach().clone() for name, leaf in inputs.leaves.items()}
    prepared = prepare("liger", inputs)
    for _ in range(2):
        gate("liger", inputs, prepared, expect(inputs, gradients=True), gradients=True)
    assert all(torch.equal(before[name], leaf) for name, leaf in inputs.leaves.items())
    with pytest.raises(ValueError, match="halves"):
        prepare("liger", make_row_inputs(Case("test", "rotary-interleaved", SHAPE), "cpu"))


@pytest.mark.parametrize("peer", [*suites.LIBRARY_PEERS, "liger", "sdpa-cudnn", "sdpa-efficient"])
def test_a_peer_that_is_not_here_has_a_row_that_says_so(peer: str) -> None:
    scenario = "rotary-half" if peer == "liger" else "plain"
    suite = suites.Suite("test", "", (), (peer,), baseline=peer)
    where = results.environment("cpu")
    rows = measure.run_case(suite, Case("test", scenario, SHAPE), measure.Options([], budget=0.0), where)
    assert {row.direction for row in rows} == {"forward", "both"}
    for row in rows:
        if row.status == "ok":
            pytest.skip(f"{peer} is here and can do it")
        assert row.status == "cannot" and row.note


def test_every_scenario_says_what_is_left_without_it() -> None:
    for scenario in SCENARIOS.values():
        bare = SCENARIOS[scenario.without]
        assert bare.name in ("plain", "causal"), "the call without the feature has no tensors of its own"
        assert bare.name == "plain" or scenario.dense_mask is not None

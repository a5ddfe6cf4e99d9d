"""fastattn.inspect: what it records, that it changes nothing, its limit; and the picture of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from positions import CASES, HEAD_DIM, HEADS, LENGTH, WIDTH, make

import fastattn
from fastattn import nn as fnn
from fastattn.nn import recording
from fastattn.nn.recording import AttentionRecord, RecordedCall

N, S, T = 2, 7, 5


def make_model(**options: Any) -> fnn.Transformer:
    return fnn.Transformer(WIDTH, HEADS, 2, 2, 24, batch_first=True, **options).eval()


SOURCE, TARGET = torch.randn(N, S, WIDTH), torch.randn(N, T, WIDTH)


def test_records_every_call_in_order() -> None:
    model = make_model()
    padding = torch.arange(S) >= torch.tensor([S, 4])[:, None]
    with fastattn.inspect(model) as record:
        model(SOURCE, TARGET, tgt_is_causal=True, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    assert record.paths == [
        "encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn", "decoder.layers.1.self_attn", "decoder.layers.1.multihead_attn",
    ]  # fmt: skip
    assert [tuple(call.weights.shape[2:]) for call in record] == [(S, S)] * 2 + [(T, T), (T, S)] * 2
    for call in record:
        assert call.heads == tuple(range(HEADS))
        assert call.weights.dtype == torch.float32
        assert not call.weights.requires_grad
        torch.testing.assert_close(call.weights.sum(-1), torch.ones(N, HEADS, call.weights.shape[2]))
    assert not record[2].weights.triu(1).any()
    assert not record["decoder.layers.1.multihead_attn"][0].weights[1, :, :, 4:].any()
    assert record.bytes == sum(4 * call.weights.numel() for call in record)
    assert "6 calls recorded" in str(record)
    before = len(record)
    model(SOURCE, TARGET)
    assert len(record) == before
    assert not recording._watched


@pytest.mark.parametrize("name", [n for n in CASES if n != "disentangled"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_weights_are_those_that_are_returned(name: str, kv_heads: int) -> None:
    """And the output is the same bits as without looking."""
    module = fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True, position=make(name), num_kv_heads=kv_heads).double()
    x = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    _, expected = module(x, x, x, average_attn_weights=False)
    with fastattn.inspect(module, heads=[2, -1, 0]) as record:
        seen = module(x, x, x, need_weights=False)[0]
    assert torch.equal(seen, module(x, x, x, need_weights=False)[0])
    assert record[0].heads == (2, 3, 0)
    assert record[0].path == ""
    torch.testing.assert_close(record[0].weights, expected[:, [2, 3, 0]])


def test_masks_of_every_kind() -> None:
    module = fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True, add_bias_kv=True, add_zero_attn=True).double()
    x = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    hidden = torch.rand(N * HEADS, LENGTH, LENGTH) < 0.3
    for call in (
        {"attn_mask": hidden},
        {"attn_mask": torch.randn(LENGTH, LENGTH).double()},
        {"is_causal": True, "key_padding_mask": torch.arange(LENGTH) > torch.tensor([3, 20])[:, None]},
    ):
        _, expected = module(x, x, x, average_attn_weights=False, **call)
        with fastattn.inspect(module, heads=1) as record:
            module(x, x, x, need_weights=False, **call)
        torch.testing.assert_close(record[0].weights, expected[:, 1:2])


def test_a_training_step_is_the_same_step() -> None:
    """Dropout draws and gradients do not notice; the record is before dropout."""
    model = make_model(dropout=0.3).train()
    grads = []
    for watch in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        if watch:
            with fastattn.inspect(model) as record:
                model(SOURCE, TARGET).square().sum().backward()
        else:
            model(SOURCE, TARGET).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.testing.assert_close(record[0].weights.sum(-1), torch.ones(N, HEADS, S))


def test_replaced_and_shared_and_decoding() -> None:
    stock = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True), 2, enable_nested_tensor=False
    ).eval()  # fmt: skip
    fastattn.replace_attention(stock)
    with torch.no_grad(), fastattn.inspect(stock, layers=-1) as record:
        stock(SOURCE)
    assert record.paths == ["layers.1.self_attn"]
    shared = make_model(share_layers=1, position=fnn.RotaryEmbedding(HEAD_DIM))
    with torch.no_grad(), fastattn.inspect(shared, layers="encoder.*") as record:
        shared(SOURCE, TARGET)
    assert [(call.path, call.call) for call in record] == [("encoder.layers.0.self_attn", n) for n in (0, 1)]
    cache = shared.make_cache(N, max_length=T)
    with torch.no_grad():
        memory = shared.encoder(SOURCE)
        with fastattn.inspect(shared, layers="decoder*self_attn") as whole:
            shared.decoder(TARGET, memory, tgt_is_causal=True)
        with fastattn.inspect(shared, layers="decoder*self_attn") as steps:
            for token in TARGET.split(1, dim=1):
                shared.decoder(token, memory, cache=cache)
    for number in range(T):  # two uses of the layer in every step
        got = steps[2 * number + 1].weights
        torch.testing.assert_close(got[:, :, 0], whole[1].weights[:, :, number, : number + 1])


def test_layers_choose_and_nest() -> None:
    model = make_model()
    with fastattn.inspect(model, layers=[0, "decoder.*.multihead_attn", -1]) as outer:
        with fastattn.inspect(model, layers=0, heads=0) as inner:
            model(SOURCE, TARGET)
        model(SOURCE, TARGET)
    chosen = ["encoder.layers.0.self_attn", *(f"decoder.layers.{n}.multihead_attn" for n in (0, 1))]
    assert outer.paths == chosen
    assert (len(outer), len(inner)) == (6, 1)
    assert [call.call for call in outer[chosen[0]]] == [0, 1]
    assert inner[0].heads == (0,)


def test_limit_raises_or_drops() -> None:
    model = make_model()
    one = 4 * N * HEADS * S * S
    with pytest.raises(fnn.RecordingLimitError, match=r"limit: expected at most .* of encoder.layers.1.self_attn"):  # noqa: SIM117
        with fastattn.inspect(model, limit=one) as record:
            model(SOURCE, TARGET)
    assert len(record) == 1
    assert not recording._watched
    with fastattn.inspect(model, limit=one + 4 * N * HEADS * T * T, on_limit="drop") as record:
        model(SOURCE, TARGET)
    assert [call.path for call in record] == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    assert record.dropped == 4
    assert record.bytes <= one + 4 * N * HEADS * T * T


def test_transforms_are_refused_and_graphs_record_nothing() -> None:
    module = fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    with fastattn.inspect(module) as record:
        with pytest.raises(NotImplementedError, match="vmap"):
            torch.vmap(lambda x: module(x, x, x, need_weights=False)[0])(torch.randn(2, N, S, WIDTH))
        torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend="eager")(SOURCE)
    assert not record


MODEL = make_model()
PLAIN = torch.nn.Linear(2, 2)
ROWS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("model a string", {"model": "model"}, TypeError, "model: expected a torch.nn.Module"),
    ("nothing inside", {"model": PLAIN}, ValueError, "model: expected attention modules.*replace_attention"),
    ("stock attention", {"model": torch.nn.Transformer(8, 2, 1, 1, 8)}, ValueError, "replace_attention"),
    ("compiled", {"model": torch.compile(MODEL, backend="eager")}, ValueError, "eagerly"),
    ("layer 6", {"layers": 6}, ValueError, r"layers: expected a number in \[-6, 6\)"),
    ("layer True", {"layers": [True]}, TypeError, "layers"),
    ("layers a float", {"layers": 1.5}, TypeError, "layers: expected a number, a pattern"),
    ("no such path", {"layers": "encoder.layers.7.*"}, ValueError, "layers: expected a pattern of"),
    ("head 4", {"heads": [0, 4]}, ValueError, "heads"),
    ("no heads", {"heads": []}, TypeError, "heads"),
    ("negative limit", {"limit": -1}, ValueError, "limit"),
    ("other rule", {"on_limit": "stop"}, ValueError, "on_limit: expected 'raise' or 'drop'"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match), fastattn.inspect(**{"model": MODEL, **arguments}):
        pass
    assert not recording._watched


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record() -> AttentionRecord:
    with torch.no_grad(), fastattn.inspect(MODEL) as found:
        MODEL(SOURCE, TARGET, tgt_is_causal=True)
    return found


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def test_grid_of_heads(record: AttentionRecord, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (plot extra)")
    source, target = list("source$"), list("t a\nr")
    calls = [*record["decoder.layers.0.multihead_attn"], *record["decoder.layers.1.multihead_attn"]]
    figure = fastattn.plot_attention(calls, (target, source), sequence=1, title="cross")
    drawn = panels(figure)
    assert len(drawn) == 2 * HEADS
    for number, axes in enumerate(drawn):
        expected = calls[number // HEADS].weights[1, number % HEADS]
        assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), expected)
        assert axes.get_title() == f"head {number % HEADS}"
        assert [t.get_text() for t in axes.get_xticklabels()] == source
    assert [t.get_text() for t in drawn[0].get_yticklabels()] == ["t", "\u2423", "a", "\u21b5", "r"]
    assert len({axes.images[0].get_clim() for axes in drawn}) == 1
    figure.savefig(tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_padding_is_cut_and_heads_are_chosen(record: AttentionRecord) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (plot extra)")
    call = record["encoder.layers.0.self_attn"][0]
    figure = fastattn.plot_attention(call, ["one", "two", "three"], heads=[3, 1])
    drawn = panels(figure)
    assert [axes.get_title() for axes in drawn] == ["head 3", "head 1"]
    assert torch.equal(torch.from_numpy(drawn[0].images[0].get_array().data), call.weights[0, 3, :3, :3])
    many = RecordedCall("path", 2, tuple(range(12)), torch.rand(1, 12, 70, 70).softmax(-1))
    drawn = panels(fastattn.plot_attention(many, ["x"] * 70))
    assert [axes.get_title() for axes in drawn] == [f"head {n}" for n in range(12)]
    assert "call 2" in drawn[0].get_ylabel()
    assert len(drawn[0].get_xticklabels()) < 20


PICTURES: list[tuple[str, Callable[[AttentionRecord], Any], type[Exception], str]] = [
    ("a tensor", lambda r: fastattn.plot_attention(r[0].weights), TypeError, "record: expected recorded calls"),
    ("a number", lambda r: fastattn.plot_attention(3), TypeError, "record"),
    ("nothing", lambda r: fastattn.plot_attention([]), ValueError, "record: expected at least one call"),
    ("sequence 2", lambda r: fastattn.plot_attention(r, sequence=2), ValueError, "sequence"),
    ("head 4", lambda r: fastattn.plot_attention(r, heads=[4]), ValueError, "heads"),
    ("no heads", lambda r: fastattn.plot_attention(r, heads=[]), ValueError, "heads"),
    ("too many", lambda r: fastattn.plot_attention(r[0], ["x"] * 8), ValueError, "tokens: expected at most 7 texts"),
    ("numbers", lambda r: fastattn.plot_attention(r[0], [1, 2]), TypeError, "tokens: expected texts"),
    ("a string", lambda r: fastattn.plot_attention(r[0], "abc"), TypeError, "tokens"),
    ("three lists", lambda r: fastattn.plot_attention(r[0], (["a"],) * 3), TypeError, "tokens"),
]


@pytest.mark.parametrize(("call", "error", "match"), [row[1:] for row in PICTURES], ids=[row[0] for row in PICTURES])
def test_bad_pictures(
    record: AttentionRecord, call: Callable[[AttentionRecord], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call(record)


def test_without_matplotlib(record: AttentionRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastattn\[plot\]'"):
        fastattn.plot_attention(record)

"""Decoding with a cache, token by token or several at a time, is one forward over everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from positions import CASES, HEAD_DIM, HEADS, LENGTH, WIDTH, make
from torch import Tensor

import fastattn
from fastattn import nn as fnn
from fastattn.nn import core
from fastattn.nn.cache import KVCache

N, S = 2, 7
STEPS = {"one by one": [1] * LENGTH, "prompt and tokens": [5, 1, 1, 3, 2], "all at once": [LENGTH]}
WINDOW = 4
REFERENCE = fastattn.dispatch._BACKENDS["reference"]
CACHED = [name for name, case in CASES.items() if not case.no_cache]
SLIDING = [name for name, case in CASES.items() if not case.no_sliding]


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def attention(name: str, kv_heads: int = HEADS, dtype: torch.dtype = torch.float64) -> fnn.MultiheadAttention:
    return fnn.MultiheadAttention(
        WIDTH, HEADS, batch_first=True, dtype=dtype, position=make(name, dtype), num_kv_heads=kv_heads
    ).eval()  # fmt: skip


def cache_for(module: fnn.MultiheadAttention, **kind: int) -> KVCache:
    return KVCache(N, module.num_kv_heads or HEADS, HEAD_DIM, dtype=module.out_proj.weight.dtype, **kind)


def decode(step: Callable[[Tensor], Tensor], x: Tensor, sizes: list[int]) -> Tensor:
    return torch.cat([step(part) for part in x.split(sizes, dim=1)], dim=1)


def band(length: int, window: int) -> Tensor:
    """True = hidden: what is later, or `window` and more earlier."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance < 0) | (distance >= window)


def check_budget(ours: Tensor, run_whole: Callable[[torch.dtype], Tensor], table_eps: float = 0.0) -> None:
    """Within twice the error of one whole forward in plain torch, and a few roundings, of tables too where they differ
    between the steps and the whole."""
    exact = run_whole(torch.float64)
    size = exact.abs().max().item()
    eps = torch.finfo(ours.dtype).eps
    torch_error = (run_whole(ours.dtype).double() - exact).abs().max().item() if ours.dtype != torch.float64 else 0.0
    assert (ours.double() - exact).abs().max().item() <= 2 * torch_error + 16 * max(eps, table_eps) * size


def whole(module: torch.nn.Module, x: Tensor, **call: Any) -> Callable[[torch.dtype], Tensor]:
    """One forward by the plain formula, in any dtype."""

    def run(dtype: torch.dtype) -> Tensor:
        backends = fastattn.dispatch._BACKENDS
        try:
            fastattn.dispatch._BACKENDS = {"reference": REFERENCE}
            wide = copy.deepcopy(module).to(dtype)
            y = x.to(dtype)
            return wide(y, y, y, need_weights=False, **call)[0]
        finally:
            fastattn.dispatch._BACKENDS = backends

    return run


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_static(dtype: torch.dtype, name: str, steps: str, kv_heads: int, only_backend: str) -> None:
    if name == "disentangled" and kv_heads != HEADS:
        pytest.skip("its projections are made for as many key heads as query heads")
    module, x = attention(name, kv_heads, dtype), torch.randn(N, LENGTH, WIDTH, dtype=dtype)
    cache = cache_for(module, max_length=LENGTH)
    out = decode(lambda t: module(t, t, t, need_weights=False, cache=cache)[0], x, STEPS[steps])
    assert cache.length == LENGTH
    check_budget(out, whole(module, x, is_causal=True), CASES[name].table_eps)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sliding(dtype: torch.dtype, name: str, steps: str, kv_heads: int, only_backend: str) -> None:
    """Against a band of the whole, long enough for the buffers to be moved."""
    if name == "disentangled" and kv_heads != HEADS:
        pytest.skip("its projections are made for as many key heads as query heads")
    module, x = attention(name, kv_heads, dtype), torch.randn(N, 3 * LENGTH, WIDTH, dtype=dtype)
    cache = cache_for(module, window=WINDOW)
    out = decode(lambda t: module(t, t, t, need_weights=False, cache=cache)[0], x, STEPS[steps] * 3)
    check_budget(out, whole(module, x, attn_mask=band(3 * LENGTH, WINDOW)), CASES[name].table_eps)


def test_sliding_is_the_sliding_window_mask(only_backend: str) -> None:
    module, x = attention("none"), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    q, k, v = (
        y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        for y in torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    )
    window = fastattn.attention(q, k, v, mask=fastattn.SlidingWindow(WINDOW - 1, 0))
    cache = cache_for(module, window=WINDOW)
    out = decode(lambda t: module(t, t, t, need_weights=False, cache=cache)[0], x, [1] * LENGTH)
    torch.testing.assert_close(out, module.out_proj(window.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "raises" in case.no_sliding])
def test_a_bias_of_the_position_itself_refuses_dropped_keys(name: str) -> None:
    module, x = attention(name), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    cache = cache_for(module, window=WINDOW)
    with pytest.raises(ValueError, match="a bias of distances where a sliding cache has dropped keys"):
        decode(lambda t: module(t, t, t, need_weights=False, cache=cache)[0], x, [1] * LENGTH)


@pytest.mark.parametrize("name", ["none", "rotary", "t5"])
def test_window_of_one_and_window_beyond_the_text(name: str) -> None:
    module, x = attention(name), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    for window in (1, LENGTH, 3 * LENGTH):
        cache = cache_for(module, window=window)
        out = decode(lambda t, c=cache: module(t, t, t, need_weights=False, cache=c)[0], x, STEPS["prompt and tokens"])
        expected = module(x, x, x, need_weights=False, attn_mask=band(LENGTH, window))[0]
        torch.testing.assert_close(out, expected)


def test_rotary_far_from_the_start() -> None:
    """The tables follow the true position: 5000 tokens in, a window in float32 is as good as at the start."""
    module = attention("rotary", dtype=torch.float32)
    x = torch.randn(N, 5000, WIDTH)
    cache = cache_for(module, window=WINDOW)
    out = decode(lambda t: module(t, t, t, need_weights=False, cache=cache)[0], x, [4990] + [1] * 10)
    tail = x[:, -20:]
    near = module(tail, tail, tail, need_weights=False, attn_mask=band(20, WINDOW))[0]
    torch.testing.assert_close(out[:, -10:], near[:, -10:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["sequence-first", "unbatched"])
def test_layouts(layout: str) -> None:
    module = attention("rotary")
    x = torch.randn(1 if layout == "unbatched" else N, LENGTH, WIDTH, dtype=torch.float64)
    expected = module(x, x, x, need_weights=False, is_causal=True)[0]
    cache = KVCache(x.shape[0], HEADS, HEAD_DIM, max_length=LENGTH, dtype=torch.float64)
    module.batch_first = layout != "sequence-first"
    x = x.transpose(0, 1) if layout == "sequence-first" else x[0]
    parts = [module(t, t, t, need_weights=False, cache=cache)[0] for t in x.split(STEPS["prompt and tokens"])]
    out = torch.cat(parts)
    torch.testing.assert_close(out.transpose(0, 1) if layout == "sequence-first" else out[None], expected)


@pytest.mark.parametrize("kind", [{"max_length": LENGTH}, {"window": LENGTH}], ids=str)
@pytest.mark.parametrize("name", ["none", "rotary", "alibi"])
def test_padded_prompts(name: str, kind: dict[str, int]) -> None:
    """Padding on the left, as a batch of prompts has it; the cache remembers it."""
    module, x = attention(name), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    padding = torch.arange(LENGTH) < torch.tensor([3, 0])[:, None]
    expected = module(x, x, x, padding, need_weights=False, is_causal=True)[0]
    cache = cache_for(module, **kind)
    outs = [module(x[:, :5], x[:, :5], x[:, :5], padding[:, :5], need_weights=False, cache=cache)[0]]
    outs += [module(t, t, t, need_weights=False, cache=cache)[0] for t in x[:, 5:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(outs, dim=1), expected)


@pytest.mark.parametrize("kind", [{"max_length": 60}, {"window": WINDOW}], ids=str)
def test_nothing_is_allocated_in_a_step(kind: dict[str, int]) -> None:
    """The buffers stay where they are, and what a step attends to is a view of them."""
    cache = KVCache(N, HEADS, HEAD_DIM, **kind)
    places = cache.key.data_ptr(), cache.value.data_ptr()
    for number in range(50):
        step = cache.append(*torch.randn(2, N, HEADS, 1, HEAD_DIM))
        assert step.key.untyped_storage().data_ptr() == places[0]
        assert step.value.untyped_storage().data_ptr() == places[1]
        expected = number + 1 if cache.window is None else min(number + 1, WINDOW)
        assert step.key.shape[2] == expected
        assert step.first == number + 1 - expected
    assert (cache.key.data_ptr(), cache.value.data_ptr()) == places
    if cache.window is not None:
        longest = cache.append(*torch.randn(2, N, HEADS, WINDOW + 1, HEAD_DIM))
        assert longest.key.untyped_storage().data_ptr() == places[0]


@pytest.mark.parametrize("kind", [{"max_length": 200}, {"window": 5}], ids=str)
def test_appending_is_concatenation(kind: dict[str, int]) -> None:
    """Against a list that keeps everything, for random steps and paddings."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cache, window = KVCache(N, 1, 2, **kind), kind.get("window")
        keys, padding = torch.empty(N, 1, 0, 2), torch.empty(N, 0, dtype=torch.bool)
        for _ in range(12):
            count = int(torch.randint(1, 14, (), generator=generator))
            new, masked = torch.randn(N, 1, count, 2), torch.rand(N, count) < 0.3
            if torch.rand((), generator=generator) < 0.5:
                masked = None
            keys = torch.cat((keys, new), dim=2)
            padding = torch.cat((padding, torch.zeros(N, count, dtype=torch.bool) if masked is None else masked), 1)
            got = cache.append(new, -new, masked)
            seen = keys.shape[2] if window is None else min(keys.shape[2], window - 1 + count)
            assert torch.equal(got.key, keys[:, :, keys.shape[2] - seen :])
            assert torch.equal(got.value, -got.key)
            assert got.first == keys.shape[2] - seen
            have = torch.zeros(N, seen, dtype=torch.bool) if got.padding is None else got.padding
            assert torch.equal(have, padding[:, padding.shape[1] - seen :])


def test_reset_and_reorder() -> None:
    module, x = attention("rotary"), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    cache = cache_for(module, max_length=LENGTH)

    def step(t: Tensor) -> Tensor:
        return module(t, t, t, need_weights=False, cache=cache)[0]

    first = decode(step, x, [1] * LENGTH)
    cache.reset()
    assert torch.equal(decode(step, x, [1] * LENGTH), first)
    cache.reset()
    step(x[:, :6])
    index = torch.tensor([1, 0])
    cache.reorder(index)
    crossed = torch.cat((x[index, :6], x[:, 6:]), dim=1)
    expected = module(crossed, crossed, crossed, need_weights=False, is_causal=True)[0]
    torch.testing.assert_close(step(x[:, 6:]), expected[:, 6:])


def test_weights_of_a_step() -> None:
    module, x = attention("alibi"), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    cache = cache_for(module, max_length=LENGTH)
    _, expected = module(x, x, x, is_causal=True)
    module(x[:, :9], x[:, :9], x[:, :9], cache=cache)
    _, weights = module(x[:, 9:], x[:, 9:], x[:, 9:], cache=cache)
    torch.testing.assert_close(weights, expected[:, 9:])


# Stacks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{"max_length": LENGTH}, {"window": LENGTH}], ids=str)
@pytest.mark.parametrize("share_layers", [None, 1], ids=["own", "shared"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("name", ["none", "rotary", "t5", "shaw"])
def test_decoder(name: str, norm_first: bool, share_layers: int | None, kind: dict[str, int]) -> None:
    """With padded memory, grouped heads, shared layers; the memory is projected once."""
    model = fnn.Transformer(
        WIDTH, HEADS, 1, 3, 24, batch_first=True, norm_first=norm_first, dtype=torch.float64, num_kv_heads=2,
        position=(None, make(name)), share_layers=share_layers,
    ).eval()  # fmt: skip
    source = torch.randn(N, S, WIDTH, dtype=torch.float64)
    x = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    padding = torch.arange(S) >= torch.tensor([S, 4])[:, None]
    memory = model.encoder(source, src_key_padding_mask=padding)
    expected = model.decoder(x, memory, tgt_is_causal=True, memory_key_padding_mask=padding)
    cache = model.make_cache(N, **kind)
    for steps in STEPS.values():
        cache.reset()
        out = decode(lambda t: model.decoder(t, memory, memory_key_padding_mask=padding, cache=cache), x, steps)
        torch.testing.assert_close(out, expected)
        assert cache.length == LENGTH


def test_causal_encoder_decodes_too() -> None:
    layer = fnn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True, dtype=torch.float64)
    model = fnn.TransformerEncoder(layer, 2, position=fnn.RotaryEmbedding(HEAD_DIM)).eval()
    x = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    cache = model.make_cache(N, max_length=LENGTH)
    out = decode(lambda t: model(t, cache=cache), x, STEPS["prompt and tokens"])
    torch.testing.assert_close(out, model(x, is_causal=True))


def test_memory_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fnn.Transformer(WIDTH, HEADS, 1, 2, 24, batch_first=True).eval()
    memory, x = torch.randn(N, S, WIDTH), torch.randn(N, 4, WIDTH)
    projected = []
    project = core.project_heads

    def watched(module: torch.nn.Module, query: Tensor, key: Tensor, *rest: Any) -> Any:
        projected.append(key is memory)
        return project(module, query, key, *rest)

    monkeypatch.setattr(core, "project_heads", watched)
    cache = model.make_cache(N, max_length=8)
    decode(lambda t: model.decoder(t, memory, cache=cache), x, [1] * 4)
    assert sum(projected) == 2
    other = torch.randn(N, S, WIDTH)
    fresh = model.make_cache(N, max_length=8)
    model.decoder(x, memory, cache=fresh)
    torch.testing.assert_close(model.decoder(x, other, cache=cache), model.decoder(x, other, cache=fresh))


def test_reordering_a_stack() -> None:
    model = fnn.Transformer(WIDTH, HEADS, 1, 2, 24, batch_first=True, dtype=torch.float64).eval()
    memory = torch.randn(1, S, WIDTH, dtype=torch.float64).expand(N, -1, -1)
    x, index = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64), torch.tensor([1, 1])
    cache = model.make_cache(N, max_length=LENGTH)
    model.decoder(x[:, :6], memory, cache=cache)
    cache.reorder(index)
    crossed = torch.cat((x[index, :6], x[:, 6:]), dim=1)
    expected = model.decoder(crossed, memory, tgt_is_causal=True)
    torch.testing.assert_close(model.decoder(x[:, 6:], memory, cache=cache), expected[:, 6:])


def test_absolute_embeddings_are_added_at_the_offset() -> None:
    model = fnn.Transformer(WIDTH, HEADS, 1, 2, 24, batch_first=True, dtype=torch.float64).eval()
    embed = fnn.SinusoidalEmbedding(WIDTH)
    memory, x = torch.randn(N, S, WIDTH, dtype=torch.float64), torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
    cache = model.make_cache(N, max_length=LENGTH)
    out = decode(lambda t: model.decoder(embed(t, offset=cache.length), memory, cache=cache), x, [1] * LENGTH)
    torch.testing.assert_close(out, model.decoder(embed(x), memory, tgt_is_causal=True))


# Bad input -----------------------------------------------------------------------------------------------------------

X = torch.zeros(N, 3, WIDTH)
KEYS = torch.zeros(N, HEADS, 3, HEAD_DIM)


def _step(cache: Any = None, x: Tensor = X, module: dict[str, Any] | None = None, **call: Any) -> Any:
    cache = KVCache(N, HEADS, HEAD_DIM, max_length=4) if cache is None else cache
    return fnn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **(module or {}))(x, x, x, cache=cache, **call)


def _append(*tensors: Any) -> Any:
    return KVCache(N, HEADS, HEAD_DIM, max_length=4).append(*tensors)


def _with_grad() -> Any:
    with torch.enable_grad():
        return _step()


def _memory_with_grad() -> Any:
    model = fnn.TransformerDecoderLayer(WIDTH, HEADS)
    with torch.enable_grad():
        return model.multihead_attn(X, X, X, cache=fnn.MemoryCache())


def _stack(places: int, **kind: int) -> Any:
    layer = fnn.TransformerEncoderLayer(WIDTH, HEADS)
    return fnn.TransformerEncoder(layer, 2)(X, cache=fnn.TransformerEncoder(layer, places).make_cache(3, **kind))


ROWS: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("both kinds", lambda: KVCache(1, 1, 2, max_length=3, window=3), ValueError, "exactly one of them, got both"),
    ("no kind", lambda: KVCache(1, 1, 2), ValueError, "exactly one of them, got none"),
    ("no window", lambda: KVCache(1, 1, 2, window=0), ValueError, "window"),
    ("length a float", lambda: KVCache(1, 1, 2, max_length=3.0), TypeError, "max_length"),
    ("no heads", lambda: KVCache(1, 0, 2, max_length=3), ValueError, "num_heads"),
    ("int dtype", lambda: KVCache(1, 1, 2, max_length=3, dtype=torch.int64), TypeError, "dtype"),
    ("too many tokens", lambda: _append(*[torch.zeros(N, HEADS, 5, HEAD_DIM)] * 2), ValueError, "at most 4 more"),
    ("key of rank 3", lambda: _append(KEYS[0], KEYS[0]), ValueError, "key: expected shape"),
    ("other heads", lambda: _append(KEYS[:, :2], KEYS[:, :2]), ValueError, "key: expected shape"),
    ("other dtype", lambda: _append(KEYS.double(), KEYS), TypeError, "key: expected torch.float32"),
    ("other length", lambda: _append(KEYS, KEYS[:, :, :2]), ValueError, "value: expected 3 tokens"),
    ("padding float", lambda: _append(KEYS, KEYS, torch.zeros(N, 3)), TypeError, "padding: expected bool"),
    ("padding shape", lambda: _append(KEYS, KEYS, torch.zeros(N, 2).bool()), ValueError, "padding"),
    ("reorder", lambda: KVCache(2, 1, 2, max_length=3).reorder(torch.tensor([0])), ValueError, "index"),
    ("with gradients", _with_grad, RuntimeError, "decode under torch.no_grad"),
    ("memory with gradients", _memory_with_grad, RuntimeError, "decode under torch.no_grad"),
    ("mask", lambda: _step(attn_mask=torch.zeros(3, 3)), ValueError, "attn_mask: expected None with a cache"),
    ("float padding", lambda: _step(key_padding_mask=torch.zeros(N, 3)), TypeError, "key_padding_mask: expected bool"),
    ("bias keys", lambda: _step(module={"add_bias_kv": True}), ValueError, "cache: expected None with add_bias_kv"),
    ("batch", lambda: _step(x=X[:1]), ValueError, "key: expected shape"),
    ("other stack", lambda: _stack(3, max_length=4), ValueError, "cache: expected one for 2 layers"),
    ("no kind for a stack", lambda: _stack(2), ValueError, "exactly one"),
]


@pytest.mark.parametrize(("call", "error", "match"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()

"""Two-dimensional relative positions: Swin v1 and v2, the decomposed ones of MViTv2 and SAM."""

from __future__ import annotations

import math

import pytest
import torch
from scheme_oracle import DTYPES, Inputs, attend, check_scheme
from torch import Tensor

import fastattn
from fastattn import nn as fnn
from fastattn.positional.decomposed import Decomposed
from fastattn.positional.windows import cosine_attention, log_spaced_offsets, shifted_window_ids, window_bias


def operands(batch: int, heads: int, queries: int, keys: int, dim: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "query": torch.randn(batch, heads, queries, dim, dtype=torch.float64),
        "key": torch.randn(batch, heads, keys, dim, dtype=torch.float64),
        "value": torch.randn(batch, heads, keys, 6, dtype=torch.float64),
    }


# -- Swin -------------------------------------------------------------------------------------------------------------

IMAGE, WINDOW, SHIFT = (6, 12), (3, 4), (1, 2)
TOKENS = WINDOW[0] * WINDOW[1]


def _window_bias(table: Tensor) -> Tensor:
    """(H, N, N), pair by pair."""
    rows = []
    for i in range(TOKENS):
        for j in range(TOKENS):
            down = i // WINDOW[1] - j // WINDOW[1] + WINDOW[0] - 1
            right = i % WINDOW[1] - j % WINDOW[1] + WINDOW[1] - 1
            rows.append(table[down * (2 * WINDOW[1] - 1) + right])
    return torch.stack(rows).view(TOKENS, TOKENS, -1).permute(2, 0, 1)


def _neighbours() -> Tensor:
    """(windows, N, N): whether two tokens of a shifted window were within one window's reach before the shift."""
    origin = torch.stack(torch.meshgrid(*[torch.arange(n) for n in IMAGE], indexing="ij"), -1)
    rolled = origin.roll((-SHIFT[0], -SHIFT[1]), (0, 1))
    tiles = rolled.view(IMAGE[0] // WINDOW[0], WINDOW[0], IMAGE[1] // WINDOW[1], WINDOW[1], 2).transpose(1, 2)
    place = tiles.reshape(-1, TOKENS, 2)
    apart = (place[:, :, None] - place[:, None]).abs()
    return ((apart[..., 0] < WINDOW[0]) & (apart[..., 1] < WINDOW[1])).contiguous()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swin(dtype: torch.dtype, shifted: bool, backend: str, device: str) -> None:
    """Windows are the batch; the gradient of the table is summed over all of them."""
    count = IMAGE[0] // WINDOW[0] * (IMAGE[1] // WINDOW[1])
    rows = (2 * WINDOW[0] - 1) * (2 * WINDOW[1] - 1)
    inputs = operands(2 * count, 3, TOKENS, TOKENS, 8) | {"table": torch.randn(rows, 3, dtype=torch.float64)}
    seen = _neighbours().repeat(2, 1, 1)[:, None] if shifted else None
    ids = shifted_window_ids(*IMAGE, WINDOW, SHIFT if shifted else (0, 0))
    mask = fastattn.Documents(ids.repeat(2, 1))

    def ours(t: Inputs) -> Tensor:
        bias = fastattn.DenseBias(window_bias(t["table"], WINDOW))
        return fastattn.attention(t["query"], t["key"], t["value"], bias=bias, mask=mask, backend=backend)

    def formula(t: Inputs) -> tuple[Tensor, Tensor]:
        scores = t["query"] @ t["key"].mT / math.sqrt(8) + _window_bias(t["table"]).to(t["query"].dtype)
        return attend(scores, t["value"], seen), scores

    check_scheme(ours, formula, inputs, dtype)


def test_shifted_windows_are_regions_of_neighbours() -> None:
    ids = shifted_window_ids(*IMAGE, WINDOW, SHIFT)
    assert torch.equal(ids[:, :, None] == ids[:, None], _neighbours())


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_layer_of_transformers(shift: int, backend: str, device: str) -> None:
    """The whole block: roll, partition, attend, with the mask and the parameters of theirs."""
    swin = pytest.importorskip("transformers.models.swin.modeling_swin", reason="compares with transformers")
    config = swin.SwinConfig(window_size=4, attention_probs_dropout_prob=0.0, attn_implementation="eager")
    layer = swin.SwinLayer(config, 16, (8, 12), 2, shift_size=shift).double().eval()
    module = fnn.SwinBias(2, (4, 4)).double()
    theirs = next(m for m in layer.modules() if isinstance(m, swin.SwinRelativePositionBias))
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    module.load_state_dict({"table": theirs.relative_position_bias_table})
    torch.testing.assert_close(module().tensor[None], theirs())
    theirs_mask = layer.get_attn_mask(8, 12, torch.float64, torch.device("cpu"))
    ids = shifted_window_ids(8, 12, (4, 4), (shift, shift))
    if shift:
        assert torch.equal(ids[:, :, None] == ids[:, None], theirs_mask == 0)
    q, k, v = operands(6, 2, 16, 16, 8).values()
    ours = fastattn.attention(q, k, v, bias=module(), mask=fastattn.Documents(ids), backend=backend)
    dense = theirs() if theirs_mask is None else theirs() + theirs_mask[:, None]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(ours, want)
    grads = [
        torch.autograd.grad(out.square().sum(), table)[0]
        for out, table in ((ours, module.table), (want, theirs.relative_position_bias_table))
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].sum(0).abs().max() < 1e-10  # softmax does not see a constant


@pytest.mark.parametrize("pretrained", [(0, 0), (7, 7)])
def test_swin_v2_layer_of_transformers(pretrained: tuple[int, int], backend: str, device: str) -> None:
    """Cosine attention, the temperature and the network, forward and all gradients."""
    swin = pytest.importorskip("transformers.models.swinv2.modeling_swinv2", reason="compares with transformers")
    config = swin.Swinv2Config(attention_probs_dropout_prob=0.0)
    layer = swin.Swinv2SelfAttention(config, 16, 2, 4, list(pretrained)).double().eval()
    with torch.no_grad():
        layer.logit_scale[1] = 5.0  # beyond its bound, where it gets no gradient
    bias = fnn.SwinV2Bias(2, (4, 4), pretrained if pretrained[0] else None).double()
    bias.network.load_state_dict(layer.continuous_position_bias_mlp.state_dict())
    offsets = log_spaced_offsets((4, 4), pretrained if pretrained[0] else None)
    theirs = layer.relative_coords_table
    torch.testing.assert_close(offsets, theirs.view(-1, 2).float())
    cosine = fnn.CosineAttention(2).double()
    cosine.load_state_dict({"logit_scale": layer.logit_scale})
    x = torch.randn(3, 16, 16, dtype=torch.float64)
    (want,) = layer(x)
    q, k, v = (f(x).view(3, 16, 2, 8).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    got = cosine(q, k, v, bias=bias(), backend=backend).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # their offsets are float32
    grad_out = torch.randn_like(want)
    ours = torch.autograd.grad(got, [cosine.logit_scale, *bias.network.parameters()], grad_out)
    hf = torch.autograd.grad(want, [layer.logit_scale, *layer.continuous_position_bias_mlp.parameters()], grad_out)
    assert ours[0][1] == 0
    for a, b in zip(ours, hf, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cosine_attention(dtype: torch.dtype, backend: str, device: str) -> None:
    inputs = operands(2, 3, 9, 11, 8) | {"scale": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)}

    def ours(t: Inputs) -> Tensor:
        return cosine_attention(
            t["query"], t["key"], t["value"], t["scale"], mask=fastattn.Causal(), backend=backend
        )  # fmt: skip

    def formula(t: Inputs) -> tuple[Tensor, Tensor]:
        q, k = (x / x.square().sum(-1, keepdim=True).sqrt() for x in (t["query"], t["key"]))
        scores = (q @ k.mT) * t["scale"].clamp(max=math.log(100)).exp().to(q.dtype)[:, None, None]
        return attend(scores, t["value"], torch.ones(9, 11, dtype=torch.bool).tril(2)), scores

    check_scheme(ours, formula, inputs, dtype)


def test_cosine_attention_does_not_see_lengths(backend: str, device: str) -> None:
    q, k, v = operands(1, 2, 5, 5, 8).values()
    scale = torch.ones(2, dtype=torch.float64)
    want = cosine_attention(q, k, v, scale, backend=backend)
    stretch = torch.rand(1, 2, 5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(cosine_attention(q * stretch, k * stretch, v, scale, backend=backend), want)


# -- decomposed -------------------------------------------------------------------------------------------------------


def _axis(table: Tensor, queries: int, keys: int) -> Tensor:
    """(queries, keys, D), pair by pair."""
    longest = max(queries, keys)
    if len(table) != 2 * longest - 1:
        table = torch.nn.functional.interpolate(table.T[None], size=2 * longest - 1, mode="linear")[0].T
    rows = [
        table[int(i * max(keys / queries, 1.0) - (j - (keys - 1)) * max(queries / keys, 1.0))]
        for i in range(queries)
        for j in range(keys)
    ]
    return torch.stack(rows).view(queries, keys, -1)


GRIDS = [((3, 4), (3, 4), 0), ((3, 4), (3, 4), 2), ((4, 6), (2, 3), 0), ((2, 3), (4, 6), 1), ((1, 5), (1, 5), 0)]


@pytest.mark.parametrize("route", ["columns", "dense"])
@pytest.mark.parametrize(("query_size", "key_size", "prefix"), GRIDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decomposed(
    dtype: torch.dtype, query_size: tuple[int, int], key_size: tuple[int, int], prefix: int, route: str,
    backend: str, device: str,
) -> None:  # fmt: skip
    lengths = [math.prod(size) + prefix for size in (query_size, key_size)]
    sizes = [2 * max(pair) - 1 for pair in zip(query_size, key_size, strict=True)]
    inputs = operands(2, 3, *lengths, 8) | {
        "rows": torch.randn(sizes[0], 8, dtype=torch.float64),
        "columns": torch.randn(sizes[1] + (4 if prefix == 1 else 0), 8, dtype=torch.float64),  # once interpolated
    }

    def ours(t: Inputs) -> Tensor:
        bias = Decomposed(t["rows"], t["columns"], query_size, key_size, prefix=prefix, route=route)
        return fastattn.attention(t["query"], t["key"], t["value"], bias=bias, backend=backend)

    def formula(t: Inputs) -> tuple[Tensor, Tensor]:
        q = t["query"]
        by_row, by_col = (
            _axis(t[n].to(q.dtype), query_size[axis], key_size[axis]) for axis, n in enumerate(("rows", "columns"))
        )
        i, j = torch.arange(lengths[0] - prefix), torch.arange(lengths[1] - prefix)
        pairs = by_row[(i // query_size[1])[:, None], j // key_size[1]]
        pairs = pairs + by_col[(i % query_size[1])[:, None], j % key_size[1]]
        pairs = torch.nn.functional.pad(pairs, (0, 0, prefix, 0, prefix, 0))
        scores = q @ t["key"].mT / math.sqrt(8) + torch.einsum("bhid,ijd->bhij", q, pairs)
        return attend(scores, t["value"]), scores

    check_scheme(ours, formula, inputs, dtype)


@pytest.mark.parametrize("route", ["columns", "dense"])
def test_attention_of_sam(route: str, backend: str, device: str) -> None:
    sam = pytest.importorskip("transformers.models.sam.modeling_sam", reason="compares with transformers")
    config = sam.SamVisionConfig(hidden_size=16, num_attention_heads=2, attention_dropout=0.0)
    layer = sam.SamVisionAttention(config, window_size=5).double().eval()
    for parameter in (layer.rel_pos_h, layer.rel_pos_w):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 5, 16, dtype=torch.float64)
    want, _ = layer(x)
    module = fnn.DecomposedBias(8, (5, 5), route=route).double()
    module.load_state_dict({"rows": layer.rel_pos_h, "columns": layer.rel_pos_w})
    q, k, v = layer.qkv(x).reshape(2, 25, 3, 2, 8).permute(2, 0, 3, 1, 4)
    out = fastattn.attention(q, k, v, bias=module(), backend=backend)
    got = layer.proj(out.transpose(1, 2).reshape(2, 5, 5, 16))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # their softmax is float32
    ours = torch.autograd.grad(got.square().sum(), list(module.parameters()), retain_graph=True)
    hf = torch.autograd.grad(want.square().sum(), [layer.rel_pos_h, layer.rel_pos_w])
    for a, b in zip(ours, hf, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_decomposed_routes() -> None:
    """Columns while they fit; the dense form where they do not, and where the scale is 0."""
    q = torch.randn(1, 1, 9, 64)
    small = fastattn.explain(q, q, q, bias=fnn.DecomposedBias(64, (3, 3))())
    assert small.notes == ["Decomposed as 6 columns appended to the 64 of query and key"]
    assert "written out" in fastattn.explain(q, q, q, bias=fnn.DecomposedBias(64, (3, 3))(), scale=0.0).notes[0]
    wide = torch.randn(1, 1, 9, 254)
    assert "written out" in fastattn.explain(wide, wide, wide, bias=fnn.DecomposedBias(254, (3, 3))()).notes[0]
    table = torch.randn(5, 64)
    for scale in (0.0, 0.3):
        outs = [
            fastattn.attention(q, q, q, bias=Decomposed(table, table, (3, 3), route=route), scale=scale)
            for route in ("auto", "columns", "dense")
        ]
        torch.testing.assert_close(outs[0], outs[2])
        torch.testing.assert_close(outs[1], outs[2])


def test_appended_columns_keep_a_multiple_of_eight() -> None:
    """64 + 6 columns become 72; a head dimension that was none stays as narrow as it can."""
    for dim, want in ((64, 72), (63, 69)):
        q = torch.randn(1, 1, 9, dim)
        problem = fastattn.functional.lower(q, q, q, bias=fnn.DecomposedBias(dim, (3, 3))())
        assert problem.query.shape[3] == problem.key.shape[3] == want
        assert problem.value.shape[3] == dim


def test_decomposed_beside_an_axial_rotation(backend: str, device: str) -> None:
    """The appended columns do not turn, wherever the rotating ones are."""
    q, k, v = operands(1, 2, 12, 12, 8).values()
    table = torch.randn(7, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    for layout in ({"axial": 2}, {"width": 4, "trailing": True}, {"width": 4, "trailing": True, "interleaved": True}):
        rope = fnn.RotaryEmbedding(8, **layout)
        rotary = rope(torch.arange(24).view(2, 12) if rope.axes > 1 else 12)
        outs = [
            fastattn.attention(q, k, v, bias=Decomposed(*table, (3, 4), route=route), rotary=rotary, backend=backend)
            for route in ("columns", "dense")
        ]
        torch.testing.assert_close(*outs)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: window_bias(torch.randn(10, 2), (3, 4)), "table"),
        (lambda: window_bias(torch.randn(35, 2), (0, 4)), "window"),
        (lambda: shifted_window_ids(7, 12, (3, 4), (1, 2)), "height"),
        (lambda: shifted_window_ids(6, 12, (3, 4), (3, 2)), "shift"),
        (lambda: cosine_attention(*[torch.randn(1, 2, 3, 4)] * 3, torch.ones(3)), "logit_scale"),
        (lambda: Decomposed(torch.randn(5), torch.randn(5, 4), (3, 3)), "rows"),
        (lambda: Decomposed(torch.randn(5, 4), torch.randn(5, 4), 3), "query_size"),
        (lambda: Decomposed(torch.randn(5, 4), torch.randn(5, 4), (3, 0)), "query_size"),
        (lambda: Decomposed(torch.randn(5, 4), torch.randn(5, 4), (3, 3), route="rows"), "route"),
        (
            lambda: fastattn.attention(*[torch.randn(1, 2, 8, 4)] * 3, bias=fnn.DecomposedBias(4, (3, 3))()),
            "query_size",
        ),
        (lambda: fastattn.attention(*[torch.randn(1, 2, 9, 5)] * 3, bias=fnn.DecomposedBias(4, (3, 3))()), "rows"),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()  # type: ignore[operator]

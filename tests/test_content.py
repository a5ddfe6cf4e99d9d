"""Relative positions that depend on the contents: Shaw, Transformer-XL, DeBERTa."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from features import deberta_bucket
from scheme_oracle import DTYPES, Inputs, attend, check_scheme
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import nn as fnn
from fastattn.positional.content import Route
from fastattn.positional.deberta import Disentangled, deberta_buckets
from fastattn.positional.shaw import ShawKeys, shaw_attention
from fastattn.positional.transformer_xl import TransformerXL
from fastattn.problem import Problem

QUERIES, KEYS, HEADS, DIM = 13, 19, 4, 8
OFFSETS = [None, 0, -3, torch.tensor([2, 9])]


def draw(**sizes: tuple[int, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "query": (2, HEADS, QUERIES, DIM), "key": (2, 2, KEYS, DIM), "value": (2, 2, KEYS, 6), **sizes,
    }  # fmt: skip
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def distances(offset: int | Tensor | None) -> Tensor:
    """j - position(i), (B|1, Sq, Sk)."""
    first = torch.as_tensor(KEYS - QUERIES if offset is None else offset).reshape(-1, 1, 1)
    return torch.arange(KEYS) - (first + torch.arange(QUERIES)[:, None])


def grouped(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // x.shape[1], 1)


def fast(t: Inputs, **keywords: object) -> Tensor:
    return fastattn.attention(t["query"], t["key"], t["value"], **keywords)  # type: ignore[call-overload]


# -- Shaw -------------------------------------------------------------------------------------------------------------


def _shaw_formula(t: Inputs, offset: int | Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = t["query"].dtype
    where = distances(offset).clamp(-3, 3) + 3
    beside_keys = t["a"].to(dtype)[..., where, :] if t["a"].dim() == 2 else t["a"].to(dtype)[:, where].transpose(0, 1)
    beside_keys = beside_keys[:, None] if t["a"].dim() == 2 else beside_keys  # (B|1, H|1, Sq, Sk, D)
    scores = t["query"] @ grouped(t["key"]).mT
    scores = (scores + (t["query"][..., None, :] * beside_keys).sum(-1)) / math.sqrt(DIM)
    out = attend(scores, grouped(t["value"]), mask)
    if "b" in t:
        weights = attend(scores, torch.eye(KEYS, dtype=dtype).expand(2, HEADS, KEYS, KEYS), mask)
        out = out + (weights[..., None] * t["b"].to(dtype)[where][:, None]).sum(-2)
    return out, scores


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shaw(dtype: torch.dtype, offset: int | Tensor | None, values: bool, backend: str, device: str) -> None:
    """Keys alone through the kernel, keys and values through the weights; a causal mask and grouped heads."""
    inputs = draw(a=(7, DIM), **({"b": (7, 6)} if values else {}))
    mask = (distances(offset) <= 0)[:, None]

    def ours(t: Inputs) -> Tensor:
        return shaw_attention(
            t["query"], t["key"], t["value"], t["a"], t.get("b"), mask=fastattn.Causal(), query_offset=offset,
            backend=backend,
        )  # fmt: skip

    check_scheme(ours, lambda t: _shaw_formula(t, offset, mask), inputs, dtype)


@pytest.mark.parametrize("route", ["table", "dense"])
def test_shaw_with_vectors_of_each_head(route: Route, backend: str, device: str) -> None:
    inputs = draw(a=(HEADS, 7, DIM))
    check_scheme(
        lambda t: fast(t, bias=ShawKeys(t["a"], route=route), backend=backend),
        lambda t: _shaw_formula(t, None, None), inputs, torch.float64,
    )  # fmt: skip


def test_shaw_module_dropout_and_other_terms(backend: str, device: str) -> None:
    """Values alone; beside another bias; dropout has the right mean; explain tells the memory."""
    t = draw(b=(7, 6))
    module = fnn.ShawAttention(DIM, 3, value_dim=6, keys=False).double()
    with torch.no_grad():
        module.value_embeddings.copy_(t["b"])
    slopes = fastattn.ALiBi(fastattn.alibi_slopes(HEADS, dtype=torch.float64))
    got = module(t["query"], t["key"], t["value"], bias=slopes, backend=backend)
    formula = t | {"a": torch.zeros(7, DIM, dtype=torch.float64)}
    scores = _shaw_formula(formula, None, None)[1] + slopes.materialize(QUERIES, KEYS)
    weights = scores.softmax(-1)
    where = distances(None).clamp(-3, 3)[0] + 3
    torch.testing.assert_close(got, weights @ grouped(t["value"]) + (weights[..., None] * t["b"][where]).sum(-2))
    many = torch.stack([
        module(t["query"], t["key"], t["value"], bias=slopes, dropout_p=0.3, backend=backend) for _ in range(800)
    ])  # fmt: skip
    spread = many.std(0) / 800**0.5
    assert ((many.mean(0) - got).abs() < 6 * spread).all()
    assert (many.std(0) > 0).all()
    q = torch.randn(1, HEADS, 5, DIM)
    notes = fastattn.explain(q, q, q, bias=ShawKeys(torch.randn(7, DIM))).notes
    assert notes == ["ShawKeys as a row table (1, 4, 5, 7) of 0.00056 MB"]
    notes = fastattn.explain(q, q, q, bias=ShawKeys(torch.randn(7, DIM), route="dense")).notes
    assert notes == ["ShawKeys written out, as a dense bias (1, 4, 5, 5) of 0.0004 MB"]
    notes = fastattn.explain(q, q, q, bias=ShawKeys(torch.randn(5, DIM))).notes
    assert notes == ["ShawKeys as a row table (1, 4, 5, 5) of 0.0004 MB"]


def test_shaw_of_wav2vec2_bert() -> None:
    """`position_embeddings_type="relative_key"`: its scores, term by term."""
    bert = pytest.importorskip("transformers.models.wav2vec2_bert.modeling_wav2vec2_bert", reason="transformers")
    config = bert.Wav2Vec2BertConfig(
        hidden_size=16, num_attention_heads=2, attention_dropout=0.0, left_max_position_embeddings=4,
        right_max_position_embeddings=4,
    )  # fmt: skip
    layer = bert.Wav2Vec2BertSelfAttention(config).double().eval()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    want = layer(x)[0]
    q, k, v = (f(x).view(2, 11, 2, 8).transpose(1, 2) for f in (layer.linear_q, layer.linear_k, layer.linear_v))
    out = fastattn.attention(q, k, v, bias=ShawKeys(layer.distance_embedding.weight))
    torch.testing.assert_close(layer.linear_out(out.transpose(1, 2).flatten(2)), want)


def test_shaw_is_shift_invariant_and_its_gradients_balance(backend: str, device: str) -> None:
    """Adding one vector to all the key embeddings adds a constant to each row: sum_r of d/de_r is 0."""
    t = draw(a=(7, DIM))
    a = t["a"].requires_grad_()
    out = fast(t, bias=ShawKeys(a), backend=backend)
    torch.testing.assert_close(fast(t, bias=ShawKeys(a + a[3]), backend=backend), out)
    (grad,) = torch.autograd.grad(out.square().sum(), a)
    assert grad.sum(0).abs().max() < 1e-12 * grad.abs().max() * 100


# -- Transformer-XL ---------------------------------------------------------------------------------------------------

WIDTH = 12


def _xl_formula(t: Inputs, offset: int | Tensor | None, mask: Tensor | None, clamp: int) -> tuple[Tensor, Tensor]:
    dtype = t["query"].dtype
    p = (-distances(offset)).clamp(-clamp, clamp)
    angle = p[..., None] / 10000.0 ** (2 * torch.arange(WIDTH // 2, dtype=torch.float64) / WIDTH)
    sinusoid = torch.cat((angle.sin(), angle.cos()), -1).to(dtype)  # (B|1, Sq, Sk, E)
    r = torch.einsum("hde,bije->bhijd", t["weight"].to(dtype), sinusoid)
    u, v = t["u"].to(dtype)[:, None], t["v"].to(dtype)[:, None]
    scores = (t["query"] + u) @ grouped(t["key"]).mT + ((t["query"] + v)[..., None, :] * r).sum(-1)
    scores = scores / math.sqrt(DIM)
    return attend(scores, grouped(t["value"]), mask), scores


@pytest.mark.parametrize("route", ["columns", "table", "dense", "clamped table", "clamped dense"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transformer_xl(
    dtype: torch.dtype, offset: int | Tensor | None, causal: bool, route: str, backend: str, device: str
) -> None:
    inputs = draw(weight=(HEADS, DIM, WIDTH), u=(HEADS, DIM), v=(HEADS, DIM))
    mask = (distances(offset) <= 0)[:, None] if causal else None
    how = {"clamp": 5, "route": route.split()[1]} if route.startswith("clamped") else {"route": route}

    def ours(t: Inputs) -> Tensor:
        return fast(
            t, bias=TransformerXL(t["weight"], t["u"], t["v"], **how), mask=fastattn.Causal() if causal else None,
            query_offset=offset, backend=backend,
        )  # fmt: skip

    clamp = how.get("clamp", 1000)
    check_scheme(ours, lambda t: _xl_formula(t, offset, mask, clamp), inputs, dtype)


def test_transformer_xl_routes() -> None:
    """Columns while they fit and nothing rotates, the dense form beyond; other biases may stand beside it."""
    t = draw(weight=(HEADS, DIM, WIDTH), u=(HEADS, DIM), v=(HEADS, DIM))
    xl = TransformerXL(t["weight"], t["u"], t["v"])
    explained = fastattn.explain(t["query"], t["key"], t["value"], bias=xl)
    assert explained.notes == ["TransformerXL as 12 columns appended to the 8 of query and key"]
    assert "dense_bias" not in explained.features
    rotary = fnn.RotaryEmbedding(DIM, width=4, trailing=True)(KEYS)
    assert "written out" in fastattn.explain(t["query"], t["key"], t["value"], bias=xl, rotary=rotary).notes[0]
    for beside in ({"rotary": rotary}, {"softcap": 3.0}):
        assert "written out" in fastattn.explain(t["query"], t["key"], t["value"], bias=xl, **beside).notes[0]
        for how in ({"route": "columns"}, {"route": "table", "clamp": 5}):
            with pytest.raises(ValueError, match="route"):
                fast(t, bias=TransformerXL(t["weight"], t["u"], t["v"], **how), **beside)
    clamped = TransformerXL(t["weight"], t["u"], t["v"], clamp=5)
    notes = fastattn.explain(t["query"], t["key"], t["value"], bias=clamped).notes
    assert notes == ["TransformerXL as a row table (2, 4, 13, 11) of 0.00915 MB"]
    other = ShawKeys(torch.randn(5, DIM, dtype=torch.float64))
    dense = TransformerXL(t["weight"], t["u"], t["v"], route="dense")
    want = fast(t, bias=other + dense)
    for bias in (xl + other, other + xl):
        torch.testing.assert_close(fast(t, bias=bias), want)
    torch.testing.assert_close(fast(t, bias=xl + other + xl), fast(t, bias=other + dense + dense))
    wide = fnn.TransformerXLBias(HEADS, DIM, 512).double()()
    for mask, columns in ((None, QUERIES + KEYS - 1), (fastattn.Causal(), KEYS), (fastattn.SlidingWindow(4, 2), 7)):
        (note,) = fastattn.explain(t["query"], t["key"], t["value"], bias=wide, mask=mask).notes
        assert note.startswith(f"TransformerXL as a row table (2, 4, 13, {columns})")


@pytest.mark.parametrize("route", ["columns", "table", "dense"])
def test_transformer_xl_of_xlnet(route: str, backend: str, device: str) -> None:
    """`rel_attn_core` in both directions, with its own rel_shift."""
    xlnet = pytest.importorskip("transformers.models.xlnet.modeling_xlnet", reason="compares with transformers")
    config = xlnet.XLNetConfig(d_model=16, n_head=2, n_layer=1, d_inner=8, vocab_size=9, dropout=0.0)
    model = xlnet.XLNetModel(config).double()
    layer = model.layer[0].rel_attn
    for parameter in (layer.r_w_bias, layer.r_r_bias, layer.r):
        torch.nn.init.normal_(parameter)
    q, k, v = (torch.randn(7, 2, 2, 8, dtype=torch.float64) for _ in range(3))
    positions = model.relative_positional_encoding(7, 7, bsz=2).double()
    k_r = torch.einsum("ibh,hnd->ibnd", positions, layer.r)
    want = layer.rel_attn_core(q, k, v, k_r)
    bias = TransformerXL(layer.r.permute(1, 2, 0), layer.r_w_bias, layer.r_r_bias, route=route)
    got = fastattn.attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), bias=bias, backend=backend)
    torch.testing.assert_close(got.permute(2, 0, 1, 3), want, rtol=1e-5, atol=1e-6)  # their sinusoids are float32


def test_transformer_xl_is_shift_invariant(backend: str, device: str) -> None:
    t = draw(weight=(HEADS, DIM, WIDTH), u=(HEADS, DIM), v=(HEADS, DIM))
    xl = TransformerXL(t["weight"], t["u"], t["v"])
    want = fast(t, bias=xl, backend=backend)
    front = [torch.zeros(2, 2, 4, n, dtype=torch.float64) for n in (DIM, 6)]
    moved = t | {"key": torch.cat((front[0], t["key"]), 2), "value": torch.cat((front[1], t["value"]), 2)}
    seen = fastattn.BoolMask(torch.arange(KEYS + 4) >= 4)
    torch.testing.assert_close(fast(moved, bias=xl, mask=seen, backend=backend), want)


# -- DeBERTa ----------------------------------------------------------------------------------------------------------


def _deberta_formula(
    t: Inputs, offset: int | Tensor | None, buckets: int | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype, span = t["query"].dtype, 4
    where = torch.tensor([deberta_bucket(-d, buckets, 16) for d in distances(offset).flatten().tolist()])
    where = (where.view(distances(offset).shape) + span).clamp(0, 2 * span - 1)
    key = grouped(t["key"])
    scores = t["query"] @ key.mT
    if "kr" in t:
        kr = t["kr"].to(dtype)[:, where].transpose(0, 1)  # (B|1, H, Sq, Sk, D)
        scores = scores + (t["query"][..., None, :] * kr).sum(-1)
    if "qr" in t:
        qr = t["qr"].to(dtype).repeat_interleave(2, 0)[:, where].transpose(0, 1)
        scores = scores + (key[..., None, :, :] * qr).sum(-1)
    scores = scores * 0.2
    return attend(scores, grouped(t["value"]), mask), scores


@pytest.mark.parametrize("route", ["table", "dense"])
@pytest.mark.parametrize("terms", ["c2p", "p2c", "both"])
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deberta(
    dtype: torch.dtype, offset: int | Tensor | None, buckets: int | None, terms: str, route: Route, backend: str,
    device: str,
) -> None:  # fmt: skip
    tables = {"kr": (HEADS, 8, DIM), "qr": (2, 8, DIM)}
    inputs = draw(**{n: s for n, s in tables.items() if terms in ("both", {"kr": "c2p", "qr": "p2c"}[n])})
    lengths = torch.tensor([KEYS, 7])
    mask = (torch.arange(KEYS) < lengths[:, None])[:, None, None]

    def ours(t: Inputs) -> Tensor:
        bias = Disentangled(t.get("kr"), t.get("qr"), max_distance=16, buckets=buckets, route=route)
        return fast(
            t, bias=bias, scale=0.2, mask=fastattn.KeyLengths(lengths), query_offset=offset, backend=backend
        )  # fmt: skip

    check_scheme(ours, lambda t: _deberta_formula(t, offset, buckets, mask), inputs, dtype)


@pytest.mark.parametrize(("buckets", "max_distance"), [(256, 512), (32, 128), (16, 40), (256, 1024)])
def test_deberta_buckets_are_those_of_transformers(buckets: int, max_distance: int) -> None:
    deberta = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="transformers")
    distance = torch.arange(-3000, 3001)
    theirs = deberta.make_log_bucket_position(distance, buckets, max_distance).long()
    assert torch.equal(deberta_buckets(distance, buckets, max_distance), theirs)


@pytest.mark.parametrize("route", ["table", "dense"])
@pytest.mark.parametrize("buckets", [-1, 16])
def test_deberta_layer_of_transformers(buckets: int, route: Route, backend: str, device: str) -> None:
    """A whole attention layer with its parameters in the module, forward and gradient of the embeddings."""
    deberta = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2", reason="transformers")
    config = deberta.DebertaV2Config(
        hidden_size=16, num_attention_heads=2, pos_att_type=["c2p", "p2c"], relative_attention=True,
        position_buckets=buckets, max_relative_positions=24, max_position_embeddings=24, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = deberta.DisentangledSelfAttention(config).double().eval()
    span = layer.pos_ebd_size
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    embeddings = torch.randn(2 * span, 16, dtype=torch.float64, requires_grad=True)
    want, _ = layer(x, torch.ones(2, 1, 21, 21, dtype=torch.bool), rel_embeddings=embeddings)
    module = fnn.DisentangledBias(
        16, 2, max_distance=24, buckets=None if buckets < 0 else buckets, route=route
    ).double()  # fmt: skip
    module.key_projection, module.query_projection = layer.pos_key_proj, layer.pos_query_proj
    q, k, v = (
        f(x).view(2, 21, 2, 8).transpose(1, 2) for f in (layer.query_proj, layer.key_proj, layer.value_proj)
    )  # fmt: skip
    out = fastattn.attention(q, k, v, bias=module(embeddings), scale=module.scale, backend=backend)
    got = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # their scale is float32
    grads = [torch.autograd.grad(y.square().sum(), embeddings, retain_graph=True)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


# -- in the simulator of the CUDA kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["shaw", "transformer_xl", "c2p", "p2c", "c2p+p2c"])
def test_on_cuda(scheme: str, dtype: torch.dtype, offset: int | Tensor | None, cuda_simulator: ModuleType) -> None:
    """Grouped heads under a causal mask, each as tables."""
    learned = {
        "shaw": {"a": (7, DIM)},
        "transformer_xl": {"weight": (HEADS, DIM, WIDTH), "u": (HEADS, DIM), "v": (HEADS, DIM)},
        "c2p": {"kr": (HEADS, 8, DIM)}, "p2c": {"qr": (2, 8, DIM)},
        "c2p+p2c": {"kr": (HEADS, 8, DIM), "qr": (2, 8, DIM)},
    }[scheme]  # fmt: skip
    mask, scale = (distances(offset) <= 0)[:, None], None if scheme in ("shaw", "transformer_xl") else 0.2

    def ours(t: Inputs) -> Tensor:
        if scheme == "shaw":
            bias = ShawKeys(t["a"], route="table")
        elif scheme == "transformer_xl":
            bias = TransformerXL(t["weight"], t["u"], t["v"], clamp=5, route="table")
        else:
            bias = Disentangled(t.get("kr"), t.get("qr"), max_distance=16, buckets=8, route="table")
        return fast(t, bias=bias, scale=scale, mask=fastattn.Causal(), query_offset=offset, backend="cuda")

    def formula(t: Inputs) -> tuple[Tensor, Tensor]:
        if scheme == "shaw":
            return _shaw_formula(t, offset, mask)
        if scheme == "transformer_xl":
            return _xl_formula(t, offset, mask, 5)
        return _deberta_formula(t, offset, 8, mask)

    check_scheme(ours, formula, draw(value=(2, 2, KEYS, DIM), **learned), dtype)


# -- what they share --------------------------------------------------------------------------------------------------


def _deberta_of(t: Inputs, route: Route = "auto") -> Disentangled:
    return Disentangled(t["kr"], t["qr"], max_distance=16, buckets=8, route=route)


def test_tables_and_their_width() -> None:
    """A column for each distance that is seen; one bias at a time, and not for kernels that read none."""
    t = draw(kr=(HEADS, 8, DIM), qr=(2, 8, DIM))
    shaw, deberta = ShawKeys(torch.randn(KEYS, DIM)), _deberta_of(t)

    def notes(bias: fastattn.Bias, **keywords: object) -> str:
        return " | ".join(fastattn.explain(t["query"], t["key"], t["value"], bias=bias, **keywords).notes)

    assert notes(shaw) == "ShawKeys as a row table (2, 4, 13, 19) of 0.0158 MB"
    assert notes(deberta) == ("Disentangled as a row table (2, 4, 13, 8) and a column table (2, 2, 8, 19) of 0.0115 MB")
    wide = ShawKeys(torch.randn(2 * KEYS + 21, DIM))  # distances from -(KEYS - 1) on: the last query is at the last key
    for mask, columns in (
        (None, QUERIES + KEYS - 1),
        (fastattn.Causal(), KEYS),
        (fastattn.SlidingWindow(4, 2), 7),
        (fastattn.SlidingWindow(4, 2) & fastattn.Causal(), 5),
    ):
        assert notes(wide, mask=mask).startswith(f"ShawKeys as a row table (2, 4, 13, {columns})")
    # the middle of DeBERTa's buckets has one for each distance
    narrow = Disentangled(torch.randn(HEADS, 64, DIM), None, buckets=24, max_distance=40)
    assert "(2, 4, 13, 13)" in notes(narrow, mask=fastattn.SlidingWindow(12, 0))
    assert "(2, 4, 13, 64)" in notes(narrow, mask=fastattn.SlidingWindow(13, 0))
    assert notes(deberta + shaw).count("written out") == 1
    assert "written out" in notes(shaw + deberta).split(" | ")[1]
    explained = fastattn.explain(t["query"], t["key"], t["value"], bias=deberta)
    assert explained.features == ["row_table", "col_table"]
    problem = fastattn.functional.lower(t["query"], t["key"], t["value"], bias=deberta, takes_tables=False)
    assert problem.row_table is None
    with pytest.raises(fastattn.UnsupportedError, match="additive"):
        fastattn.additive_attention(
            t["query"], t["key"], t["value"], torch.ones(DIM), bias=_deberta_of(t, "table"), backend="cpu"
        )


@pytest.mark.parametrize(
    "mask", [fastattn.Causal(), fastattn.SlidingWindow(4, 2), fastattn.SlidingWindow(2, 7)], ids=str
)
@pytest.mark.parametrize("offset", [None, -3, 9, torch.tensor([2, 9])], ids=str)
@pytest.mark.parametrize(
    "scheme", ["shaw", "wide shaw", "xl", "clamped xl", "deberta", "bucketed deberta", "far deberta"]
)
def test_tables_of_what_the_mask_shows(
    scheme: str, offset: int | Tensor | None, mask: fastattn.Mask, backend: str, device: str
) -> None:
    """Columns that no pair reads are left out: outputs and gradients are those of the bias written out."""
    t = draw(
        e=(HEADS, 7, DIM), wide=(2 * KEYS + 21, DIM), weight=(HEADS, DIM, WIDTH), u=(HEADS, DIM), v=(HEADS, DIM),
        kr=(HEADS, 64, DIM), qr=(2, 64, DIM),
    )  # fmt: skip
    x = {name: tensor.clone().requires_grad_() for name, tensor in t.items()}
    xl, tables = (x["weight"], x["u"], x["v"]), (x["kr"], x["qr"])
    bias = {
        "shaw": lambda route: ShawKeys(x["e"], route=route),
        "wide shaw": lambda route: ShawKeys(x["wide"], route=route),
        "xl": lambda route: TransformerXL(*xl, route=route),
        "clamped xl": lambda route: TransformerXL(*xl, clamp=3, route=route),
        "deberta": lambda route: Disentangled(*tables, buckets=None, route=route),
        "bucketed deberta": lambda route: Disentangled(*tables, buckets=24, max_distance=40, route=route),
        "far deberta": lambda route: Disentangled(*tables, buckets=8, max_distance=16, route=route),
    }[scheme]
    results = []
    for route in ("table", "dense"):
        out = fast(x, bias=bias(route), mask=mask, query_offset=offset, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), list(x.values()), allow_unused=True)
        results.append([out, *(grad for grad in grads if grad is not None)])
    assert len(results[0]) >= 5  # the operands and a parameter
    for mine, want in zip(*results, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0), (1, 1), (1, 6)])
@pytest.mark.parametrize("mask", [None, fastattn.Causal(), fastattn.SlidingWindow(2, 0)], ids=str)
def test_tables_of_the_shortest_calls(
    queries: int, keys: int, mask: fastattn.Mask | None, backend: str, device: str
) -> None:
    q, k = (torch.randn(2, HEADS, n, DIM, dtype=torch.float64, requires_grad=True) for n in (queries, keys))
    biases = (
        lambda route: ShawKeys(torch.ones(7, DIM), route=route),
        lambda route: fnn.TransformerXLBias(HEADS, DIM, 64, route=route).double()(),
        lambda route: Disentangled(torch.ones(8, DIM), torch.ones(8, DIM), buckets=4, max_distance=8, route=route),
    )
    for bias in biases:
        results = []
        for route in ("table", "dense"):
            torch.manual_seed(0)
            out = fastattn.attention(q, k, k, mask=mask, bias=bias(route), backend=backend)
            results.append([out, *torch.autograd.grad(out.sum(), (q, k))])
        for mine, want in zip(*results, strict=True):
            torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("offset", [-40, 0, 300, torch.tensor([-40, 300])], ids=str)
def test_tables_far_from_the_diagonal(offset: int | Tensor, backend: str, device: str) -> None:
    """Every pair beyond the reach on one side: each column of a table but one has gradient 0."""
    inputs = draw(kr=(HEADS, 8, DIM), qr=(2, 8, DIM))
    check_scheme(
        lambda t: fast(t, bias=_deberta_of(t, "table"), scale=0.2, query_offset=offset, backend=backend),
        lambda t: _deberta_formula(t, offset, 8, None), inputs, torch.float64,
    )  # fmt: skip


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))  # type: ignore[operator]
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("route", ["table", "dense"])
def test_nothing_of_the_scores_size_beside_tables(route: Route) -> None:
    length = 160
    q, k, v = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3))
    kr, qr = (torch.randn(2, 8, 8, requires_grad=True) for _ in range(2))
    with _Largest() as largest:
        bias = Disentangled(kr, qr, max_distance=16, buckets=8, route=route)
        out = fastattn.attention(q, k, v, bias=bias, backend="cpu")
        torch.autograd.grad(out, [q, k, v, kr, qr], torch.ones_like(out))
    assert (largest.elements >= length * length) == (route == "dense")


@pytest.mark.parametrize("route", ["table", "dense"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_keys_do_not_leak(bad: float, route: Route, backend: str, device: str) -> None:
    """What stands behind the lengths changes no bit, of the gradients of the tables either."""
    t = draw(kr=(HEADS, 8, DIM), qr=(2, 8, DIM))
    results = []
    for filling in (0.0, bad):
        for name in ("key", "value"):
            t[name][:, :, 11:] = filling
        leaves = {name: x.clone().requires_grad_() for name, x in t.items()}
        out = fast(
            leaves, bias=_deberta_of(leaves, route), mask=fastattn.KeyLengths(torch.tensor([11, 11])), backend=backend
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for clean, spoiled in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, spoiled)


def test_columns_are_checked() -> None:
    q = torch.zeros(1, 1, 2, 4)
    table = torch.zeros(1, 1, 2, 3)
    for columns in ([0, 3], [-1, 0], [1, 0]):
        problem = Problem(
            query=q, key=q, value=q, scale=1.0, row_table=table, columns=torch.tensor(columns, dtype=torch.int32)
        )
        with pytest.raises(RuntimeError, match="columns"):
            torch.ops.fastattn.cpu_forward(*problem.arguments())


def test_they_need_an_attention_call() -> None:
    bias = ShawKeys(torch.randn(3, 4))
    with pytest.raises(NotImplementedError, match="ShawKeys"):
        bias.materialize(2, 2)
    with pytest.raises(NotImplementedError, match="ShawKeys"):
        fastattn.masked_softmax(torch.randn(1, 1, 2, 2), bias=bias)


@pytest.mark.parametrize("queries", [0, 1])
@pytest.mark.parametrize("keys", [0, 1, 5])
def test_empty_and_single_lengths(queries: int, keys: int, backend: str, device: str) -> None:
    q, k = torch.randn(2, 4, queries, 8), torch.randn(2, 4, keys, 8)
    xl = [torch.randn(4, 8, 6), torch.randn(4, 8), torch.randn(4, 8)]
    for bias in (
        ShawKeys(torch.randn(5, 8)),
        TransformerXL(*xl),
        TransformerXL(*xl, route="dense"),
        Disentangled(torch.randn(8, 8), torch.randn(8, 8), max_distance=16, buckets=8),
    ):
        out = fastattn.attention(q, k, k, bias=bias, backend=backend)
        assert out.shape == (2, 4, queries, 8)
        assert out.isfinite().all()
    out = shaw_attention(q, k, k, torch.randn(5, 8), torch.randn(5, 8), backend=backend)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ShawKeys(torch.randn(4, 8)), "embeddings"),
        (lambda: ShawKeys(torch.randn(3)), "embeddings"),
        (lambda: fastattn.attention(*[torch.randn(1, 2, 3, 4)] * 3, bias=ShawKeys(torch.randn(3, 5))), "embeddings"),
        (lambda: shaw_attention(*[torch.randn(1, 2, 3, 4)] * 3, None, torch.randn(3, 5)), "value_embeddings"),
        (lambda: TransformerXL(torch.randn(2, 4, 5), torch.randn(2, 4), torch.randn(2, 4)), "weight"),
        (lambda: TransformerXL(torch.randn(2, 4, 6), torch.randn(2, 5), torch.randn(2, 4)), r"\.u"),
        (lambda: TransformerXL(torch.randn(2, 4, 6), *[torch.randn(2, 4)] * 2, route="fast"), "route"),
        (lambda: TransformerXL(torch.randn(2, 4, 6), *[torch.randn(2, 4)] * 2, clamp=3, route="columns"), "route"),
        (
            lambda: fastattn.attention(*[torch.randn(1, 3, 3, 4)] * 3, bias=fnn.TransformerXLBias(2, 4, 6)()),
            r"TransformerXL\.u",
        ),
        (lambda: Disentangled(None, None), "position_keys"),
        (lambda: Disentangled(torch.randn(7, 4), None), "position_keys"),
        (lambda: Disentangled(torch.randn(8, 4), torch.randn(6, 4)), "position_queries"),
        (lambda: Disentangled(torch.randn(8, 4), None, buckets=8, max_distance=5), "max_distance"),
        (lambda: fnn.DisentangledBias(7, 2), "num_heads"),
        (lambda: ShawKeys(torch.randn(3, 4), route="columns"), "ShawKeys.route"),
        (lambda: Disentangled(torch.randn(8, 4), None, route="columns"), "Disentangled.route"),
        (
            lambda: fastattn.attention(
                *[torch.randn(1, 2, 3, 4)] * 3,
                bias=ShawKeys(torch.randn(3, 4)) + ShawKeys(torch.randn(3, 4), route="table"),
            ),
            "ShawKeys.route",
        ),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        make()  # type: ignore[operator]


def test_autocast_does_not_reach_the_terms(backend: str, device: str) -> None:
    """Under autocast as in bfloat16 without it: the products with the tables are made in float32 either way."""
    if backend == "reference":
        pytest.skip("plain torch, whose own products autocast reaches")
    q, k, v = (torch.randn(1, 4, 9, 8) for _ in range(3))
    for bias in (
        ShawKeys(torch.randn(5, 8)),
        TransformerXL(torch.randn(4, 8, 6), torch.randn(4, 8), torch.randn(4, 8)),
        Disentangled(torch.randn(8, 8), torch.randn(8, 8), max_distance=16, buckets=8),
        fnn.FIRE(4)(),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            got = fastattn.attention(q, k, v, bias=bias, backend=backend)
        want = fastattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), bias=bias, backend=backend)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, want)
    vectors = torch.randn(5, 8), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = shaw_attention(q, k, v, *vectors, backend=backend)
    want = shaw_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), *vectors, backend=backend)
    assert torch.equal(got, want)

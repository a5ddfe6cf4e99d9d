"""Bias objects: what they materialize to, how they add up, their helpers, what they print."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from features import BIASES, Shape, t5_bucket
from oracle import Call

import fastattn
from fastattn import ALiBi, DenseBias, DistanceTable, T5Bias, alibi_slopes
from fastattn.biases import t5_buckets

SHAPES = [Shape(), Shape(query_length=5, key_length=3), Shape(query_length=1, key_length=7), Shape(query_length=0)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.query_length}x{s.key_length}")
@pytest.mark.parametrize("offset", [None, 0, 4, torch.tensor([2, -1])], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_materialize(name: str, offset: int | torch.Tensor | None, shape: Shape) -> None:
    call = Call((name,), shape, dtype=torch.float64, offset=offset)
    leaves = {n: t.requires_grad_() for n, t in call.leaves.items()}
    got = call.keywords(leaves)["bias"].materialize(shape.query_length, shape.key_length, offset)
    want = call.features[0].bias(leaves)
    full = (shape.batch, shape.heads, shape.query_length, shape.key_length)
    torch.testing.assert_close(got.expand(full), want.expand(full))
    assert got.requires_grad or not call.features[0].leaves


SUMS = [
    ("alibi", "alibi_batch"),
    ("dense_matrix", "dense_keys"),
    ("table", "table_one_sided"),
    ("table_right", "table_wide"),
    ("table_batch", "t5_encoder", "table_one_column"),
    ("t5_encoder", "t5_decoder"),
    ("alibi", "table", "dense_heads", "t5_decoder", "dense_scalar"),
]


@pytest.mark.parametrize("names", SUMS, ids="+".join)
def test_sum(names: tuple[str, ...], backend: str, device: str) -> None:
    """Of a kind or not, nested either way, materialized or run; the gradient reaches every part."""
    call = Call(names, dtype=torch.float64)
    leaves = {n: t.requires_grad_() for n, t in call.leaves.items()}
    want = sum(feature.bias(leaves) for feature in call.features)
    parts = [feature.public(leaves)["bias"] for feature in call.features]
    forward, backward = parts[0], parts[-1]
    for part in parts[1:]:
        forward = forward + part
    for part in reversed(parts[:-1]):
        backward = part + backward
    for total in (forward, backward):
        torch.testing.assert_close(total.materialize(33, 49).expand(2, 4, -1, -1), want.expand(2, 4, 33, 49))
    q, k, v = (leaves[n] for n in ("query", "key", "value"))
    names_of_parts = [n for n in leaves if n not in ("query", "key", "value")]
    got = fastattn.attention(q, k, v, bias=backward, backend=backend)
    dense = fastattn.attention(q, k, v, bias=DenseBias(want), backend="reference")
    torch.testing.assert_close(got, dense)
    grads = [torch.autograd.grad(x.sum() + (x * x).sum(), [leaves[n] for n in names_of_parts]) for x in (got, dense)]
    for name, a, b in zip(names_of_parts, *grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_half_precision_biases_are_summed_in_float32(backend: str, device: str) -> None:
    """1 + 2^-9 is not a bfloat16: the small part survives beside the large one."""
    q = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)
    big = DenseBias(torch.full((1, 2), 256.0, dtype=torch.bfloat16))
    small = DenseBias(torch.tensor([[0.5, 0.0]], dtype=torch.bfloat16))
    _, lse = fastattn.attention(q, k, k, bias=big + small, return_lse=True, backend=backend)
    torch.testing.assert_close(lse.item(), 256 + math.log(math.exp(0.5) + 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 8, 12, 16, 20, 24, 31, 32, 33, 40, 71, 112, 128])
def test_alibi_slopes(heads: int) -> None:
    """The authors' published function, word for word (github.com/ofirpress/attention_with_linear_biases)."""

    def get_slopes(n: int) -> list[float]:
        def get_slopes_power_of_2(n: int) -> list[float]:
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]

        if math.log2(n).is_integer():
            return get_slopes_power_of_2(n)
        closest = 2 ** math.floor(math.log2(n))
        return get_slopes_power_of_2(closest) + get_slopes(2 * closest)[0::2][: n - closest]

    got = alibi_slopes(heads, dtype=torch.float64)
    torch.testing.assert_close(got, torch.tensor(get_slopes(heads), dtype=torch.float64), rtol=1e-12, atol=0)
    assert alibi_slopes(heads).dtype == torch.float32


def test_alibi_at_long_range_does_not_cancel(backend: str, device: str) -> None:
    """Distances are differences of integers: slope * j - slope * i in float32 would be wrong by 2% here."""
    length = 2**20
    torch.manual_seed(0)
    q, k = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 1, 4).expand(1, 1, length, 4)
    v = torch.randn(1, 1, length, 1)
    got = fastattn.attention(q, k, v, bias=ALiBi(torch.tensor([0.3])), mask=fastattn.Causal(), backend=backend)
    for i in range(3):
        seen = v[0, 0, : length - 2 + i, 0].double().flip(0)[:400]
        weights = torch.softmax(-0.3 * torch.arange(400, dtype=torch.float64), 0)
        torch.testing.assert_close(got[0, 0, i, 0].double(), weights @ seen, rtol=1e-5, atol=1e-6)


def _t5_attention() -> type:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="compares with transformers' T5")
    return t5.T5Attention


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("buckets", "max_distance"), [(32, 128), (32, 256), (16, 64), (8, 20), (64, 512), (32, 100), (128, 1000)]
)
def test_t5_buckets_are_those_of_transformers(buckets: int, max_distance: int, bidirectional: bool) -> None:
    distance = torch.arange(-max_distance - 40, max_distance + 41)
    want = _t5_attention()._relative_position_bucket(distance, bidirectional, buckets, max_distance)
    weight = torch.arange(float(buckets))[:, None]
    bias = T5Bias(weight, bidirectional, max_distance)
    length = max_distance + 41
    got = bias.materialize(1, 2 * length - 1, query_offset=length - 1)[0, 0, 0].long()
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(4, 3), (8, 20), (32, 128), (32, 4096), (6, 7), (320, 800)])
def test_t5_buckets_by_integer_arithmetic(buckets: int, max_distance: int, bidirectional: bool) -> None:
    right = max_distance if bidirectional else 0
    want = tuple(t5_bucket(d, buckets, bidirectional, max_distance) for d in range(-max_distance, right + 1))
    assert t5_buckets(buckets, bidirectional, max_distance) == want


def test_t5_attention_of_transformers(backend: str, device: str) -> None:
    """A whole layer: no scale, the bias of its embedding, forward and gradient of the embedding."""
    from transformers import T5Config

    config = T5Config(d_model=32, d_kv=8, num_heads=4, dropout_rate=0.0, relative_attention_num_buckets=16)
    torch.manual_seed(0)
    layer = _t5_attention()(config, has_relative_attention_bias=True).double().eval()
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    want = layer(x)[0]
    weight = layer.relative_attention_bias.weight
    q, k, v = (f(x).view(2, 19, 4, 8).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    bias = T5Bias(weight, bidirectional=True, max_distance=config.relative_attention_max_distance)
    out = fastattn.attention(q, k, v, bias=bias, scale=1.0, backend=backend)
    got = layer.o(out.transpose(1, 2).reshape(2, 19, 32))
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad((y * y).sum(), weight, retain_graph=True)[0] for y in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (DenseBias(torch.zeros(3, 1, 4)), "DenseBias((3, 1, 4))"),
        (ALiBi(alibi_slopes(6)), "ALiBi(heads=6)"),
        (DistanceTable(torch.zeros(2, 9)), "DistanceTable(heads=2, left=4, right=4)"),
        (DistanceTable(torch.zeros(5, 2, 9), left=8), "DistanceTable(heads=2, left=8, right=0)"),
        (T5Bias(torch.zeros(32, 8)), "T5Bias(buckets=32, heads=8, bidirectional=True, max_distance=128)"),
        (ALiBi(alibi_slopes(2)) + DenseBias(torch.zeros(())), "ALiBi(heads=2) + DenseBias(())"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_repr(bias: fastattn.Bias, text: str) -> None:
    assert repr(bias) == text


def test_add_something_else() -> None:
    with pytest.raises(TypeError, match=r"\+"):
        DenseBias(torch.zeros(())) + 1.0  # type: ignore[operator]


def test_pickle_deepcopy_and_save(tmp_path: object) -> None:
    for name in BIASES:
        call = Call((name,))
        bias = call.keywords(call.leaves)["bias"] + ALiBi(alibi_slopes(4))
        torch.save(bias, f"{tmp_path}/bias.pt")
        loaded = torch.load(f"{tmp_path}/bias.pt", weights_only=False)
        for again in (pickle.loads(pickle.dumps(bias)), copy.deepcopy(bias), loaded):
            assert torch.equal(again.materialize(33, 49), bias.materialize(33, 49))
            assert repr(again) == repr(bias)


def test_gradient_has_the_shape_of_the_bias_and_sums_over_the_rest(backend: str, device: str) -> None:
    """d/db of a broadcast bias is the sum of the full gradient over the broadcast dimensions."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, s, 8, dtype=torch.float64) for s in (5, 7, 7))
    full = torch.zeros(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    out = fastattn.attention(q, k, v, bias=DenseBias(full), backend="reference")
    (want,) = torch.autograd.grad(out, full, grad_out)
    for bits in range(16):
        shape = [n if bits >> d & 1 else 1 for d, n in enumerate((2, 3, 5, 7))]
        for small in (shape, shape[next((d for d in range(4) if shape[d] != 1), 4) :]):
            leaf = torch.zeros(small, dtype=torch.float64, requires_grad=True)
            out = fastattn.attention(q, k, v, bias=DenseBias(leaf), backend=backend)
            (got,) = torch.autograd.grad(out, leaf, grad_out)
            assert got.shape == leaf.shape
            torch.testing.assert_close(got, want.sum_to_size(shape).reshape(small))
            expanded = fastattn.attention(q, k, v, bias=DenseBias(leaf.expand(2, 3, 5, 7)), backend=backend)
            torch.testing.assert_close(torch.autograd.grad(expanded, leaf, grad_out)[0], got)


def test_table_gradient_sums_to_zero_without_a_sink(backend: str, device: str) -> None:
    """Softmax is invariant to a constant: the gradients of all entries cancel, and with a sink they cancel with its."""
    for features in (("table", "causal"), ("table", "causal", "sink"), ("t5_encoder", "sink")):
        call = Call(features, dtype=torch.float64, with_lse=False)
        grads = call.fused(backend, device).grads
        total = grads[features[0]].sum(0 if features[0].startswith("t5") else 1)
        if "sink" in grads:
            total = total + grads["sink"]
        assert total.abs().max() < 1e-12

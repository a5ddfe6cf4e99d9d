"""The CUDA attention kernels in the simulator: every feature and random compositions, forward and gradients.

The simulator checks more than the numbers: a race, a wait that is missing, an access out of bounds or of memory nobody
wrote is an error there.  Shapes are small, and cross the tiles (128 query rows, 32 or 64 keys) where that matters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from features import BIASES, CONTENT, FEATURES, MASKS, ROTARY, Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Call, check

import fastattn
from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS

pytestmark = pytest.mark.usefixtures("device")

HALF, BFLOAT16 = torch.float16, torch.bfloat16
SHAPE = Shape(heads=2, kv_heads=1, query_length=40, key_length=75)
DECODE = Shape(heads=4, kv_heads=2, query_length=3, key_length=300)
HEAD_DIMS = (8, 32, 40, 64, 72, 96, 128, 160, 192, 256)


@pytest.fixture
def device(cuda_simulator: ModuleType) -> Iterator[ModuleType]:
    """The simulator, set back to its own device afterwards."""
    cuda_simulator.set_device()
    yield cuda_simulator
    cuda_simulator.set_device()


def kernels(device: ModuleType) -> list[str]:
    return [report["kernel"] for report in device.reports()]


@pytest.mark.parametrize("shape", [SHAPE, DECODE], ids=["rows", "decode"])
@pytest.mark.parametrize("feature", FEATURES)
def test_feature(feature: str, shape: Shape) -> None:
    if feature in ROTARY:
        shape = dataclasses.replace(shape, query_length=min(shape.query_length, 17), key_length=40)
    check(Call((feature,), shape, HALF), "cuda")


@pytest.mark.parametrize(
    "features",
    [(), ("causal", "t5_encoder"), ("window", "alibi", "rotary"), ("dense_full", "sink"), ("softcap", "documents")],
    ids="+".join,
)
def test_bfloat16(features: tuple[str, ...]) -> None:
    check(Call(features, SHAPE, BFLOAT16), "cuda")


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(device: ModuleType, dim: int, dtype: torch.dtype) -> None:
    """Every instance, the dimensions it is padded for, and Dv on either side of D."""
    device.clear_reports()
    for value_dim in {dim, max(8, dim - 16), min(256, dim + 8)}:
        shape = Shape(1, 2, 1, query_length=33, key_length=70, head_dim=dim, value_dim=value_dim)
        check(Call(("causal", "table"), shape, dtype), "cuda")
    native = next(n for n in (32, 64, 96, 128, 192, 256) if n >= dim)
    ran, suffix = kernels(device), "f16" if dtype == HALF else "bf16"
    for kernel in ("forward", "backward_kv", "backward_q"):
        assert f"{kernel}_{suffix}_d{native}" in ran
    assert f"parameter_gradient_{suffix}" in ran


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("dim", [24, 64, 120, 128, 200, 256])
def test_decode_head_dims(device: ModuleType, dim: int, dtype: torch.dtype) -> None:
    device.clear_reports()
    check(Call(("causal", "alibi", "sink"), dataclasses.replace(DECODE, head_dim=dim, value_dim=dim), dtype), "cuda")
    native = next(n for n in (64, 128, 256) if n >= dim)
    assert f"decode_{'f16' if dtype == HALF else 'bf16'}_d{native}" in kernels(device)


@pytest.mark.parametrize("features", [("causal",), ("window", "table"), ("key_lengths", "dense_full")], ids="+".join)
@pytest.mark.parametrize("key_length", [1, 31, 33, 64, 129, 200])
@pytest.mark.parametrize("query_length", [17, 64, 127, 129, 150])
def test_lengths(query_length: int, key_length: int, features: tuple[str, ...]) -> None:
    shape = Shape(
        batch=1, heads=2, kv_heads=1, query_length=query_length, key_length=key_length, head_dim=32, value_dim=32
    )
    check(Call(features, shape, HALF), "cuda")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=6, kv_heads=1, query_length=17, key_length=33),
        Shape(heads=2, query_length=40, key_length=20),
        Shape(query_length=0),
        Shape(key_length=0),
        Shape(batch=0),
    ],
    ids=lambda s: f"{s.batch}x{s.heads}x{s.query_length}-{s.kv_heads}x{s.key_length}",
)
def test_shapes(shape: Shape) -> None:
    check(Call(("causal", "alibi", "sink", "table", "dense_full"), shape, HALF), "cuda")


@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024], ids=["one stage", "two stages"])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_stages(device: ModuleType, dim: int, shared_memory: int) -> None:
    """Devices with little and with much shared memory copy one tile ahead, or two."""
    device.set_device(shared_memory_per_block=shared_memory)
    shape = Shape(1, 2, 1, query_length=140, key_length=150, head_dim=dim, value_dim=dim)
    call = Call(("causal",), shape, HALF)
    check(call, "cuda")
    problem = lower(**{name: call.leaves[name].detach() for name in ("query", "key", "value")})
    plan = json.loads(device.attention_plan(problem))
    assert plan["shared_bytes"] <= shared_memory
    if dim == 256:
        assert plan["stages"] == (1 if shared_memory < 100 * 1024 else 2)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("features", [("causal",), ("window", "alibi"), ("key_lengths", "sink")], ids="+".join)
def test_splits_of_decode(device: ModuleType, features: tuple[str, ...], multiprocessors: int) -> None:
    """As many parts of the keys as the device has room for: one, some that see nothing, all joined to one result."""
    device.set_device(multiprocessors=multiprocessors)
    device.clear_reports()
    check(Call(features, dataclasses.replace(DECODE, batch=1, key_length=1100), HALF), "cuda")
    assert ("attention_combine" in kernels(device)) == (multiprocessors > 1)


@pytest.mark.parametrize("shape", [SHAPE, DECODE], ids=["rows", "decode"])
@pytest.mark.parametrize("offset", [0, 16, -7, torch.tensor([3, -5])], ids=str)
@pytest.mark.parametrize("features", [("causal",), ("window", "table"), ("prefix_lm", "t5_decoder")], ids="+".join)
def test_query_offset(features: tuple[str, ...], offset: int | torch.Tensor, shape: Shape) -> None:
    check(Call(features, shape, HALF, offset=offset), "cuda")


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("features", [("causal",), ("alibi",), ("softcap",)], ids="+".join)
def test_scale(features: tuple[str, ...], scale: float) -> None:
    check(Call(features, SHAPE, HALF, scale=scale), "cuda")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.tuples(
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *BIASES, *CONTENT]),
        st.sampled_from([None, *BIASES, *CONTENT]),
        st.sampled_from([None, *ROTARY]),
        st.sampled_from([None, "softcap", "sink"]),
    ),
    dropout_p=st.sampled_from([0.0, 0.25]),
    dtype=st.sampled_from([HALF, BFLOAT16]),
    query_length=st.integers(1, 70),
    key_length=st.integers(1, 140),
    seed=st.integers(0, 1000),
)
def test_composition(
    features: tuple[str | None, ...],
    dropout_p: float,
    dtype: torch.dtype,
    query_length: int,
    key_length: int,
    seed: int,
) -> None:
    names = tuple(dict.fromkeys(name for name in features if name))
    if any(name in ROTARY for name in names):
        query_length = min(query_length, 40)
        key_length = max(min(key_length, 40), query_length)  # the tables end there, and have no negative positions
    shape = Shape(heads=2, kv_heads=1, query_length=query_length, key_length=key_length)
    check(Call(names, shape, dtype, seed=seed, dropout_p=dropout_p), "cuda")


@pytest.mark.parametrize("query_length", [20, 40])
def test_same_dropout_as_the_cpu_backend(query_length: int) -> None:
    query, key = torch.zeros(2, 3, query_length, 16, dtype=HALF), torch.zeros(2, 3, 37, 16, dtype=HALF)
    value = torch.eye(37, 64, dtype=HALF).expand(2, 3, 37, 64).contiguous()  # the output is the weights themselves
    outs = []
    for name in ("cuda", "cpu", "reference"):
        torch.manual_seed(5)
        outs.append(fastattn.attention(query, key, value, dropout_p=0.3, backend=name))
    kept = [out[..., :37] > 0 for out in outs]
    assert 0.6 < kept[0].float().mean() < 0.8
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("dropout_p", [0.0, 0.999, 1.0])
def test_extreme_dropout(dropout_p: float) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 32, dtype=HALF) for _ in range(3))
    torch.manual_seed(1)
    expected = fastattn.attention(query, key, value, dropout_p=dropout_p, backend="reference")
    torch.manual_seed(1)
    actual = fastattn.attention(query, key, value, dropout_p=dropout_p, backend="cuda")
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("query_length", [3, 150])
@pytest.mark.parametrize("where", ["query", "key", "value", "grad"])
def test_not_a_number_stays_where_it_may_be_seen(where: str, query_length: int) -> None:
    """Number 1 of the queries, keys, values or gradients is NaN under a causal mask that starts at the first key."""
    torch.manual_seed(0)
    tensors = {
        "query": torch.randn(1, 1, query_length, 32), "key": torch.randn(1, 1, 150, 32),
        "value": torch.randn(1, 1, 150, 32), "grad": torch.randn(1, 1, query_length, 32),
    }  # fmt: skip
    tensors[where][0, 0, 1, 5] = float("nan")
    leaves = [tensors[name].to(HALF).requires_grad_() for name in ("query", "key", "value")]
    out = fastattn.attention(*leaves, mask=fastattn.Causal(), query_offset=0, backend="cuda")
    dquery, dkey, dvalue = torch.autograd.grad(out, leaves, tensors["grad"].to(HALF))

    rows, keys = torch.arange(query_length), torch.arange(150)
    met = rows >= 1 if where in ("key", "value") else rows == 1  # rows that meet it
    seen = keys <= rows[met].max()  # keys that such a row sees
    assert torch.equal(out[0, 0].isnan().any(-1), met & (where != "grad"))
    assert torch.equal(dquery[0, 0].isnan().any(-1), met)
    for grad in (dkey, dvalue):
        assert not grad[0, 0][~seen].isnan().any()
        assert grad[0, 0][seen].isnan().any()


def test_gradients_are_bit_identical() -> None:
    call = Call(("causal", "table", "alibi", "dense_full", "sink"), SHAPE, HALF)
    first, second = call.fused("cuda"), call.fused("cuda")
    for name, grad in first.grads.items():
        assert torch.equal(grad, second.grads[name]), name


@pytest.mark.parametrize("query_length", [3, 40])
def test_reads_and_writes_stay_inside(query_length: int) -> None:
    """Operands are slices of larger tensors whose surroundings are NaN; nothing of it may reach the result."""
    torch.manual_seed(0)

    def guarded(*shape: int) -> torch.Tensor:
        whole = torch.full([n + 6 for n in shape[:-1]] + [shape[-1] + 16], float("nan"), dtype=HALF)
        inner = whole[tuple(slice(3, 3 + n) for n in shape[:-1])][..., 8 : 8 + shape[-1]]
        inner.copy_(torch.randn(shape))
        return inner

    query, key, value = guarded(2, 2, query_length, 24), guarded(2, 2, 41, 24), guarded(2, 2, 41, 24)
    bias, grad = guarded(1, 2, query_length, 41), guarded(2, 2, query_length, 24)
    results = []
    for of in (lambda x: x, torch.Tensor.contiguous):
        leaves = [of(x).detach().requires_grad_() for x in (query, key, value, bias)]
        out = fastattn.attention(
            *leaves[:3], bias=fastattn.DenseBias(leaves[3]), mask=fastattn.Causal(), backend="cuda"
        )
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for sliced, whole in zip(*results, strict=True):
        assert sliced.isfinite().all()
        assert torch.equal(sliced, whole)


def test_what_is_not_aligned_is_copied() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 37, dtype=HALF)[..., 3:35] for _ in range(3))
    transposed = torch.randn(1, 2, 32, 20, dtype=HALF).transpose(-1, -2)
    for operands in ((query, key, value), (query, transposed, value)):
        expected = fastattn.attention(*(x.contiguous() for x in operands), backend="cuda")
        assert torch.equal(fastattn.attention(*operands, backend="cuda"), expected)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_no_bank_conflicts(device: ModuleType, dim: int) -> None:
    """The swizzle holds: every access of shared memory takes as few wavefronts as its bytes need."""
    query, key, value = (torch.randn(1, 1, 140, dim, dtype=HALF, requires_grad=True) for _ in range(3))
    device.clear_reports()
    fastattn.attention(query, key, value, backend="cuda").backward(torch.randn(1, 1, 140, dim, dtype=HALF))
    for report in device.reports():
        for access in ("load_matrix", "copy_async_to_shared", "load_shared", "store_shared"):
            counts = report["traffic"][access]
            assert counts["actual"] == counts["ideal"], (report["kernel"], access)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dim": 264}, "multiples of 8 up to 256"),
        ({"dim": 20}, "multiples of 8"),
    ],
)
def test_refusals(problem: dict, words: str) -> None:
    x = torch.zeros(1, 1, 4, problem.get("dim", 16), dtype=problem.get("dtype", HALF))
    with pytest.raises(fastattn.UnsupportedError, match=words):
        fastattn.attention(x, x, x, backend="cuda")


def test_gradients_that_are_not_wanted_cost_nothing(device: ModuleType) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 40, 32, dtype=HALF) for _ in range(3))
    table = torch.randn(2, 9).requires_grad_()
    out = fastattn.attention(query, key, value, bias=fastattn.DistanceTable(table, left=4), backend="cuda")
    device.clear_reports()
    out.sum().backward()
    assert "backward_kv_f16_d32" not in kernels(device)
    assert table.grad is not None
    assert table.grad.isfinite().all()


def test_every_gradient_has_a_feature() -> None:
    """What the kernels give gradients for is covered above; they refuse row and column tables."""
    covered = {"query", "key", "value", "slopes", "table", "dense_bias", "sink"}
    assert set(GRADIENT_FIELDS) - {"row_table", "col_table"} == covered

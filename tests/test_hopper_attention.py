"""The sm_90a kernels in the simulator: every feature, dimension and type against the formula in float64.

The simulator checks the protocol as well as the numbers: a wait for the wrong phase, a copy that is not waited for, an
accumulator that is read while its product is under way, a fence that is missing is an error there.  Shapes are small
and cross the tiles (128 or 192 query rows, 64 to 128 keys), and few multiprocessors have several tiles each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from features import BIASES, CONTENT, FEATURES, MASKS, ROTARY, Shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Call, Result, check

import fastattn
from fastattn.functional import lower

HALF, BFLOAT16 = torch.float16, torch.bfloat16
DIMS = (64, 96, 128, 192, 256)
SHAPE = Shape(heads=2, kv_heads=1, query_length=40, key_length=140)
SHARED_BYTES = 232448  # what an H100 gives a block

# Row and column tables go to the kernels of sm_80.
TAKEN = [name for name in FEATURES if name not in CONTENT]


@pytest.fixture(autouse=True)
def device(cuda_simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The simulator as a small device of capability 9.0, asked for these kernels."""
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    cuda_simulator.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=3, capability=90)
    cuda_simulator.clear_reports()
    yield cuda_simulator
    cuda_simulator.set_device()


class Forward(Call):
    """A call without its gradients, which other kernels give."""

    def fused(self, backend: str | None, device: str = "cpu") -> Result:
        torch.manual_seed(self.seed)  # of dropout
        with torch.no_grad():
            out, lse = self.attend(self.leaves, backend)
        return Result(out, lse, {})

    def naive(self, dtype: torch.dtype, device: str = "cpu") -> Result:
        result = super().naive(dtype, device)
        result.grads.clear()
        return result


def forward_kernels(device: ModuleType) -> set[str]:
    return {report["kernel"] for report in device.reports() if "forward" in report["kernel"]}


def suffix(dtype: torch.dtype) -> str:
    return "f16" if dtype == HALF else "bf16"


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("feature", TAKEN)
def test_feature(device: ModuleType, feature: str, dtype: torch.dtype) -> None:
    """Two heads that share tiles of rows, or, in bfloat16, that have key heads of their own."""
    shape = Shape(heads=2, kv_heads=1, query_length=17, key_length=40) if feature in ROTARY else SHAPE
    check(Forward((feature,), replace(shape, kv_heads=1 if dtype == HALF else 2), dtype), "cuda")
    ran = forward_kernels(device)
    assert len(ran) == 1
    assert ran <= {f"hopper_forward_{suffix(dtype)}_d64", f"hopper_forward_plain_{suffix(dtype)}_d64"}


def backward_kernels(device: ModuleType) -> set[str]:
    return {report["kernel"] for report in device.reports() if "backward" in report["kernel"]}


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("feature", TAKEN)
def test_gradients_of_a_feature(device: ModuleType, feature: str, dtype: torch.dtype) -> None:
    shape = Shape(heads=2, kv_heads=1, query_length=17, key_length=40) if feature in ROTARY else SHAPE
    check(Call((feature,), shape, dtype), "cuda")
    ran, kind = backward_kernels(device), suffix(dtype)
    assert ran in (
        {f"hopper_backward_q_{kind}_d64", f"hopper_backward_kv_{kind}_d64"},
        {f"hopper_backward_q_plain_{kind}_d64", f"hopper_backward_kv_plain_{kind}_d64"},
    )


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("dim", [8, 64, 72, 96, 128])
@pytest.mark.parametrize("features", [("causal",), ("causal", "table", "softcap", "alibi")], ids="+".join)
def test_gradients_of_head_dims(device: ModuleType, features: tuple[str, ...], dim: int, dtype: torch.dtype) -> None:
    native = next(n for n in DIMS if n >= dim)
    for value_dim in {dim, max(8, dim - 16)}:
        shape = Shape(2, 4, 2, query_length=200, key_length=210, head_dim=dim, value_dim=value_dim)
        check(Call(features, shape, dtype), "cuda")
    plain = "" if "table" in features else "_plain"
    assert backward_kernels(device) == {
        f"hopper_backward_{side}{plain}_{suffix(dtype)}_d{native}" for side in ("q", "kv")
    }


@pytest.mark.parametrize("dim", [160, 192, 256])
@pytest.mark.parametrize(
    "features",
    [
        ("causal",), ("window", "sink"), ("documents",), ("bool_full",), ("alibi",), ("table",), ("dense_full",),
        ("softcap",), ("softcap", "causal", "alibi", "table", "dense_full", "sink"),
    ],
    ids="+".join,
)  # fmt: skip
def test_gradients_of_wide_heads(device: ModuleType, features: tuple[str, ...], dim: int) -> None:
    """Above D = 128 one group has dV and another dK, and weights go from one to the other; dropout marks them."""
    for dropout_p in (0.0, 0.25):
        shape = Shape(1, 2, 1, query_length=105, key_length=135, head_dim=dim, value_dim=dim - (dim == 192) * 24)
        check(Call(features, shape, HALF if dropout_p else BFLOAT16, dropout_p=dropout_p), "cuda")
    kernel = f"d{192 if dim < 256 else 256}"
    expected = {f"hopper_backward_{side}_f16_{kernel}" for side in ("q", "kv")}
    plain = "_plain" if features in (("causal",), ("window", "sink")) else ""
    assert backward_kernels(device) == expected | {
        f"hopper_backward_{side}{plain}_bf16_{kernel}" for side in ("q", "kv")
    }


@pytest.mark.parametrize("features", [("causal",), ("window",), ("key_lengths", "dense_full")], ids="+".join)
@pytest.mark.parametrize("key_length", [1, 63, 129, 300])
@pytest.mark.parametrize("query_length", [17, 128, 193])
def test_gradients_of_lengths(query_length: int, key_length: int, features: tuple[str, ...]) -> None:
    shape = Shape(1, 4, 2, query_length=query_length, key_length=key_length, head_dim=64, value_dim=64)
    check(Call(features, shape, BFLOAT16), "cuda")


@pytest.mark.parametrize("multiprocessors", [1, 5])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_gradients_are_bit_identical(device: ModuleType, dim: int, multiprocessors: int) -> None:
    """For any number of blocks, in any order of warps and copies."""
    call = Call(("causal", "table", "alibi", "dense_full", "softcap", "sink"), Shape(2, 2, 1, 150, 140, dim, dim), HALF)
    first = call.fused("cuda")
    device.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=multiprocessors, capability=90)
    try:
        device.options(seed=7)
        second = call.fused("cuda")
    finally:
        device.options(seed=0)
    # the inner entries of the table are cut by the number of multiprocessors, as on sm_80
    for name in first.grads.keys() - {"table"}:
        assert torch.equal(first.grads[name], second.grads[name]), name


@pytest.mark.parametrize("dim", [16, 192])
@pytest.mark.parametrize("query_offset", [-150, 16])
def test_gradients_of_rows_that_see_nothing(query_offset: int, dim: int) -> None:
    shape = Shape(2, 2, 1, 300, 140, dim, dim)
    check(Call(("causal", "alibi"), shape, HALF, offset=query_offset), "cuda")
    check(Call(("causal",), shape, HALF, offset=query_offset), "cuda")


@pytest.mark.parametrize("dim", [64, 192])
@pytest.mark.parametrize("where", ["query", "key", "value", "grad"])
def test_gradients_of_what_is_not_a_number(where: str, dim: int) -> None:
    """Number 1 of the queries, keys, values or gradients is NaN under a causal mask that starts at the first key."""
    torch.manual_seed(0)
    length = 150
    tensors = {name: torch.randn(1, 1, length, dim) for name in ("query", "key", "value", "grad")}
    tensors[where][0, 0, 1, 5] = float("nan")
    leaves = [tensors[name].to(HALF).requires_grad_() for name in ("query", "key", "value")]
    out = fastattn.attention(*leaves, mask=fastattn.Causal(), query_offset=0, backend="cuda")
    dquery, dkey, dvalue = torch.autograd.grad(out, leaves, tensors["grad"].to(HALF))
    rows = torch.arange(length)
    met = rows >= 1 if where in ("key", "value") else rows == 1  # rows that meet it
    seen = rows <= rows[met].max()  # keys that such a row sees
    assert torch.equal(dquery[0, 0].isnan().any(-1), met)
    for grad in (dkey, dvalue):
        assert not grad[0, 0][~seen].isnan().any()
        assert grad[0, 0][seen].isnan().any()


@pytest.mark.parametrize("dim", [64, 256])
def test_gradients_that_are_broadcast_or_not_wanted(device: ModuleType, dim: int) -> None:
    """A gradient that is one number everywhere has no rows to copy; dK alone leaves dV unwritten."""
    torch.manual_seed(0)
    query, value = torch.randn(1, 2, 40, dim).to(HALF), torch.randn(1, 2, 50, dim).to(HALF)
    key = torch.randn(1, 2, 50, dim).to(HALF).requires_grad_()
    grads = []
    for grad_out in (torch.ones(1, 2, 40, dim, dtype=HALF), torch.ones(dim, dtype=HALF).expand(1, 2, 40, dim)):
        device.clear_reports()
        out = fastattn.attention(query, key, value, backend="cuda")
        grads.append(torch.autograd.grad(out, key, grad_out)[0])
        taken = f"hopper_backward_kv_plain_f16_d{dim}" if grad_out.stride(2) else f"backward_kv_f16_d{dim}"
        assert backward_kernels(device) == {taken}
    torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 64, 72, 96, 128, 160, 192, 200, 256])
@pytest.mark.parametrize("features", [("causal",), ("causal", "table")], ids="+".join)
def test_head_dims(device: ModuleType, features: tuple[str, ...], dim: int, dtype: torch.dtype) -> None:
    """Every instance, the dimensions it is padded for, and Dv on either side of D; two tiles of rows or more."""
    native = next(n for n in DIMS if n >= dim)
    for value_dim in {dim, max(8, dim - 16), min(native, dim + 8)}:
        shape = Shape(1, 2, 1, query_length=200, key_length=210, head_dim=dim, value_dim=value_dim)
        check(Forward(features, shape, dtype), "cuda")
    kind = "hopper_forward" if "table" in features else "hopper_forward_plain"
    assert forward_kernels(device) == {f"{kind}_{suffix(dtype)}_d{native}"}


@pytest.mark.parametrize("features", [("causal",), ("window",), ("key_lengths", "dense_full")], ids="+".join)
@pytest.mark.parametrize("key_length", [1, 63, 128, 129, 300])
@pytest.mark.parametrize("query_length", [17, 64, 192, 193, 400])
def test_lengths(query_length: int, key_length: int, features: tuple[str, ...]) -> None:
    shape = Shape(1, 2, 1, query_length=query_length, key_length=key_length, head_dim=64, value_dim=64)
    check(Forward(features, shape, BFLOAT16), "cuda")


def packed_heads(device: ModuleType, shape: Shape) -> object:
    query, key, value = (
        torch.zeros(shape.batch, heads, length, dim, dtype=HALF)
        for heads, length, dim in (
            (shape.heads, shape.query_length, shape.head_dim),
            (shape.kv_heads, shape.key_length, shape.head_dim),
            (shape.kv_heads, shape.key_length, shape.value_dim),
        )
    )
    return json.loads(device.attention_plan(lower(query, key, value)))["packed_heads"]


GROUPS = {
    # heads, key heads, queries: heads that share a tile
    (4, 2, 40): 2,
    (8, 2, 33): 4,
    (16, 2, 17): 8,
    (8, 1, 70): 8,
    (6, 2, 50): 3,
    (7, 1, 37): 7,
    (24, 2, 19): 6,
    (16, 1, 97): 16,
    (67, 1, 17): 1,
    (4, 2, 384): 1,
}


@pytest.mark.parametrize("features", [("causal",), ("causal", "alibi", "sink", "table", "dense_full")], ids="+".join)
@pytest.mark.parametrize(("heads", "kv_heads", "query_length"), GROUPS)
def test_heads_that_share_a_tile(
    device: ModuleType, heads: int, kv_heads: int, query_length: int, features: tuple[str, ...]
) -> None:
    """Groups that divide 64 or not, one key head or two, last tiles that are not full."""
    shape = Shape(2, heads, kv_heads, query_length, key_length=141, head_dim=64, value_dim=56)
    if features == ("causal",):
        assert packed_heads(device, shape) == GROUPS[heads, kv_heads, query_length]
    check(Forward(features, shape, HALF, dropout_p=0.0 if features == ("causal",) else 0.2), "cuda")


@pytest.mark.parametrize("feature", FEATURES)
def test_feature_of_packed_rows(device: ModuleType, feature: str) -> None:
    """Whatever depends on the head or the query takes the row's own; 63 of 64 rows exist."""
    shape = Shape(heads=6, kv_heads=2, query_length=27, key_length=40)
    assert packed_heads(device, shape) == 3
    check(Forward((feature,), shape, BFLOAT16, dropout_p=0.25), "cuda")


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("query_offset", [-20, 16])
def test_packed_rows_that_see_nothing(query_offset: int, dim: int) -> None:
    shape = Shape(1, 10, 2, query_length=33, key_length=150, head_dim=dim, value_dim=dim)
    check(Forward(("causal",), shape, BFLOAT16, offset=query_offset), "cuda")
    check(Forward(("window", "alibi"), shape, BFLOAT16, offset=query_offset), "cuda")


def test_packed_rows_meet_what_is_not_a_number(device: ModuleType) -> None:
    """A value that some rows of a tile see and others do not, of queries that are neighbours there."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, 43, 64), torch.randn(1, 2, 50, 64), torch.randn(1, 2, 50, 64)
    value[0, 1, 20, 3] = float("nan")
    mask = torch.rand(1, 6, 43, 50) < 0.5
    for options, seen in (
        ({"mask": fastattn.Causal(), "query_offset": 0}, (torch.arange(43) >= 20).expand(6, -1)),
        ({"mask": fastattn.BoolMask(mask)}, mask[0, :, :, 20]),
    ):
        out = fastattn.attention(query.to(HALF), key.to(HALF), value.to(HALF), backend="cuda", **options)
        assert torch.equal(out[0].isnan().any(-1), seen & (torch.arange(6) >= 3)[:, None])


@pytest.mark.parametrize("layout", ["bshd", "broadcast"])
def test_layouts_of_packed_queries(device: ModuleType, layout: str) -> None:
    """Heads beside each other in memory; heads that are one, which no box can take together."""
    torch.manual_seed(0)
    query = torch.randn(2, 30, 4, 64).to(HALF).transpose(1, 2)
    if layout == "broadcast":
        query = query[:, :1].expand(-1, 4, -1, -1)
    key, value = (torch.randn(2, 1, 70, 64).to(HALF) for _ in range(2))
    out = fastattn.attention(query, key, value, mask=fastattn.Causal(), backend="cuda")
    expected = fastattn.attention(query.contiguous(), key, value, mask=fastattn.Causal(), backend="cuda")
    assert torch.equal(out, expected)
    plan = json.loads(device.attention_plan(lower(query, key, value)))
    assert plan["packed_heads"] == (4 if layout == "bshd" else 1)


@pytest.mark.parametrize("features", [("causal", "sink"), ("window", "alibi", "dense_full")], ids="+".join)
def test_few_queries(device: ModuleType, features: tuple[str, ...]) -> None:
    """Rows that one pass over the keys serves, and tiles enough for all blocks: not the kernel that splits keys."""
    shape = Shape(2, 16, 2, query_length=5, key_length=200, head_dim=64, value_dim=64)
    check(Forward(features, shape, HALF), "cuda")
    assert len(forward_kernels(device)) == 1
    device.clear_reports()
    device.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=5, capability=90)
    check(Forward(features, shape, HALF), "cuda")
    assert not forward_kernels(device)


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
@pytest.mark.parametrize("dim", [64, 256])
def test_order_of_tiles(device: ModuleType, dim: int, multiprocessors: int) -> None:
    """However few or many blocks share them, every tile of queries is computed once."""
    device.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=multiprocessors, capability=90)
    shape = Shape(3, 4, 2, query_length=260, key_length=140, head_dim=dim, value_dim=dim)
    check(Forward(("causal",), shape, HALF, offset=0), "cuda")
    # two heads take turns in the rows of a tile
    assert device.reports()[0]["grid"][0] == min(multiprocessors, 3 * 2 * -(-520 // (192 if dim == 64 else 128)))


def test_sections_of_heads_that_do_not_come_out_even(device: ModuleType) -> None:
    """Keys and values of four of ten heads fill the part of L2 that a section may have."""
    torch.manual_seed(0)
    query = torch.randn(1, 10, 24, 256).to(HALF)
    # only lengths are large: rows beyond the first 40 keys are never seen
    key, value = (torch.randn(1, 10, 8192, 256).to(HALF) for _ in range(2))
    lengths = torch.tensor([40])
    out = fastattn.attention(query, key, value, mask=fastattn.KeyLengths(lengths), backend="cuda")
    expected = fastattn.attention(query, key[:, :, :40], value[:, :, :40], backend="reference")
    torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=6, kv_heads=1, query_length=17, key_length=33),
        Shape(heads=2, query_length=200, key_length=20),
        Shape(query_length=0),
        Shape(key_length=0),
        Shape(batch=0),
    ],
    ids=lambda s: f"{s.batch}x{s.heads}x{s.query_length}-{s.kv_heads}x{s.key_length}",
)
def test_shapes(shape: Shape) -> None:
    for features in (("causal", "sink"), ("causal", "alibi", "sink", "table", "dense_full")):
        check(Forward(features, shape, HALF), "cuda")


@pytest.mark.parametrize("offset", [0, 16, -150, torch.tensor([3, -5])], ids=str)
@pytest.mark.parametrize("features", [("causal",), ("window", "table"), ("prefix_lm", "t5_decoder")], ids="+".join)
def test_query_offset(features: tuple[str, ...], offset: int | torch.Tensor) -> None:
    """Rows, and with -150 whole tiles of rows, that see nothing among others that do."""
    check(Forward(features, Shape(2, 2, 1, 300, 140), HALF, offset=offset), "cuda")


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("features", [("causal",), ("alibi",), ("softcap",)], ids="+".join)
def test_scale(features: tuple[str, ...], scale: float) -> None:
    check(Forward(features, SHAPE, HALF, scale=scale), "cuda")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.tuples(
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *MASKS]),
        st.sampled_from([None, *BIASES]),
        st.sampled_from([None, *BIASES]),
        st.sampled_from([None, "softcap", "sink"]),
    ),
    dropout_p=st.sampled_from([0.0, 0.25]),
    dtype=st.sampled_from([HALF, BFLOAT16]),
    dim=st.sampled_from([16, 64, 96, 128, 192, 256]),
    query_length=st.integers(17, 150),
    key_length=st.integers(1, 260),
    seed=st.integers(0, 1000),
)
def test_composition(
    features: tuple[str | None, ...], dropout_p: float, dtype: torch.dtype, dim: int, query_length: int,
    key_length: int, seed: int,
) -> None:  # fmt: skip
    names = tuple(dict.fromkeys(name for name in features if name))
    shape = Shape(1, 2, 1, query_length=query_length, key_length=key_length, head_dim=dim, value_dim=dim)
    check(Forward(names, shape, dtype, seed=seed, dropout_p=dropout_p), "cuda")


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("mask", ["causal", "documents", "bias"])
def test_not_a_number_stays_where_it_may_be_seen(device: ModuleType, mask: str, where: str, dim: int) -> None:
    """Some keys or values are NaN or infinite, and some rows do not see them: those alone stay finite."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, dim).to(BFLOAT16) for length in (260, 300, 300))
    bad = (5, 130, 131, 250)
    for j, number in zip(bad, (float("nan"), float("inf"), float("nan"), float("-inf")), strict=True):
        (key if where == "key" else value)[0, 0, j, dim // 2 + 1] = number
    rows, keys = torch.arange(260)[:, None], torch.arange(300)[None]
    if mask == "causal":
        seen = keys <= rows
        options = {"mask": fastattn.Causal(), "query_offset": 0}
    elif mask == "documents":
        query_ids, key_ids = torch.arange(260) // 50, torch.arange(300) // 50
        seen = query_ids[:, None] == key_ids[None]
        options = {"mask": fastattn.Documents(query_ids[None], key_ids[None])}
    else:
        seen = (rows + keys) % 7 != 0
        bias = torch.zeros(260, 300).masked_fill(~seen, float("-inf"))
        options = {"bias": fastattn.DenseBias(bias[None, None])}
    out, lse = fastattn.attention(query, key, value, return_lse=True, backend="cuda", **options)
    if where == "key":
        # an infinite key may give a score of -inf, which is nothing
        unseen = ~seen[:, list(bad)].any(-1)
        assert out[0, 0, unseen].isfinite().all()
        assert out[0, 0, ~unseen].isnan().any()
    else:
        assert torch.equal((~out[0, 0].isfinite()).any(-1), seen[:, list(bad)].any(-1))
        assert out[0, 0, ~seen[:, list(bad)].any(-1)].isfinite().all()
        assert lse.isfinite().all()


def test_reads_and_writes_stay_inside() -> None:
    """Operands are slices of larger tensors whose surroundings are NaN; nothing of it may reach the result."""
    torch.manual_seed(0)

    def guarded(*shape: int) -> torch.Tensor:
        whole = torch.full([n + 6 for n in shape[:-1]] + [shape[-1] + 16], float("nan"), dtype=HALF)
        inner = whole[tuple(slice(3, 3 + n) for n in shape[:-1])][..., 8 : 8 + shape[-1]]
        inner.copy_(torch.randn(shape))
        return inner

    operands = guarded(2, 2, 140, 72), guarded(2, 2, 141, 72), guarded(2, 2, 141, 72)
    sliced = fastattn.attention(*operands, mask=fastattn.Causal(), backend="cuda")
    whole = fastattn.attention(*(x.contiguous() for x in operands), mask=fastattn.Causal(), backend="cuda")
    assert sliced.isfinite().all()
    assert torch.equal(sliced, whole)


def test_broadcast_operands(device: ModuleType) -> None:
    """A dimension of stride 0 is one element of the tensor map; rows that are all one are left to other kernels."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape).to(HALF) for shape in ((1, 4, 40, 64), (1, 1, 50, 64), (1, 2, 1, 64)))
    query, key = query.expand(3, -1, -1, -1), key.expand(3, 2, -1, -1)
    for values, kernel in (
        (value.repeat(3, 1, 50, 1), "hopper_forward_plain_f16_d64"),
        (value.expand(3, -1, 50, -1), "forward_f16_d64"),
    ):
        device.clear_reports()
        out = fastattn.attention(query, key, values, backend="cuda")
        expected = fastattn.attention(query, key, values, backend="reference")
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        assert forward_kernels(device) == {kernel}


@pytest.mark.parametrize("dim", DIMS)
def test_no_bank_conflicts(device: ModuleType, dim: int) -> None:
    query, key, value = (torch.randn(1, 1, 140, dim, dtype=HALF).requires_grad_() for _ in range(3))
    fastattn.attention(query, key, value, mask=fastattn.Causal(), backend="cuda").sum().backward()
    reports = [report for report in device.reports() if report["kernel"].startswith("hopper_")]
    assert len(reports) == 3
    for report in reports:
        for access in ("load_matrix", "store_matrix", "load_shared", "store_shared"):
            if access in report["traffic"]:
                counts = report["traffic"][access]
                assert counts["actual"] == counts["ideal"], (report["kernel"], access)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_same_bits_without_the_pin(device: ModuleType, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, dim).to(BFLOAT16) for _ in range(3))
    pinned = fastattn.attention(query, key, value, backend="cuda")
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "unpinned")
    device.clear_reports()
    assert torch.equal(fastattn.attention(query, key, value, backend="cuda"), pinned)
    assert forward_kernels(device) == {f"hopper_forward_unpinned_bf16_d{dim}"}


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("dim", [64, 128])
def test_same_bits_in_any_order(device: ModuleType, dim: int, kv_heads: int) -> None:
    """Warps run, and copies arrive, in orders of chance: what is not waited for shows."""
    torch.manual_seed(0)
    query = torch.randn(1, 2, 260, dim).to(BFLOAT16)
    key, value = (torch.randn(1, kv_heads, 300, dim).to(BFLOAT16) for _ in range(2))
    results = []
    try:
        for seed in range(4):
            device.options(seed=seed)
            results.append(fastattn.attention(query, key, value, mask=fastattn.Causal(), backend="cuda"))
    finally:
        device.options(seed=0)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_off_by_default(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(1, 2, 40, 64).to(HALF) for _ in range(3))
    problem = lower(query, key, value)
    plan = json.loads(device.attention_plan(problem))
    assert plan["kernel"] == "hopper_forward"
    assert (plan["rows"], plan["keys"], plan["stages"], plan["registers"]) == (192, 128, 4, 160)
    assert plan["shared_bytes"] <= SHARED_BYTES
    assert plan["waves"] == 1
    assert "not_hopper" not in plan

    monkeypatch.delenv("FASTATTN_CUDA_HOPPER")
    plan = json.loads(device.attention_plan(problem))
    assert plan["kernel"] == "forward"
    assert "FASTATTN_CUDA_HOPPER=1" in plan["not_hopper"]
    fastattn.attention(query, key, value, backend="cuda")
    assert forward_kernels(device) == {"forward_f16_d64"}

    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    device.set_device(capability=80)
    plan = json.loads(device.attention_plan(problem))
    assert plan["kernel"] == "forward"
    assert "not_hopper" not in plan


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("mask", [None, fastattn.BoolMask(torch.ones(40, 40, dtype=torch.bool).tril())], ids=str)
def test_explain_names_the_backward(
    device: ModuleType, dim: int, mask: fastattn.Mask | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = (torch.randn(1, 2, 40, dim).to(HALF) for _ in range(3))

    def plan() -> dict[str, object]:
        return fastattn.explain(query, key, value, mask=mask, backend="cuda").plan

    assert not {"backward_q", "backward_kv"} & plan().keys()
    value.requires_grad_()
    assert "backward_q" not in plan()
    with torch.no_grad():
        assert "backward_kv" not in plan()
    query.requires_grad_()
    told = plan()
    device.clear_reports()
    fastattn.attention(query, key, value, mask=mask, backend="cuda").sum().backward()
    for report in device.reports():
        if "backward" in report["kernel"]:
            side = "backward_kv" if "backward_kv" in report["kernel"] else "backward_q"
            assert report["kernel"].startswith(f"{told[side]['kernel']}_")
            assert told[side]["dim"] == dim
            assert told[side]["shared_bytes"] == report["shared_bytes"]
            assert told[side]["threads"] == report["threads"]
            assert told[side]["registers"] == 240
    monkeypatch.delenv("FASTATTN_CUDA_HOPPER")
    told = plan()
    assert "backward_q: kernel backward_q, dim" in str(fastattn.explain(query, key, value, mask=mask, backend="cuda"))
    for side in ("backward_q", "backward_kv"):
        assert told[side]["kernel"] == side
        assert "FASTATTN_CUDA_HOPPER=1" in told[side]["not_hopper"]

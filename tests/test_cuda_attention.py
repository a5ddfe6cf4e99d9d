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
from features import BIASES, CONTENT, FEATURES, MASKS, ROTARY, Feature, Scene, Shape, Tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Call, check

import fastattn
from fastattn.backends.cuda import CudaBackend
from fastattn.functional import lower
from fastattn.positional.content import ContentBias, Tables
from fastattn.problem import GRADIENT_FIELDS, Problem

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


class GivenTables(ContentBias):
    """Row and column tables as they are given."""

    route = "table"

    def __init__(self, tables: Tables) -> None:
        self.given = tables

    def tables(self, *_: object) -> Tables:
        return self.given

    def dense(self, *_: object) -> torch.Tensor:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TableCase:
    """What the tables of a call are: their width, and the column of each entry, T in all, by default its own."""

    width: int
    left: int
    columns: tuple[int, ...] | None = None
    rows: bool = True
    cols: bool = True

    def __call__(self, scene: Scene) -> Feature:
        s, width = scene.shape, self.width
        leaves = {}
        if self.rows:
            leaves["rows"] = scene.randn(s.batch, s.heads, s.query_length, width, dtype=torch.float32)
        if self.cols:
            leaves["cols"] = scene.randn(s.batch, s.kv_heads, width, s.key_length, dtype=torch.float32)
        columns = torch.tensor(self.columns or range(width), dtype=torch.int32)

        def bias(leaves: Tensors) -> torch.Tensor:
            entry = scene.distance.clamp(-self.left, len(columns) - 1 - self.left) + self.left
            index = columns[entry].long().expand(s.batch, s.heads, -1, -1)
            total = torch.zeros((), dtype=torch.float64)
            if self.rows:
                total = total + leaves["rows"].gather(-1, index)
            if self.cols:
                total = total + leaves["cols"].repeat_interleave(s.heads // s.kv_heads, 1).gather(-2, index)
            return total

        def public(leaves: Tensors) -> dict[str, object]:
            given = columns if self.columns else None
            return {"bias": GivenTables(Tables(leaves.get("rows"), leaves.get("cols"), given, self.left))}

        return Feature(leaves=leaves, public=public, bias=bias)


# few, of which one is read by no pair and one by a single distance; the reach is not symmetric
BUCKETS = TableCase(6, 17, (0,) * 5 + (1,) * 9 + (2,) + (4,) * 11 + (5,) * 3)
TABLE_CASES = {
    "rows": TableCase(15, 7, cols=False),
    "columns": TableCase(15, 7, rows=False),
    "both": TableCase(9, 2),
    "buckets": BUCKETS,
    "beyond every distance": TableCase(701, 350),
    "one": TableCase(1, 0),
    "one side": TableCase(12, 11),
    "other side": TableCase(4, 0, (0, 1, 1, 1, 2, 2, 3)),
}


@pytest.fixture
def table_case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The feature of the case that the test names, for as long as it runs."""
    monkeypatch.setitem(FEATURES, "given tables", request.param)
    return "given tables"


def _cases(*names: str) -> pytest.MarkDecorator:
    cases = {name: TABLE_CASES[name] for name in names or TABLE_CASES}
    return pytest.mark.parametrize("table_case", cases.values(), ids=cases, indirect=True)


FAR = Shape(1, 4, 2, query_length=70, key_length=230, head_dim=32, value_dim=32)


@_cases()
@pytest.mark.parametrize("shape", [SHAPE, DECODE, FAR], ids=["rows", "decode", "far"])
def test_tables(table_case: str, shape: Shape) -> None:
    """Within reach, across its ends and beyond; a group of heads adds to one column table."""
    check(Call((table_case,), shape, HALF), "cuda")


@_cases("both", "buckets")
@pytest.mark.parametrize("offset", [0, -60, 190, torch.tensor([3, -90])], ids=str)
@pytest.mark.parametrize(
    "features",
    [("causal",), ("window", "table"), ("key_lengths", "softcap", "alibi"), ("documents", "dense_full", "sink")],
    ids="+".join,
)
def test_tables_beside_other_features(
    table_case: str, features: tuple[str, ...], offset: int | torch.Tensor
) -> None:  # fmt: skip
    check(Call((table_case, *features), SHAPE, BFLOAT16, offset=offset, dropout_p=0.2), "cuda")


@_cases("buckets")
@pytest.mark.parametrize("dtype", [HALF, BFLOAT16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_tables_at_head_dims(table_case: str, dim: int, dtype: torch.dtype) -> None:
    shape = Shape(1, 2, 1, query_length=35, key_length=70, head_dim=dim, value_dim=dim)
    check(Call((table_case, "causal"), shape, dtype), "cuda")


@_cases("buckets")
@pytest.mark.parametrize("key_length", [1, 63, 65, 129])
@pytest.mark.parametrize("query_length", [1, 63, 129])
def test_tables_at_lengths(table_case: str, query_length: int, key_length: int) -> None:
    shape = Shape(1, 2, 1, query_length=query_length, key_length=key_length, head_dim=32, value_dim=32)
    check(Call((table_case, "causal"), shape, HALF), "cuda")


@_cases("both")
@pytest.mark.parametrize("sizes", [{"query_length": 0}, {"key_length": 0}, {"batch": 0}], ids=str)
def test_tables_of_nothing(table_case: str, sizes: dict[str, int]) -> None:
    check(Call((table_case,), dataclasses.replace(SHAPE, **sizes), HALF), "cuda")


def table_problem(columns: list[int] | None = None) -> Problem:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 32, dtype=HALF) for n in (40, 75, 75))
    rows, cols = torch.randn(1, 2, 40, 5), torch.randn(1, 2, 5, 75)
    return Problem(
        query=query, key=key, value=value, scale=0.2, query_offset=35, row_table=rows, col_table=cols, columns_left=2,
        columns=None if columns is None else torch.tensor(columns, dtype=torch.int32),
    )  # fmt: skip


def run_problem(problem: Problem) -> list[torch.Tensor]:
    """Output, and gradients of both tables."""
    torch.manual_seed(1)
    out, _, statistics = torch.ops.fastattn.cuda_forward(*problem.arguments())
    needs = sum(1 << bit for bit, name in enumerate(GRADIENT_FIELDS) if name.endswith("_table"))
    grad_out = torch.randn_like(out)
    grads = torch.ops.fastattn.cuda_backward(grad_out, None, out, statistics, needs, *problem.arguments())
    return [out, *grads[-2:]]


def test_tables_may_be_slices_of_larger_ones() -> None:
    problem = table_problem()

    def guarded(x: torch.Tensor) -> torch.Tensor:
        whole = torch.full([n + 5 for n in x.shape], float("nan"))
        inner = whole[tuple(slice(2, 2 + n) for n in x.shape)]
        inner.copy_(x)
        return inner

    sliced = dataclasses.replace(
        problem, row_table=guarded(problem.row_table), col_table=guarded(problem.col_table)
    )  # fmt: skip
    for ours, want in zip(run_problem(sliced), run_problem(problem), strict=True):
        assert torch.equal(ours, want)


def test_columns_that_do_not_exist_are_clamped() -> None:
    """They lie in the GPU's memory, where no operator looks at them."""
    for ours, want in zip(
        run_problem(table_problem([-9, 1, 2, 2, 99])), run_problem(table_problem([0, 1, 2, 2, 4])), strict=True
    ):  # fmt: skip
        assert torch.equal(ours, want)


def test_gradients_of_tables_alone(device: ModuleType) -> None:
    """Each is made by one kernel, and neither needs dQ, dK or dV."""
    problem = table_problem()
    out, _, statistics = torch.ops.fastattn.cuda_forward(*problem.arguments())
    for name, kernel in (("row_table", "backward_q_f16_d32"), ("col_table", "backward_kv_f16_d32")):
        device.clear_reports()
        needs = 1 << GRADIENT_FIELDS.index(name)
        torch.ops.fastattn.cuda_backward(torch.randn_like(out), None, out, statistics, needs, *problem.arguments())
        assert kernels(device) == ["attention_delta", kernel]
        wanted = dataclasses.replace(problem, **{name: getattr(problem, name).clone().requires_grad_()})
        told = CudaBackend().plan(wanted).keys()
        assert told & {"backward_q", "backward_kv"} == {kernel.removesuffix("_f16_d32")}


def test_tables_keep_to_the_kernels_of_sm_80(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    device.set_device(shared_memory_per_block=227 * 1024, capability=90)
    device.clear_reports()
    call = Call(("shaw",), SHAPE, HALF)
    check(call, "cuda")
    assert not any("hopper" in kernel for kernel in kernels(device))
    leaves = call.leaves
    explained = fastattn.explain(
        leaves["query"], leaves["key"], leaves["value"], **call.keywords(leaves), backend="cuda"
    )  # fmt: skip
    assert explained.plan["not_hopper"] == "row and column tables"


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


@pytest.mark.parametrize("query_length", [3, 150])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_minus_infinity_hides_does_not_leak(bad: float, query_length: int) -> None:
    """A dense bias hides keys 60 to 139, and row 1 from all keys, in tiles that no mask touches."""
    torch.manual_seed(0)
    query, grad = (torch.randn(1, 2, query_length, 32, dtype=HALF) for _ in range(2))
    key, value = (torch.randn(1, 2, 150, 32, dtype=HALF) for _ in range(2))
    hidden = (torch.arange(150) >= 60) & (torch.arange(150) < 140)
    bias = torch.randn(1, 2, query_length, 150, dtype=HALF).masked_fill(hidden, -float("inf"))
    bias[:, :, 1] = -float("inf")

    def run() -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
        out = fastattn.attention(*leaves[:3], bias=fastattn.DenseBias(leaves[3]), backend="cuda")
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    clean = run()
    key[:, :, hidden, 5], value[:, :, hidden, 7] = bad, bad
    query[:, :, 1], grad[:, :, 1] = bad, bad
    for name, a, b in zip(("out", "dquery", "dkey", "dvalue", "dbias"), clean, run(), strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


def test_gradients_are_bit_identical() -> None:
    call = Call(("causal", "table", "alibi", "dense_full", "sink", "deberta"), SHAPE, HALF)
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
    """What the kernels give gradients for is covered above."""
    covered = {"query", "key", "value", "slopes", "table", "dense_bias", "sink", "row_table", "col_table"}
    assert set(GRADIENT_FIELDS) == covered

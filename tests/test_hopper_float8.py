"""The sm_90a kernel of float8_e4m3fn operands in the simulator, against the formula in float64 on the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from features import MASKS, SINKS, Shape
from float8_oracle import BFLOAT16, FLOAT8, Float8Call, check_float8
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.bench.gate import expect, gate
from fastattn.bench.peers import CannotError, prepare
from fastattn.bench.scenarios import Case, make_inputs
from fastattn.bench.scenarios import Shape as BenchShape

SHAPE = Shape(heads=2, kv_heads=1, query_length=40, key_length=140, head_dim=64, value_dim=64)
SHARED_BYTES = 232448  # what an H100 gives a block


@pytest.fixture(autouse=True)
def device(cuda_simulator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The simulator as a small device of capability 9.0, asked for these kernels."""
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    cuda_simulator.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=3, capability=90)
    cuda_simulator.clear_reports()
    yield cuda_simulator
    cuda_simulator.set_device()


def kernels(device: ModuleType) -> set[str]:
    return {report["kernel"] for report in device.reports()}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(FLOAT8)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("feature", [*MASKS, *SINKS])
def test_feature(device: ModuleType, feature: str, kv_heads: int) -> None:
    """Two heads that share tiles of rows, or that have key heads of their own."""
    check_float8(Float8Call((feature,), replace(SHAPE, kv_heads=kv_heads)), "cuda")
    assert kernels(device) <= {"hopper_forward_e4m3_d64", "hopper_forward_plain_e4m3_d64"}
    assert len(kernels(device)) == 1


@pytest.mark.parametrize("dim", [16, 48, 64, 80, 96, 128, 144, 192, 256])
@pytest.mark.parametrize("features", [("causal",), ("causal", "documents")], ids="+".join)
def test_head_dims(device: ModuleType, features: tuple[str, ...], dim: int) -> None:
    """Every instance and the dimensions it is padded for, Dv on either side of D, several tiles of rows and of keys."""
    native = next(n for n in (64, 128, 256) if n >= dim)
    for value_dim in {dim, max(16, dim - 32), min(native, dim + 16)}:
        check_float8(Float8Call(features, Shape(1, 2, 1, 200, 410, dim, value_dim)), "cuda")
    plain = "" if "documents" in features else "_plain"
    assert kernels(device) == {f"hopper_forward{plain}_e4m3_d{native}"}


@pytest.mark.parametrize("features", [("causal",), ("window", "sink"), ("key_lengths", "bool_full")], ids="+".join)
@pytest.mark.parametrize("key_length", [1, 63, 192, 193, 400])
@pytest.mark.parametrize("query_length", [1, 64, 193])
def test_lengths(query_length: int, key_length: int, features: tuple[str, ...]) -> None:
    for dim in (64, 128):
        check_float8(Float8Call(features, Shape(1, 2, 1, query_length, key_length, dim, dim)), "cuda")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1), (8, 2), (16, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    """Rows of several heads in a tile, each with its own scale."""
    for features in (("causal",), ("documents", "sink")):
        check_float8(Float8Call(features, Shape(2, heads, kv_heads, 37, 141, 64, 48)), "cuda")


@pytest.mark.parametrize("per", ["none", "head", "batch"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_scales(per: str, dim: int) -> None:
    check_float8(Float8Call(("causal",), Shape(3, 4, 2, 70, 90, dim, dim), per=per), "cuda")


def test_scales_of_any_size() -> None:
    """Tiny ones leave uniform weights, large ones a single key; zero is a number."""
    call = Float8Call((), Shape(1, 4, 2, 70, 90, 64, 64), per="head")
    for size in (0.0, 1e-30, 1e-3, 30.0):
        call.scales["query"][1] = size
        check_float8(call, "cuda")
    call.scales["value"][0] = 0.0
    out, _ = call.attend8("cuda")
    assert (out[:, :2] == 0).all()
    assert (out[:, 2:] != 0).any()


@pytest.mark.parametrize("offset", [0, 16, -150, torch.tensor([3, -5])], ids=str)
@pytest.mark.parametrize("features", [("causal",), ("window", "documents")], ids="+".join)
def test_query_offset(features: tuple[str, ...], offset: int | torch.Tensor) -> None:
    """Rows, and with -150 whole tiles of rows, that see nothing among others that do."""
    for dim in (64, 128):
        check_float8(Float8Call(features, Shape(2, 2, 1, 300, 240, dim, dim), offset=offset), "cuda")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.tuples(
        st.sampled_from([None, *MASKS]), st.sampled_from([None, *MASKS]), st.sampled_from([None, *SINKS])
    ),
    dim=st.sampled_from([16, 64, 112, 128, 208, 256]),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]),
    query_length=st.integers(1, 300),
    key_length=st.integers(1, 400),
    per=st.sampled_from(["none", "head", "batch"]),
    seed=st.integers(0, 1000),
)
def test_composition(
    features: tuple[str | None, ...], dim: int, heads: tuple[int, int], query_length: int, key_length: int, per: str,
    seed: int,
) -> None:  # fmt: skip
    names = tuple(dict.fromkeys(name for name in features if name))
    shape = Shape(1, *heads, query_length=query_length, key_length=key_length, head_dim=dim, value_dim=dim)
    check_float8(Float8Call(names, shape, per=per, seed=seed), "cuda")


def test_negative_scales_make_nan() -> None:
    """Where values of tensors are not looked at: of the operator."""
    operands = [random(1, 2, 40, 64) for _ in range(3)]
    problem = fastattn.functional.lower(*(x.to(BFLOAT16) for x in operands))
    problem.query, problem.key, problem.value = operands
    scales = torch.tensor([[0.5, -0.5]]), None, None
    out, lse = torch.ops.fastattn.cuda_float8_forward(*scales, *problem.arguments())
    assert out[:, 0].isfinite().all()
    assert lse[:, 0].isfinite().all()
    assert out[:, 1].isnan().all()
    assert lse[:, 1].isnan().all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_key_brings_its_own_value(dim: int) -> None:
    """Each query meets one key alone, so the output is that key's row of values to the bit."""
    torch.manual_seed(0)
    length = 400
    key = (torch.randint(0, 2, (1, 1, length, dim)) * 2 - 1).float().to(FLOAT8)
    query = key.clone()
    value = torch.randint(0, 256, (1, 1, length, dim), dtype=torch.uint8)
    value[value & 0x7F == 0x7F] = 1
    value = value.view(FLOAT8)
    out, lse = fastattn.attention(query, key, value, scale=3.0, return_lse=True, backend="cuda")
    scores = 3.0 * query.double() @ key.double().transpose(-1, -2)
    assert (scores.softmax(-1).diagonal(dim1=-2, dim2=-1) > 0.9999).all()
    assert torch.equal(out, value.to(BFLOAT16))
    torch.testing.assert_close(lse, torch.full_like(lse, 3.0 * dim))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("mask", ["causal", "documents", "bool", "lengths"])
def test_not_a_number_stays_where_it_may_be_seen(mask: str, where: str, code: int, dim: int) -> None:
    """Some keys or values are NaN, and some rows do not see them: those alone stay finite."""
    torch.manual_seed(0)
    query, key, value = random(1, 1, 260, dim), random(1, 1, 300, dim), random(1, 1, 300, dim)
    bad = [5, 130, 131, 199, 250, 299]
    (key if where == "key" else value).view(torch.uint8)[0, 0, bad, dim // 2 + 1] = code
    rows, keys = torch.arange(260)[:, None], torch.arange(300)[None]
    options: dict[str, object] = {}
    if mask == "causal":
        seen = keys <= rows
        options = {"mask": fastattn.Causal(), "query_offset": 0}
    elif mask == "documents":
        query_ids, key_ids = torch.arange(260) // 50, torch.arange(300) // 50
        seen = query_ids[:, None] == key_ids[None]
        options = {"mask": fastattn.Documents(query_ids[None], key_ids[None])}
    elif mask == "bool":
        seen = (rows + keys) % 7 != 0
        options = {"mask": fastattn.BoolMask(seen)}
    else:
        seen = (keys < 5).expand(260, 300)
        options = {"mask": fastattn.KeyLengths(torch.tensor([5]))}
    out, lse = fastattn.attention(query, key, value, return_lse=True, backend="cuda", **options)
    meets = seen[:, bad].any(-1)
    assert torch.equal(out[0, 0].isnan().any(-1), meets)
    assert out[0, 0, ~meets].isfinite().all()
    assert torch.equal(lse[0, 0].isnan(), meets if where == "key" else torch.zeros_like(meets))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_each_key_is_looked_at(dim: int) -> None:
    """Sequence n has a NaN among the values of key n, and each query sees the key of its own number."""
    torch.manual_seed(0)
    length = 40
    query, key, value = random(length, 1, length, dim), random(length, 1, length, dim), random(length, 1, length, dim)
    for n in range(length):
        value.view(torch.uint8)[n, 0, n, 7 * n % dim] = 0x7F
    seen = torch.eye(length, dtype=torch.bool)
    out = fastattn.attention(query, key, value, mask=fastattn.BoolMask(seen), backend="cuda")
    assert torch.equal(out[:, 0].isnan().any(-1), seen)


def test_not_a_number_that_all_see_stays_in_its_column() -> None:
    torch.manual_seed(0)
    query, key, value = random(1, 1, 40, 64), random(1, 1, 256, 64), random(1, 1, 256, 64)
    value.view(torch.uint8)[0, 0, 77, 9] = 0x7F
    out = fastattn.attention(query, key, value, backend="cuda")
    assert out[..., 9].isnan().all()
    assert out[..., torch.arange(64) != 9].isfinite().all()


def test_reads_and_writes_stay_inside() -> None:
    """Operands are slices of larger tensors whose surroundings are NaN; nothing of it may reach the result."""
    torch.manual_seed(0)

    def guarded(*shape: int) -> torch.Tensor:
        whole = torch.full([n + 6 for n in shape[:-1]] + [shape[-1] + 32], 0x7F, dtype=torch.uint8)
        inner = whole[tuple(slice(3, 3 + n) for n in shape[:-1])][..., 16 : 16 + shape[-1]]
        inner.copy_(random(*shape).view(torch.uint8))
        return inner.view(FLOAT8)

    operands = guarded(2, 2, 140, 80), guarded(2, 2, 141, 80), guarded(2, 2, 141, 80)
    sliced = fastattn.attention(*operands, mask=fastattn.Causal(), backend="cuda")
    whole = fastattn.attention(*(x.contiguous() for x in operands), mask=fastattn.Causal(), backend="cuda")
    assert sliced.isfinite().all()
    assert torch.equal(sliced, whole)
    unaligned = [torch.nn.functional.pad(x.float(), (1, 0)).to(FLOAT8)[..., 1:] for x in operands]
    assert torch.equal(fastattn.attention(*unaligned, mask=fastattn.Causal(), backend="cuda"), whole)


def test_layouts(device: ModuleType) -> None:
    """(B, S, H, D) in memory gives an output like it; a dimension of stride 0 is one element."""
    torch.manual_seed(0)
    query = random(2, 30, 4, 64).transpose(1, 2)
    key, value = random(1, 1, 70, 64).expand(2, 2, -1, -1), random(2, 2, 70, 64)
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0])
    out = fastattn.attention(query, key, value, query_scale=scale, backend="cuda")
    expected = fastattn.attention(
        query.contiguous(), key.contiguous(), value, query_scale=scale.expand(2, 4), backend="cuda"
    )
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    assert expected.is_contiguous()
    assert kernels(device) == {"hopper_forward_plain_e4m3_d64"}


@pytest.mark.parametrize("shape", [Shape(query_length=0), Shape(batch=0), Shape(heads=0, kv_heads=0)], ids=str)
def test_empty(shape: Shape) -> None:
    shape = replace(shape, head_dim=64, value_dim=64)
    out, lse = Float8Call((), shape).attend8("cuda")
    assert out.shape == (shape.batch, shape.heads, shape.query_length, 64)
    assert lse.shape == out.shape[:3]


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
def test_order_of_tiles(device: ModuleType, multiprocessors: int) -> None:
    device.set_device(shared_memory_per_block=SHARED_BYTES, multiprocessors=multiprocessors, capability=90)
    for dim in (64, 128, 256):
        check_float8(Float8Call(("causal",), Shape(3, 4, 2, 260, 240, dim, dim), offset=0), "cuda")


@pytest.mark.parametrize("features", [("causal",), ("documents",)], ids="+".join)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_same_bits_in_any_order(device: ModuleType, dim: int, features: tuple[str, ...]) -> None:
    """Warps run, and copies arrive, in orders of chance: what is not waited for shows."""
    call = Float8Call(features, Shape(1, 2, 1, 260, 500, dim, dim))
    results = []
    try:
        for seed in range(4):
            device.options(seed=seed)
            results.append(call.attend8("cuda")[0])
    finally:
        device.options(seed=0)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(("dim", "key_length"), [(64, 6000), (128, 6000), (256, 1024)])
def test_sums_in_few_bits(device: ModuleType, dim: int, key_length: int) -> None:
    """Values of one sign over many keys, on a chip that cuts sums off: added apart, tile by tile, they keep their size;
    where they are not, rows are short."""
    torch.manual_seed(0)
    query, key = random(1, 1, 64, dim), random(1, 1, key_length, dim)
    value = (torch.randn(1, 1, key_length, dim) + 1).to(FLOAT8)
    scale = 0.1 / dim**0.5
    expected = (scale * query.double() @ key.double().mT).softmax(-1) @ value.double()
    try:
        device.options(sum_bits=13)
        out = fastattn.attention(query, key, value, scale=scale, backend="cuda")
    finally:
        device.options(sum_bits=0)
    error = (out.double() / expected - 1).abs().max()
    # weights of one size are rounded alike
    assert error < (0.02 if dim == 256 else 0.008)


@pytest.mark.parametrize("features", [("causal",), ("documents",)], ids="+".join)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_no_bank_conflicts(device: ModuleType, dim: int, features: tuple[str, ...]) -> None:
    Float8Call(features, Shape(1, 1, 1, 140, 200, dim, dim)).attend8("cuda")
    (report,) = device.reports()
    assert report["traffic"]["load_matrix"]["requests"] > 0
    for access in ("load_matrix", "store_matrix", "load_shared", "store_shared"):
        counts = report["traffic"][access]
        assert counts["actual"] == counts["ideal"], access


def test_explain(device: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    operands = [random(1, 2, 40, 128) for _ in range(3)]

    def told(**options: object) -> fastattn.Explanation:
        return fastattn.explain(*operands, backend="cuda", **options)

    plan = told(mask=fastattn.Causal()).plan
    assert plan["kernel"] == "hopper_forward_e4m3"
    assert (plan["dim"], plan["rows"], plan["keys"], plan["stages"]) == (128, 128, 128, 2)
    assert told(mask=fastattn.Documents(torch.zeros(1, 40, dtype=torch.long))).plan["keys"] == 64
    assert "float8" in told().kernel
    assert not told().notes
    device.clear_reports()
    fastattn.attention(*operands, mask=fastattn.Causal(), backend="cuda")
    (report,) = device.reports()
    assert (report["shared_bytes"], report["threads"]) == (plan["shared_bytes"], plan["threads"])
    assert fastattn.last_call().kernel == told().kernel

    lengths = torch.zeros(1, dtype=torch.long)
    for options, reason in (
        ({"softcap": 3.0}, "softcap"),
        ({"bias": fastattn.ALiBi(torch.ones(2))}, "bias"),
        ({"dropout_p": 0.5}, "dropout_p"),
        ({"scale": -1.0}, "scale = -1.0; it needs one > 0"),
        ({"sink": torch.ones(2).requires_grad_()}, "gradient of sink"),
    ):
        explanation = told(**options)
        assert len(explanation.notes) == 1
        what, _, why = explanation.notes[0].partition("; the float8 kernel does not run: ")
        assert what == "float8_e4m3fn operands as bfloat16 of 0.0614 MB"
        assert reason in why
        assert "float8" not in explanation.kernel
    automatic = fastattn.explain(*operands, mask=fastattn.KeyLengths(lengths))
    assert "the simulator runs only when asked for" in automatic.notes[0]
    assert "backend='cpu' was asked for" in fastattn.explain(*operands, backend="cpu").notes[0]

    operands = [random(1, 2, length, 144) for length in (40, 1025, 1025)]
    assert "1025 keys; above D = 128, where sums have 14 bits, it takes 1024" in told().notes[0]
    operands = [random(1, 2, 40, 24) for _ in range(3)]
    assert "D = 24; it has multiples of 16 up to 256" in told().notes[0]
    operands = [random(1, 2, 1, 64).expand(-1, -1, 40, -1) for _ in range(3)]
    assert "broadcast along its length" in told().notes[0]
    operands = [random(1, 2, 40, 64), random(1, 2, 0, 64), random(1, 2, 0, 64)]
    assert "no keys" in told().notes[0]
    operands = [random(1, 2, 40, 64) for _ in range(3)]
    monkeypatch.delenv("FASTATTN_CUDA_HOPPER")
    assert "not asked for with FASTATTN_CUDA_HOPPER=1" in told().notes[0]
    device.clear_reports()
    fastattn.attention(*operands, backend="cuda")
    assert kernels(device) == {"forward_bf16_d64"}
    monkeypatch.setenv("FASTATTN_CUDA_HOPPER", "1")
    device.set_device(capability=80)
    assert "compute capability 8.0; it needs 9.0" in told().notes[0]


def test_compiled(device: ModuleType) -> None:
    operands = [random(1, 2, 40, 64) for _ in range(3)]
    scale = torch.rand(2) + 0.5

    def call(*operands: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(*operands, mask=fastattn.Causal(), key_scale=scale, backend="cuda")

    expected = call(*operands)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(*operands), expected)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(*operands), expected)
    assert kernels(device) == {"hopper_forward_plain_e4m3_d64"}


@pytest.mark.parametrize("name", ["float8", "float8-causal"])
def test_the_bench_holds_it_to_the_formula(device: ModuleType, name: str) -> None:
    for dim in (64, 128, 256):
        case = Case("hopper", name, BenchShape(1, 2, 200, 300, dim, kv_heads=1), BFLOAT16, ("forward",))
        inputs = make_inputs(case, "cpu")
        for x in (inputs.query, inputs.key, inputs.value):
            assert torch.equal(x, x.to(FLOAT8).to(BFLOAT16))
        device.clear_reports()
        error = gate(
            "fastattn-float8", inputs, prepare("fastattn-float8", inputs), expect(inputs, gradients=False),
            gradients=False,
        )  # fmt: skip
        assert 0 < error < 16
        assert kernels(device) == {f"hopper_forward_plain_e4m3_d{dim}"}
    plain = make_inputs(replace(case, scenario="plain"), "cpu")
    with pytest.raises(CannotError, match="not float8_e4m3fn's"):
        prepare("fastattn-float8", plain)


def test_the_kernel_refuses_what_it_cannot_run(device: ModuleType) -> None:
    """The operator itself, past the checks of `attention`."""
    operands = [random(1, 2, 40, 64) for _ in range(3)]
    problem = fastattn.functional.lower(*(x.to(BFLOAT16) for x in operands), softcap=2.0)
    problem.query, problem.key, problem.value = operands
    with pytest.raises(RuntimeError, match="no kernel takes these operands of 8 bits: a stage between"):
        torch.ops.fastattn.cuda_float8_forward(None, None, None, *problem.arguments())
    with pytest.raises(RuntimeError, match="query must be float16 or bfloat16"):
        torch.ops.fastattn.cuda_forward(*problem.arguments())


@pytest.mark.parametrize("feature", ["causal", "documents", "sink"])
@pytest.mark.parametrize("dim", [24, 64])
def test_dequantized_on_other_kernels(
    device: ModuleType, dim: int, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of sm_80, and of sm_90a where the dimension is none of the 8-bit kernel's."""
    call = Float8Call((feature,), replace(SHAPE, head_dim=dim, value_dim=dim))
    if dim == 24:
        check_float8(call, "cuda", kernel=False)
        assert kernels(device) <= {"hopper_forward_bf16_d64", "hopper_forward_plain_bf16_d64"}
    monkeypatch.delenv("FASTATTN_CUDA_HOPPER")
    device.clear_reports()
    check_float8(call, "cuda", kernel=False)
    assert kernels(device) == {f"forward_bf16_d{32 if dim == 24 else 64}"}

"""What only the native CPU kernels can get wrong: instruction sets, threads, tile borders, strides.

Calls the operators directly, below the public API.  The oracle is the reference formula in float64; the budget is
twice the error of that formula in the inputs' own precision, plus one rounding of the result.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import native, reference
from fastattn.problem import GRADIENT_FIELDS, Problem

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPED = ("query", "key", "value")
Gradients = dict[str, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def plain(
    dtype: torch.dtype, sq: int, sk: int, *, b: int = 2, hq: int = 4, hk: int = 2, d: int = 32, **fields
) -> Problem:
    """A problem without masks and biases."""
    q, k, v = random(b, hq, sq, d, seed=1), random(b, hk, sk, d, seed=2), random(b, hk, sk, d, seed=3)
    return Problem(query=q.to(dtype), key=k.to(dtype), value=v.to(dtype), scale=d**-0.5, **fields)


def everything(dtype: torch.dtype, sq: int = 150, sk: int = 210) -> Problem:
    """Every optional field at once, and some rows that see nothing."""
    b, hq, hk, d = 2, 4, 2, 32
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    angle = random(1, sk + 8, d // 4, seed=4, dtype=parameter)
    ids = torch.arange(sk) * 3 // sk
    hidden = random(1, 1, sq, sk, seed=5, dtype=parameter)
    bias = random(1, hq, sq, sk, seed=6, dtype=parameter).masked_fill(hidden > 1.5, float("-inf"))
    return plain(
        dtype,
        sq,
        sk,
        b=b,
        hq=hq,
        d=d,
        softcap=20.0,
        query_cos=angle.cos(),
        query_sin=angle.sin(),
        key_cos=angle.cos(),
        key_sin=angle.sin(),
        query_offsets=torch.tensor([sk - sq, 5]),
        window_left=120,
        window_right=40,
        key_lengths=torch.tensor([sk, sk - 17]),
        prefix_lengths=torch.tensor([60, 0]),
        query_ids=ids[None, :sq].contiguous(),
        key_ids=ids[None],
        dense_mask=random(b, 1, 1, sk, seed=7) > -1.0,
        slopes=random(1, hq, seed=8, dtype=parameter).abs() * 0.1,
        table=random(1, hq, 40, seed=9, dtype=parameter),
        table_left=25,
        dense_bias=bias,
        row_table=random(b, hq, sq, 12, seed=11, dtype=parameter) * 0.1,
        col_table=random(b, hk, 12, sk, seed=12, dtype=parameter) * 0.1,
        columns_left=5,
        sink=random(1, hq, seed=10, dtype=parameter),
        dropout_p=0.2,
        dropout_seed=torch.tensor([2**40 + 3, 7]),
    )


def native_run(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Gradients]:
    out, lse, statistics = torch.ops.fastattn.cpu_forward(*problem.arguments())
    names = [name for name in GRADIENT_FIELDS if getattr(problem, name) is not None]
    needs = sum(1 << bit for bit, name in enumerate(GRADIENT_FIELDS) if name in names)
    grads = torch.ops.fastattn.cpu_backward(grad_out, grad_lse, out, statistics, needs, *problem.arguments())
    return out, lse, {name: grads[GRADIENT_FIELDS.index(name)] for name in names}


def reference_run(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor, Gradients]:
    names = [name for name in GRADIENT_FIELDS if getattr(problem, name) is not None]
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in names}
    out, lse = reference.forward(dataclasses.replace(problem, **leaves))
    loss = (out.double() * grad_out.double()).sum()
    if grad_lse is not None:
        loss = loss + (lse.masked_fill(lse.isinf(), 0.0).double() * grad_lse.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return out.detach(), lse.detach(), dict(zip(names, grads, strict=True))


def widened(problem: Problem) -> Problem:
    def wide(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Problem(**{f.name: wide(getattr(problem, f.name)) for f in dataclasses.fields(problem)})


def assert_within_budget(name: str, got: Tensor, exact: Tensor, peer: Tensor, u: float, cancelled: float = 0.0) -> None:
    """|got - exact| <= 2 max|peer - exact| + roundings of the result, of its typical term and of terms that cancel,
    element by element."""
    size = exact.abs().nan_to_num(posinf=0.0)
    error = torch.where(exact.isinf() & (got.double() == exact), 0.0, (got.double() - exact).abs())
    budget = 2 * torch.where(peer.double() == exact, 0.0, (peer.double() - exact).abs()).max()
    if got.dtype == torch.float64:  # the oracle is no more exact than the kernels, with scores of up to some hundreds
        budget = 200 * u * (1 + size.max())
    allowed = budget + 2 * u * size + 8 * u * size.mean() + cancelled
    assert (error <= allowed).all(), f"{name}: error {error.max():.3g}, budget {budget:.3g}"


def operand_rounding(problem: Problem) -> float:
    """Of rotated queries and keys, and with AMX of the products of float16, whose operands are two bfloat16 numbers
    there: all of a float16, 16 bits of one that is rotated."""
    dtype = problem.query.dtype
    if dtype == torch.bfloat16 and problem.query_cos is not None:
        return torch.finfo(dtype).eps / 2
    if dtype == torch.float16 and native.cpu_info()["isa"] == "amx":
        return 2.0**-16
    return torch.finfo(problem.parameter_dtype).eps


def check(problem: Problem, one_key_a_row: bool = False) -> None:
    """Output, lse and every gradient of the native kernels against the oracle.

    Where a row gives one key all its weight, dS = dP - Delta is a difference of equal numbers.  The formula subtracts
    one number from itself; kernels that do not keep P compute each with roundings of its own, of the mass |dO| |V|.
    """
    dtype = problem.query.dtype
    u = torch.finfo(dtype).eps / 2
    sq, dv = problem.query_length, problem.value.shape[3]
    grad_out = random(problem.batch_size, problem.num_heads, sq, dv, seed=20, dtype=dtype)
    grad_lse = random(problem.batch_size, problem.num_heads, sq, seed=21, dtype=problem.parameter_dtype)
    out, lse, grads = native_run(problem, grad_out, grad_lse)
    exact_out, exact_lse, exact = reference_run(widened(problem), grad_out, grad_lse)
    peer_out, peer_lse, peer = reference_run(problem, grad_out, grad_lse)
    # q and k may be rounded to the operand type after rotation, P before the second product: one more rounding each
    rounding = 4 * u if dtype == torch.bfloat16 else u
    # the backward computes P a second time: S, the exponent and its exponential round again
    recomputed = 4 * torch.finfo(problem.parameter_dtype).eps
    assert_within_budget("out", out, exact_out, peer_out, rounding)
    assert_within_budget("lse", lse, exact_lse, peer_lse, 4 * operand_rounding(problem))
    cancelled = 0.0
    if one_key_a_row:
        value = problem.value.abs().repeat_interleave(problem.num_heads // problem.num_kv_heads, dim=1)
        mass = (grad_out.abs() @ value.mT).max()
        largest = max(problem.query.abs().max(), problem.key.abs().max())
        cancelled = 4 * u * problem.scale * float(mass * largest)
    check_gradients(problem, grads, exact, peer, 2 * rounding + recomputed, cancelled)


def check_gradients(
    problem: Problem, grads: Gradients, exact: Gradients, peer: Gradients, rounding: float, cancelled: float = 0.0
) -> None:
    u = torch.finfo(problem.query.dtype).eps / 2
    for name, grad in grads.items():
        assert grad.shape == getattr(problem, name).shape
        assert grad.dtype == getattr(problem, name).dtype
        if name in SHAPED:
            assert_within_budget(name, grad, exact[name], peer[name], rounding, 0.0 if name == "value" else cancelled)
        else:
            # sums of many terms that cancel: bounded by the unit roundoff of the inputs times the mass of |dS|
            mass = problem.query_length * problem.key_length * problem.num_heads
            mass *= problem.batch_size if grad.shape[0] == 1 else 1
            distance = problem.key_length if name == "slopes" else 1
            error = (grad.double() - exact[name]).abs().max()
            assert error <= 4 * u * distance * mass**0.5 + 2 * (peer[name].double() - exact[name]).abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_field_at_once(dtype: torch.dtype) -> None:
    check(everything(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])  # short queries take a tile in chunks if no head shares their keys
@pytest.mark.parametrize("every", [256, 24])
@pytest.mark.parametrize(("doublings", "queries"), [(5, 140), (40, 70), (-40, 70)])  # pieces of float32 need 128
def test_scores_that_grow_or_fall(doublings: int, queries: int, every: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Weights that double so often every 256 keys, or every 24: a row's reference moves never, or between and within
    tiles; that of every third row falls where the others' rise."""
    problem = plain(dtype, queries, 1700, b=1, hq=2, hk=kv_heads, window_right=900)
    problem.query[..., 0] = 4
    problem.query[..., ::3, 0] = -4
    step = doublings * math.log(2) / (4 * problem.scale)
    problem.key[..., 0] = (torch.arange(1700) // every % 7 * step).to(dtype)
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-900, 300, 900])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", ["slopes", "table", "large table", "both"])
def test_biases_of_tiles_on_either_side(name: str, kv_heads: int, offset: int, dtype: torch.dtype) -> None:
    """Whole tiles before the queries, after them, and beyond the reach of a table, whose ends are then all there is."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    fields: dict[str, object] = {}
    if name in ("slopes", "both"):
        fields["slopes"] = random(1, 2, seed=4, dtype=parameter) / 1000
    if name != "slopes":
        table = random(1, 2, 21, seed=5, dtype=parameter)
        if name == "large table":  # swallows the scores it is added to; float64 has no more exact oracle
            table[..., 0] = -3e38
            table[..., -1] = 1.0 if dtype == torch.float64 else 1e4
        fields |= {"table": table, "table_left": 8}
    check(plain(dtype, 70, 600, b=1, hq=2, hk=kv_heads, query_offset=offset, **fields))


ONE_FEATURE = {
    "dropout": lambda dtype: {"dropout_p": 0.3, "dropout_seed": torch.tensor([7, 1])},
    "softcap": lambda dtype: {"softcap": 2.0},
    "slopes": lambda dtype: {"slopes": random(1, 2, seed=4, dtype=dtype) / 100},
    "dense bias": lambda dtype: {"dense_bias": random(1, 2, 140, 256, seed=4, dtype=dtype)},
    "dense mask": lambda dtype: {"dense_mask": random(1, 1, 140, 256, seed=4) < 1},
    "ids": lambda dtype: {"query_ids": torch.zeros(1, 140, dtype=torch.int64), "key_ids": torch.arange(256)[None] % 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", ONE_FEATURE)
def test_one_feature_of_rows_that_see_whole_tiles(feature: str, dtype: torch.dtype) -> None:
    """No other one hides that a way made for plain rows would leave it out."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    check(plain(dtype, 140, 256, b=1, hq=2, hk=2, **ONE_FEATURE[feature](parameter)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-8])
def test_slopes_with_any_scale(scale: float, dtype: torch.dtype) -> None:
    """Slopes are divided by a scale that is large enough, and by no other."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = random(1, 2, seed=4, dtype=parameter) / 100
    check(dataclasses.replace(plain(dtype, 70, 150, b=1, hq=2, hk=1, slopes=slopes), scale=scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotated", [32, 64, 48])
def test_rotation_of_a_part_of_dense_rows(rotated: int, dtype: torch.dtype) -> None:
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    angle = random(1, 200, rotated // 2, seed=4, dtype=parameter)
    tables = {f"{of}_{kind}": getattr(angle, kind)() for of in ("query", "key") for kind in ("cos", "sin")}
    check(plain(dtype, 70, 150, d=64, query_offset=20, **tables))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 47, 48, 49, 63, 65, 191, 192, 193, 255, 256, 257, 385])
def test_borders_of_tiles(dtype: torch.dtype, length: int) -> None:
    check(plain(dtype, length, length + 1, b=1, hq=2, hk=1, d=24, window_right=0, query_offset=1))
    check(plain(dtype, 65, length, b=1, hq=1, hk=1, d=8))


@pytest.mark.parametrize("lengths", [(33, 50), (130, 150)], ids=str)  # from 64 and 128 on AMX computes in pieces
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 31, 32, 40, 64, 65, 128, 200])
def test_borders_of_head_dimensions(dim: int, lengths: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        problem = plain(dtype, *lengths, d=dim)
        check(dataclasses.replace(problem, value=random(2, 2, lengths[1], dim % 37 + 1, seed=3, dtype=dtype)))


ISA_SCRIPT = """
import sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from tests import test_cpu_backend as t, test_cpu_bad_numbers as n, test_precision as p
assert t.native.cpu_info()["isa"] == sys.argv[2], t.native.cpu_info()
for dtype in t.DTYPES:
    t.check(t.everything(dtype))
    t.check(t.plain(dtype, 70, 300, d=64, window_right=0, query_offset=230))
    t.check(t.plain(dtype, 3, 130, d=20, hq=6))
    t.check(t.plain(dtype, 1, 600, d=80, hq=6))
t.test_exponential_over_its_range()
for case in n.LEAKS:
    n.test_masked_rows_never_leak(torch.bfloat16, case, (70, 130, 40), False)
    n.test_masked_rows_never_leak(torch.bfloat16, case, (140, 200, 64), True)
for name in ("query", "key", "value"):
    n.test_bad_numbers_among_keys_that_everyone_sees(name, torch.float32)
for lengths in ((128, 32768), (32768, 128)):
    p.test_error_does_not_grow_with_length(lengths, "cpu", "cpu")
"""


def run_isolated(isa: str, script: str = ISA_SCRIPT) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "FASTATTN_CPU_ISA": isa, "PYTHONPATH": root}
    command = [sys.executable, "-c", script, root, isa]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_forced_instruction_set(isa: str) -> None:
    info = native.cpu_info()
    if isa not in info["supported"]:  # type: ignore[operator]
        pytest.skip(f"this processor has no {isa}" if isa in info["compiled"] else f"{isa} is not compiled in")  # type: ignore[operator]
    result = run_isolated(isa)
    assert result.returncode == 0, result.stderr[-3000:]


def test_unknown_instruction_set_is_an_error() -> None:
    script = "from tests import test_cpu_backend as t; t.plain; q = t.plain(t.torch.float32, 2, 2)\n"
    result = run_isolated("mmx", script + "t.torch.ops.fastattn.cpu_forward(*q.arguments())")
    assert result.returncode != 0
    assert "FASTATTN_CPU_ISA=mmx" in result.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_heads_of_a_strip(dtype: torch.dtype) -> None:
    """Short queries of several heads share strips if there are few threads; keys here lie beyond a table's reach."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    table = random(1, 8, 21, seed=5, dtype=parameter)
    problem = plain(dtype, 20, 700, b=1, hq=8, hk=1, window_right=0, query_offset=680, table=table, table_left=8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 8):
            torch.set_num_threads(threads)
            results.append(torch.ops.fastattn.cpu_forward(*problem.arguments()))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def same_bits_for_any_number_of_threads(problem: Problem) -> None:
    grad_out = random(*problem.query.shape[:3], problem.value.shape[3], seed=20, dtype=problem.query.dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(native_run(problem, grad_out, None))
    finally:
        torch.set_num_threads(before)
    for out, lse, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        for name, grad in grads.items():
            assert torch.equal(grad, results[0][2][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [210, 900])
def test_bits_do_not_depend_on_the_thread_count(dtype: torch.dtype, keys: int) -> None:
    same_bits_for_any_number_of_threads(everything(dtype, 150, keys))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 2)], ids=["one", "group", "two"])
@pytest.mark.parametrize("mask", ["causal", "window", "none"])
def test_gradients_of_queries_from_chunks_in_any_order(mask: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Under a causal mask the last chunks of keys have least to do and are there first; under a window most tiles of
    queries have something from one chunk alone, and the last ones from none."""
    fields = {"causal": {"window_right": 0}, "window": {"window_left": 200, "window_right": 0}, "none": {}}[mask]
    queries = 2300 if mask == "window" else 1900
    problem = plain(dtype, queries, 1900, b=1, hq=heads[0], hk=heads[1], d=16, **fields)
    check(problem)
    same_bits_for_any_number_of_threads(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ((300, 736), (237, 204, 126)),
        ((465, 1420), (179, 286, 74)),
        ((466, 821), (459, 286, 318)),
        ((1700, 2600), (237, 126, 700)),
    ],
)
def test_bits_of_a_window_do_not_depend_on_the_thread_count(
    dtype: torch.dtype, lengths: tuple[int, int], window: tuple[int, int, int]
) -> None:
    """Items of other rows begin at other keys, among them at such as are no whole operand away."""
    left, right, offset = window
    options = {"window_left": left, "window_right": right, "query_offset": offset}
    same_bits_for_any_number_of_threads(plain(dtype, *lengths, b=1, d=64, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_far_above_and_below_all_scores(dtype: torch.dtype) -> None:
    """Above by more than the exponents of float32 have room for, it is all that a row sees, and has lse's gradient."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    problem = plain(dtype, 70, 150, sink=torch.tensor([[300.0, 95.0, 60.0, -300.0]], dtype=parameter))
    check(problem)
    # scores whose exponentials overflow, and have no weight nevertheless
    problem = dataclasses.replace(problem, scale=40.0, sink=torch.full((1, 4), 1e5, dtype=parameter))
    for grad in native_run(problem, random(2, 4, 70, 32, seed=20, dtype=dtype), None)[2].values():
        assert (grad == 0).all()


STEEP = [2.0, 0.6, 0.3, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"window_right": 0, "query_offset": 1100},
        {"query_offset": 1420, "by": 0.125},  # the nearest keys are up to 300 away
        {"query_offset": 700, "window_left": 900, "window_right": 500, "sink": True},
        {"query_offset": -150, "lengths": (1400, 90)},
        {"hidden": 600, "by": 0.125},
    ],
    ids=["both sides", "causal", "after all keys", "window", "lengths", "mask"],
)
def test_keys_out_of_reach_of_a_slope(fields: dict, dtype: torch.dtype) -> None:
    """Weights there are zero: to pass over them changes nothing, whatever is nearest and however large q and k are."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    fields = dict(fields)
    fields["slopes"] = torch.tensor([STEEP], dtype=parameter) * fields.pop("by", 1.0)
    if fields.pop("sink", False):
        fields["sink"] = random(1, 4, seed=10, dtype=parameter)
    if lengths := fields.pop("lengths", None):
        fields["key_lengths"] = torch.tensor(lengths)
    if hidden := fields.pop("hidden", None):
        fields["dense_mask"] = (torch.arange(1400) >= hidden)[None, None, None]
    problem = plain(dtype, 300, 1400, hk=4, d=32, **fields)
    check(problem, one_key_a_row=True)
    far = problem.key.clone()
    far[:, :, 1390:] *= 200  # scores of some hundreds, which no distance here makes small enough
    problem = dataclasses.replace(problem, key=far)
    out, lse, _ = torch.ops.fastattn.cpu_forward(*problem.arguments())
    exact_out, exact_lse = reference.forward(widened(problem))
    half = torch.finfo(dtype).bits == 16
    torch.testing.assert_close(out.double(), exact_out, rtol=0, atol=0.02 if half else 2e-4)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-3 if half else 1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_slope_passes_over_is_the_same_for_any_number_of_threads(dtype: torch.dtype) -> None:
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.tensor([STEEP], dtype=parameter)
    for fields in ({}, {"window_left": 1000, "window_right": 700}):
        problem = plain(dtype, 1500, 1700, b=1, hk=4, slopes=slopes, query_offset=100, **fields)
        same_bits_for_any_number_of_threads(problem)


def test_exponential_over_its_range() -> None:
    """With keys (1, 0) and values (1, 0) the output is the logistic function of q: exp with nothing to hide it."""
    x = torch.linspace(-86.0, 30.0, 20001, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 5e-7), (torch.float64, 2e-15)):
        q = x.to(dtype)
        k = torch.tensor([1.0, 0.0], dtype=dtype)[None, None, :, None]
        problem = Problem(query=q[None, None, :, None], key=k, value=k, scale=1.0)
        out, lse, _statistics = torch.ops.fastattn.cpu_forward(*problem.arguments())
        exact = torch.sigmoid(q.double())
        # the logits themselves are rounded to u |x| in base 2
        allowed = tolerance + torch.finfo(dtype).eps * q.double().abs()
        # subnormal numbers, and subnormal pieces of a number (csrc/cpu/pieces.h), are zero
        slack = torch.finfo(dtype).tiny
        assert ((out.double().flatten() - exact).abs() <= allowed * exact + slack).all()
        exact_lse = torch.nn.functional.softplus(q.double(), threshold=100)
        assert ((lse.double().flatten() - exact_lse).abs() <= 2 * tolerance * (1 + exact_lse)).all()


def test_extreme_scores() -> None:
    """finfo.min is a number (a row of it is the average), -inf is a mask, and large logits do not overflow."""
    low = torch.finfo(torch.float32).min
    problem = plain(torch.float32, 4, 50, b=1, hq=1, hk=1)
    bias = torch.zeros(1, 1, 4, 50)
    bias[:, :, 0], bias[:, :, 1], bias[:, :, 2, 7] = low, float("-inf"), 3e38
    out, lse, _statistics = torch.ops.fastattn.cpu_forward(*dataclasses.replace(problem, dense_bias=bias).arguments())
    torch.testing.assert_close(out[0, 0, 0], problem.value[0, 0].mean(dim=0), rtol=1e-5, atol=1e-6)
    assert (out[0, 0, 1] == 0).all()
    assert lse[0, 0, 1] == float("inf")
    torch.testing.assert_close(out[0, 0, 2], problem.value[0, 0, 7])
    check(dataclasses.replace(problem, scale=60.0), one_key_a_row=True)


def test_memory_order_follows_the_query() -> None:
    q = random(2, 30, 4, 16, seed=1).transpose(1, 2)
    k = random(2, 4, 30, 16, seed=2)
    problem = Problem(query=q, key=k, value=k, scale=0.25)
    out, lse, grads = native_run(problem, torch.ones(2, 4, 30, 16), None)
    assert out.stride() == grads["query"].stride() == q.stride()
    assert grads["key"].is_contiguous()
    assert lse.is_contiguous()


def test_strided_and_broadcast_views() -> None:
    wide = random(2, 40, 3, 5, 24, seed=1)  # (B, S, qkv, H, D), as a fused projection leaves it
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    shared = random(1, 1, 40, 24, seed=2).expand(2, 5, 40, 24)
    column = random(2, 5, 40, 1, seed=3).expand(2, 5, 40, 40)
    flipped = random(40, 40, seed=4).t()[None, None]
    for key, bias in ((k, column), (shared, flipped), (k, column[..., ::2].repeat_interleave(2, -1))):
        problem = Problem(query=q, key=key, value=v, scale=0.2, dense_bias=bias)
        check(problem)
        dense = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
        dense = {n: x.contiguous() if isinstance(x, Tensor) else x for n, x in dense.items()}
        grad_out = torch.ones(2, 5, 40, 24)
        for a, b in zip(
            native_run(problem, grad_out, None)[:2], native_run(Problem(**dense), grad_out, None)[:2], strict=True
        ):
            assert torch.equal(a, b)


def test_strides_past_32_bits() -> None:
    # 8 GiB of addresses, of which a handful of pages are ever touched
    base = torch.empty(2**32 + 4096, dtype=torch.float16)
    far = [base.as_strided((1, 2, 9, 16), (0, 2**31 + 512 * n, 16, 1), 1024 * n) for n in range(3)]
    near = [random(1, 2, 9, 16, seed=n, dtype=torch.float16) for n in range(3)]
    for a, b in zip(far, near, strict=True):
        a.copy_(b)
    grad_out = torch.ones(1, 2, 9, 16, dtype=torch.float16)
    runs = [native_run(Problem(query=q, key=k, value=v, scale=0.2), grad_out, None) for q, k, v in (far, near)]
    assert torch.equal(runs[0][0], runs[1][0])
    for name in SHAPED:
        assert torch.equal(runs[0][2][name], runs[1][2][name])


@pytest.mark.parametrize("value", [-(2**63), -(2**40), -1, 10**6, 2**62, 2**63 - 1])
def test_values_out_of_range_are_clamped(value: int) -> None:
    """Lengths, offsets and windows are data: no value of theirs reads outside a tensor."""
    q = plain(torch.float32, 20, 30, window_left=3, window_right=2)
    angle = random(1, 7, 8, seed=1)
    rotary = {"query_cos": angle.cos(), "query_sin": angle.sin(), "key_cos": angle.cos(), "key_sin": angle.sin()}
    slopes, table = random(1, 4, seed=2), random(1, 4, 9, seed=3)
    extreme = torch.tensor([value])
    for fields in (
        {"query_offsets": extreme, **rotary, "slopes": slopes * 0, "table": table},
        {"query_offset": value, **rotary, "table": table, "table_left": value},
        {"key_lengths": extreme},
        {"prefix_lengths": extreme},
        {"window_left": max(value, -1), "window_right": max(value, -1)},
    ):
        problem = dataclasses.replace(q, **fields)
        out, _, grads = native_run(problem, torch.ones_like(q.query), None)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in grads.values())
    empty, *_ = torch.ops.fastattn.cpu_forward(*dataclasses.replace(q, key_lengths=torch.tensor([-5])).arguments())
    full, *_ = torch.ops.fastattn.cpu_forward(*dataclasses.replace(q, key_lengths=torch.tensor([2**62])).arguments())
    assert (empty == 0).all()
    assert torch.equal(full, torch.ops.fastattn.cpu_forward(*q.arguments())[0])


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
def test_empty_dimensions(shape: tuple[int, int, int, int]) -> None:
    b, h, sq, sk = shape
    problem = plain(torch.float32, sq, sk, b=b, hq=h, hk=h, slopes=random(1, h, seed=1), sink=random(1, h, seed=2))
    out, lse, grads = native_run(problem, torch.ones(b, h, sq, 32), torch.ones(b, h, sq))
    assert out.shape == (b, h, sq, 32)
    assert (out == 0).all()
    if sk == 0 and out.numel():
        assert torch.equal(lse, problem.sink[..., None].expand_as(lse))  # type: ignore[index]
        torch.testing.assert_close(grads["sink"], torch.full((1, h), float(b * sq)))
    assert all((grads[name] == 0).all() for name in (*SHAPED, "slopes"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 70])
def test_padding_is_a_mask_like_any_other(dtype: torch.dtype, queries: int) -> None:
    """A mask of keys alone ends the keys at its last visible one: the same bits as the same mask written out."""
    lengths = torch.tensor([300, 129, 0])
    padding = (torch.arange(300) < lengths[:, None])[:, None, None, :]
    padding[0, ..., 7] = False
    problem = plain(dtype, queries, 300, b=3, d=40, dense_mask=padding)
    problem.key[1, :, 129:] = float("nan")
    problem.value[1, :, 129:] = float("nan")
    grad_out = random(3, 4, queries, 40, seed=20, dtype=dtype)
    out, lse, grads = native_run(problem, grad_out, None)
    written_out = dataclasses.replace(problem, dense_mask=padding.expand(3, 4, queries, 300).contiguous())
    expected_out, expected_lse, expected = native_run(written_out, grad_out, None)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    for name, grad in grads.items():
        assert torch.equal(grad, expected[name]), name
    exact, _ = reference.forward(widened(problem))
    torch.testing.assert_close(out.double(), exact, atol=3e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def bands(problem: Problem, left: int, right: int) -> Tensor:
    """(Sq, Sk): what a window of keys lets each query see, written out."""
    rows, keys = torch.arange(problem.query_length), torch.arange(problem.key_length)
    distance = keys - (rows[:, None] + problem.query_offset)
    return (distance >= -left) & (distance <= right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "full"])
@pytest.mark.parametrize("queries", [2, 300], ids=["decode", "tiles"])
def test_a_window_written_out_is_the_window(queries: int, layout: str, dtype: torch.dtype) -> None:
    """What a dense mask hides before and after all that some queries see is passed over.  The same bits, but with tile
    registers, where the weights of a window's whole tiles are made in another way."""
    problem = plain(dtype, queries, 2300, d=40, query_offset=1700 if queries > 2 else 2100)
    left, right = 1033, 70  # narrower ones have tiles of another width
    dense = bands(problem, left, right)
    if layout == "columns":
        dense = dense.t().contiguous().t()
    dense = dense.repeat(2, 4, 1, 1) if layout == "full" else dense[None, None]
    written_out = dataclasses.replace(problem, dense_mask=dense)
    window = dataclasses.replace(problem, window_left=left, window_right=right)
    check(written_out)
    if native.cpu_info()["isa"] != "amx":
        grad_out = random(2, 4, queries, 40, seed=20, dtype=dtype)
        out, lse, grads = native_run(written_out, grad_out, None)
        expected_out, expected_lse, expected = native_run(window, grad_out, None)
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)
        for name, grad in grads.items():
            assert torch.equal(grad, expected[name]), name
    same_bits_for_any_number_of_threads(written_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["mask", "mask with a hole", *(f"bias {str(t)[6:]}" for t in DTYPES)])
@pytest.mark.parametrize(
    ("heads", "queries"), [((4, 2), 150), ((8, 1), 20), ((4, 1), 1)], ids=["tiles", "shared", "one"]
)
def test_edges_of_dense_masks(heads: tuple[int, int], queries: int, kind: str, dtype: torch.dtype) -> None:
    """Every query of every head has keys of its own that it sees, some one alone or none; strips see their union."""
    hq, hk = heads
    problem = plain(dtype, queries, 1100, hq=hq, hk=hk, softcap=15.0)
    edges = torch.randint(0, 1101, (2, 2, hq, queries, 1), generator=torch.Generator().manual_seed(7))
    edges[..., ::7, :] = edges[:1, ..., ::7, :]  # nothing
    edges[1, ..., 1::7, :] = edges[0, ..., 1::7, :] + 1  # one key, or none after the last
    keys = torch.arange(1100)
    seen = (keys >= edges.amin(0)) & (keys < edges.amax(0))
    if kind.startswith("mask"):
        if kind != "mask":  # not all rows are intervals any more
            row = seen.view(-1, 1100)[seen.sum(-1).argmax()]
            row[row.nonzero()[1:2]] = False
        check(dataclasses.replace(problem, dense_mask=seen), one_key_a_row=True)
    else:
        stored = getattr(torch, kind[5:])
        bias = random(2, hq, queries, 1100, seed=8, dtype=stored).masked_fill(~seen, -math.inf)
        check(dataclasses.replace(problem, dense_bias=bias), one_key_a_row=True)


def test_only_the_gradients_asked_for() -> None:
    problem = everything(torch.float32)
    grad_out = random(2, 4, 150, 32, seed=20)
    out, _, every = native_run(problem, grad_out, None)
    _, _, statistics = torch.ops.fastattn.cpu_forward(*problem.arguments())
    for bit, name in enumerate(GRADIENT_FIELDS):
        grads = torch.ops.fastattn.cpu_backward(grad_out, None, out, statistics, 1 << bit, *problem.arguments())
        assert [grad.numel() == 0 for grad in grads] == [other != name for other in GRADIENT_FIELDS]
        assert torch.equal(grads[bit], every[name])


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 33, 47), (1, 4, 33, 47), (2, 1, 33, 47), (1, 1, 33, 47), (1, 1, 1, 47), (2, 4, 33, 1), (1, 1, 1, 1)],
)
def test_gradient_of_a_broadcast_bias(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(plain(dtype, 33, 47, dense_bias=random(*shape, seed=40, dtype=dtype)))


@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "masks"),
    [
        (70, 9, 11, {}),  # two batch elements to a group
        (70, 9, 11, {"window_right": 0}),
        (37, 33, 70, {"key_lengths": torch.arange(37) * 2}),
        (3, 140, 1100, {"window_left": 700, "window_right": 30, "query_offset": 900}),  # chunks of the keys
        (1, 140, 600, {}),
    ],
    ids=str,
)
def test_gradient_of_a_bias_shared_by_the_batch(
    batch: int, queries: int, keys: int, masks: dict[str, object], heads: int
) -> None:
    """Groups of batch elements are summed where dS is: the formula's, and the same bits on any number of threads."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bias = random(1, heads, queries, keys, seed=40, dtype=dtype) / 4
        problem = plain(dtype, queries, keys, b=batch, d=16, dense_bias=bias, **masks)
        check(problem)
        grad_out = random(batch, 4, queries, 16, seed=20, dtype=dtype)
        out, _, statistics = torch.ops.fastattn.cpu_forward(*problem.arguments())
        before, results = torch.get_num_threads(), []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(
                torch.ops.fastattn.cpu_backward(grad_out, None, out, statistics, 0b100111, *problem.arguments())
            )
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))
        alone = torch.ops.fastattn.cpu_backward(grad_out, None, out, statistics, 0b100000, *problem.arguments())
        assert torch.equal(alone[5], results[0][5])


def test_malformed_arguments_are_refused() -> None:
    good = plain(torch.float32, 5, 6)
    for fields in (
        {"key": good.key[..., :-1]},
        {"value": good.value.double()},
        {"query": good.query.transpose(2, 3)},
        {"key": good.key[:, :1].expand(-1, 3, -1, -1)},
        {"slopes": torch.ones(1, 4, dtype=torch.float64)},
        {"table": torch.ones(1, 4, 0)},
        {"dense_mask": torch.ones(1, 1, 5, 7, dtype=torch.bool)},
        {"query_ids": torch.zeros(1, 5, dtype=torch.int64)},
        {"key_lengths": torch.ones(2, dtype=torch.int32)},
    ):
        with pytest.raises(RuntimeError, match="fastattn"):
            torch.ops.fastattn.cpu_forward(*dataclasses.replace(good, **fields).arguments())


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_library_has_no_python_symbol() -> None:
    command = ["nm", "-D", "--undefined-only", str(native.library_path)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " Py" not in symbols
    assert "_Py" not in symbols

"""Attention that gives its weights, on CPUs: output, weights and the gradients of both against the oracle."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import native, reference
from fastattn.philox import keep_mask
from fastattn.problem import GRADIENT_FIELDS, Problem
from tests.test_cpu_backend import (
    DTYPES,
    SHAPED,
    Gradients,
    assert_within_budget,
    check_gradients,
    everything,
    operand_rounding,
    plain,
    random,
    run_isolated,
    widened,
)

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))

Results = tuple[Tensor, Tensor, Tensor, Gradients]


def names_of(problem: Problem) -> list[str]:
    return [name for name in GRADIENT_FIELDS if getattr(problem, name) is not None]


def gradients_of(problem: Problem, average: bool) -> tuple[Tensor, Tensor]:
    """Random gradients of the output and of the weights."""
    b, h, sq, sk = problem.batch_size, problem.num_heads, problem.query_length, problem.key_length
    grad_out = random(b, h, sq, problem.value.shape[3], seed=20, dtype=problem.dtype)
    return grad_out, random(b, 1 if average else h, sq, sk, seed=21, dtype=problem.dtype)


def native_run(problem: Problem, average: bool, leading: int, grad_out: Tensor, grad_weights: Tensor) -> Results:
    args = problem.arguments()
    out, lse, statistics, weights = torch.ops.fastattn.cpu_weights_forward(average, leading, *args)
    names = names_of(problem)
    needs = sum(1 << bit for bit, name in enumerate(GRADIENT_FIELDS) if name in names)
    grads = torch.ops.fastattn.cpu_weights_backward(
        grad_out, grad_weights, out, statistics, needs, average, leading, *args
    )  # fmt: skip
    return out, lse, weights, {name: grads[GRADIENT_FIELDS.index(name)] for name in names}


def reference_weights(problem: Problem, average: bool, leading: int) -> Tensor:
    dtype = problem.parameter_dtype
    p, _, masked = reference.weights(problem, dtype, reference.products(problem, dtype))
    p = p.masked_fill(masked, 0.0)
    if problem.dropout_p > 0:
        assert problem.dropout_seed is not None
        heads = torch.arange(problem.batch_size * problem.num_heads)
        rows = torch.arange(problem.query_length)
        kept = keep_mask(problem.dropout_seed, problem.dropout_p, heads, rows, range(problem.key_length))
        p = p * kept.view(p.shape) / (1.0 - problem.dropout_p)
    p = torch.cat((p[..., leading:], p[..., :leading]), dim=-1)
    return (p.mean(1, keepdim=True) if average else p).to(problem.dtype)


def reference_run(problem: Problem, average: bool, leading: int, grad_out: Tensor, grad_weights: Tensor) -> Results:
    leaves = {name: getattr(problem, name).detach().clone().requires_grad_() for name in names_of(problem)}
    problem = dataclasses.replace(problem, **leaves)
    out, lse = reference.forward(problem)
    weights = reference_weights(problem, average, leading)
    loss = (out.double() * grad_out.double()).sum() + (weights.double() * grad_weights.double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), grads, strict=True)]
    return out.detach(), lse.detach(), weights.detach(), dict(zip(leaves, filled, strict=True))


def check(problem: Problem, average: bool, leading: int = 0) -> None:
    dtype = problem.dtype
    u = torch.finfo(dtype).eps / 2
    grads = gradients_of(problem, average)
    out, lse, weights, got = native_run(problem, average, leading, *grads)
    exact_out, exact_lse, exact_weights, exact = reference_run(widened(problem), average, leading, *grads)
    peer_out, peer_lse, peer_weights, peer = reference_run(problem, average, leading, *grads)
    # the roundings that tests/test_cpu_backend.py grants attention
    rounding = 4 * u if dtype == torch.bfloat16 else u
    recomputed = 4 * torch.finfo(problem.parameter_dtype).eps
    assert_within_budget("out", out, exact_out, peer_out, rounding)
    lse_rounding = u if dtype == torch.bfloat16 else operand_rounding(problem)
    assert_within_budget("lse", lse, exact_lse, peer_lse, 4 * lse_rounding)
    assert_within_budget("weights", weights, exact_weights, peer_weights, rounding + recomputed)
    check_gradients(problem, got, exact, peer, 2 * rounding + recomputed)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_field_at_once(dtype: torch.dtype, average: bool) -> None:
    check(everything(dtype), average)
    check(everything(dtype), average, leading=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 11, 12, 13, 31, 32, 33, 47, 49, 63, 65, 193, 257, 385])
def test_borders_of_strips_and_blocks(dtype: torch.dtype, length: int) -> None:
    check(plain(dtype, length, length + 1, b=1, hq=2, hk=1, d=24, window_right=0, query_offset=1), average=True)
    if length > 1:
        check(plain(dtype, 65, length, b=1, hq=1, hk=1, d=8), average=False, leading=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype: torch.dtype) -> None:
    """Its weight is 1, and a gradient that is 0 in exact arithmetic is a rounding of the terms that cancel."""
    problem = plain(dtype, 65, 1, b=1, hq=2, hk=1, d=8)
    grad_out, grad_weights = gradients_of(problem, False)
    out, _, weights, grads = native_run(problem, False, 0, grad_out, grad_weights)
    u = torch.finfo(problem.parameter_dtype).eps
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=4 * u, rtol=0)
    torch.testing.assert_close(out, problem.value.expand_as(out), atol=4 * u, rtol=4 * u)
    terms = (grad_out.double() @ problem.value.double().transpose(-2, -1) + grad_weights.double()).abs().max()
    assert grads["query"].abs().max() <= 4 * u * terms * problem.key.abs().max()


@pytest.mark.parametrize("dim", [1, 7, 16, 40, 65, 128])
def test_borders_of_head_dimensions(dim: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        problem = plain(dtype, 33, 50, d=dim)
        check(dataclasses.replace(problem, value=random(2, 2, 50, dim % 37 + 1, seed=3, dtype=dtype)), average=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [30, 900])
def test_output_is_that_of_attention_alone(dtype: torch.dtype, keys: int) -> None:
    """Within one tile of keys to the bit; and without values there are the same weights."""
    problem = plain(dtype, 70, keys, d=32, dropout_p=0.3, dropout_seed=torch.tensor([3, 4]))
    out, lse, _ = torch.ops.fastattn.cpu_forward(*problem.arguments())
    got, got_lse, _, weights = torch.ops.fastattn.cpu_weights_forward(True, 0, *problem.arguments())
    if keys == 30:
        assert torch.equal(got, out)
        assert torch.equal(got_lse, lse)
    else:
        u = torch.finfo(dtype).eps
        torch.testing.assert_close(got, out, atol=4 * u, rtol=4 * u)
    without = dataclasses.replace(problem, value=problem.value[..., :0])
    nothing, _, _, alone = torch.ops.fastattn.cpu_weights_forward(True, 0, *without.arguments())
    assert nothing.shape == (2, 4, 70, 0)
    assert torch.equal(alone, weights)


def test_blocks_of_many_batch_elements() -> None:
    """Operands are packed for some batch elements at a time; the bound on that memory cuts this batch into three."""
    problem = plain(torch.float32, 150, 2100, b=5, hq=8, hk=8, d=64)
    out, _, _, weights = torch.ops.fastattn.cpu_weights_forward(True, 0, *problem.arguments())
    for b in (0, 1, 4):
        one = dataclasses.replace(problem, **{name: getattr(problem, name)[b : b + 1] for name in SHAPED})
        alone = torch.ops.fastattn.cpu_weights_forward(True, 0, *one.arguments())
        assert torch.equal(alone[0][0], out[b])
        assert torch.equal(alone[3][0], weights[b])
    exact = reference_weights(widened(problem), True, 0)
    torch.testing.assert_close(weights.double(), exact, atol=1e-7, rtol=1e-5)


ISA_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from tests import test_cpu_weights as t
assert t.native.cpu_info()["isa"] == sys.argv[2], t.native.cpu_info()
for dtype in t.DTYPES:
    for average in (True, False):
        t.check(t.everything(dtype), average, leading=1)
        t.check(t.plain(dtype, 130, 300, d=64, window_right=0, query_offset=170), average)
    t.check(t.plain(dtype, 3, 130, d=20, hq=6), True)
for dtype in (torch.float32, torch.bfloat16):
    for case in t.LEAKS:
        t.test_masked_rows_never_leak(dtype, case, True)
    t.test_visible_rows_propagate(dtype, "key")
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_forced_instruction_set(isa: str) -> None:
    info = native.cpu_info()
    if isa not in info["supported"]:  # type: ignore[operator]
        pytest.skip(f"this processor has no {isa}" if isa in info["compiled"] else f"{isa} is not compiled in")  # type: ignore[operator]
    result = run_isolated(isa, ISA_SCRIPT)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_the_thread_count(dtype: torch.dtype, average: bool) -> None:
    problem = everything(dtype, 150, 600)
    grads = gradients_of(problem, average)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(native_run(problem, average, 1, *grads))
    finally:
        torch.set_num_threads(before)
    for *tensors, got in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0], strict=False))
        for name, grad in got.items():
            assert torch.equal(grad, results[0][3][name]), name


LEAKS = ("key", "value", "query", "grad_out", "grad_weights", "dense_bias")


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", LEAKS)
def test_masked_rows_never_leak(dtype: torch.dtype, where: str, average: bool) -> None:
    """NaN and infinity in places nobody sees change no bit of anything that is seen; weights there are 0."""
    sq, sk = 70, 130
    visible = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    visible[..., 100] = visible[..., 3] = False
    visible[:, :, 11] = visible[:, :, 64] = False
    bias = random(1, 1, sq, sk, seed=30)
    problem = plain(dtype, sq, sk, d=40, dense_mask=visible, dense_bias=bias)
    grad_out, grad_weights = gradients_of(problem, average)
    clean = native_run(problem, average, 0, grad_out, grad_weights)
    assert (clean[2].masked_select(~visible) == 0).all()
    poisoned = {name: getattr(problem, name).clone() for name in ("query", "key", "value", "dense_bias")}
    poisoned["grad_out"], poisoned["grad_weights"] = grad_out.clone(), grad_weights.clone()
    if where in ("key", "value"):
        poisoned[where][:, :, 100, 5], poisoned[where][:, :, 3] = float("nan"), float("inf")
    elif where in ("dense_bias", "grad_weights"):
        poisoned[where][..., 100], poisoned[where][..., 3] = float("nan"), float("inf")
        poisoned[where][:, :, 11] = float("nan")
    else:
        poisoned[where][:, :, 11], poisoned[where][:, :, 64, 0] = float("nan"), float("-inf")
    grads = poisoned.pop("grad_out"), poisoned.pop("grad_weights")
    *got, gradients = native_run(dataclasses.replace(problem, **poisoned), average, 0, *grads)
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=False))
    for name, grad in gradients.items():
        assert torch.equal(grad, clean[3][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("field", ["key", "query", "value"])
def test_visible_rows_propagate(dtype: torch.dtype, field: str) -> None:
    """A NaN makes the weights of the rows that see it NaN, where they see anything, and no others."""
    problem = plain(dtype, 40, 40, window_right=0)
    tensor = getattr(problem, field).clone()
    tensor[:, :, 25, 2] = float("nan")
    args = dataclasses.replace(problem, **{field: tensor}).arguments()
    for average in (True, False):
        out, _, _, weights = torch.ops.fastattn.cpu_weights_forward(average, 0, *args)
        rows = torch.arange(40)
        touched = rows == 25 if field == "query" else rows >= 25
        assert torch.equal(out.isnan().any(dim=-1), touched.expand(2, 4, 40))
        seen = rows <= rows[:, None]
        expected = seen & touched[:, None] & torch.tensor(field != "value")
        assert torch.equal(weights.isnan(), expected.expand_as(weights))
        assert (weights.masked_select(~seen) == 0).all()


def test_infinite_scores() -> None:
    """A row of +inf has no weights, a row of -inf is masked, a row of finfo.min is the average."""
    problem = plain(torch.float32, 4, 50, b=1, hq=1, hk=1)
    bias = torch.zeros(1, 1, 4, 50)
    bias[:, :, 0], bias[:, :, 1], bias[:, :, 2, 7] = torch.finfo(torch.float32).min, float("-inf"), float("inf")
    args = dataclasses.replace(problem, dense_bias=bias).arguments()
    for average in (True, False):
        weights = torch.ops.fastattn.cpu_weights_forward(average, 0, *args)[3][0, 0]
        torch.testing.assert_close(weights[0], torch.full((50,), 0.02))
        assert (weights[1] == 0).all()
        assert weights[2].isnan().all()
        torch.testing.assert_close(weights[3].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)])
@pytest.mark.parametrize("average", [True, False])
def test_empty_dimensions(shape: tuple[int, int, int, int], average: bool) -> None:
    b, h, sq, sk = shape
    problem = plain(torch.float32, sq, sk, b=b, hq=h, hk=h)
    out, lse, weights, grads = native_run(problem, average, 0, *gradients_of(problem, average))
    assert weights.shape == (b, 1 if average else h, sq, sk)
    assert (out == 0).all()
    assert (lse == float("inf")).all()
    assert all((grad == 0).all() for grad in grads.values())


def test_expanded_gradients() -> None:
    """As .sum() gives them: without memory of their own."""
    problem = plain(torch.float32, 40, 300)
    grad_out, _ = gradients_of(problem, True)
    flat = torch.ones(1).expand(2, 1, 40, 300)
    *_, got = native_run(problem, True, 3, grad_out, flat)
    *_, expected = native_run(problem, True, 3, grad_out, flat.contiguous())
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("average", [True, False])
def test_opcheck(average: bool) -> None:
    for layout in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        problem = everything(torch.float32, 5, 7)
        problem = dataclasses.replace(problem, **{name: layout(getattr(problem, name)) for name in SHAPED})
        args = (average, 1, *problem.arguments())
        torch.library.opcheck(torch.ops.fastattn.cpu_weights_forward.default, args)
        out, _, statistics, _ = torch.ops.fastattn.cpu_weights_forward(*args)
        needs = sum(1 << bit for bit, name in enumerate(GRADIENT_FIELDS) if getattr(problem, name) is not None)
        grads = gradients_of(problem, average)
        torch.library.opcheck(
            torch.ops.fastattn.cpu_weights_backward.default, (*grads, out, statistics, needs, *args)
        )  # fmt: skip


def test_malformed_arguments_are_refused() -> None:
    problem = plain(torch.float32, 5, 6)
    args = problem.arguments()
    forward, backward = torch.ops.fastattn.cpu_weights_forward, torch.ops.fastattn.cpu_weights_backward
    for leading in (-1, 7):
        with pytest.raises(RuntimeError, match="fastattn: leading must be a number of keys"):
            forward(True, leading, *args)
    with pytest.raises(RuntimeError, match="fastattn: value has the wrong dtype"):
        forward(True, 0, *dataclasses.replace(problem, value=problem.value.double()).arguments())
    out, _, statistics, weights = forward(False, 0, *args)
    for wrong, message in (
        (weights.double(), "grad_weights has the wrong dtype"),
        (weights[:, :1], "grad_weights has size 1 in dimension 1, expected 4"),
        (weights[..., :-1], "grad_weights has size 5 in dimension 3, expected 6"),
        (weights[0], "grad_weights must have 4 dimensions"),
    ):
        with pytest.raises(RuntimeError, match=f"fastattn: {message}"):
            backward(out, wrong, out, statistics, 7, False, 0, *args)


MEMORY_SCRIPT = """
import json, resource, sys, torch
sys.path.insert(0, sys.argv[1])
from tests import test_cpu_weights as t
problem = t.plain(torch.float32, 2048, 2048, b=1, hq=32, hk=32, d=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = torch.ops.fastattn.cpu_weights_forward(True, 0, *problem.arguments())[3]
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


def test_averages_are_made_without_the_weights_of_the_heads() -> None:
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", MEMORY_SCRIPT, root]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    result = 4 * 2048 * 2048
    # the weights, the packed operands, output and statistics; all heads would be 32 times the result
    assert json.loads(run.stdout) < 5 * result

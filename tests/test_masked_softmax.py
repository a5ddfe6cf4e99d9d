"""`masked_softmax`: every mask and bias against the formula, gradients, what may not leak, and what must be refused."""

# A row of the table of bad input is a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from features import BIASES, MASKS, Shape
from hypothesis import given
from hypothesis import strategies as st
from softmax_oracle import SoftmaxCall, check
from torch import Tensor

import fastattn
from fastattn import native, ops
from fastattn.softmax_problem import SOFTMAX_FIELDS, SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED = [
    pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=b.reason)])
    for b in fastattn.backends()
    if b.name in ops.FUSED_BACKENDS
]
TINY = Shape(batch=2, heads=2, query_length=3, key_length=5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [*MASKS, *BIASES])
def test_feature(feature: str, dtype: torch.dtype, backend: str, device: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend has no float64")
    check(SoftmaxCall((feature,), dtype=dtype), backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 31, 129, 1000, 17000])
def test_row_length(length: int, dtype: torch.dtype, backend: str, device: str) -> None:
    shape = Shape(batch=1, heads=2, query_length=3, key_length=length)
    check(SoftmaxCall((), shape, dtype), backend, device)
    check(SoftmaxCall(("causal", "alibi", "table"), shape, dtype, scale=0.3), backend, device)


@given(data=st.data())
def test_composition(data: st.DataObject) -> None:
    """Any masks and biases together, at any shape, offset and scale."""
    names = (*data.draw(st.permutations(MASKS), "masks")[: data.draw(st.integers(0, 3))],)
    names += (*data.draw(st.permutations(BIASES), "biases")[: data.draw(st.integers(0, 3))],)
    shape = Shape(
        batch=data.draw(st.integers(1, 3)),
        heads=data.draw(st.integers(1, 3)),
        query_length=data.draw(st.integers(1, 20)),
        key_length=data.draw(st.integers(1, 40)),
    )
    offset = data.draw(st.one_of(st.none(), st.integers(-25, 45), st.just("tensor")))
    if offset == "tensor":
        offset = torch.randint(-9, 30, (shape.batch,))
    scale = data.draw(st.sampled_from([1.0, 0.25, -1.5, 0.0]))
    call = SoftmaxCall(names, shape, data.draw(st.sampled_from(DTYPES)), offset=offset, scale=scale)
    for backend in fastattn.backends():
        if backend.available and backend.name != "triton":
            check(call, backend.name)


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty(size: tuple[int, ...], backend: str, device: str) -> None:
    """Empty in, empty out; the parameters still have a gradient, of zeros."""
    scores = torch.randn(size, device=device, requires_grad=True)
    table, slopes = torch.randn(size[1], 5, device=device), torch.randn(size[1], device=device)
    shared = torch.randn(1, size[1], 1, 1, device=device)
    leaves = [table.requires_grad_(), slopes.requires_grad_(), shared.requires_grad_()]
    bias = fastattn.DistanceTable(table) + fastattn.ALiBi(slopes) + fastattn.DenseBias(shared)
    out = fastattn.masked_softmax(scores, mask=fastattn.Causal(), bias=bias, backend=backend)
    assert out.shape == size
    out.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda x: torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced out of NaN": lambda x: torch.nn.functional.pad(x, (3, 5, 2, 1), value=math.nan)[..., 2:-1, 3:-5],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, backend: str, device: str) -> None:
    call = SoftmaxCall(("window", "table", "dense_full"), Shape(query_length=6, key_length=37))
    strided = LAYOUTS[layout](call.leaves["scores"].to(device))
    keywords = call.keywords({name: t.to(device) for name, t in call.leaves.items()})

    def run(scores: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores.detach().requires_grad_()
        out = fastattn.masked_softmax(scores, **keywords, backend=backend)
        return out.detach(), torch.autograd.grad(out, scores, grad)[0]

    grad = LAYOUTS[layout](call.grad_out.to(device))
    for ours, plain in zip(run(strided, grad), run(strided.contiguous(), grad.contiguous()), strict=True):
        assert torch.equal(ours, plain)


def test_broadcast_gradient(backend: str, device: str) -> None:
    """The gradient of a sum is an expanded scalar; that of the row sums, which are constant, is zero."""
    scores = torch.randn(2, 3, 4, 50, device=device, requires_grad=True)
    out = fastattn.masked_softmax(scores, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), scores)
    assert grad.abs().max() < 1e-7


# -- what stands at masked places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "features", [("causal",), ("window", "alibi"), ("bool_full",), ("documents", "table"), ("key_lengths", "dense_full")],
    ids="+".join,
)  # fmt: skip
def test_nothing_at_masked_places_is_seen(features: tuple[str, ...], value: float, backend: str, device: str) -> None:
    """Scores, full-sized biases and incoming gradients may hold anything where they are masked: no bit changes."""
    clean, dirty = SoftmaxCall(features), SoftmaxCall(features)
    masked = ~clean.visible()
    assert masked.any() and not masked.all()
    for name in ("scores", "dense_full"):
        if name in clean.leaves:
            clean.leaves[name] = clean.leaves[name].masked_fill(masked, 0.0)
            dirty.leaves[name] = dirty.leaves[name].masked_fill(masked, value)
    clean.grad_out, dirty.grad_out = clean.grad_out.masked_fill(masked, 0.0), dirty.grad_out.masked_fill(masked, value)
    (out, grads), (dirty_out, dirty_grads) = clean.fused(backend, device), dirty.fused(backend, device)
    assert torch.equal(out, dirty_out)
    for name, grad in grads.items():
        assert torch.equal(grad, dirty_grads[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("length", [5, 40])
def test_a_row_that_sees_no_number(value: float, length: int, backend: str, device: str) -> None:
    """It is NaN where it is visible, 0 where it is masked, and alone in that."""
    scores = torch.randn(1, 2, 4, length, device=device)
    scores[0, 1, 2, 1] = value
    seen = torch.ones(1, 1, 1, length, dtype=torch.bool, device=device)
    seen[..., 3] = False
    out = fastattn.masked_softmax(scores, mask=fastattn.BoolMask(seen), backend=backend)
    assert (out[..., 3] == 0).all()
    bad = out.isnan()
    assert bad[0, 1, 2][seen[0, 0, 0]].all()
    bad[0, 1, 2] = False
    assert not bad.any()
    all_bad = fastattn.masked_softmax(torch.full((1, 1, 1, length), value, device=device), backend=backend)
    assert all_bad.isnan().all()


def test_low_scores(backend: str, device: str) -> None:
    """-inf masks, finfo.min is a number: rows of nothing else are zero and uniform."""
    lowest = torch.finfo(torch.float32).min
    scores = torch.tensor(
        [[lowest] * 4, [-math.inf] * 4, [lowest, -math.inf, lowest, 0.0], [lowest, lowest, -math.inf, lowest]]
    )
    expected = torch.tensor([[0.25] * 4, [0.0] * 4, [0.0, 0.0, 0.0, 1.0], [1 / 3, 1 / 3, 0.0, 1 / 3]])
    out = fastattn.masked_softmax(scores[None, None].to(device), backend=backend)
    torch.testing.assert_close(out[0, 0].cpu(), expected)
    biased = fastattn.masked_softmax(
        torch.randn(1, 1, 4, 4, device=device), bias=fastattn.DenseBias(scores.to(device)), backend=backend
    )
    torch.testing.assert_close(biased[0, 0].cpu(), expected)
    highest = fastattn.masked_softmax(
        -scores[:1, None, None].to(device) * torch.tensor([1.0, 0.5, 0.5, 0.5], device=device), backend=backend
    )
    torch.testing.assert_close(highest.flatten().cpu(), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_masked_rows_have_no_gradient(backend: str, device: str) -> None:
    scores = torch.randn(2, 2, 5, 6, device=device, requires_grad=True)
    slopes = torch.ones(2, device=device, requires_grad=True)
    lengths = torch.tensor([0, 6], device=device)
    out = fastattn.masked_softmax(
        scores, mask=fastattn.KeyLengths(lengths), bias=fastattn.ALiBi(slopes), backend=backend
    )
    assert (out[0] == 0).all() and torch.allclose(out[1].sum(-1), torch.ones((), device=device))
    grad = torch.full_like(out, math.nan)
    grad[1] = 0
    dscores, dslopes = torch.autograd.grad(out, (scores, slopes), grad)
    assert (dscores == 0).all() and (dslopes == 0).all()


# -- derivatives -------------------------------------------------------------------------------------------------------


def _function(call: SoftmaxCall, backend: str) -> Callable[..., Tensor]:
    def run(*leaves: Tensor) -> Tensor:
        named = dict(zip(call.leaves, leaves, strict=True))
        return fastattn.masked_softmax(named["scores"], **call.keywords(named), backend=backend)

    return run


@pytest.mark.parametrize("features", [("causal", "alibi"), ("t5_encoder", "dense_keys"), ("dense_rows",)], ids="+".join)
def test_gradcheck(features: tuple[str, ...], backend: str) -> None:
    if backend == "triton":
        pytest.skip("the triton backend has no float64")
    call = SoftmaxCall(features, TINY, torch.float64, scale=0.7)
    torch.autograd.gradcheck(_function(call, backend), list(call.fresh().values()))


def test_double_backward_on_the_reference() -> None:
    call = SoftmaxCall(("causal", "table"), TINY, torch.float64)
    torch.autograd.gradgradcheck(_function(call, "reference"), list(call.fresh().values()))


@pytest.mark.parametrize("name", FUSED)
def test_double_backward_elsewhere_names_the_backend(name: str) -> None:
    scores = torch.randn(1, 1, 2, 3, requires_grad=True)
    out = fastattn.masked_softmax(scores, backend=name)
    (grad,) = torch.autograd.grad(out[..., 0].sum(), scores, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"the {name} backend has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    "features", [("bool_keys", "alibi"), ("dense_heads", "table_batch"), ("dense_scalar",)], ids="+".join
)
def test_vmap_and_per_sample_gradients(features: tuple[str, ...], backend: str, device: str) -> None:
    """Samples of their own, parameters shared or mapped: the same as one call at a time."""
    samples = [SoftmaxCall(features, TINY, seed=seed) for seed in range(3)]
    call = samples[0]
    keywords = call.keywords(call.leaves)
    run = _function(call, backend)
    parameters = [t for name, t in call.leaves.items() if name != "scores"]
    scores = torch.stack([sample.leaves["scores"] for sample in samples])
    grads = torch.stack([sample.grad_out for sample in samples])
    both = torch.vmap(lambda x: fastattn.masked_softmax(x, **keywords, backend=backend))(scores)
    for ours, x in zip(both, scores, strict=True):
        torch.testing.assert_close(ours, fastattn.masked_softmax(x, **keywords, backend=backend))

    def loss(leaves: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return (run(*leaves) * grad).sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=((0, *[None] * len(parameters)), 0))
    found = per_sample((scores, *parameters), grads)
    for n, (x, grad) in enumerate(zip(scores, grads, strict=True)):
        single = torch.func.grad(loss)((x, *parameters), grad)
        for ours, plain in zip(found, single, strict=True):
            torch.testing.assert_close(ours[n], plain)


def test_only_needed_gradients_are_computed() -> None:
    call = SoftmaxCall(("causal", "alibi", "table", "dense_heads"))
    problem = _problem(call)
    for name in ops.FUSED_BACKENDS:
        if name != "cpu" or not native.load_cpu_library():
            continue
        out = torch.ops.fastattn.cpu_softmax_forward(*problem.arguments())
        run = torch.ops.fastattn.cpu_softmax_backward
        features = problem.arguments()[1:]
        everything = run(call.grad_out, out, 15, *features)
        for bit in range(len(SOFTMAX_GRADIENT_FIELDS)):
            for other, grad in enumerate(run(call.grad_out, out, 1 << bit, *features)):
                if other == bit:
                    assert torch.equal(grad, everything[bit])
                else:
                    assert grad.shape == (0,)


@pytest.mark.parametrize(
    "features",
    [("alibi", "table"), ("dense_keys", "table_batch"), ("dense_heads",), ("dense_matrix", "alibi")],
    ids="+".join,
)
def test_gradients_do_not_depend_on_threads(features: tuple[str, ...]) -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    call = SoftmaxCall(features, Shape(query_length=70, key_length=300))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out, grads = call.fused("cpu")
        results.append([out, *grads.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- operators and compilation -----------------------------------------------------------------------------------------


def _problem(call: SoftmaxCall) -> SoftmaxProblem:
    """What `masked_softmax` hands to the backend."""
    caught: list[SoftmaxProblem] = []
    original = fastattn.dispatch.softmax
    try:
        fastattn.dispatch.softmax = lambda problem, name: caught.append(problem)  # type: ignore[assignment]
        fastattn.masked_softmax(call.leaves["scores"], **call.keywords(call.leaves))
    finally:
        fastattn.dispatch.softmax = original
    return caught[0]


@pytest.mark.parametrize(
    "features", [(), ("causal", "alibi"), ("window", "table_batch", "prefix_lm"), ("documents", "bool_keys", "dense_infinite", "key_lengths")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name: str, dtype: torch.dtype, features: tuple[str, ...]) -> None:
    call = SoftmaxCall(features, TINY, dtype)
    args = _problem(call).arguments()
    forward, backward = (getattr(torch.ops.fastattn, f"{name}_softmax_{p}").default for p in ("forward", "backward"))
    assert tuple(a.name for a in forward._schema.arguments) == SOFTMAX_FIELDS
    torch.library.opcheck(forward, args)
    out = forward(*args)
    needs = sum(
        1 << bit for bit, field in enumerate(SOFTMAX_GRADIENT_FIELDS) if args[SOFTMAX_FIELDS.index(field)] is not None
    )
    torch.library.opcheck(backward, (torch.ones_like(out), out, needs, *args[1:]))


def test_compile(backend: str, device: str) -> None:
    """One graph, forward and backward, the same numbers as eager, no recompilation for another length."""
    if backend == "triton":
        pytest.skip("Triton kernels are opaque operators; tests/test_gpu.py compiles them")

    def step(scores: Tensor, slopes: Tensor) -> Tensor:
        return fastattn.masked_softmax(scores, mask=fastattn.Causal(), bias=fastattn.ALiBi(slopes), backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        scores, slopes = torch.randn(2, 3, length, length), torch.rand(3)
        grad = torch.randn_like(scores)
        results = []
        for function in (step, compiled):
            leaves = [scores.detach().requires_grad_(), slopes.detach().requires_grad_()]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        torch.testing.assert_close(results[0], results[1])
        with torch.no_grad():
            torch.testing.assert_close(compiled(scores, slopes), results[0][0])


def test_values_that_cannot_be_checked_are_clamped() -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    scores, big = torch.randn(2, 2, 3, 5), 2**62
    plain = scores.softmax(-1)

    def run(**given: Any) -> Tensor:
        return torch.ops.fastattn.cpu_softmax_forward(*SoftmaxProblem(scores=scores, **given).arguments())

    torch.testing.assert_close(run(key_lengths=torch.tensor([big, 6])), plain)
    assert (run(key_lengths=torch.tensor([-big, -1])) == 0).all()
    for offset in (-big, big):
        out = run(query_offset=offset, table=torch.zeros(1, 2, 3), table_left=1, window_right=0)
        torch.testing.assert_close(out, plain if offset > 0 else torch.zeros_like(plain))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_instruction_sets(isa: str) -> None:
    """Each set this machine has, by the same tests and those of the rotation in a process of its own."""
    if isa not in native.cpu_info().get("supported", []):
        pytest.skip(f"this machine or library does not have {isa}")
    if os.environ.get("FASTATTN_CPU_ISA"):
        pytest.skip("already inside such a process")
    wanted = (
        "test_row_length or test_low_scores or test_a_row or test_rotation or "
        "(test_feature and (table or dense or alibi or window))"
    )
    rotation = str(Path(__file__).with_name("test_apply_rotary.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"cpu and ({wanted})", __file__, rotation],
        capture_output=True, text=True, env={**os.environ, "FASTATTN_CPU_ISA": isa}, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


def test_last_call_names_the_kernel(backend: str, device: str) -> None:
    fastattn.masked_softmax(torch.randn(1, 1, 2, 3, device=device), mask=fastattn.Causal(), backend=backend)
    call = fastattn.last_call()
    assert call is not None and call.backend == backend and call.features == ["causal"]
    assert backend == "reference" or "masked softmax" in call.kernel


# -- bad input ---------------------------------------------------------------------------------------------------------

S = torch.zeros(2, 3, 4, 5)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastattn.masked_softmax([1.0]), TypeError, "scores: expected a torch.Tensor, got list"),
    (lambda: fastattn.masked_softmax(S.int()), TypeError, "scores: expected dtype float32.*got torch.int32"),
    (lambda: fastattn.masked_softmax(S[0]), ValueError, r"scores: expected four dimensions.*\(3, 4, 5\)"),
    (lambda: fastattn.masked_softmax(S, mask=S > 0), TypeError, "mask: expected a fastattn mask"),
    (lambda: fastattn.masked_softmax(S, bias=S), TypeError, "bias: expected a fastattn bias"),
    (lambda: fastattn.masked_softmax(S, scale="1"), TypeError, "scale: expected a number"),
    (lambda: fastattn.masked_softmax(S, scale=math.nan), ValueError, "scale: expected a finite number"),
    (lambda: fastattn.masked_softmax(S, query_offset=1.0), TypeError, "query_offset: expected an int"),
    (lambda: fastattn.masked_softmax(S, query_offset=torch.zeros(3, dtype=torch.int64)), ValueError, r"query_offset: expected shape \(2,\)"),
    (lambda: fastattn.masked_softmax(S, backend="none"), ValueError, "backend: expected one of"),
    (lambda: fastattn.masked_softmax(S, bias=fastattn.ALiBi(torch.ones(4))), ValueError, r"ALiBi.slopes: expected shape \(3,\)"),
    (lambda: fastattn.masked_softmax(S, bias=fastattn.DenseBias(torch.ones(4, 4))), ValueError, "DenseBias.tensor: expected a shape broadcastable"),
    (lambda: fastattn.masked_softmax(S, mask=fastattn.KeyLengths(torch.tensor([1, 6]))), ValueError, "KeyLengths.lengths: expected values in"),
    (lambda: fastattn.masked_softmax(S, mask=fastattn.BoolMask(torch.ones(4, dtype=torch.bool, device="meta"))), ValueError, "BoolMask.tensor: expected a tensor on cpu"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)))
def test_bad_input(row: int) -> None:
    call, kind, message = BAD[row]
    with pytest.raises(kind, match=re.compile(message)):
        call()

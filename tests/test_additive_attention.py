"""`additive_attention`: every mask and bias against the formula, gradients, what may not leak, and what must be refused."""

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

import pytest
import torch
from additive_oracle import AdditiveCall
from features import BIASES, CONTENT, MASKS, Shape
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check
from torch import Tensor

import fastattn
from fastattn import native, ops
from fastattn.additive_problem import ADDITIVE_FIELDS, ADDITIVE_GRADIENT_FIELDS, AdditiveProblem
from fastattn.backends.base import Backend
from fastattn.backends.cpu import CpuBackend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED = [
    pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=b.reason)])
    for b in fastattn.backends()
    if b.name in ops.FUSED_BACKENDS and type(b).additive is not Backend.additive
]
SMALL = Shape(query_length=19, key_length=37, head_dim=7, value_dim=10)
TINY = Shape(batch=2, heads=2, kv_heads=1, query_length=3, key_length=5, head_dim=3, value_dim=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [None, *MASKS, *BIASES, *CONTENT])
def test_feature(feature: str | None, dtype: torch.dtype, backend: str, device: str) -> None:
    check(AdditiveCall(() if feature is None else (feature,), SMALL, dtype), backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 129), (63, 1), (65, 63), (129, 300), (300, 65)], ids=lambda n: f"{n[0]}x{n[1]}"
)
def test_lengths(lengths: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    shape = Shape(batch=1, heads=2, kv_heads=2, query_length=lengths[0], key_length=lengths[1], head_dim=9, value_dim=5)
    check(AdditiveCall(("causal", "alibi", "table"), shape, dtype, scale=0.5), backend, device)


@pytest.mark.parametrize("dims", [(1, 1), (64, 64), (65, 3), (17, 200), (300, 16)], ids=str)
def test_head_dims(dims: tuple[int, int], backend: str, device: str) -> None:
    shape = Shape(batch=1, heads=2, kv_heads=1, query_length=21, key_length=35, head_dim=dims[0], value_dim=dims[1])
    check(AdditiveCall(("window",), shape, scale=0.3), backend, device)


@given(data=st.data())
@settings(max_examples=25)
def test_composition(data: st.DataObject) -> None:
    """Any masks and biases together, at any shape, offset and scale."""
    names = (*data.draw(st.permutations(MASKS), "masks")[: data.draw(st.integers(0, 3))],)
    names += (*data.draw(st.permutations([*BIASES, *CONTENT]), "biases")[: data.draw(st.integers(0, 3))],)
    kv_heads = data.draw(st.integers(1, 2))
    shape = Shape(
        batch=data.draw(st.integers(1, 3)),
        heads=kv_heads * data.draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        query_length=data.draw(st.integers(1, 20)),
        key_length=data.draw(st.integers(1, 80)),
        head_dim=data.draw(st.integers(1, 20)),
        value_dim=data.draw(st.integers(1, 20)),
    )
    offset = data.draw(st.one_of(st.none(), st.integers(-25, 45), st.just("tensor")))
    if offset == "tensor":
        offset = torch.randint(-9, 30, (shape.batch,))
    call = AdditiveCall(
        names, shape, data.draw(st.sampled_from(DTYPES)), offset=offset,
        scale=data.draw(st.sampled_from([None, 0.25, -1.5, 0.0])), dropout_p=data.draw(st.sampled_from([0.0, 0.0, 0.4])),
    )  # fmt: skip
    for backend in fastattn.backends():
        if backend.available and backend.name != "triton":
            check(call, backend.name)


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.3, 3.0, 15.0, 40.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_and_large_operands(size: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """On both sides of every switch between ways to tanh, with pairs that cancel."""
    call = AdditiveCall(("causal",), SMALL, dtype, scale=0.2)
    for name in ("query", "key"):
        call.leaves[name] = call.leaves[name] * size
    call.leaves["key"][..., :19, :] = -call.leaves["query"][:, ::2] * (1 + 1e-3)
    check(call, backend, device)


@pytest.mark.parametrize(
    "size", [(0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6), (2, 2, 3, 4, 0, 6), (2, 2, 3, 4, 5, 0)], ids=str
)  # fmt: skip
def test_empty(size: tuple[int, ...], backend: str, device: str) -> None:
    """Empty in, empty or averaged out; what has no part in it has a gradient of zeros."""
    batch, heads, queries, keys, dim, value_dim = size
    query = torch.randn(batch, heads, queries, dim, device=device, requires_grad=True)
    key = torch.randn(batch, heads, keys, dim, device=device, requires_grad=True)
    value = torch.randn(batch, heads, keys, value_dim, device=device, requires_grad=True)
    weight, table = torch.randn(heads, dim, device=device), torch.randn(heads, 5, device=device)
    shared = torch.randn(1, heads, 1, 1, device=device)
    leaves = [weight.requires_grad_(), table.requires_grad_(), shared.requires_grad_(), query, key]
    bias = fastattn.DistanceTable(table) + fastattn.DenseBias(shared)
    out, lse = fastattn.additive_attention(
        query, key, value, weight, mask=fastattn.Causal(), bias=bias, return_lse=True, backend=backend
    )
    assert out.shape == (batch, heads, queries, value_dim)
    assert keys or (lse == math.inf).all()
    out.sum().backward()
    if dim:
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
    call = AdditiveCall(("window", "table", "dense_full"), SMALL)
    change = LAYOUTS[layout]
    names = ("query", "key", "value")
    strided = {n: change(call.leaves[n].to(device)) for n in names}
    grad = change(call.grad_out.to(device))

    def run(leaves: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        out, _ = call.attend({**call.leaves, **leaves}, backend)
        return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)

    plain = run({n: t.contiguous() for n, t in strided.items()}, grad.contiguous())
    for ours, other in zip(run(strided, grad), plain, strict=True):
        assert torch.equal(ours, other)


def test_layout_of_the_result(backend: str, device: str) -> None:
    inside = torch.randn(2, 5, 3, 4, device=device).transpose(1, 2)
    out = fastattn.additive_attention(inside, inside, inside, torch.randn(4, device=device), backend=backend)
    assert backend == "reference" or out.transpose(1, 2).is_contiguous()


def test_weight_forms(backend: str, device: str) -> None:
    """(D,) is the same weight for every head; half precision weights are read as they are."""
    call = AdditiveCall((), SMALL)
    operands = [call.leaves[n].to(device) for n in ("query", "key", "value")]
    weight = call.leaves["weight"][0].to(device).half().requires_grad_()
    out = fastattn.additive_attention(*operands, weight, backend=backend)
    full = weight.detach().float().expand(SMALL.heads, -1).clone().requires_grad_()
    want = fastattn.additive_attention(*operands, full, backend=backend)
    assert torch.equal(out, want)
    (grad,), (parts,) = (torch.autograd.grad(x.sum(), w) for x, w in ((out.square(), weight), (want.square(), full)))
    assert grad.dtype == torch.float16 and grad.shape == (SMALL.head_dim,)
    torch.testing.assert_close(grad, parts.sum(0).half(), rtol=2e-3, atol=1e-3)


# -- what stands at masked places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_of_a_masked_key_is_seen(value: float, dtype: torch.dtype, backend: str, device: str) -> None:
    """Not in the output, not in any gradient: no bit changes."""
    lengths = torch.tensor([5, 0], device=device)
    results = []
    for fill in (0.0, value):
        call = AdditiveCall((), SMALL, dtype)
        leaves = {n: t.to(device) for n, t in call.leaves.items()}
        for name in ("key", "value"):
            leaves[name] = leaves[name].clone()
            for b, length in enumerate(lengths):
                leaves[name][b, :, length:] = fill
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        operands = [leaves[n] for n in ("query", "key", "value", "weight")]
        out = fastattn.additive_attention(*operands, mask=fastattn.KeyLengths(lengths), backend=backend)
        grad = call.grad_out.to(device)
        grad[1] = fill  # of rows that see nothing
        results.append((out, *torch.autograd.grad(out, operands, grad)))
    assert (results[0][0][1] == 0).all()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_is_seen_where_it_is_visible(name: str, backend: str, device: str) -> None:
    """One NaN makes exactly the rows that see it NaN, and the gradients of what they see."""
    call = AdditiveCall((), Shape(batch=1, heads=1, kv_heads=1, query_length=9, key_length=9, head_dim=3, value_dim=3))
    leaves = {n: t.to(device).clone() for n, t in call.leaves.items()}
    leaves[name][0, 0, 4, 1] = math.nan
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    operands = [leaves[n] for n in ("query", "key", "value", "weight")]
    out = fastattn.additive_attention(*operands, mask=fastattn.Causal(), backend=backend)
    rows = torch.arange(9)
    sees = rows == 4 if name == "query" else rows >= 4
    finite = out[0, 0].isfinite().all(-1).cpu()
    assert torch.equal(finite, ~sees)
    if name != "value" and backend != "reference":  # there, autograd does not see what a NaN was put in for
        (dquery,) = torch.autograd.grad(out.sum(), operands[0])
        assert torch.equal(dquery[0, 0].isfinite().all(-1).cpu(), ~sees)


def test_infinite_operands_saturate(backend: str, device: str) -> None:
    query, key, value = (torch.randn(1, 1, n, 3, device=device) for n in (2, 5, 5))
    weight = torch.randn(3, device=device)
    query[0, 0, 1] = torch.tensor([math.inf, -math.inf, 50.0])
    out = fastattn.additive_attention(query, key, value, weight, backend=backend)
    torch.testing.assert_close(out[0, 0, 1], value[0, 0].mean(0))


def test_rows_that_see_nothing(backend: str, device: str) -> None:
    call = AdditiveCall(("bool_full", "dense_infinite"), Shape(query_length=30, key_length=4))
    empty = ~call.visible(call.leaves).any(-1)
    assert empty.any() and not empty.all()
    result = call.fused(backend, device)
    assert (result.out.cpu()[empty] == 0).all() and (result.lse.cpu()[empty] == math.inf).all()
    assert (result.grads["query"].cpu()[empty] == 0).all()


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_dropout_is_attentions(backend: str, device: str) -> None:
    """The mask of the seed is the one `attention` draws; everything dropped is zero with zero gradients."""
    check(AdditiveCall(("causal", "dense_matrix"), SMALL, dropout_p=0.3), backend, device)
    operands = [torch.randn(1, 2, 4, 3, device=device, requires_grad=True) for _ in range(3)]
    out = fastattn.additive_attention(*operands, torch.randn(3, device=device), dropout_p=1.0, backend=backend)
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), operands))


# -- derivatives -------------------------------------------------------------------------------------------------------


def _function(call: AdditiveCall, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *leaves: call.attend(dict(zip(call.leaves, leaves, strict=True)), backend)


def _fresh(call: AdditiveCall) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in call.leaves.values()]


@pytest.mark.parametrize("features", [("causal", "alibi"), ("t5_encoder", "dense_keys"), ("dense_rows",)], ids="+".join)
def test_gradcheck(features: tuple[str, ...], backend: str) -> None:
    call = AdditiveCall(features, TINY, torch.float64, scale=0.7)
    torch.autograd.gradcheck(_function(call, backend), _fresh(call))


def test_double_backward_on_the_reference() -> None:
    call = AdditiveCall(("causal",), TINY, torch.float64)
    torch.autograd.gradgradcheck(lambda *x: _function(call, "reference")(*x)[0], _fresh(call))


def test_double_backward_elsewhere_names_the_backend() -> None:
    call = AdditiveCall((), TINY)
    leaves = _fresh(call)
    (grad,) = torch.autograd.grad(_function(call, "cpu")(*leaves)[0].sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="the cpu backend has no second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize(
    "features", [("bool_keys", "alibi"), ("dense_heads", "table_batch"), ("dense_scalar",)], ids="+".join
)
def test_vmap_and_per_sample_gradients(features: tuple[str, ...], backend: str, device: str) -> None:
    """Samples of their own, parameters shared: the same as one call at a time."""
    samples = [AdditiveCall(features, TINY, seed=seed) for seed in range(3)]
    call, names = samples[0], ("query", "key", "value")
    run = _function(call, backend)
    stacked = [torch.stack([s.leaves[n] for s in samples]) if n in names else t for n, t in call.leaves.items()]
    grads = torch.stack([sample.grad_out for sample in samples])

    def loss(leaves: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return (run(*leaves)[0] * grad).sum()

    dims = tuple(0 if n in names else None for n in call.leaves)
    found = torch.vmap(torch.func.grad(loss), in_dims=(dims, 0))(tuple(stacked), grads)
    for n, sample in enumerate(samples):
        leaves = tuple(sample.leaves[k] if k in names else t for k, t in call.leaves.items())
        single = torch.func.grad(loss)(leaves, grads[n])
        for ours, plain in zip(found, single, strict=True):
            torch.testing.assert_close(ours[n], plain)


def test_invariants(backend: str, device: str) -> None:
    """Adding to every query what is taken from every key changes nothing; a bias shared by all keys has no gradient."""
    call = AdditiveCall((), SMALL, torch.float64)
    operands = {n: call.leaves[n].to(device) for n in ("query", "key", "value", "weight")}
    shift = torch.randn(SMALL.head_dim, dtype=torch.float64, device=device)
    moved = operands | {"query": operands["query"] + shift, "key": operands["key"] - shift}
    plain, other = (fastattn.additive_attention(*x.values(), backend=backend) for x in (operands, moved))
    torch.testing.assert_close(plain, other)
    rows = torch.randn(1, 1, SMALL.query_length, 1, dtype=torch.float64, device=device, requires_grad=True)
    biased = fastattn.additive_attention(*operands.values(), bias=fastattn.DenseBias(rows), backend=backend)
    torch.testing.assert_close(biased, plain)
    (grad,) = torch.autograd.grad(biased.square().sum(), rows)
    assert grad.abs().max() < 1e-12


# -- determinism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "features",
    [("alibi", "table"), ("dense_keys", "table_batch"), ("dense_heads",), ("dense_matrix",), ("dense_rows",)],
    ids="+".join,
)
def test_gradients_do_not_depend_on_threads(features: tuple[str, ...]) -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    call = AdditiveCall(features, Shape(query_length=70, key_length=300))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        result = call.fused("cpu")
        results.append([result.out, result.lse, *result.grads.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- operators and compilation -----------------------------------------------------------------------------------------


def _problem(call: AdditiveCall, monkeypatch: pytest.MonkeyPatch) -> AdditiveProblem:
    """What `additive_attention` hands to the backend."""
    caught: list[AdditiveProblem] = []
    with monkeypatch.context() as patch:
        out = call.leaves["query"]
        patch.setattr(fastattn.dispatch, "additive", lambda problem, name: (out, caught.append(problem)))
        call.attend(call.leaves, None)
    return caught[0]


@pytest.mark.parametrize(
    "features", [(), ("causal", "alibi"), ("window", "table_batch", "prefix_lm"), ("documents", "bool_keys", "dense_infinite", "key_lengths")],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name: str, dtype: torch.dtype, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    args = _problem(AdditiveCall(features, TINY, dtype), monkeypatch).arguments()
    forward, backward = (getattr(torch.ops.fastattn, f"{name}_additive_{p}").default for p in ("forward", "backward"))
    assert tuple(a.name for a in forward._schema.arguments) == ADDITIVE_FIELDS
    torch.library.opcheck(forward, args)
    out, lse, statistics = forward(*args)
    fields = ADDITIVE_GRADIENT_FIELDS
    needs = sum(1 << bit for bit, field in enumerate(fields) if args[ADDITIVE_FIELDS.index(field)] is not None)
    torch.library.opcheck(backward, (torch.ones_like(out), torch.ones_like(lse), out, statistics, needs, *args))


def test_only_needed_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    call = AdditiveCall(("causal", "alibi", "table", "dense_heads"), SMALL)
    args = _problem(call, monkeypatch).arguments()
    out, _, statistics = torch.ops.fastattn.cpu_additive_forward(*args)
    run = torch.ops.fastattn.cpu_additive_backward
    everything = run(call.grad_out, None, out, statistics, 127, *args)
    for bit in range(len(ADDITIVE_GRADIENT_FIELDS)):
        for other, grad in enumerate(run(call.grad_out, None, out, statistics, 1 << bit, *args)):
            if other != bit:
                assert grad.shape == (0,)
            elif ADDITIVE_GRADIENT_FIELDS[bit] == "dense_bias":
                assert torch.equal(grad, everything[bit])
            else:  # without the bias, heads and batches are cut into items differently
                torch.testing.assert_close(grad, everything[bit], rtol=1e-5, atol=1e-5)


def test_compile(backend: str, device: str) -> None:
    """One graph, forward and backward, the same numbers as eager, no recompilation for another length."""

    def step(x: Tensor, weight: Tensor, slopes: Tensor) -> Tensor:
        return fastattn.additive_attention(
            x, x, x, weight, mask=fastattn.Causal(), bias=fastattn.ALiBi(slopes), backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        x, weight, slopes = torch.randn(2, 3, length, 4), torch.randn(4), torch.rand(3)
        grad = torch.randn_like(x)
        results = []
        for function in (step, compiled):
            leaves = [t.detach().requires_grad_() for t in (x, weight, slopes)]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, grad)))
        torch.testing.assert_close(results[0], results[1])
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, weight, slopes), results[0][0])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_instruction_sets(isa: str) -> None:
    """Each set this machine has, by the same tests in a process of its own."""
    if isa not in native.cpu_info().get("supported", []):
        pytest.skip(f"this machine or library does not have {isa}")
    if os.environ.get("FASTATTN_CPU_ISA"):
        pytest.skip("already inside such a process")
    wanted = (
        "test_head_dims or test_small_and_large or test_nothing_of or "
        "(test_feature and float32 and (table or dense_keys or dense_full or window))"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"cpu and ({wanted})", __file__],
        capture_output=True, text=True, env={**os.environ, "FASTATTN_CPU_ISA": isa}, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]


def test_last_call_names_the_kernel(backend: str, device: str) -> None:
    x = torch.randn(1, 1, 2, 3, device=device)
    fastattn.additive_attention(x, x, x, x[0, 0, 0], mask=fastattn.Causal(), backend=backend)
    call = fastattn.last_call()
    assert call is not None and call.backend == backend and call.features == ["causal"]
    assert backend == "reference" or "additive attention" in call.kernel


def test_a_backend_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    monkeypatch.delattr(CpuBackend, "additive")
    x = torch.randn(1, 1, 2, 3)
    with pytest.raises(fastattn.UnsupportedError, match="backend 'cpu' cannot run this call: it has no additive"):
        fastattn.additive_attention(x, x, x, x[0, 0, 0], backend="cpu")
    fastattn.dispatch._warned.clear()
    with pytest.warns(RuntimeWarning, match="it has no additive attention"):
        fastattn.additive_attention(x, x, x, x[0, 0, 0])
    assert fastattn.last_call().backend == "reference"


# -- bad input ---------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 4, 5), torch.zeros(3, 5)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: fastattn.additive_attention(X, X, X, [1.0]), TypeError, "weight: expected a torch.Tensor, got list"),
    (lambda: fastattn.additive_attention(X, X, X, W.int()), TypeError, "weight: expected dtype float32.*got torch.int32"),
    (lambda: fastattn.additive_attention(X, X, X, W[:2]), ValueError, r"weight: expected shape \(5,\) or \(3, 5\), got \(2, 5\)"),
    (lambda: fastattn.additive_attention(X, X, X, W[:, 0]), ValueError, r"weight: expected shape .*got \(3,\)"),
    (lambda: fastattn.additive_attention(X, X, X, W.to("meta")), ValueError, "weight: expected a tensor on cpu"),
    (lambda: fastattn.additive_attention(X[0], X, X, W), ValueError, r"query: expected four dimensions.*\(3, 4, 5\)"),
    (lambda: fastattn.additive_attention(X, X.double(), X, W), TypeError, "key: expected dtype torch.float32 like query"),
    (lambda: fastattn.additive_attention(X, X[..., :4], X, W), ValueError, "key: expected head dimension 5 like query"),
    (lambda: fastattn.additive_attention(X, X[:, :2], X[:, :2], W), ValueError, "query: expected a number of heads that is a multiple"),
    (lambda: fastattn.additive_attention(X, X, X, W, mask=X > 0), TypeError, "mask: expected a fastattn mask"),
    (lambda: fastattn.additive_attention(X, X, X, W, bias=X), TypeError, "bias: expected a fastattn bias"),
    (lambda: fastattn.additive_attention(X, X, X, W, scale=math.nan), ValueError, "scale: expected a finite number"),
    (lambda: fastattn.additive_attention(X, X, X, W, scale=None), TypeError, "scale: expected a number"),
    (lambda: fastattn.additive_attention(X, X, X, W, dropout_p=1.5), ValueError, "dropout_p: expected a probability"),
    (lambda: fastattn.additive_attention(X, X, X, W, query_offset=1.0), TypeError, "query_offset: expected an int"),
    (lambda: fastattn.additive_attention(X, X, X, W, backend="none"), ValueError, "backend: expected one of"),
    (lambda: fastattn.additive_attention(X, X, X, W, rotary=None), TypeError, "rotary"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)))
def test_bad_input(row: int) -> None:
    call, kind, message = BAD[row]
    with pytest.raises(kind, match=re.compile(message)):
        call()

"""`apply_rotary`: every pairing, width, position and layout against a complex product, gradients, in place, refusals."""

# A row of the table of bad input is a line, however long.
# ruff: noqa: E501
from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from rotary_oracle import RotaryCall, RotaryShape, check_rotation
from torch import Tensor

import fastattn
from fastattn import native, ops
from fastattn.rotation import ROTATION_FIELDS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED = [
    pytest.param(b.name, marks=[] if b.available else [pytest.mark.skip(reason=b.reason)])
    for b in fastattn.backends()
    if b.name in ops.FUSED_BACKENDS
]
SHAPES = {
    "usual": RotaryShape(),
    "partial": RotaryShape(dim=24, width=10),
    "wide": RotaryShape(heads=3, kv_heads=1, length=70, dim=128, width=128, rows=70),
    "one pair": RotaryShape(dim=2, width=2),
    "odd rest": RotaryShape(dim=13, width=6),
    "nothing rotates": RotaryShape(dim=8, width=0),
    "one token": RotaryShape(batch=1, length=1),
}


@pytest.mark.parametrize("positions", ["none", "shared", "each"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation(dtype: torch.dtype, shape: str, interleaved: bool, positions: str, backend: str, device: str) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend has no float64")
    batched = positions == "each"
    call = RotaryCall(SHAPES[shape], dtype, interleaved=interleaved, positions=positions, batched=batched)
    check_rotation(call, backend, device)


@pytest.mark.parametrize("empty", ["batch", "heads", "kv_heads", "length"])
def test_empty(empty: str, backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape(**{empty: 0}), positions="each")
    query, key = call.run(backend, device)
    assert query.shape == call.query.shape and key.shape == call.key.shape
    torch.testing.assert_close(query.cpu().double(), call.exact(call.query), atol=1e-5, rtol=1e-5)


def test_rotating_back_multiplies_by_the_amplitude_squared(backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape(), positions="shared")
    query, key = call.run(backend, device)
    back = call.run(backend, device, query=query, key=key, sin=-call.sin)
    for ours, x in zip(back, (call.query, call.key), strict=True):
        torch.testing.assert_close(ours.cpu(), 1.3**2 * x)


def test_agrees_with_the_rotation_inside_attention(backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape(kv_heads=4))
    value = torch.randn(2, 4, 7, 8, device=device)
    query, key = call.run(backend, device)
    operands = [x.to(device) for x in (call.query, call.key)]
    rotary = fastattn.Rotary(call.cos.to(device), call.sin.to(device))
    inside = fastattn.attention(*operands, value, rotary=rotary, backend=backend)
    torch.testing.assert_close(inside, fastattn.attention(query, key, value, backend=backend))


# -- layouts and in place ----------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension strided": lambda x: torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0],
    "sliced out of NaN": lambda x: torch.nn.functional.pad(x, (3, 5, 2, 1), value=math.nan)[..., 2:-1, 3:-5],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str, backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape(dim=24, width=10))
    query, key = (LAYOUTS[layout](x.to(device)) for x in (call.query, call.key))
    ours = call.run(backend, device, query=query, key=key)
    plain = call.run(backend, device, query=query.contiguous(), key=key.contiguous())
    for one, other, given in zip(ours, plain, (query, key), strict=True):
        assert torch.equal(one, other)
        assert backend == "reference" or (one.stride(1) < one.stride(2)) == (given.stride(1) < given.stride(2))


@pytest.mark.parametrize("layout", ["contiguous", "heads inside", "sliced out of NaN"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_place(dtype: torch.dtype, interleaved: bool, layout: str, backend: str, device: str) -> None:
    """The same bits as out of place, in the operands themselves, and nothing beside them is touched."""
    call = RotaryCall(RotaryShape(dim=24, width=10), dtype, interleaved=interleaved, positions="each")
    expected = call.run(backend, device)
    query, key = (LAYOUTS.get(layout, Tensor.clone)(x.to(device)) for x in (call.query, call.key))
    found = call.run(backend, device, query=query, key=key, inplace=True)
    assert found[0].data_ptr() == query.data_ptr() and found[1].data_ptr() == key.data_ptr()
    for x, want in zip((query, key), expected, strict=True):
        assert torch.equal(x, want)
        if layout == "sliced out of NaN":
            assert x._base.isnan().sum() == x._base.numel() - x.numel()


def test_in_place_on_one_projection(backend: str, device: str) -> None:
    """Query and key as views of one tensor, with the value between their rows untouched."""
    call = RotaryCall(RotaryShape(heads=2, kv_heads=2))
    parts = torch.stack([call.query, call.key, torch.full_like(call.key, 3.0)], dim=3).to(device)
    query, key, value = parts.unbind(3)
    expected = call.run(backend, device)
    call.run(backend, device, query=query, key=key, inplace=True)
    assert torch.equal(query, expected[0]) and torch.equal(key, expected[1]) and (value == 3).all()


def test_in_place_where_no_gradient_is_recorded(backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape())
    query, key = (x.clone().to(device).requires_grad_() for x in (call.query, call.key))
    with pytest.raises(ValueError, match="inplace: expected False while a gradient is recorded"):
        call.run(backend, device, query=query, key=key, inplace=True)
    assert torch.equal(query.detach().cpu(), call.query)
    with torch.no_grad():
        call.run(backend, device, query=query, key=key, inplace=True)
    assert not torch.equal(query.detach().cpu(), call.query)


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_learned_tables(interleaved: bool, backend: str) -> None:
    if backend == "triton":
        pytest.skip("the triton backend has no float64")
    call = RotaryCall(
        RotaryShape(heads=2, length=3, dim=6, width=4, rows=5), torch.float64, interleaved=interleaved, positions="each"
    )

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return call.run(backend, **dict(zip(("query", "key", "cos", "sin"), leaves, strict=True)))

    leaves = [x.clone().requires_grad_() for x in (call.query, call.key, call.cos, call.sin)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)


def test_every_order_of_derivative(backend: str) -> None:
    """Without learned tables the fused kernels run, and their backward has a backward."""
    if backend == "triton":
        pytest.skip("the triton backend has no float64")
    call = RotaryCall(RotaryShape(heads=2, length=3, dim=6, width=4, rows=5), torch.float64)

    def run(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return call.run(backend, query=query, key=key)

    leaves = [x.clone().requires_grad_() for x in (call.query, call.key)]
    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("which", ["query", "key"])
def test_gradient_of_one_operand(which: str, backend: str, device: str) -> None:
    call = RotaryCall(RotaryShape())
    leaf = getattr(call, which).to(device).requires_grad_()
    out = call.run(backend, device, **{which: leaf})
    place = ("query", "key").index(which)
    assert not out[1 - place].requires_grad or backend != "reference"
    (grad,) = torch.autograd.grad(out[place], leaf, call.grads[place].to(device))
    torch.testing.assert_close(grad.cpu(), call.exact(call.grads[place], conjugate=True).float())
    both = call.run(backend, device, **{which: leaf})
    (total,) = torch.autograd.grad(sum(x.sum() for x in both if x.requires_grad), leaf)
    ones = call.exact(torch.ones_like(call.grads[place]), conjugate=True)
    torch.testing.assert_close(total.cpu(), ones.float())


def test_vmap(backend: str, device: str) -> None:
    """Over operands, with shared tables, and over tables, with shared operands."""
    calls = [RotaryCall(RotaryShape(batch=1), seed=seed, batched=True, positions="each") for seed in range(3)]
    query, key, cos, sin, positions = (
        torch.stack([getattr(c, n).to(device) for c in calls]) for n in ("query", "key", "cos", "sin", "positions")
    )

    def run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return fastattn.apply_rotary(query, key, cos, sin, positions=positions, backend=backend)

    for dims in ((0, 0, 0, 0, 0), (0, 0, None, None, None), (None, None, 0, 0, None), (0, None, None, None, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip((query, key, cos, sin, positions), dims, strict=True)]
        ours = torch.vmap(run, in_dims=dims)(*given)
        single = [run(*[x[n] if dim == 0 else x for x, dim in zip(given, dims, strict=True)]) for n in range(3)]
        for found, wanted in zip(ours, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(found, torch.stack(wanted).expand_as(found))


# -- operators and compilation -----------------------------------------------------------------------------------------


def _arguments(call: RotaryCall) -> tuple[object, ...]:
    positions = None if call.positions is None else call.positions.long()
    return call.query, call.key, call.cos[None], call.sin[None], positions, call.interleaved, False


@pytest.mark.parametrize("positions", ["none", "each"])
@pytest.mark.parametrize("name", FUSED)
def test_opcheck(name: str, positions: str) -> None:
    call = RotaryCall(RotaryShape(), positions=positions)
    operator = getattr(torch.ops.fastattn, f"{name}_rotate").default
    inplace = getattr(torch.ops.fastattn, f"{name}_rotate_").default
    assert tuple(a.name for a in operator._schema.arguments) == ROTATION_FIELDS
    assert not operator._schema.is_mutable and inplace._schema.is_mutable
    torch.library.opcheck(operator, _arguments(call))
    torch.library.opcheck(inplace, _arguments(call))


@pytest.mark.parametrize("inplace", [False, True])
def test_compile(inplace: bool, backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton kernels are opaque operators; tests/test_gpu.py compiles them")

    def step(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if inplace:
            query, key = query * 1.0, key * 1.0
        query, key = fastattn.apply_rotary(query, key, cos, sin, inplace=inplace, backend=backend)
        return query * 2.0, key

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        call = RotaryCall(RotaryShape(length=length))
        operands = (call.query, call.key, call.cos, call.sin)
        torch.testing.assert_close(compiled(*operands), step(*operands))
        if not inplace:
            leaves = [x.clone().requires_grad_() for x in operands[:2]]
            grads = [torch.autograd.grad(f(*leaves, *operands[2:]), leaves, call.grads) for f in (step, compiled)]
            torch.testing.assert_close(grads[0], grads[1])


def test_positions_that_cannot_be_checked_are_clamped() -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    call = RotaryCall(RotaryShape(length=4))
    query, key, cos, sin, *_ = _arguments(call)
    run = torch.ops.fastattn.cpu_rotate
    wild = run(query, key, cos, sin, torch.tensor([[-(2**62), -1, 40, 2**62]]), False, False)
    tame = run(query, key, cos, sin, torch.tensor([[0, 0, 39, 39]]), False, False)
    assert torch.equal(wild[0], tame[0]) and torch.equal(wild[1], tame[1])


def test_results_do_not_depend_on_threads() -> None:
    if not native.load_cpu_library():
        pytest.skip(str(native.load_error))
    call = RotaryCall(RotaryShape(length=300, rows=300, dim=64, width=64))
    first = call.run("cpu")
    torch.set_num_threads(3)
    second = call.run("cpu")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_last_call_names_the_kernel(backend: str, device: str) -> None:
    RotaryCall(RotaryShape(), interleaved=True).run(backend, device)
    call = fastattn.last_call()
    assert call is not None and call.backend == backend and call.features == ["rotary", "interleaved"]
    assert backend == "reference" or "rotary" in call.kernel


# -- bad input ---------------------------------------------------------------------------------------------------------

Q, K, C = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(9, 4)
apply = fastattn.apply_rotary
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: apply(1, K, C, C), TypeError, "query: expected a torch.Tensor, got int"),
    (lambda: apply(Q.long(), K, C, C), TypeError, "query: expected dtype float32"),
    (lambda: apply(Q[0], K, C, C), ValueError, "query: expected four dimensions"),
    (lambda: apply(Q, K.half(), C, C), TypeError, "key: expected dtype torch.float32 like query"),
    (lambda: apply(Q, K.to("meta"), C, C), ValueError, "key: expected a tensor on cpu"),
    (lambda: apply(Q, K[:1], C, C), ValueError, "key: expected batch size 2 like query"),
    (lambda: apply(Q, K[:, :, :4], C, C), ValueError, "key: expected length 5 like query"),
    (lambda: apply(Q, K[..., :6], C, C), ValueError, "key: expected head dimension 8 like query"),
    (lambda: apply(Q, K, C.long(), C), TypeError, "cos: expected dtype float32"),
    (lambda: apply(Q, K, C[0], C), ValueError, r"cos: expected shape \(P, R/2\) or \(B, P, R/2\)"),
    (lambda: apply(Q, K, C, C[:, :2]), ValueError, "sin: expected shape"),
    (lambda: apply(Q, K, torch.zeros(9, 5), torch.zeros(9, 5)), ValueError, "cos: expected at most D/2 = 4 columns"),
    (lambda: apply(Q, K, C.expand(3, 9, 4), C.expand(3, 9, 4)), ValueError, "cos: expected batch dimension 1 or B = 2"),
    (lambda: apply(Q, K, C[:4], C[:4]), ValueError, "cos: expected a row for each of S = 5 positions"),
    (lambda: apply(Q, K, C, C, positions=torch.zeros(5)), TypeError, "positions: expected an integer dtype"),
    (lambda: apply(Q, K, C, C, positions=torch.zeros(4, dtype=torch.int64)), ValueError, r"positions: expected shape \(5,\) or \(2, 5\)"),
    (lambda: apply(Q, K, C, C, positions=torch.tensor([0, 1, 2, 3, 9])), ValueError, r"positions: expected rows of the tables, in \[0, 8\]"),
    (lambda: apply(Q, K, C, C, positions=torch.tensor([0, 1, 2, 3, -1])), ValueError, "positions: expected rows of the tables"),
    (lambda: apply(Q, K, C, C, interleaved=1), TypeError, "interleaved: expected a bool"),
    (lambda: apply(Q, K, C, C, inplace=None), TypeError, "inplace: expected a bool"),
    (lambda: apply(Q.mT.contiguous().mT, K, C, C, inplace=True), ValueError, "query: expected a dense last dimension when inplace=True"),
    (lambda: apply(Q, K[:, :1].expand(2, 3, 5, 8), C, C, inplace=True), ValueError, "key: expected no expanded dimension when inplace=True"),
    (lambda: apply(Q, Q, C, C, inplace=True), ValueError, "key: expected another tensor than query"),
    (lambda: apply(Q, K, C.clone().requires_grad_(), C, inplace=True), ValueError, "inplace: expected False while a gradient is recorded"),
    (lambda: apply(Q, K, C, C, backend="none"), ValueError, "backend: expected one of"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(BAD)))
def test_bad_input(row: int) -> None:
    call, kind, message = BAD[row]
    with pytest.raises(kind, match=re.compile(message)):
        call()

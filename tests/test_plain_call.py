"""The short ways of a call: the operator of `PLAIN_FIELDS`, one thread for little work, Function.apply without binding.

Each gives the bits of the long way, and is taken where it may be and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from features import FEATURES, Shape
from oracle import Call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import autograd, functional, native
from fastattn.problem import FIELD_NAMES, PLAIN_FIELDS, Problem

pytestmark = pytest.mark.skipif(not native.load_cpu_library(), reason=str(native.load_error))

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# batch, heads, key heads, queries, keys, D, Dv
SHAPES = [
    (1, 2, 2, 8, 8, 16, 16),
    (2, 4, 2, 33, 49, 16, 24),
    (1, 4, 1, 1, 512, 64, 64),  # decoding
    (1, 4, 1, 1, 513, 64, 64),
    (2, 2, 2, 5, 0, 8, 8),
    (2, 2, 2, 0, 5, 8, 8),
    (0, 2, 2, 5, 5, 8, 8),
    (1, 1, 1, 3, 4, 0, 8),
    (1, 2, 1, 130, 300, 40, 72),
]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": fastattn.Causal()},
    "window": {"mask": fastattn.SlidingWindow(3, 2), "query_offset": 2, "scale": 0.3},
    "softcap": {"softcap": 2.0, "query_offset": -1},
}


class Operators(TorchDispatchMode):
    """The names of fastattn's forward operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastattn" and func._opname.endswith("_forward"):
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def ran(call: Callable[[], object]) -> list[str]:
    with Operators() as operators:
        call()
    return operators.names


def operands(shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hk, sq, sk, d, dv = shape
    return tuple(torch.randn(size).to(dtype) for size in ((b, hq, sq, d), (b, hk, sk, d), (b, hk, sk, dv)))


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_as_the_long_way(dtype: torch.dtype, shape: tuple[int, ...], arguments: dict[str, Any]) -> None:
    contiguous = operands(shape, dtype)
    for q, k, v in (contiguous, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in contiguous]):
        with Operators() as operators:
            short = fastattn.attention(q, k, v, **arguments)
            told = fastattn.last_call()
            long, _ = fastattn.attention(q, k, v, **arguments, return_lse=True)
            assert fastattn.last_call() == told
        assert operators.names == ["cpu_plain_forward", "cpu_forward"]
        assert torch.equal(short, long)
        assert short.stride() == long.stride()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        assert torch.equal(fastattn.attention(*leaves, **arguments), long)


@pytest.mark.parametrize("name", FEATURES)
def test_what_is_plain(name: str) -> None:
    """Exactly the problems that PLAIN_FIELDS say all of."""
    call = Call((name,), Shape())
    torch.manual_seed(0)
    problem = functional.lower(*[call.leaves[n] for n in ("query", "key", "value")], **call.keywords(call.leaves))
    told = Problem(**{field: getattr(problem, field) for field in PLAIN_FIELDS})
    rest = [field for field in FIELD_NAMES if getattr(problem, field) is not getattr(told, field)]
    # numbers that say how to read a tensor: of no effect by themselves
    rest = [field for field in rest if field not in ("table_left", "columns_left", "interleaved")]
    assert problem.is_plain() == (not rest), rest


def test_every_other_field_is_asked_for() -> None:
    """None of the tensors, nor dropout, may be lost; of those that come together one is enough."""
    together = [{"query_cos", "query_sin"}, {"key_cos", "key_sin"}, {"query_ids", "key_ids"}]
    q, k, v = operands()
    x = torch.zeros(1)
    for field in set(FIELD_NAMES) - set(PLAIN_FIELDS) - {"interleaved", "table_left", "columns_left"}:
        fields = next((fields for fields in together if field in fields), {field})
        if field == "columns":
            fields = {field, "col_table"}  # of no effect without a table
        if field == "dropout_seed":
            continue  # of no effect without dropout_p
        given = {name: 0.5 if name == "dropout_p" else x for name in fields}
        assert not Problem(query=q, key=k, value=v, scale=1.0, **given).is_plain(), fields


def test_who_asks_for_more_gets_the_operator_of_all_fields() -> None:
    q, k, v = operands()
    assert ran(lambda: fastattn.attention(q, k, v)) == ["cpu_plain_forward"]
    assert ran(lambda: fastattn.attention(q, k, v, backend="cpu")) == ["cpu_plain_forward"]
    assert ran(lambda: fastattn.scaled_dot_product_attention(q, k, v, is_causal=True)) == ["cpu_plain_forward"]
    for more in (
        {"return_lse": True},
        {"sink": torch.zeros(2)},
        {"dropout_p": 0.5},
        {"query_offset": torch.tensor([1])},
        {"mask": fastattn.KeyLengths(torch.tensor([3]))},
        {"bias": fastattn.ALiBi(torch.ones(2))},
    ):
        assert ran(lambda more=more: fastattn.attention(q, k, v, **more)) == ["cpu_forward"], more
    for leaf in range(3):
        leaves = [x.clone().requires_grad_(i == leaf) for i, x in enumerate((q, k, v))]
        assert ran(lambda leaves=leaves: fastattn.attention(*leaves)) == ["cpu_forward"]
        with torch.no_grad():
            assert ran(lambda leaves=leaves: fastattn.attention(*leaves)) == ["cpu_plain_forward"]
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention(q, k, v).dtype == torch.bfloat16
    assert ran(lambda: fastattn.attention(q, k, v, backend="reference")) == []


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each call that was lowered to a `Problem`."""
    calls: list[bool] = []
    lower = functional.lower
    monkeypatch.setattr(
        functional, "lower", lambda *args, **keywords: (calls.append(True), lower(*args, **keywords))[1]
    )
    return calls


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shortcut_without_a_problem(lowered: list[bool], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = operands(shape, dtype)
    for arguments in ({}, {"mask": fastattn.Causal()}, {"scale": 0.3, "query_offset": 2, "mask": fastattn.Causal()}):
        out = fastattn.attention(q, k, v, **arguments)
        told = fastattn.last_call()
        assert not lowered
        assert torch.equal(out, fastattn.attention(q, k, v, **arguments, return_lse=True)[0])
        assert fastattn.last_call() == told
        explained = fastattn.explain(q, k, v, **arguments)
        assert (told.backend, told.kernel, told.features) == (explained.backend, explained.kernel, explained.features)
        assert told.refusals.items() <= explained.refusals.items()
        lowered.clear()


def test_no_shortcut_for_anything_else(lowered: list[bool]) -> None:
    q, k, v = operands()
    rows = torch.randn(1, 2, 16, 8).transpose(2, 3)

    class Other(Tensor):
        pass

    for case, change in {
        "named": {"backend": "cpu"},
        "softcap": {"softcap": 2.0},
        "window": {"mask": fastattn.SlidingWindow(3, 2)},
        "bias": {"bias": fastattn.ALiBi(torch.ones(2))},
        "sink": {"sink": torch.zeros(2)},
        "dropout": {"dropout_p": 0.5},
        "offsets": {"query_offset": torch.tensor([1])},
        "lse": {"return_lse": True},
        "an int for a scale": {"scale": 1},
        "rows that are not dense": {"query": rows},
        "keys that are not dense": {"key": rows},
        "values that are not dense": {"value": rows},
        "a subclass": {"key": k.as_subclass(Other)},
        "a gradient": {"value": v.clone().requires_grad_()},
    }.items():
        arguments = {"query": q, "key": k, "value": v, **change}
        fastattn.attention(**arguments)
        assert lowered == [True], case
        lowered.clear()
    with torch.autocast("cpu", torch.bfloat16):
        fastattn.attention(q, k, v)
    torch.func.vmap(fastattn.attention)(q[None], k[None], v[None])
    assert lowered == [True, True]


@pytest.mark.parametrize(
    "change",
    [
        {"query": [1.0]},
        {"query": torch.randn(2, 8, 16)},
        {"key": torch.randn(8)},
        {"value": torch.randn(2, 8, 16)},
        {"key": torch.randn(2, 2, 8, 16)},
        {"key": torch.randn(1, 2, 8, 15)},
        {"key": torch.randn(1, 3, 8, 16), "value": torch.randn(1, 3, 8, 16)},
        {"key": torch.randn(1, 0, 8, 16), "value": torch.randn(1, 0, 8, 16)},
        {"value": torch.randn(1, 2, 7, 16)},
        {"value": torch.randn(1, 2, 8, 16).double()},
        {"key": torch.randn(1, 2, 8, 16, device="meta")},
        {"query": torch.randn(1, 2, 8, 16).to_sparse()},
        {"query": torch.ones(1, 2, 8, 16, dtype=torch.long)},
        {"scale": float("nan")},
        {"scale": "1"},
        {"query_offset": 1.0},
        {"dropout_p": None},
        {"mask": torch.ones(8, 8, dtype=torch.bool)},
    ],
)
def test_what_is_wrong_is_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    q, k, v = operands()
    said = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
            fastattn.attention(**{"query": q, "key": k, "value": v, **change})
        said.append((error.type, str(error.value)))
        monkeypatch.setattr(fastattn.dispatch, "run_shortcut", lambda *_: None)
    assert said[0] == said[1]
    assert next(iter(change)) in said[0][1] or "value" in said[0][1]


def test_the_plain_operator_by_itself() -> None:
    q, k, v = operands((2, 4, 2, 5, 7, 8, 6))
    operator = torch.ops.fastattn.cpu_plain_forward.default
    assert tuple(a.name for a in operator._schema.arguments) == PLAIN_FIELDS
    for query in (q, torch.randn(2, 5, 4, 8).transpose(1, 2)):
        arguments = (query, k, v, 0.5, 0.0, 2, -1, 0)
        torch.library.opcheck(operator, arguments)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments])
        real = operator(*arguments)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": torch.randn(1, 2, 8, 15)}, "dimension 3"),
        ({"value": torch.randn(1, 2, 7, 16)}, "dimension 2"),
        ({"key": torch.randn(1, 2, 8, 16).double()}, "dtype"),
        ({"key": torch.randn(1, 3, 8, 16)}, "cannot share"),
        ({"query": torch.randn(1, 2, 16, 8).transpose(2, 3)}, "dense"),
        ({"query": torch.randn(2, 8, 16)}, "4 dimensions"),
    ],
    ids=["head dim", "length", "dtype", "heads", "stride", "rank"],
)
def test_the_plain_operator_refuses_what_the_other_does(change: dict[str, Tensor], words: str) -> None:
    q, k, v = operands()
    problem = Problem(**{"query": q, "key": k, "value": v, "scale": 1.0, **change})
    said = []
    for name, fields in (("cpu_plain_forward", PLAIN_FIELDS), ("cpu_forward", FIELD_NAMES)):
        with pytest.raises(RuntimeError, match=words) as error:
            getattr(torch.ops.fastattn, name)(*[getattr(problem, field) for field in fields])
        said.append(str(error.value).splitlines()[0])
    assert said[0] == said[1]


def test_sdpa_of_four_dimensions_has_the_bits_of_five() -> None:
    """What needs no broadcasting does not go through it."""
    q, k, v = operands()
    grouped = operands((2, 4, 2, 5, 7, 8, 6))
    for x, keywords in (
        ((q, k, v), {}),
        ((q, k, v), {"is_causal": True, "scale": 0.3}),
        (grouped, {"enable_gqa": True}),
    ):
        short = fastattn.scaled_dot_product_attention(*x, **keywords)
        assert torch.equal(short, fastattn.scaled_dot_product_attention(*[y[None] for y in x], **keywords)[0])


def test_little_work_is_done_by_the_calling_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        few, many = operands((1, 2, 2, 16, 32, 16, 16)), operands((1, 2, 2, 16, 33, 16, 16))  # 2^15 multiply-adds
        assert fastattn.explain(*few, backend="cpu").plan["threads"] == 1
        assert fastattn.explain(*many, backend="cpu").plan["threads"] == 2
    finally:
        torch.set_num_threads(threads)


def test_apply_without_binding_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(*arguments: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*operands_, slopes)]
        out, lse = fastattn.attention(*leaves[:3], bias=fastattn.ALiBi(leaves[3]), return_lse=True)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)]

    operands_, slopes = operands((2, 4, 2, 5, 7, 8, 6)), torch.rand(4)
    short = gradients()
    monkeypatch.setattr(autograd, "call", lambda function, *args: function.apply(*args))
    assert all(torch.equal(a, b) for a, b in zip(short, gradients(), strict=True))


def test_a_tensor_that_outlived_its_transform() -> None:
    """The gradient reaches the tensor it wraps, as through Function.apply itself."""
    q, k, v = operands()
    q.requires_grad_()
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(q)
    out, want = fastattn.attention(kept[0], k, v), fastattn.attention(q, k, v)
    assert torch.equal(out, want)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], torch.autograd.grad(want.sum(), q)[0])
    with torch.no_grad():
        assert torch.equal(fastattn.attention(kept[0], k, v), want)

"""The launcher's short way: it tells apart what Triton does, hands over what Triton does, and steps aside in time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from features import Shape
from hypothesis import given
from hypothesis import strategies as st
from oracle import Call

from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS
from fastattn.softmax_problem import SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: nothing is launched", allow_module_level=True)

from triton import knobs  # noqa: E402
from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastattn.triton_kernels import launcher, rotary  # noqa: E402
from fastattn.triton_kernels.attention import attention_forward  # noqa: E402
from fastattn.triton_kernels.attention_gradients import attention_backward  # noqa: E402
from fastattn.triton_kernels.launcher import constants, remembers, specialization  # noqa: E402
from fastattn.triton_kernels.masked_softmax import softmax_forward  # noqa: E402
from fastattn.triton_kernels.softmax_gradients import softmax_backward  # noqa: E402
from fastattn.triton_kernels.stub import stubbed_driver  # noqa: E402

BACKEND = make_backend(GPUTarget("cuda", 90, 32))


class Pair(NamedTuple):
    first: Any
    second: Any


@remembers
class Remembered(NamedTuple):
    first: Any
    second: Any


def _by_triton(values: tuple[Any, ...]) -> list[Any]:
    """What Triton's own binder computes of parameters without annotations."""
    return [native_specialize_impl(BACKEND, value, False, True, True) for value in values]


def _tensor(dtype: torch.dtype, offset: int) -> torch.Tensor:
    """One whose address is `offset` bytes past a multiple of 16."""
    buffer = torch.empty(64, dtype=torch.uint8)
    start = -buffer.data_ptr() % 16 + offset
    return buffer[start : start + 8].view(dtype)


INTEGERS = st.one_of(
    st.sampled_from([0, 1, 2, 16, 17, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1]),
    st.sampled_from([-(2**31) - 16, 2**32, 2**63 - 1, 2**63 - 16, 2**63, 2**64 - 1, -(2**63)]),
    st.integers(-100, 100),
)
LEAVES = st.one_of(
    st.none(),
    INTEGERS,
    st.sampled_from([0.0, 1.0, 16.0, 0.5]),
    st.booleans(),
    st.builds(
        _tensor,
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]),
        st.sampled_from([0, 8]),
    ),
)
VALUES = st.one_of(
    LEAVES, st.builds(Pair, LEAVES, LEAVES), st.builds(Remembered, LEAVES, LEAVES), st.tuples(LEAVES, LEAVES)
)
# two calls that mostly agree: where every value differed, so would every key
CALLS = st.lists(st.tuples(VALUES, VALUES, st.sampled_from([False, False, True])), min_size=1, max_size=4).map(
    lambda drawn: (tuple(a for a, _, _ in drawn), tuple(b if other else a for a, b, other in drawn))
)


@given(calls=CALLS)
def test_the_key_parts_calls_as_triton_does(calls: tuple[tuple[Any, ...], tuple[Any, ...]]) -> None:
    one, two = calls
    kinds = [[type(value) for value in values] for values in calls]
    ours = specialization(one) == specialization(two)
    # Triton's description does not have the types of tuples in it, which its cache of kernels does not need
    theirs = _by_triton(one) == _by_triton(two) and kinds[0] == kinds[1]
    if kinds[0] == kinds[1] or ours:
        assert ours == theirs, (one, two)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 1.0), (1, True), (0, False), (0, None), (1, 2), (16, 17), (2**31 - 1, 2**31), (2**63 - 1, 2**63),
        (_tensor(torch.float32, 0), _tensor(torch.float32, 8)), (_tensor(torch.float32, 0), _tensor(torch.int32, 0)),
        (Pair(None, 0), Pair(0, None)), ((1, 2), (1, 2, 2)), (_tensor(torch.uint8, 0), None),
    ],
)  # fmt: skip
def test_different_kernels_have_different_keys(one: Any, two: Any) -> None:
    assert specialization((one,)) != specialization((two,))


def test_what_is_remembered_is_what_was_found() -> None:
    values = Remembered(_tensor(torch.float32, 0), 3)
    assert specialization((values,)) == specialization((values,)) == specialization((Remembered(*values),))


def test_constants_are_one_object_per_value() -> None:
    assert constants(A=1, B=2.0) is constants(A=1, B=2.0)
    assert constants(A=1) is not constants(A=True)
    assert constants(A=1) is not constants(A=2)


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(TypeError, match="str"):
        specialization((Pair("a", 1),))


def _attention(features: tuple[str, ...], **keywords: Any) -> Callable[[], object]:
    call = Call(features, Shape(heads=2, kv_heads=1, query_length=40, key_length=52, **keywords))
    arguments = call.keywords(call.leaves)
    problem = lower(*[call.leaves[name].detach() for name in ("query", "key", "value")], **arguments)
    wanted = frozenset(name for name in GRADIENT_FIELDS if getattr(problem, name) is not None)

    def run() -> None:
        out, lse, statistics = attention_forward(problem)
        attention_backward(problem, torch.ones_like(out), torch.ones_like(lse), out, statistics, wanted)

    return run


def _softmax() -> None:
    problem = SoftmaxProblem(
        scores=torch.zeros(2, 2, 5, 40), slopes=torch.ones(1, 2), table=torch.ones(1, 2, 9), table_left=4,
        dense_bias=torch.zeros(1, 1, 5, 40),
    )  # fmt: skip
    wanted = frozenset(name for name in SOFTMAX_GRADIENT_FIELDS if getattr(problem, name) is not None)
    softmax_backward(dataclasses.replace(problem, scores=softmax_forward(problem)), torch.ones(2, 2, 5, 40), wanted)


def _rotate() -> None:
    table = torch.ones(1, 40, 8)
    rotary.rotate(torch.zeros(1, 4, 40, 16), torch.zeros(1, 2, 40, 16), (table,) * 4, interleaved=False)


CALLS_OF_KERNELS = {
    "attention": _attention(()),
    "every bias": _attention(("causal", "alibi", "table", "dense_heads", "sink")),
    "masks": _attention(("window", "key_lengths", "documents", "bool_full", "rotary")),
    "softmax": _softmax,
    "rotary": _rotate,
}


def _same(one: Any, two: Any) -> bool:
    """Whether two arguments of a kernel are alike; fresh tensors are elsewhere each time."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and (one.shape, one.dtype) == (two.shape, two.dtype)
    if isinstance(one, tuple):
        return type(one) is type(two) and all(map(_same, one, two))
    return type(one) is type(two) and one == two


@pytest.mark.parametrize("name", CALLS_OF_KERNELS)
def test_the_short_way_hands_over_what_triton_does(name: str) -> None:
    launches: list[tuple[Any, ...]] = []
    with stubbed_driver(lambda *arguments: launches.append(arguments)):
        CALLS_OF_KERNELS[name]()
        first, launches = launches, []
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("not the short way")):
            CALLS_OF_KERNELS[name]()
    assert len(first) == len(launches) > 0
    for by_triton, by_us in zip(first, launches, strict=True):
        assert by_us[:6] == by_triton[:6]  # grid, stream, function, metadata
        assert by_us[6:9] == (None, None, None)  # no hooks, nothing to tell them
        assert len(by_us) == len(by_triton)
        assert all(map(_same, by_us[9:], by_triton[9:])), (by_us, by_triton)


def test_other_arguments_are_another_kernel() -> None:
    """Lengths of 33 and 34 are one kernel, 32 (a multiple of 16) and 1 are others."""
    kernels = []
    with stubbed_driver(), mock.patch.object(launcher, "_compiled", kept := {}):
        for length in (33, 34, 32, 1, 34):
            query = torch.zeros(1, 2, length, 16)
            attention_forward(lower(query, torch.zeros(1, 2, 19, 16), torch.zeros(1, 2, 19, 16)))
            kernels.append(len(kept))
    assert kernels == [1, 1, 2, 3, 3]


def _hook(*arguments: Any) -> None:
    pass


@pytest.mark.parametrize("what", ["enter", "exit", "debug", "instrumentation", "stages", "version"])
def test_the_ordinary_way_where_the_short_one_would_miss_something(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.zeros(1, 2, 33, 16)
    problem = lower(query, query, query)
    with stubbed_driver():
        attention_forward(problem)
        if what in ("enter", "exit"):
            chain = getattr(knobs.runtime, f"launch_{what}_hook")
            monkeypatch.setattr(chain, "calls", [_hook])
        elif what == "debug":
            monkeypatch.setattr(knobs.runtime, "debug", True)
        elif what == "instrumentation":
            monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "x")
        elif what == "stages":
            if not hasattr(knobs.runtime, "add_stages_inspection_hook"):
                pytest.skip(f"Triton {triton.__version__} has no such hook")
            monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", _hook)
        else:
            monkeypatch.setattr(launcher, "_known_version", lambda: False)
        with mock.patch.object(JITFunction, "run", return_value=None) as ordinary:
            attention_forward(problem)
        ordinary.assert_called_once()


@pytest.mark.parametrize(
    ("version", "known"),
    [("3.5.1", False), ("3.6.0", True), ("3.7.1+git1234", True), ("3.9.0", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_versions(version: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher._known_version.cache_clear()
    monkeypatch.setattr(triton, "__version__", version)
    assert launcher._known_version() is known
    launcher._known_version.cache_clear()


def test_scalars_in_another_order_are_an_error() -> None:
    query = torch.zeros(1, 4, 16, 16)
    with stubbed_driver(), pytest.raises(TypeError, match="QUERY_GROUPS"):
        launcher.launch(rotary.rotary_kernel, 1, (query, query), constants(D=16), TILES=1, QUERY_GROUPS=1, KEY_GROUPS=1)


def test_the_stub_leaves_nothing_behind() -> None:
    with stubbed_driver():
        _rotate()
        assert rotary.rotary_kernel.device_caches
    assert not rotary.rotary_kernel.device_caches and not launcher._compiled

"""The Triton softmax, rotary and additive kernels compiled for GPUs that are not here: they fit, and do not spill.

A row of up to 16384 columns is held in registers, so a spill would be the end of the one pass over memory that these
kernels are for.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from fastattn.additive_problem import ADDITIVE_GRADIENT_FIELDS, AdditiveProblem
from fastattn.problem import Problem
from fastattn.softmax_problem import SOFTMAX_GRADIENT_FIELDS, SoftmaxProblem

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from aot_baseline import ALL, SHARED, UPDATE, baseline, hold  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastattn.triton_kernels import aot  # noqa: E402
from fastattn.triton_kernels.additive import additive_backward, additive_forward  # noqa: E402
from fastattn.triton_kernels.masked_softmax import softmax_forward  # noqa: E402
from fastattn.triton_kernels.rotary import rotate  # noqa: E402
from fastattn.triton_kernels.softmax_gradients import softmax_backward  # noqa: E402

BATCH, HEADS, ROWS = 2, 4, 64


def _softmax(columns: int, dtype: torch.dtype, features: str) -> list[aot.Launch]:
    fields: dict[str, object] = {}
    if features == "causal":
        fields = {"window_right": 0, "query_offset": columns - ROWS}
    elif features == "everything":
        integers = torch.zeros(BATCH, dtype=torch.int64)
        fields = {
            "query_offsets": integers, "window_left": 5, "window_right": 3, "key_lengths": integers,
            "prefix_lengths": integers, "query_ids": torch.zeros(BATCH, ROWS, dtype=torch.int64),
            "key_ids": torch.zeros(BATCH, columns, dtype=torch.int64),
            "dense_mask": torch.ones(BATCH, 1, ROWS, columns, dtype=torch.bool), "slopes": torch.ones(1, HEADS),
            "table": torch.ones(1, HEADS, 33), "table_left": 16, "dense_bias": torch.ones(1, HEADS, ROWS, columns),
        }  # fmt: skip
    scores = torch.empty(BATCH, HEADS, ROWS, columns, dtype=dtype)
    problem = SoftmaxProblem(scores=scores, **fields)  # type: ignore[arg-type]
    with aot.record_launches() as caught:
        softmax_forward(problem)
        wanted = frozenset(name for name in SOFTMAX_GRADIENT_FIELDS if getattr(problem, name) is not None)
        softmax_backward(problem, torch.empty_like(scores), wanted)
    assert len(caught) == (4 if features == "everything" else 2)
    return caught


def _rotary(dim: int, dtype: torch.dtype, *, interleaved: bool) -> list[aot.Launch]:
    query, key = torch.empty(BATCH, 16, 256, dim, dtype=dtype), torch.empty(BATCH, 4, 256, dim, dtype=dtype)
    table = torch.empty(1, 256, dim // 2)
    with aot.record_launches() as caught:
        rotate(query, key, (table,) * 4, interleaved=interleaved)
    return caught


def _rule(features: str) -> Callable[[str, aot.Resources], str | None]:
    """Nothing spills, but every mask and bias at once beside 16384 columns (40 bytes on sm_86, 72 on sm_120)."""
    return lambda kernel, took: "spills" if took.stack and features != "everything" else None


def _additive(dim: int, dtype: torch.dtype, features: str) -> list[aot.Launch]:
    fields: dict[str, object] = {}
    if features == "everything":
        fields = {
            "window_right": 0, "key_lengths": torch.zeros(BATCH, dtype=torch.int64), "slopes": torch.ones(1, HEADS),
            "table": torch.ones(1, HEADS, 33), "table_left": 16, "dense_bias": torch.ones(1, HEADS, ROWS, ROWS),
            "dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64),
        }  # fmt: skip
    query, key = (torch.empty(BATCH, heads, ROWS, dim, dtype=dtype) for heads in (HEADS, 2))
    attention = Problem(query=query, key=key, value=key, scale=1.0, **fields)  # type: ignore[arg-type]
    problem = AdditiveProblem(weight=torch.ones(1, HEADS, dim), attention=attention)
    wanted = [n for n in ADDITIVE_GRADIENT_FIELDS if n == "weight" or getattr(attention, n) is not None]
    with aot.record_launches() as caught:
        out, lse, statistics = additive_forward(problem)
        additive_backward(problem, out, lse, out, statistics, frozenset(wanted))
    assert len(caught) == (6 if features == "everything" else 4)
    return caught


# columns: several rows a program, one row a program, the longest row in registers, parts of rows
HALF_COLUMNS = ((128, torch.float16), *((columns, torch.bfloat16) for columns in (1000, 4096, 16384, 17000)))
SOFTMAX = [
    (arch, columns, dtype, features)
    for arch in SHARED
    for columns, dtype in (*HALF_COLUMNS, (16384, torch.float32))
    for features in ("plain", "causal", "everything")
]
SOFTMAX_REPRESENTATIVE = [
    (80, 128, torch.float16, "causal"),
    (90, 1000, torch.bfloat16, "everything"),
    (80, 4096, torch.bfloat16, "causal"),
    (80, 16384, torch.float32, "everything"),
    (90, 16384, torch.bfloat16, "plain"),
    (120, 17000, torch.bfloat16, "everything"),
]
ROTARY = [(arch, dim, interleaved) for arch in SHARED for dim in (64, 128, 256) for interleaved in (False, True)]
ROTARY_REPRESENTATIVE = [(80, 128, False), (90, 64, True), (120, 256, False)]


def _softmax_name(arch: int, columns: int, dtype: torch.dtype, features: str) -> str:
    return f"sm_{arch} softmax {columns} {str(dtype).removeprefix('torch.')} {features}"


def _rotary_name(arch: int, dim: int, interleaved: bool) -> str:
    return f"sm_{arch} rotary {dim} {'interleaved' if interleaved else 'half'}"


@pytest.mark.parametrize(("arch", "columns", "dtype", "features"), SOFTMAX if ALL else SOFTMAX_REPRESENTATIVE)
def test_softmax(arch: int, columns: int, dtype: torch.dtype, features: str) -> None:
    name = _softmax_name(arch, columns, dtype, features)
    problems = hold(name, arch, _softmax(columns, dtype, features), _rule(features))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("arch", "dim", "interleaved"), ROTARY if ALL else ROTARY_REPRESENTATIVE)
def test_rotary(arch: int, dim: int, interleaved: bool) -> None:
    name = _rotary_name(arch, dim, interleaved)
    problems = hold(name, arch, _rotary(dim, torch.bfloat16, interleaved=interleaved), _rule("plain"))
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(UPDATE, reason="the baseline is being written")
def test_the_baseline_is_of_every_case() -> None:
    cases = {_softmax_name(*case) for case in SOFTMAX} | {_rotary_name(*case) for case in ROTARY}
    assert set(SOFTMAX_REPRESENTATIVE) <= set(SOFTMAX) and set(ROTARY_REPRESENTATIVE) <= set(ROTARY)
    for figures in baseline().values():
        held = {name.rpartition(" ")[0] for name in figures if " D" not in name}
        assert held == cases


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "features", "stack"),
    [
        (80, 64, torch.float16, "everything", 32),
        (90, 64, torch.float32, "plain", 0),
        (90, 128, torch.bfloat16, "plain", 8),
        (120, 256, torch.bfloat16, "plain", 8),
    ],
)
def test_additive(arch: int, dim: int, dtype: torch.dtype, features: str, stack: int) -> None:
    for launch in _additive(dim, dtype, features):
        took = aot.resources(aot.compile_launch(launch, GPUTarget("cuda", arch, 32)))
        assert took.stack <= stack, f"{launch.kernel.__name__} spills: {took}"
        assert took.shared <= SHARED[arch], f"{launch.kernel.__name__}: {took}"


def test_amd_compiles() -> None:
    rows = (*_softmax(1000, torch.float16, "everything"), *_rotary(128, torch.float16, interleaved=False))
    for launch in (*rows, *_additive(64, torch.float16, "plain")):
        assert aot.compile_launch(launch, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]


def test_the_softmax_sees_an_attention_problem_without_width() -> None:
    """Masks and biases are shared with attention through it."""
    problem = SoftmaxProblem(scores=torch.empty(2, 3, 4, 5), scale=0.5, window_right=0).attention()
    assert isinstance(problem, Problem) and problem.query.shape == (2, 3, 4, 0) and problem.key.shape == (2, 3, 5, 0)
    assert (problem.scale, problem.window_right, problem.features()) == (0.5, 0, ["causal"])

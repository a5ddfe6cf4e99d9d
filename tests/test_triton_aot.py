"""Every Triton attention kernel compiled for GPUs that are not here, held to a baseline of what the compiler made.

`make aot` compiles every kernel, feature, table row and architecture; by default a set that has every row of the tile
table, every feature and every kernel once.  See aot_baseline.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.functional import lower
from fastattn.positional.deberta import Disentangled
from fastattn.positional.shaw import ShawKeys
from fastattn.problem import GRADIENT_FIELDS

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from aot_baseline import ALL, SHARED, UPDATE, baseline, hold  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from fastattn.triton_kernels import (  # noqa: E402
    aot,
    attention,
    attention_backward,
    attention_forward,
    bias_gradient,
    content_tables,
    spans,
)
from fastattn.triton_kernels.attention_gradients import attention_backward as backward  # noqa: E402

HEADS = 4
WITHOUT_PRODUCTS = ("attention_delta_kernel", "table_gradient_fold_kernel", "spans_kernel")
# Keywords of a call with heads of this dimension.
FEATURES: dict[str, Callable[[int], dict[str, object]]] = {
    "plain": lambda dim: {},
    "causal": lambda dim: {"mask": fastattn.Causal()},
    "t5": lambda dim: {"bias": fastattn.T5Bias(torch.zeros(32, HEADS))},
    "t5_causal": lambda dim: {"bias": fastattn.T5Bias(torch.zeros(32, HEADS)), "mask": fastattn.Causal()},
    "alibi_causal": lambda dim: {"bias": fastattn.ALiBi(torch.zeros(HEADS)), "mask": fastattn.Causal()},
    "dense_bias": lambda dim: {"bias": fastattn.DenseBias(torch.zeros(1, HEADS, 256, 256, dtype=torch.float16))},
    "window": lambda dim: {"mask": fastattn.SlidingWindow(64, 0)},
    "documents": lambda dim: {"mask": fastattn.Documents(torch.zeros(256, dtype=torch.int64))},
    "dropout_sink_softcap": lambda dim: {"dropout_p": 0.1, "sink": torch.zeros(HEADS), "softcap": 30.0},
    "row_table_causal": lambda dim: {"bias": ShawKeys(torch.zeros(33, dim)), "mask": fastattn.Causal()},
    "row_and_col_table": lambda dim: {
        "bias": Disentangled(*[torch.zeros(HEADS, 64, dim)] * 2, max_distance=128, buckets=32)
    },
}
# The first of them are compiled once each by default, at one row of the tile table; then these.
TABLES = ("row_table_causal", "row_and_col_table")


@dataclasses.dataclass(frozen=True)
class Case:
    arch: int
    head_dim: int
    dtype: torch.dtype
    feature: str

    def __str__(self) -> str:
        return f"sm_{self.arch} D{self.head_dim} {str(self.dtype).removeprefix('torch.')} {self.feature}"


def _every_case() -> list[Case]:
    half, single = torch.float16, torch.float32
    grid = itertools.product(SHARED, (64, 128, 256), FEATURES)
    cases = [Case(arch, dim, half, feature) for arch, dim, feature in grid]
    # padded inside to a row's head dimension
    cases += [Case(a, d, half, f) for a in SHARED for d in (32, 96, 192) for f in ("plain", "causal")]
    return cases + [Case(arch, dim, single, "plain") for arch in SHARED for dim in (64, 128, 256)]


def _representative_cases() -> list[Case]:
    """Every row of the table (three classes of shared memory, three head dimensions), every feature, every kernel."""
    half = torch.float16
    rows = itertools.product((80, 86, 90), (64, 128, 256))
    cases = [Case(arch, dim, half, feature) for (arch, dim), feature in zip(rows, FEATURES, strict=False)]
    cases += [Case(90, 64, half, feature) for feature in TABLES]
    cases += [Case(arch, dim, half, "causal") for arch, dim in ((100, 64), (120, 128))]
    cases += [Case(90, dim, half, "plain") for dim in (64, 128, 192)]
    return [*cases, Case(80, 64, half, "t5_causal"), Case(80, 128, torch.float32, "plain")]


def _launches(case: Case) -> list[aot.Launch]:
    query: Tensor = torch.empty(2, HEADS, 256, case.head_dim, dtype=case.dtype)
    problem = lower(query, query.clone(), query.clone(), **FEATURES[case.feature](case.head_dim))
    wanted = frozenset(name for name in GRADIENT_FIELDS if getattr(problem, name) is not None)
    with (
        mock.patch.object(attention, "target", return_value=(divmod(case.arch, 10), SHARED[case.arch])),
        aot.record_launches() as caught,
    ):
        out, _, statistics = attention.attention_forward(problem)
        backward(problem, torch.empty_like(out), None, out, statistics, wanted)
    return caught


def _rule(case: Case) -> Callable[[str, aot.Resources], str | None]:
    def broken(kernel: str, took: aot.Resources) -> str | None:
        if case.dtype != torch.float32 and kernel not in WITHOUT_PRODUCTS and took.mma == 0:
            return "no tensor core instruction"
        # 8 bytes of stack beside 40 registers, as of the delta kernel on sm_100, are a frame and not a spill
        if case.feature == "plain" and took.stack and took.registers >= 128:
            return "spills"
        return None

    return broken


@pytest.mark.parametrize("case", _every_case() if ALL else _representative_cases(), ids=str)
def test_resources(case: Case) -> None:
    """Fits the device, uses its tensor cores, does not spill where it must not, and takes no more than it took."""
    problems = hold(str(case), case.arch, _launches(case), _rule(case))
    assert not problems, "\n".join(problems)


@pytest.mark.skipif(UPDATE, reason="the baseline is being written")
def test_the_baseline_is_of_every_case() -> None:
    """Nothing is compared with what is not there, and no figure outlives its case."""
    cases = {str(case) for case in _every_case()}
    assert {str(case) for case in _representative_cases()} <= cases
    for figures in baseline().values():
        held = {name.rpartition(" ")[0] for name in figures if " D" in name}
        assert held == cases


def test_the_representative_set_has_every_kernel() -> None:
    launched = {launch.kernel.__name__ for case in _representative_cases() for launch in _launches(case)}
    modules = (attention_forward, attention_backward, bias_gradient, content_tables, spans)
    assert launched == {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def test_amd_compiles() -> None:
    for launch in _launches(Case(90, 64, torch.float16, "causal")):
        assert aot.compile_launch(launch, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]

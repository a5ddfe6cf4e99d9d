"""Every Triton attention kernel compiled for GPUs that are not here, held to a baseline of what the compiler made.

`make aot` compiles every kernel, feature, table row and architecture (AOT_ALL=1); by default a representative set.
AOT_UPDATE=1 writes the figures into the baseline instead of comparing: do so only for a change that is understood, and
say why in the commit.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from resource_baseline import add_to_baseline, read_baseline
from torch import Tensor

import fastattn
from fastattn.functional import lower
from fastattn.problem import GRADIENT_FIELDS

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: nothing is compiled", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from fastattn.triton_kernels import aot, attention, tiles  # noqa: E402
from fastattn.triton_kernels.attention_gradients import attention_backward  # noqa: E402

BASELINE = Path(__file__).parent / "resources" / "triton.json"
ALL = os.environ.get("AOT_ALL") == "1"
UPDATE = os.environ.get("AOT_UPDATE") == "1"

# Shared memory a block may use, bytes, by architecture.
SHARED = {80: tiles.MEDIUM, 86: tiles.SMALL, 90: tiles.LARGE, 100: tiles.LARGE, 120: tiles.SMALL}
HEADS = 4
FEATURES: dict[str, Callable[[], dict[str, object]]] = {
    "plain": dict,
    "causal": lambda: {"mask": fastattn.Causal()},
    "t5": lambda: {"bias": fastattn.T5Bias(torch.zeros(32, HEADS))},
    "t5_causal": lambda: {"bias": fastattn.T5Bias(torch.zeros(32, HEADS)), "mask": fastattn.Causal()},
    "alibi_causal": lambda: {"bias": fastattn.ALiBi(torch.zeros(HEADS)), "mask": fastattn.Causal()},
    "dense_bias": lambda: {"bias": fastattn.DenseBias(torch.zeros(1, HEADS, 256, 256, dtype=torch.float16))},
    "window": lambda: {"mask": fastattn.SlidingWindow(64, 0)},
    "documents": lambda: {"mask": fastattn.Documents(torch.zeros(256, dtype=torch.int64))},
    "dropout_sink_softcap": lambda: {"dropout_p": 0.1, "sink": torch.zeros(HEADS), "softcap": 30.0},
}


@dataclasses.dataclass(frozen=True)
class Case:
    arch: int
    head_dim: int
    dtype: torch.dtype
    feature: str

    def __str__(self) -> str:
        return f"sm_{self.arch} D{self.head_dim} {str(self.dtype).removeprefix('torch.')} {self.feature}"


def _cases() -> list[Case]:
    half, single = torch.float16, torch.float32
    if ALL:
        cases = [Case(arch, dim, half, feature) for arch in SHARED for dim in (64, 128, 256) for feature in FEATURES]
        return cases + [Case(arch, dim, single, "causal") for arch in SHARED for dim in (64, 128, 256)]
    cases = [Case(a, d, half, f) for a in (80, 90) for d in (64, 128) for f in ("plain", "t5_causal")]
    cases += [Case(arch, 64, half, "causal") for arch in (86, 100, 120)]
    cases += [Case(90, 256, half, "plain"), Case(80, 64, single, "plain"), Case(90, 64, torch.bfloat16, "dense_bias")]
    return cases


def _launches(case: Case) -> list[aot.Launch]:
    query: Tensor = torch.empty(2, HEADS, 256, case.head_dim, dtype=case.dtype)
    problem = lower(query, query.clone(), query.clone(), **FEATURES[case.feature]())
    wanted = frozenset(name for name in GRADIENT_FIELDS if getattr(problem, name) is not None)
    with (
        mock.patch.object(attention, "shared_memory", return_value=SHARED[case.arch]),
        aot.record_launches() as caught,
    ):
        out, _, statistics = attention.attention_forward(problem)
        attention_backward(problem, torch.empty_like(out), None, out, statistics, wanted)
    return caught


@pytest.mark.parametrize("case", _cases(), ids=str)
def test_resources(case: Case) -> None:
    """Fits the device, uses its tensor cores, does not spill where it must not, and takes no more than it took."""
    known = read_baseline(BASELINE, triton.__version__)
    found: dict[str, list[int]] = {}
    problems = []
    for launch in _launches(case):
        name = f"{case} {launch.kernel.__name__}"
        took = aot.resources(aot.compile_launch(launch, GPUTarget("cuda", case.arch, 32)))
        found[name] = list(dataclasses.astuple(took))
        if took.shared > SHARED[case.arch]:
            problems.append(f"{name}: {took.shared} bytes of shared memory, the device has {SHARED[case.arch]}")
        if case.dtype != torch.float32 and "delta" not in name and took.mma == 0:
            problems.append(f"{name}: no tensor core instruction")
        if case.feature == "plain" and took.stack:
            problems.append(f"{name}: spills, stack {took.stack}")
        if name in known and not UPDATE:
            registers, stack, shared, instructions, _ = known[name]
            if took.registers > registers or took.stack > stack or took.shared > shared:
                problems.append(f"{name}: {took}, the baseline has {known[name]}")
            if took.instructions > 1.05 * instructions:
                problems.append(f"{name}: {took.instructions} instructions, the baseline has {instructions}")
        elif known and not UPDATE and not ALL:
            problems.append(f"{name}: not in the baseline; run this test with AOT_UPDATE=1")
    if UPDATE:
        add_to_baseline(BASELINE, triton.__version__, found)
    assert not problems, "\n".join(problems)


def test_amd_compiles() -> None:
    for launch in _launches(Case(90, 64, torch.float16, "causal")):
        assert aot.compile_launch(launch, GPUTarget("hip", "gfx942", 64)).asm["hsaco"]

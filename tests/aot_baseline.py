"""What the compiler made of the Triton kernels, held to tests/resources/triton.json.

The baseline has, by Triton version and by case, registers a thread, stack bytes, shared memory, instructions, and
tensor core instructions.  A version of Triton that is not in it is held to the absolute rules of the tests alone.
AOT_UPDATE=1 writes the figures instead of comparing them: do so only for a change that is understood, and say why in
the commit.  AOT_ALL=1 compiles every case instead of a representative set.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import triton
from resource_baseline import Figures, add_to_baseline, read_baseline, read_versions
from triton.backends.compiler import GPUTarget

from fastattn.triton_kernels import aot, tiles

BASELINE = Path(__file__).parent / "resources" / "triton.json"
ALL = os.environ.get("AOT_ALL") == "1"
UPDATE = os.environ.get("AOT_UPDATE") == "1"

# Shared memory a block may use, bytes, by architecture.
SHARED = {80: tiles.MEDIUM, 86: tiles.SMALL, 90: tiles.LARGE, 100: tiles.LARGE, 120: tiles.SMALL}


def baseline() -> dict[str, Figures]:
    return read_versions(BASELINE)


def hold(
    case: str, arch: int, launches: Iterable[aot.Launch], rule: Callable[[str, aot.Resources], str | None]
) -> list[str]:
    """Compile the launches of a case; what is wrong with them, by the baseline and by `rule`.

    Args:
        rule: given a kernel's name and what it takes, says what may not be whatever the baseline has.
    """
    known = read_baseline(BASELINE, triton.__version__)
    found: Figures = {}
    problems = []
    for launch in launches:
        kernel = launch.kernel.__name__
        name = f"{case} {kernel}"
        took = aot.resources(aot.compile_launch(launch, GPUTarget("cuda", arch, 32)))
        # a kernel that a case launches twice is held to the larger figures
        figures = dataclasses.astuple(took)
        found[name] = [max(pair) for pair in zip(found.get(name, figures), figures, strict=True)]
        if took.shared > SHARED[arch]:
            problems.append(f"{name}: {took.shared} bytes of shared memory, the device has {SHARED[arch]}")
        if (broken := rule(kernel, took)) is not None:
            problems.append(f"{name}: {broken}, {took}")
        if UPDATE or not known:
            continue
        if name not in known:
            problems.append(f"{name}: not in the baseline; run this test with AOT_UPDATE=1")
            continue
        registers, stack, shared, instructions, _ = known[name]
        if took.registers > registers or took.stack > stack or took.shared > shared:
            problems.append(f"{name}: {took}, the baseline has {known[name]}")
        if took.instructions > 1.05 * instructions:
            problems.append(f"{name}: {took.instructions} instructions, the baseline has {instructions}")
    if UPDATE:
        add_to_baseline(BASELINE, triton.__version__, found)
    return problems

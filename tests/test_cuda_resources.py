"""Every CUDA kernel instance compiled for GPUs that are not here, held to a baseline of what nvcc made of it.

`make aot` compiles all of them (AOT_ALL=1); by default a representative set.  AOT_UPDATE=1 writes the figures into the
baseline instead of comparing: do so only for a change that is understood, and say why in the commit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from resource_baseline import add_to_baseline, read_baseline

ROOT = Path(__file__).parent.parent
if not (ROOT / "build_cuda.py").exists():
    pytest.skip("not in a checkout: no kernel sources", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed, and with it no cuobjdump")
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
from build_objects import Unit  # noqa: E402
from fastattn.triton_kernels.machine_code import MachineCode, read_machine_code  # noqa: E402

NVCC = build_cuda.find_nvcc()
if NVCC is None:
    pytest.skip("nvcc is neither in CUDA_HOME nor on PATH", allow_module_level=True)

BASELINE = ROOT / "tests" / "resources" / "cuda.json"
ALL = os.environ.get("AOT_ALL") == "1"
UPDATE = os.environ.get("AOT_UPDATE") == "1"
ARCHS = ("80", "90a")
# One of each kind, the smallest of those that are alike but for the head dimension.
REPRESENTATIVE = {
    "80": (
        "forward_f16_d64", "backward_kv_f16_d64", "backward_q_bf16_d64", "decode_f16_d64", "attention_delta",
        "rotary_bf16", "softmax_forward_bf16", "softmax_backward_f16", "part_sum",
    ),
    "90a": ("forward_bf16_d128", "softmax_forward_f32", "line_sum_f16"),
}  # fmt: skip
# Kernels of products: they must use the tensor cores, and fill them through ldmatrix and cp.async.
WITH_PRODUCTS = ("forward", "backward_kv", "backward_q", "decode", "parameter_gradient")


def _cases() -> list[tuple[str, str]]:
    if not ALL:
        return [(name, arch) for arch, names in REPRESENTATIVE.items() for name in names]
    # those of sm_90a alone are held to more, in test_hopper_machine_code.py
    names = [path.stem for path in build_cuda.instances() if not path.stem.startswith("hopper_")]
    return [(name, arch) for name in names for arch in ARCHS]


def _figures(code: MachineCode) -> list[int]:
    """Registers, stack, static shared memory, instructions, tensor core products, ldmatrix, cp.async."""
    counts = [code.products, code.opcodes["LDSM"], code.opcodes["LDGSTS"]]
    return [code.registers, code.stack, code.shared, code.instructions, *counts]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), _cases(), ids=str)
def test_resources(name: str, arch: str) -> None:
    """Does not spill, uses the tensor cores, and takes no more than it took."""
    source = ROOT / "csrc" / "cuda" / "instances" / f"{name}.cu"
    # kept between runs, and compiled again only when something it is made from changed
    target = ROOT / "build" / "cubin" / arch / f"{name}.cubin"
    target.parent.mkdir(parents=True, exist_ok=True)
    Unit((NVCC, *build_cuda.NVCC_FLAGS, f"-arch=sm_{arch}"), source, target, mode="-cubin").compile()
    code = read_machine_code(target)
    found, kernel = _figures(code), f"sm_{arch} {name}"
    problems = []
    if code.stack:
        problems.append(f"spills: {code.stack} bytes of stack")
    if name.startswith(WITH_PRODUCTS) and not (code.products and code.opcodes["LDSM"] and code.opcodes["LDGSTS"]):
        problems.append(f"no tensor core product, ldmatrix or cp.async: {found}")
    known = read_baseline(BASELINE, f"nvcc {build_cuda.release(NVCC)}")
    if UPDATE:
        add_to_baseline(BASELINE, f"nvcc {build_cuda.release(NVCC)}", {kernel: found})
    elif kernel in known:
        registers, stack, shared, instructions, *_ = known[kernel]
        if code.registers > registers or code.stack > stack or code.shared > shared:
            problems.append(f"{found}, the baseline has {known[kernel]}")
        if code.instructions > 1.05 * instructions:
            problems.append(f"{code.instructions} instructions, the baseline has {instructions}")
    elif known:
        problems.append("not in the baseline; run this test with AOT_UPDATE=1")
    assert not problems, f"{kernel}: {'; '.join(problems)}"

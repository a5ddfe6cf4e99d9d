"""What nvcc makes of the sm_90a kernels: products that run asynchronously, exponentials beside them, no spills.

Nothing of this shows in numbers, and all of it can be lost by an innocent change: a register too many spills, a read of
an accumulator too early and ptxas waits after every product, an exponential that it moves and nothing overlaps.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from resource_baseline import add_to_baseline, read_baseline

ROOT = Path(__file__).parent.parent
if not (ROOT / "build_cuda.py").exists():
    pytest.skip("not in a checkout: no kernel sources", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed, and with it no nvdisasm")
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
from build_objects import Unit  # noqa: E402
from fastattn.triton_kernels.machine_code import disassemble  # noqa: E402

NVCC = build_cuda.find_nvcc()
if NVCC is None:
    pytest.skip("nvcc is neither in CUDA_HOME nor on PATH", allow_module_level=True)

BASELINE = ROOT / "tests" / "resources" / "cuda.json"
ALL = os.environ.get("AOT_ALL") == "1"
UPDATE = os.environ.get("AOT_UPDATE") == "1"
INSTANCES = [path.stem for path in build_cuda.instances() if path.stem.startswith("hopper_")]
UNPINNED = "hopper_forward_unpinned_bf16_d128"
REPRESENTATIVE = [
    "hopper_forward_plain_bf16_d64", "hopper_forward_plain_bf16_d128", "hopper_forward_plain_f16_d256",
    "hopper_forward_f16_d128", UNPINNED, "hopper_backward_q_plain_bf16_d128", "hopper_backward_kv_plain_bf16_d128",
    "hopper_backward_kv_f16_d128", "hopper_backward_q_bf16_d256", "hopper_backward_kv_plain_f16_d192",
    "hopper_forward_plain_e4m3_d128", "hopper_forward_e4m3_d64", "hopper_forward_plain_e4m3_d256",
]  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What an instance must consist of; tiles and registers as csrc/cuda/hopper/tiles.h has them."""

    products: int
    waits: int  # for products
    loads: int  # panels that copies bring, by place in the code
    stores: int
    beside: list[int]  # least exponentials at each place where a product is under way beside them
    consumer_registers: int = 240
    producer_registers: int = 24
    # least exponentials, those of a softcap included, between the wait for scores and the next, where the product that
    # is under way beside them is issued after the former
    after_scores: int = 0
    opcode: str = "HGMMA"
    turns: int = 0  # ldmatrix that transpose values


FORWARD_KEYS = {
    True: {64: 128, 96: 128, 128: 128, 192: 112, 256: 80},
    False: {64: 128, 96: 128, 128: 128, 192: 96, 256: 64},
}
E4M3_KEYS = {True: {64: 128, 128: 128, 256: 64}, False: {64: 128, 128: 64, 256: 64}}
Q_KEYS = {
    True: {64: 128, 96: 96, 128: 80, 192: 80, 256: 48},
    False: {64: 64, 96: 64, 128: 64, 192: 64, 256: 48},
}
KV_QUERIES = {
    True: {64: 64, 96: 64, 128: 64, 192: 96, 256: 64},
    False: {64: 64, 96: 32, 128: 32, 192: 80, 256: 64},
}


def expected(name: str) -> Expected:
    dim = int(name.rpartition("_d")[2])
    if "e4m3" in name:
        return expected_of_8_bits(dim, "plain" in name)
    plain, panels, steps = "plain" in name or "unpinned" in name, dim // (64 if dim % 64 == 0 else 32), dim // 16
    if "forward" in name:
        keys = FORWARD_KEYS[plain][dim]
        # scores of the first tile, of a tile with masks, of one without: the same code where masks are a branch
        sites = 3 if plain else 2
        registers = (160, 32) if plain and dim == 64 else (240, 24)
        # a wait after the first scores, two for each further tile, one after the last product
        return Expected(
            sites * (steps + keys // 16), 2 * sites, 3 * panels, panels, [keys // 2 + 2] * (sites - 1), *registers
        )
    # under a softcap the scores are computed twice, and waited for
    again = 0 if plain else 1
    if "backward_q" in name:
        keys = Q_KEYS[plain][dim]
        products = (2 + again) * steps + keys // 16
        if dim > 128 and not plain:
            return Expected(products, 3 + again, 4 * panels, panels, [], after_scores=keys)
        return Expected(products, 3 + again, 4 * panels, panels, [keys // 2])
    queries = KV_QUERIES[plain][dim]
    products = (2 + again) * steps + 2 * (queries // 16)
    if dim > 128:
        # each of two groups waits for its accumulation, its product and its last accumulation; exponentials run beside
        # the other group's products
        return Expected(products, 6 + again, 4 * panels, 2 * panels, [0, 0])
    return Expected(products, 3 + again, 4 * panels, 2 * panels, [queries // 2])


def expected_of_8_bits(dim: int, plain: bool) -> Expected:
    keys, sites = E4M3_KEYS[plain][dim], 3 if plain else 2
    products = sites * (dim // 32 + keys // 32)
    panels = max(dim // 128, 1)  # of 128 bytes, or of all there are
    return Expected(
        products, 2 * sites, 3 * panels, max(dim // 64, 1), [keys // 2 + 2] * (sites - 1),
        *((224, 56) if dim == 256 else (232, 40)), opcode="QGMMA", turns=2 * (dim // 32),  # with care and without
    )  # fmt: skip


def instruction(line: str) -> str | None:
    found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
    return found[1] if found else None


@dataclass(frozen=True)
class Compiled:
    said: str  # by ptxas
    code: list[str]  # in the order of addresses

    def count(self, word: str) -> int:
        return sum(word in line for line in self.code)

    def after_the_first_wait(self, word: str) -> int:
        """How many of an instruction lie between the first wait for products and the second."""
        waits = [n for n, line in enumerate(self.code) if "WARPGROUP.DEPBAR" in line]
        return sum(word in line for line in self.code[waits[0] : waits[1]])

    def beside_the_second_product(self, word: str) -> list[int]:
        """How many of an instruction lie between the wait for scores and the wait for the product under way beside."""
        counts, inside = [], False
        for line in self.code:
            if "WARPGROUP.DEPBAR" in line:
                inside = "gsb0, 0x1" in line
                counts += [0] * inside
            elif inside:
                counts[-1] += word in line
        return counts


@cache
def compiled(name: str) -> Compiled:
    target = ROOT / "build" / "cubin" / "90a" / f"{name}.cubin"
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log")
    source = ROOT / "csrc" / "cuda" / "instances" / f"{name}.cu"
    unit = Unit((NVCC, *build_cuda.NVCC_FLAGS, "-arch=sm_90a", "-Xptxas", "-v"), source, target, mode="-cubin")
    if not (unit.is_current() and log.exists()):
        result = subprocess.run(unit.line(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        log.write_text(result.stderr)
        unit.stamp.write_text(str(unit.line()))
    return Compiled(log.read_text(), [text for line in disassemble(target).splitlines() if (text := instruction(line))])


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES if ALL else REPRESENTATIVE)
def test_machine_code(name: str) -> None:
    made, wanted = compiled(name), expected(name)
    # "Potential Performance Loss": products one after the other, or waits that the source does not have
    assert not re.search(r"C75\d\d|Potential Performance Loss", made.said), made.said
    assert "0 bytes spill stores, 0 bytes spill loads" in made.said
    assert made.count("LDL") == made.count("STL") == 0

    assert made.count("GMMA") == made.count(wanted.opcode) == wanted.products
    assert made.count("LDSM") == wanted.turns
    assert made.count("WARPGROUP.DEPBAR") == wanted.waits
    assert made.count("UTMALDG") == wanted.loads
    assert made.count("UTMASTG") == wanted.stores
    taken = [int(line.split()[-1], 16) for line in made.code if "USETMAXREG" in line]
    assert sorted(taken) == [wanted.producer_registers, wanted.consumer_registers]

    beside = made.beside_the_second_product("MUFU.EX2")
    assert len(beside) == len(wanted.beside)
    if "unpinned" in name:
        # what the pin is for: without it some loop keeps less than half, and this test would see it
        assert min(beside) < wanted.beside[0] // 2
    else:
        assert all(found >= least for found, least in zip(beside, wanted.beside, strict=True)), beside

    assert made.after_the_first_wait("MUFU.EX2") >= wanted.after_scores

    figures = [max_register(made.code) + 1, len(made.code), *beside]
    kernel = f"sm_90a {name}"
    known = read_baseline(BASELINE, f"nvcc {build_cuda.release(NVCC)}")
    if UPDATE:
        add_to_baseline(BASELINE, f"nvcc {build_cuda.release(NVCC)}", {kernel: figures})
    elif known:
        assert kernel in known, "not in the baseline; run this test with AOT_UPDATE=1"
        assert figures[0] <= known[kernel][0], f"registers: {figures}, the baseline has {known[kernel]}"
        assert figures[1] <= 1.05 * known[kernel][1], f"instructions: {figures}, the baseline has {known[kernel]}"


def max_register(code: list[str]) -> int:
    return max(int(n) for line in code for n in re.findall(r"\bR(\d+)\b", line))

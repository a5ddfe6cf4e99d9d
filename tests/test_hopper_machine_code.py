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
    "hopper_forward_f16_d128", UNPINNED,
]  # fmt: skip


@dataclass(frozen=True)
class Tiles:
    """As csrc/cuda/hopper/tiles.h has them; registers as setmaxnreg asks for them."""

    keys: int
    consumer_registers: int = 240
    producer_registers: int = 24


PLAIN = {64: Tiles(128, 160, 32), 96: Tiles(128), 128: Tiles(128), 192: Tiles(112), 256: Tiles(80)}
FULL = {64: Tiles(128), 96: Tiles(128), 128: Tiles(128), 192: Tiles(96), 256: Tiles(64)}


def instruction(line: str) -> str | None:
    found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
    return found[1] if found else None


@dataclass(frozen=True)
class Compiled:
    said: str  # by ptxas
    code: list[str]  # in the order of addresses

    def count(self, word: str) -> int:
        return sum(word in line for line in self.code)

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


def tiles_of(name: str) -> tuple[int, Tiles]:
    dim = int(name.rpartition("_d")[2])
    return dim, (PLAIN if "plain" in name or "unpinned" in name else FULL)[dim]


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTANCES if ALL else REPRESENTATIVE)
def test_machine_code(name: str) -> None:
    made, (dim, tiles) = compiled(name), tiles_of(name)
    full = tiles == FULL[dim] and "plain" not in name and "unpinned" not in name
    # "Potential Performance Loss": products one after the other, or waits that the source does not have
    assert not re.search(r"C75\d\d|Potential Performance Loss", made.said), made.said
    assert "0 bytes spill stores, 0 bytes spill loads" in made.said
    assert made.count("LDL") == made.count("STL") == 0

    # scores of the first tile, of a tile with masks, of one without: the same code where masks are a branch
    sites = 2 if full else 3
    assert made.count("HGMMA") == sites * (dim // 16 + tiles.keys // 16)
    # a wait after the first scores, two for each further tile, one after the last product
    assert made.count("WARPGROUP.DEPBAR") == 2 + 2 * (sites - 1)
    panels = dim // (64 if dim % 64 == 0 else 32)
    assert made.count("UTMALDG") == 3 * panels
    assert made.count("UTMASTG") == panels
    taken = [int(line.split()[-1], 16) for line in made.code if "USETMAXREG" in line]
    assert sorted(taken) == [tiles.producer_registers, tiles.consumer_registers]

    beside = made.beside_the_second_product("MUFU.EX2")
    assert len(beside) == sites - 1
    if "unpinned" in name:
        # what the pin is for: without it some loop keeps next to none, and this test would see it
        assert min(beside) < tiles.keys // 8
    else:
        assert min(beside) >= tiles.keys // 2 + 2

    figures = [max_register(made.code) + 1, len(made.code), *beside]
    kernel = f"sm_90a {name}"
    known = read_baseline(BASELINE, build_cuda.nvcc_version(NVCC))
    if UPDATE:
        add_to_baseline(BASELINE, build_cuda.nvcc_version(NVCC), {kernel: figures})
    elif known:
        assert kernel in known, "not in the baseline; run this test with AOT_UPDATE=1"
        assert figures[0] <= known[kernel][0], f"registers: {figures}, the baseline has {known[kernel]}"
        assert figures[1] <= 1.05 * known[kernel][1], f"instructions: {figures}, the baseline has {known[kernel]}"


def max_register(code: list[str]) -> int:
    return max(int(n) for line in code for n in re.findall(r"\bR(\d+)\b", line))

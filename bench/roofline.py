"""How fast could a case be: its arithmetic at the peak rate or its bytes at the memory's, whichever takes longer.

The peak rate is measured in the same run (ceilings.py): on a CPU independent multiply-adds of one core times the
threads, of the dtype that the kernels compute in; on a GPU an 8192^3 matrix product.  The memory's rate is that of a
reduction on a CPU, where most of what is moved is read, and of a copy on a GPU.  A case that stays in a cache can be
faster than this memory: its fraction is above 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastattn.bench.ceilings import Ceilings
from fastattn.bench.results import Environment, Row, make_row
from fastattn.bench.scenario import Case, Shape


@dataclass(frozen=True)
class Roof:
    """FLOP/s by name of the dtype and bytes per second, and what each was measured with."""

    flops: dict[str, float]
    flops_name: str
    bytes_per_s: float
    bytes_name: str

    def seconds(self, flops: float, moved: float, dtype: str) -> tuple[float, str]:
        """The least time, and the name of the ceiling that sets it; "" where nothing was measured for it."""
        arithmetic = flops / self.flops[dtype] if dtype in self.flops else 0.0
        memory = moved / self.bytes_per_s
        return (arithmetic, self.flops_name) if arithmetic >= memory else (memory, self.bytes_name)


def roof(found: Ceilings, device: str, threads: int) -> Roof:
    """The ceilings of a whole device; float16 on a CPU is computed in float32."""
    if device == "cuda":
        halves = dict.fromkeys(("bfloat16", "float16"), found.matmul_flops)
        return Roof(halves, "matmul", found.copy_bytes, "copy")
    peaks = {dtype: rates["peak_flops"] * threads for dtype, rates in found.core.items()}
    if "float32" in peaks:
        peaks["float16"] = peaks["float32"]
        peaks["bfloat16"] = max(peaks["float32"], peaks.get("bfloat16", 0.0))
    return Roof(peaks, "fma", found.read_bytes, "read")


def ceiling_rows(where: Environment, found: Ceilings, device: str) -> list[Row]:
    """The ceilings as rows: what the fractions of this run are fractions of."""
    whole = roof(found, device, where.threads)
    size = found.matmul_size
    rows = [_row(where, "matmul", found.matmul_dtype, size, tflops=found.matmul_flops / 1e12)]
    rows += [_row(where, name, "float32", 0, gb_per_s=rate / 1e9) for name, rate in _rates(found).items()]
    if whole.flops_name != "matmul":
        rows += [_row(where, whole.flops_name, dtype, 0, tflops=rate / 1e12) for dtype, rate in whole.flops.items()]
    return rows


def _rates(found: Ceilings) -> dict[str, float]:
    return {"copy": found.copy_bytes, "read": found.read_bytes}


def _row(where: Environment, name: str, dtype: str, size: int, **rates: float) -> Row:
    case = Case("ceilings", name, Shape(1, 1, size, size, 0), getattr(torch, dtype))
    return make_row(where, case, "machine", "forward", status="ok", **rates)

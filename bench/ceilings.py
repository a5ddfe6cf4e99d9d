"""How fast could it be: the machine's own matrix product and copy; on a CPU also what one core of it does at best.

``python -m fastattn.bench.ceilings [--device cpu|cuda] [--out FILE.json]`` prints them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fastattn import native
from fastattn.bench.timing import Clock, Spread, make_clock


@dataclass(frozen=True)
class Ceilings:
    """Medians: matrix product in FLOP/s, device-to-device copy in bytes read plus written per second."""

    matmul_flops: float
    matmul_size: int
    matmul_dtype: str
    copy_bytes: float
    read_bytes: float  # bytes read per second, by whichever of torch's reductions is the fastest
    # by dtype, of one core: FLOP/s of independent multiply-adds and of this library's product on attention's tiles
    # (scores = Q K^T and values = P V, head dimension 64 and 128), and weights (maximum and exponential) per second
    core: dict[str, dict[str, float]] = field(default_factory=dict)


def core(*, seconds: float = 0.2) -> dict[str, dict[str, float]]:
    """The native CPU library's own loops, `seconds` for each number; empty where the library is not built.

    Least processor times of many: a neighbour can only add to them.
    """
    if not native.load_cpu_library():
        return {}
    dtypes = (torch.float32, torch.bfloat16)
    return {
        str(dtype).removeprefix("torch."): json.loads(
            torch.ops.fastattn.cpu_roofline(torch.empty(0, dtype=dtype), seconds)
        )
        for dtype in dtypes
    }


def measure(device: str, *, seconds: float = 1.0, size: int | None = None) -> Ceilings:
    """8192^3 in bf16 on a GPU; on a CPU 2048^3 in float32.  Random data: zeros run faster than anyone's numbers."""
    size = size or (8192 if device == "cuda" else 2048)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    elements = (1 << 30) if device == "cuda" else (1 << 26)
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    clock = make_clock(device)
    matmul = _median(lambda: torch.mm(a, b), clock, seconds)
    copy = _median(lambda: target.copy_(source), clock, seconds)
    square = source.view(1 << (elements.bit_length() // 2), -1)
    vector = torch.randn(square.shape[1], device=device)
    readers = (lambda: torch.mv(square, vector), lambda: torch.dot(source, source), lambda: source.sum())
    read = min(_median(reader, clock, seconds / len(readers)) for reader in readers)
    return Ceilings(
        matmul_flops=2.0 * size**3 / matmul,
        matmul_size=size,
        matmul_dtype=str(dtype).removeprefix("torch."),
        copy_bytes=2.0 * source.nbytes / copy,
        read_bytes=source.nbytes / read,
        core=core() if device == "cpu" else {},
    )


def _median(call: Callable[[], object], clock: Clock, seconds: float) -> float:
    samples: list[float] = []
    for turn in range(200):
        clock.start()
        call()
        clock.mark()
        (elapsed,) = clock.stop()
        if turn >= 3:  # warm-up
            samples.append(elapsed)
        if len(samples) >= 5 and sum(samples) > seconds:
            break
    return Spread.of(samples).median


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the matrix product and the copy of this machine.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    options = parser.parse_args()
    found = measure(options.device)
    print(f"{found.matmul_size}^3 matrix product, {found.matmul_dtype}: {found.matmul_flops / 1e12:.2f} TFLOP/s")
    print(f"copy, read plus written: {found.copy_bytes / 1e9:.1f} GB/s; read: {found.read_bytes / 1e9:.1f} GB/s")
    for dtype, numbers in found.core.items():
        rates = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in numbers.items())
        print(f"one core, {dtype}, in 1e9 per second: {rates}")
    if options.out:
        options.out.write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()

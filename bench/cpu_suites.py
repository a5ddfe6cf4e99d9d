"""The `cpu` group: what the CPU kernels are held to by goals.py, at the sizes that its goals speak of.

Two threads or more, at least 8 heads in all, lengths up to 8192.  The long cases are few, because one round of them
takes seconds; the whole group is sized for some ten minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.bench.modules import ATTENTION_SCENARIOS, ENCODER_SCENARIOS
from fastattn.bench.scenario import Case, Shape
from fastattn.bench.suite import Suite

HEADS = 8
TRAINING, FORWARD = ("forward", "both"), ("forward",)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OURS, WITHOUT = "fastattn", "fastattn-without"


def _shape(length: int, dim: int = 64, *, batch: int = 1, heads: int = HEADS) -> Shape:
    return Shape(batch, heads, length, length, dim)


def dense(device: str, quick: bool) -> Suite:
    """Plain attention, forward and backward, by length and width."""
    sizes: list[tuple[torch.dtype, int, int, tuple[str, ...]]]
    if quick:
        sizes = [(dtype, 64, 512, TRAINING) for dtype in (F32, BF16)]
    else:
        sizes = [
            *((dtype, 64, length, TRAINING) for dtype in (F32, BF16) for length in (512, 2048, 8192)),
            *((dtype, 128, length, TRAINING) for dtype in (F32, BF16) for length in (512, 2048, 4096)),
            (F16, 64, 8192, FORWARD),
        ]
    cases = [Case("cpu-dense", "plain", _shape(length, dim), dtype, ways) for dtype, dim, length, ways in sizes]
    return Suite("cpu-dense", "plain attention", tuple(cases), (OURS, "sdpa"), memory=False)


def half(device: str, quick: bool) -> Suite:
    """float16, where SDPA's own choice has a backward far slower than its math backend's.

    Training stops at 2048: a step takes SDPA's own choice a minute at 8192.
    """
    sizes = [(64, 512)] if quick else [(dim, length) for dim in (64, 128) for length in (512, 2048)]
    cases = [Case("cpu-half", "plain", _shape(length, dim), F16, TRAINING) for dim, length in sizes]
    return Suite("cpu-half", "plain attention, float16", tuple(cases), (OURS, "sdpa", "sdpa-math"), memory=False)


def backends(device: str, quick: bool) -> Suite:
    """Which of SDPA's backends is the fastest: its own choice, or one asked for by name."""
    length = 256 if quick else 1024
    cases = [Case("cpu-backends", "plain", _shape(length), dtype) for dtype in (F32, BF16, F16)]
    cases += [Case("cpu-backends", "causal", _shape(length), F32)]
    return Suite("cpu-backends", "SDPA's backends", tuple(cases), (OURS, "sdpa", "sdpa-flash", "sdpa-math"))


def causal(device: str, quick: bool) -> Suite:
    """Causal attention against SDPA's, and against our own without the mask."""
    sizes = [(512, 64)] if quick else [(512, 64), (2048, 64), (8192, 64), (2048, 128), (4096, 128)]
    cases = [Case("cpu-causal", "causal", _shape(*size), dtype, FORWARD) for dtype in (F32, BF16) for size in sizes]
    return Suite("cpu-causal", "causal attention", tuple(cases), (OURS, WITHOUT, "sdpa"), memory=False)


def sparse(device: str, quick: bool) -> Suite:
    """Masks that leave little to see; SDPA has to be given them densely."""
    length, batch = (1024, 4) if quick else (8192, 4)
    cases = [
        Case("cpu-sparse", "window", _shape(length), F32, FORWARD),
        Case("cpu-sparse", "documents", _shape(length), F32, FORWARD),
        Case("cpu-sparse", "lengths", _shape(length // 4, batch=batch), F32, FORWARD),
        Case("cpu-sparse", "window", _shape(length), BF16, FORWARD),
        *(Case("cpu-sparse", "left-padding", _shape(length // 4, batch=batch), dtype) for dtype in (F32, BF16)),
    ]
    if not quick:
        cases.insert(1, Case("cpu-sparse", "window", _shape(length // 4), F32, FORWARD))
    peers = (OURS, WITHOUT, "sdpa")
    return Suite("cpu-sparse", "windows, documents, lengths, padding", tuple(cases), peers, memory=False)


def bias(device: str, quick: bool) -> Suite:
    """Biases with the gradient of their parameters against our own call without them and SDPA with the dense bias."""
    sizes = [(512, F32)] if quick else [(512, F32), (2048, F32), (2048, BF16)]
    cases = [
        Case("cpu-bias", name, _shape(length), dtype)
        for name in ("t5", "alibi-learned", "table")
        for length, dtype in sizes
    ]
    return Suite("cpu-bias", "T5, ALiBi, distance table", tuple(cases), (OURS, WITHOUT, "sdpa", "sdpa-built"))


def rotary(device: str, quick: bool) -> Suite:
    """Rotation inside the kernel against none, and against SDPA behind a rotation in torch; all causal."""
    lengths = (512,) if quick else (512, 2048, 4096)
    cases = [Case("cpu-rotary", "rotary", _shape(length), dtype) for dtype in (F32, BF16) for length in lengths]
    return Suite("cpu-rotary", "causal + rotary", tuple(cases), (OURS, WITHOUT, "sdpa"), memory=False)


def short(device: str, quick: bool) -> Suite:
    """Short sequences in batches of 32."""
    lengths = (32,) if quick else (16, 32, 64, 128)
    cases = [Case("cpu-short", "plain", _shape(n, batch=32), dtype) for dtype in (F32, BF16) for n in lengths]
    return Suite("cpu-short", "short sequences", tuple(cases), (OURS, "sdpa"), memory=False)


def decode(device: str, quick: bool) -> Suite:
    """One query, four query heads to a key head: a batch that fills the threads, and one pair of them that has to be
    split over its keys."""
    lengths = (2048,) if quick else (512, 2048, 8192, 32768)
    cases = [
        Case("cpu-decode", "plain", Shape(batch, heads, 1, length, 64, kv_heads=heads // 4), dtype, FORWARD)
        for batch, heads in ((4, 16), (1, 4))
        for dtype in (F32, BF16)
        for length in lengths
    ]
    return Suite("cpu-decode", "one query against a cache", tuple(cases), (OURS, "sdpa"), memory=False)


def module(device: str, quick: bool) -> Suite:
    """nn.MultiheadAttention and its replacement, nn.TransformerEncoder before and after `replace_attention`.

    Inference is in eval mode, training in train mode.
    """
    sizes = [(128, F32)] if quick else [(128, F32), (512, F32), (2048, F32), (512, BF16)]
    cases = [
        Case("cpu-module", name, _shape(length, batch=max(1, 2048 // length)), dtype)
        for name in ATTENTION_SCENARIOS
        for length, dtype in sizes
    ]
    cases += [
        Case("cpu-module", name, _shape(length, batch=max(1, 2048 // length)), dtype)
        for name in ENCODER_SCENARIOS
        for length, dtype in sizes
        if length < 2048
    ]
    return Suite("cpu-module", "modules", tuple(cases), ("fastattn-mha", "nn-mha"), baseline="nn-mha", memory=False)


def overhead(device: str, quick: bool) -> Suite:
    """What a call costs where there is nothing to compute, on one thread, with its parts."""
    shape = Shape(1, 2, 8, 8, 16)
    cases = tuple(Case("cpu-overhead", name, shape) for name in ("plain", "causal"))
    peers = (OURS, "fastattn-sdpa", "sdpa")
    return Suite("cpu-overhead", "a tiny call", cases, peers, per_call=True)


def memory(device: str, quick: bool) -> Suite:
    """Memory of a training step with a T5 bias, of one head: SDPA's step holds several matrices of (S, S).

    The length is 16384, or the longest power of two that the machine has room for: SDPA was seen to need 12.3 of them.
    """
    length = 2048 if quick else 16384
    while length > 1024 and 14 * length**2 * 4 > _available():
        length //= 2
    case = Case("cpu-memory", "t5", _shape(length, heads=1), F32, ("both",))
    return Suite("cpu-memory", "memory of a T5 bias", (case,), (OURS, "sdpa"), only_memory=True)


def threads(device: str, quick: bool) -> Suite:
    """All threads against one."""
    length = 512 if quick else 2048
    cases = [Case("cpu-threads", name, _shape(length), dtype) for name in ("plain",) for dtype in (F32, BF16)]
    peers = (OURS, "fastattn-1-thread")
    return Suite("cpu-threads", "threads", tuple(cases), peers, baseline="fastattn-1-thread", memory=False)


def _available() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 16 << 30
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 16 << 30)


CPU_SUITES = {
    f"cpu-{build.__name__}": build
    for build in (dense, half, backends, causal, sparse, bias, rotary, short, decode, module, overhead, memory, threads)
}

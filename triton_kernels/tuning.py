"""The search behind ``python -m fastattn tune``: every sensible tile of a kernel, numerics first, then time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problem import Problem

from . import tiles
from .attention import attention_forward
from .attention_gradients import attention_backward
from .tiles import Tile

KERNELS = ("forward", "backward_kv", "backward_q")
# The gradients whose computation runs the kernel.
_WANTED = {"backward_kv": frozenset({"key", "value"}), "backward_q": frozenset({"query"})}


@dataclass(frozen=True)
class Trial:
    """What became of one tile: its time, or why it was not timed."""

    tile: Tile
    seconds: float | None
    reason: str = ""


def candidates(head_dim: int, itemsize: int, shared_memory: int) -> Iterator[Tile]:
    """Tiles whose operands fit: one stage of K and V (or q and dO) at least, beside the tile that stays."""
    for rows, cols, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)):
        operands = itemsize * head_dim * (2 * rows + 2 * cols * stages)
        # more than 256 accumulators a thread cannot stay in registers; fewer than 16 leave the tensor cores idle
        accumulators = (rows * cols + rows * head_dim) / (32 * warps)
        if operands <= shared_memory and 16 <= accumulators <= 256:
            yield Tile(rows, cols, warps, stages)


def runner(kernel: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """A call that runs the kernel (and, in the backward, the small one before it) and returns what it computes."""
    if kernel == "forward":
        return lambda: attention_forward(problem)[:2]
    out, _, statistics = attention_forward(problem)
    generator = torch.Generator(out.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)
    wanted = _WANTED[kernel]
    return lambda: tuple(attention_backward(problem, grad, None, out, statistics, wanted)[n] for n in sorted(wanted))


def budget(problem: Problem, result: tuple[Tensor, ...]) -> float:
    """How far one tile's result may be from another's: the sums are the same, only their order differs."""
    largest = max(float(x.abs().max()) for x in result)
    return 8 * torch.finfo(problem.query.dtype).eps * max(largest, 1.0)


def search(
    kernel: str, problem: Problem, choices: Iterable[Tile], timer: Callable[[Callable[[], object]], float]
) -> list[Trial]:
    """Try every tile; those that fail to compile or miss the budget are not timed.  Fastest first, then the failures.

    Args:
        timer: seconds of a call, such as a median of `triton.testing.do_bench`.
    """
    call = runner(kernel, problem)
    expected = call()  # with the table's own tile, which the tests hold to the formula
    allowed = budget(problem, expected)
    trials = []
    for choice in choices:
        with tiles.override(**{kernel: choice}):
            try:
                result = call()
            except Exception as error:
                trials.append(Trial(choice, None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"))
                continue
            worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(result, expected, strict=True))
            if not worst <= allowed:
                trials.append(Trial(choice, None, f"wrong: off by {worst:.1e}, {allowed:.1e} allowed"))
                continue
            trials.append(Trial(choice, timer(call)))
    return sorted(trials, key=lambda trial: (trial.seconds is None, trial.seconds or 0.0))

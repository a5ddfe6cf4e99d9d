"""Which backend runs a problem, and why each other one does not."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastattn.additive_problem import AdditiveProblem
from fastattn.backends.base import WHAT_RUNS, AnyProblem, Backend
from fastattn.backends.cpu import CpuBackend, shortcut
from fastattn.backends.cuda import CudaBackend
from fastattn.backends.reference import ReferenceBackend
from fastattn.backends.triton import TritonBackend
from fastattn.problem import Problem
from fastattn.quantized_problem import QuantizedProblem
from fastattn.rotation import Rotation
from fastattn.softmax_problem import SoftmaxProblem

# Asked in this order.
_BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (CudaBackend(), TritonBackend(), CpuBackend(), ReferenceBackend())
}
# Kinds of problems that not every backend runs, and the method that does.
_OPTIONAL = {AdditiveProblem: "additive", QuantizedProblem: "quantized"}
_local = threading.local()


class UnsupportedError(NotImplementedError):
    """No backend, or not the one asked for, can run this call; the message lists every reason."""


def backends() -> list[Backend]:
    """Every backend, in the order of preference, with `.name`, `.available` and `.reason`."""
    return list(_BACKENDS.values())


def _refusals(backend: Backend, problem: AnyProblem) -> list[str]:
    reason = backend.reason
    if reason is not None:
        return [reason]
    kind = type(problem)
    if kind in _OPTIONAL and getattr(type(backend), _OPTIONAL[kind]) is getattr(Backend, _OPTIONAL[kind]):
        return [f"it has no {WHAT_RUNS[kind]}"]
    return backend.unsupported_reasons(problem)


def choose(problem: AnyProblem, name: str | None) -> tuple[Backend, dict[str, list[str]]]:
    """The backend that runs `problem` and the refusals of those asked before it.

    Raises:
        ValueError: there is no backend of that name.
        UnsupportedError: the named backend refuses; or FASTATTN_STRICT=1 is set and only `reference` is left.
    """
    refusals: dict[str, list[str]] = {}
    if name is not None:
        if name not in _BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(_BACKENDS)} or None, got {name!r}")
        reasons = _refusals(_BACKENDS[name], problem)
        if reasons:
            raise UnsupportedError(f"backend {name!r} cannot run this call: {'; '.join(reasons)}")
        return _BACKENDS[name], refusals
    for backend in _BACKENDS.values():
        reasons = _refusals(backend, problem) or backend.volunteers(problem)
        if reasons:
            refusals[backend.name] = reasons
            continue
        if backend.name == "reference" and os.environ.get("FASTATTN_STRICT", "0") == "1":
            listing = "; ".join(f"{other}: {', '.join(why)}" for other, why in refusals.items())
            raise UnsupportedError(f"FASTATTN_STRICT=1 forbids the fallback to reference, and {listing}")
        return backend, refusals
    raise AssertionError("the reference backend refuses nothing")


@dataclass(frozen=True)
class Explanation:
    """What runs for a call and why.

    Attributes:
        backend: name of the backend.
        kernel: the kernel it runs.
        features: the optional stages the call uses.
        plan: tiles and other choices, as the backend gives them.
        refusals: for each backend that does not run it, the reasons.
        notes: what is done to the arguments before the kernel, and in which memory.
    """

    backend: str
    kernel: str
    features: list[str]
    plan: dict[str, object] = field(default_factory=dict)
    refusals: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.kernel}", f"  features: {', '.join(self.features) or 'plain'}"]
        lines += [f"  {key}: {_words(value)}" for key, value in self.plan.items()]
        lines += [f"  before it: {note}" for note in self.notes]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refusals.items()]
        return "\n".join(lines)


def _words(value: object) -> object:
    """A kernel's own entries of a plan on one line; anything else as it is."""
    return ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value


def explain(problem: Problem | QuantizedProblem, name: str | None, notes: list[str]) -> Explanation:
    chosen, refusals = choose(problem, name)
    for other in _BACKENDS.values():
        if other is not chosen and other.name not in refusals:
            why = f"backend={chosen.name!r} was asked for" if name else f"{chosen.name} comes first"
            refusals[other.name] = _refusals(other, problem) or [why]
    return Explanation(chosen.name, chosen.kernel(problem), problem.features(), chosen.plan(problem), refusals, notes)


def run(problem: Problem, name: str | None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Run attention on the chosen backend: output and lse, which may be None without `with_lse`."""
    return _chosen(problem, name).run(problem, with_lse)


def run_shortcut(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, query_offset: int | None, causal: bool
) -> Tensor | None:
    """What `attention` returns for operands, numbers and perhaps a causal mask, where a backend has a way of its own
    that needs no `Problem`; else None."""
    backend = _BACKENDS.get("cpu")  # no other one runs by itself on its tensors, and only its calls are that short
    if backend is None or backend.reason is not None:
        return None
    out = shortcut(query, key, value, scale, query_offset, causal)
    if out is not None:
        _local.last = (_told_by_shape, query.shape, key.shape, value.shape, query.dtype, causal)
    return out


def quantized(problem: QuantizedProblem, name: str | None) -> tuple[Tensor, Tensor]:
    """Run attention on 8-bit operands on the chosen backend: output and lse."""
    return _chosen(problem, name).quantized(problem)


def quantized_refusals(problem: QuantizedProblem, name: str | None) -> list[str]:
    """Why no kernel takes these 8-bit operands as they are; empty where `quantized` may be called."""
    backend = _BACKENDS["cuda"]
    if name not in (None, backend.name):
        return [f"backend={name!r} was asked for"]
    return _refusals(backend, problem) or ([] if name else backend.volunteers(problem))


def run_with_weights(
    problem: Problem, *, average: bool, leading: int, name: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run attention on the chosen backend: output and weights, None where its kernels do not give them."""
    backend = _chosen(problem, name, weights=True)
    if not backend.gives_weights:
        return backend.run(problem)[0], None
    return backend.run_with_weights(problem, average=average, leading=leading)


def gives_weights(problem: Problem, name: str | None) -> bool:
    """Whether the kernels of the backend that would run this problem give its weights, too."""
    return choose(problem, name)[0].gives_weights


def weights_alone(problem: Problem, *, average: bool, leading: int) -> Tensor | None:
    """The weights of a call that runs by itself, or None as above.  It is not the `last_call`."""
    backend, _ = choose(problem, None)
    if not backend.gives_weights:
        return None
    without = replace(problem, value=problem.value.detach()[..., :0])
    return backend.run_with_weights(without, average=average, leading=leading)[1]


def softmax(problem: SoftmaxProblem, name: str | None) -> Tensor:
    """Run the masked softmax on the chosen backend."""
    return _chosen(problem, name).softmax(problem)


def rotate(rotation: Rotation, name: str | None, inplace: bool) -> tuple[Tensor, Tensor]:
    """Rotate query and key on the chosen backend."""
    return _chosen(rotation, name).rotate(rotation, inplace)


def additive(problem: AdditiveProblem, name: str | None) -> tuple[Tensor, Tensor]:
    """Run additive attention on the chosen backend: output and lse."""
    return _chosen(problem, name).additive(problem)


def _chosen(problem: AnyProblem, name: str | None, weights: bool = False) -> Backend:
    """The backend that runs the problem now: recorded for `last_call`, with a warning where it is a fallback."""
    backend, refusals = choose(problem, name)
    if not torch.compiler.is_compiling():
        kernel = backend.kernel(problem)
        if weights:
            kernel += " with weights" if backend.gives_weights else "; weights: torch operations, tile by tile"
        _local.last = (_told, backend.name, kernel, problem.features(), refusals)
        if refusals and backend.name == "reference":
            _warn_fallback(tuple((other, *why) for other, why in refusals.items()))
    return backend


def last_call() -> Explanation | None:
    last = getattr(_local, "last", None)
    if last is None:
        return None
    tell, *told = last
    return tell(*told)


def _told(backend: str, kernel: str, features: list[str], refusals: dict[str, list[str]]) -> Explanation:
    return Explanation(backend, kernel, features, refusals=refusals)


def _told_by_shape(
    query: torch.Size, key: torch.Size, value: torch.Size, dtype: torch.dtype, causal: bool
) -> Explanation:
    """Of a call that made no `Problem`: one of its shapes and without its contents is made now."""
    one = torch.empty((), dtype=dtype)
    problem = Problem(
        query=one.expand(query), key=one.expand(key), value=one.expand(value), scale=1.0, window_right=int(causal) - 1
    )
    backend, refusals = choose(problem, None)
    return _told(backend.name, backend.kernel(problem), problem.features(), refusals)


_warned: set[tuple[tuple[str, ...], ...]] = set()


def _warn_fallback(refusals: tuple[tuple[str, ...], ...]) -> None:
    """Nothing falls back silently: say it once per set of reasons."""
    if refusals not in _warned:
        _warned.add(refusals)
        listing = "; ".join(f"{other}: {', '.join(why)}" for other, *why in refusals)
        warnings.warn(f"fastattn runs the slow reference formula ({listing})", RuntimeWarning, stacklevel=5)

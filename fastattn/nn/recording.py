"""Attention weights on the side: recorded for reading while the fused kernels compute the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastattn.nn.readout import problem_weights
from fastattn.problem import Problem
from fastattn.validation import check_index, describe, fail

if TYPE_CHECKING:
    from fastattn.nn.multihead_attention import MultiheadAttention

__all__ = ["AttentionRecord", "RecordedCall", "RecordingLimitError", "inspect"]

Layers: TypeAlias = "int | str | Sequence[int | str] | None"

DEFAULT_LIMIT = 256 * 2**20


class RecordingLimitError(RuntimeError):
    """The next call's weights would not fit into the memory that `inspect` was given."""


@dataclass(frozen=True)
class RecordedCall:
    """The weights of one call of one attention module.

    Attributes:
        path: of the module in the model.
        call: which call of this module it is, from 0; layers that share parameters call the same module.
        heads: the head that each entry of the second dimension belongs to.
        weights: (B, len(heads), L, S) float32 (float64 for a float64 model) on the CPU, softmax before dropout; rows
            add up to 1, or to 0 where everything is masked.  S counts the bias and zero keys, which come last, and
            with a cache all the keys the step saw.
    """

    path: str
    call: int
    heads: tuple[int, ...]
    weights: Tensor

    def __str__(self) -> str:
        return f"{self.path} call {self.call}, heads {list(self.heads)}: {tuple(self.weights.shape)}"


@dataclass
class AttentionRecord:
    """What `inspect` recorded, in the order of the calls.

    ``record["encoder.layers.0.self_attn"]`` is the list of that module's calls, ``record[3]`` the fourth call of all.

    Attributes:
        calls: the recorded calls.
        bytes: their size.
        dropped: how many calls were left out because of the limit.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    bytes: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.calls)

    def __iter__(self) -> Iterator[RecordedCall]:
        return iter(self.calls)

    def __getitem__(self, key: int | str) -> RecordedCall | list[RecordedCall]:
        if not isinstance(key, str):
            return self.calls[key]
        found = [call for call in self.calls if call.path == key]
        if not found:
            raise KeyError(f"{key!r}: expected one of {self.paths}")
        return found

    @property
    def paths(self) -> list[str]:
        """The modules that were called, in the order of their first call."""
        return list(dict.fromkeys(call.path for call in self.calls))

    def __str__(self) -> str:
        lines = [f"{len(self.calls)} calls recorded, {self.bytes / 1e6:.1f} MB, {self.dropped} left out"]
        return "\n".join(lines + [f"  {call}" for call in self.calls])


@dataclass(eq=False)
class Watcher:
    """One module that one `inspect` looks at."""

    path: str
    heads: tuple[int, ...]
    limit: int
    on_limit: Literal["raise", "drop"]
    into: AttentionRecord
    calls: int = 0


_watched: WeakKeyDictionary[torch.nn.Module, list[Watcher]] = WeakKeyDictionary()


def watchers(module: MultiheadAttention) -> Sequence[Watcher]:
    """Who looks at this module; nobody does inside a compiled graph."""
    if torch.compiler.is_compiling() or not _watched:
        return ()
    return tuple(_watched.get(module, ()))


def record(watcher: Watcher, module: MultiheadAttention, problem: Problem, extra_keys: int) -> None:
    """Write the weights of the call down, if there is room."""
    number, watcher.calls = watcher.calls, watcher.calls + 1
    into = watcher.into
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "fastattn.inspect: expected a plain call, got one under vmap, grad or another transform"
        )
    shape = (problem.batch_size, len(watcher.heads), problem.query_length, problem.key_length)
    wide = problem.parameter_dtype
    size = torch.Size(shape).numel() * (8 if wide == torch.float64 else 4)
    if into.bytes + size > watcher.limit:
        if watcher.on_limit == "drop":
            into.dropped += 1
            return
        raise RecordingLimitError(
            f"limit: expected at most {watcher.limit / 1e6:.3g} MB, got {into.bytes / 1e6:.3g} MB and the weights "
            f"{shape} of {watcher.path}; choose layers or heads, raise limit, or pass on_limit='drop'"
        )
    with torch.no_grad():
        weights = problem_weights(problem, leading=extra_keys, heads=watcher.heads).to("cpu", wide)
    into.bytes += size
    into.calls.append(RecordedCall(watcher.path, number, watcher.heads, weights))


@contextmanager
def inspect(
    model: torch.nn.Module,
    layers: Layers = None,
    heads: int | Sequence[int] | None = None,
    *,
    limit: int = DEFAULT_LIMIT,
    on_limit: Literal["raise", "drop"] = "raise",
) -> Iterator[AttentionRecord]:
    """Record attention weights while the model runs as it always does::

        with fastattn.inspect(model, layers=[0, -1], heads=[0, 1]) as record:
            model(x)
        fastattn.plot_attention(record, tokens=tokens)

    The fused kernels compute the outputs, bit for bit what they are without this; the weights of the chosen heads are
    computed beside them, without gradients, and go to the CPU.  On another device one call's weights exist there
    meanwhile.  Works for the modules of `fastattn.nn`, for those of a model after `fastattn.replace_attention`, in
    training, inference and incremental decoding.  Not inside graphs of `torch.compile`, where nothing is recorded.

    Args:
        model: holds the attention modules, or is one.
        layers: which of its attention modules, in the order of ``model.named_modules()``: numbers (negative ones from
            the end), or patterns of paths such as "encoder.*.self_attn"; None for all.  A decoder layer counts twice:
            self-attention and cross-attention.
        heads: which heads; None for all.
        limit: bytes that the record may hold, 256 MB if not given.
        on_limit: what happens to a call that does not fit any more: "raise" a `RecordingLimitError`, before its output
            is returned, or "drop" its weights, counted in the record; what was recorded stays either way.

    Yields:
        An `AttentionRecord`, which stays valid afterwards.

    Raises:
        TypeError: model is no module; layers or heads of another type.
        ValueError: the model has no fastattn attention; it is compiled; no module or head of that number or name.
    """
    if not isinstance(model, torch.nn.Module):
        fail(TypeError, "model", "a torch.nn.Module", describe(model))
    if hasattr(model, "_orig_mod"):
        fail(ValueError, "model", "a module that runs eagerly", "one compiled by torch.compile")
    if on_limit not in ("raise", "drop"):
        fail(ValueError, "on_limit", "'raise' or 'drop'", describe(on_limit))
    limit = check_index("limit", limit, least=0)
    into = AttentionRecord()
    added: list[tuple[torch.nn.Module, Watcher]] = []
    for path, module in _choose(_attention_modules(model), layers):
        added.append((module, Watcher(path, _heads(heads, path, module), limit, on_limit, into)))
    for module, watcher in added:
        _watched.setdefault(module, []).append(watcher)
    try:
        yield into
    finally:
        for module, watcher in added:
            _watched[module].remove(watcher)
            if not _watched[module]:
                del _watched[module]


def _attention_modules(model: torch.nn.Module) -> list[tuple[str, MultiheadAttention]]:
    from fastattn.nn.multihead_attention import MultiheadAttention

    found = [(path, module) for path, module in model.named_modules() if isinstance(module, MultiheadAttention)]
    if not found:
        fail(
            ValueError,
            "model",
            "attention modules of fastattn.nn (call fastattn.replace_attention(model) first)",
            f"a {type(model).__name__} without any",
        )
    return found


def _choose(found: list[tuple[str, MultiheadAttention]], layers: Layers) -> list[tuple[str, MultiheadAttention]]:
    if layers is None:
        return found
    wanted = [layers] if isinstance(layers, (int, str)) else layers
    if not isinstance(wanted, Sequence):
        fail(TypeError, "layers", "a number, a pattern, or a sequence of them", describe(layers))
    chosen: dict[str, MultiheadAttention] = {}
    for one in wanted:
        if isinstance(one, str):
            matches = [(path, module) for path, module in found if fnmatchcase(path, one)]
            if not matches:
                fail(ValueError, "layers", f"a pattern of {[path for path, _ in found]}", describe(one))
        else:
            matches = [found[_index("layers", one, len(found))]]
        chosen.update(matches)
    return [(path, module) for path, module in found if path in chosen]


def _heads(heads: int | Sequence[int] | None, path: str, module: MultiheadAttention) -> tuple[int, ...]:
    count = module.num_heads
    if heads is None:
        return tuple(range(count))
    wanted = [heads] if isinstance(heads, int) else heads
    if not isinstance(wanted, Sequence) or not len(wanted):
        fail(TypeError, "heads", "a number, or a sequence of at least one", describe(heads))
    return tuple(_index(f"heads ({path})", head, count) for head in wanted)


def _index(name: str, x: object, count: int) -> int:
    index = check_index(name, x)
    if not -count <= index < count:
        fail(ValueError, name, f"a number in [{-count}, {count})", x)
    return index % count

"""Attention weights as a picture: a grid of heads, tokens on the axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from fastattn.nn.recording import AttentionRecord, RecordedCall
from fastattn.validation import check_index, describe, fail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_attention"]

Tokens: TypeAlias = Sequence[str] | tuple[Sequence[str], Sequence[str]] | None

_TOKEN = 0.17  # inches for one token of 7 points
_SMALLEST, _LARGEST = 1.5, 5.0  # inches of a panel's sides
_MOST_LABELS = 60  # more tokens than this on an axis are numbered instead
_COLUMNS = 8
_VISIBLE = str.maketrans({" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"})
_INK, _FAINT = "#222222", "#9a9a9a"


def plot_attention(
    record: AttentionRecord | RecordedCall | Iterable[RecordedCall],
    tokens: Tokens = None,
    *,
    sequence: int = 0,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """A row of panels for each recorded call, one per head: queries downwards, keys to the right, darker is more.

    All panels share one scale from 0 to the largest weight shown, which the bar at the side tells.

    Args:
        record: what `fastattn.inspect` recorded, or some of its calls: ``record["encoder.layers.0.self_attn"]``.
        tokens: texts of the tokens of queries and keys, or a tuple of both where they differ, as in attention over a
            memory: (target tokens, source tokens).  Fewer texts than positions: the others, padding, are not drawn.
            None, or more than 60: positions are numbered.
        sequence: which one of the batch.
        heads: which of the recorded heads; default all.
        title: over the grid.

    Returns:
        A matplotlib Figure, which belongs to no window: ``figure.savefig("attention.png")``.

    Raises:
        ImportError: matplotlib is not installed (the extra ``fastattn[plot]``).
        TypeError, ValueError: nothing to draw; a sequence or head that was not recorded; more tokens than positions.
    """
    calls = _calls(record)
    sequence = check_index("sequence", sequence)
    panels = [[_panel(call, head, sequence, tokens) for head in _chosen(call, heads)] for call in calls]
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_attention draws with matplotlib: pip install 'fastattn[plot]'") from error

    most = max(len(row) for row in panels)
    columns = math.ceil(most / math.ceil(most / _COLUMNS))  # 12 heads are two lines of 6
    # a call with more heads than columns goes on in the next line
    lines = [
        (call, row[start : start + columns])
        for call, row in zip(calls, panels, strict=True)
        for start in range(0, len(row), columns)
    ]
    width = max(_inches(line[0].shape[1]) for _, line in lines)
    heights = [_inches(line[0].shape[0]) for _, line in lines]
    size = (columns * (width + 0.12) + 1.9, sum(heights) + 0.75 * len(lines) + (0.4 if title else 0.0))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    top = max(float(panel.max()) if panel.numel() else 0.0 for row in panels for panel in row) or 1.0
    image = None
    for number, (call, line) in enumerate(lines):
        begins = number == 0 or lines[number - 1][0] is not call
        shown = _chosen(call, heads)
        skipped = 0 if begins else columns * sum(1 for before, _ in lines[:number] if before is call)
        texts = _labels(call, tokens)
        for place, axes in enumerate(grid[number]):
            if place >= len(line):
                axes.set_axis_off()
                continue
            image = axes.imshow(line[place].numpy(), cmap="Blues", vmin=0.0, vmax=top, aspect="auto", rasterized=True)
            _dress(axes, texts, line[place].shape, left=place == 0)
            axes.set_title(f"head {shown[skipped + place]}", fontsize=8, color=_INK, pad=3)
        if begins:
            count = f", call {call.call}" if call.call else ""
            grid[number][0].set_ylabel(f"{call.path or 'attention'}{count}\nquery", fontsize=7.5, color=_INK)
    assert image is not None
    for axes in grid[-1][: len(lines[-1][1])]:
        axes.set_xlabel("key", fontsize=7.5, color=_INK)
    tallest = min(1.0, 3.0 / size[1])
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01, aspect=24, shrink=tallest, anchor=(0.0, 1.0))
    bar.set_label("weight", fontsize=7.5, color=_INK)
    bar.ax.tick_params(labelsize=7, length=2, colors=_INK)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10, color=_INK, x=0.01, ha="left")
    return figure


def _calls(record: object) -> list[RecordedCall]:
    if isinstance(record, RecordedCall):
        return [record]
    if not isinstance(record, Iterable):
        fail(TypeError, "record", "what fastattn.inspect recorded, or some of its calls", describe(record))
    calls = list(record)
    for call in calls:
        if not isinstance(call, RecordedCall):
            fail(TypeError, "record", "recorded calls", describe(call))
    if not calls:
        fail(ValueError, "record", "at least one call (run the model inside fastattn.inspect)", "none")
    return calls


def _chosen(call: RecordedCall, heads: Sequence[int] | None) -> tuple[int, ...]:
    if heads is None:
        return call.heads
    for head in heads:
        if head not in call.heads:
            fail(ValueError, "heads", f"some of the recorded {list(call.heads)} of {call.path}", describe(head))
    if not heads:
        fail(ValueError, "heads", "at least one", describe(heads))
    return tuple(heads)


def _labels(call: RecordedCall, tokens: Tokens) -> tuple[list[str] | None, list[str] | None]:
    """The texts of queries and keys, checked against the call's lengths."""
    if tokens is None:
        return None, None
    both = tokens if isinstance(tokens, tuple) and not all(isinstance(t, str) for t in tokens) else (tokens, tokens)
    if len(both) != 2 or any(isinstance(side, str) or not isinstance(side, Sequence) for side in both):
        fail(TypeError, "tokens", "texts, or a tuple of the queries' and the keys' texts", describe(tokens))
    labels = []
    for side, name, length in zip(both, ("queries", "keys"), call.weights.shape[2:], strict=True):
        if not all(isinstance(text, str) for text in side):
            fail(TypeError, "tokens", "texts", describe(side))
        if len(side) > length:
            fail(ValueError, "tokens", f"at most {length} texts for the {name} of {call.path}", f"{len(side)}")
        labels.append([text.translate(_VISIBLE) for text in side])
    return labels[0], labels[1]


def _panel(call: RecordedCall, head: int, sequence: int, tokens: Tokens) -> Tensor:
    """(queries, keys) to draw."""
    batch = call.weights.shape[0]
    if not -batch <= sequence < batch:
        fail(ValueError, "sequence", f"a number in [{-batch}, {batch})", sequence)
    rows, cols = _labels(call, tokens)
    weights = call.weights[sequence, call.heads.index(head)]
    return weights[: None if rows is None else len(rows), : None if cols is None else len(cols)]


def _inches(tokens: int) -> float:
    return min(max(tokens * _TOKEN, _SMALLEST), _LARGEST)


def _dress(
    axes: Axes, labels: tuple[list[str] | None, list[str] | None], shape: tuple[int, ...], *, left: bool
) -> None:  # fmt: skip
    """Tokens on the axes, at the left of a line only; no frame."""
    for axis, texts, length in ((axes.yaxis, labels[0], shape[0]), (axes.xaxis, labels[1], shape[1])):
        vertical = axis is axes.yaxis
        if texts is not None and length <= _MOST_LABELS:
            axis.set_ticks(range(length))
            turned = not vertical and any(len(text) > 1 for text in texts)
            for label, text in zip(
                axis.set_ticklabels(texts, rotation=90 if turned else 0, fontsize=7), texts, strict=True
            ):
                label.set_parse_math(False)  # a dollar is a dollar
                label.set_text(text)
        else:
            axis.get_major_locator().set_params(integer=True, nbins=5)
        axis.set_tick_params(length=0 if texts else 2, labelsize=7, colors=_INK if texts else _FAINT, pad=2)
        if vertical and not left:
            axis.set_ticklabels([])
            axis.set_tick_params(length=0)
    for spine in axes.spines.values():
        spine.set(color=_FAINT, linewidth=0.4)
    axes.set_facecolor("white")

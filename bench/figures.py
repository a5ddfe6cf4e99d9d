"""Figures of rows as SVG that takes its text and grid colours from the page around it, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from fastattn.bench.results import Row

# One colour per peer in every figure, legible on white and on black; fastattn's is the loud one.
COLOURS = {
    "fastattn": "#e0522d",
    "fastattn-mha": "#e0522d",
    "fastattn-hf": "#e0522d",
    "fastattn-cuda": "#b8321a",
    "fastattn-hopper": "#7a1200",
    "fastattn-hopper-unpinned": "#9c5a4e",
    "fastattn-float8": "#4a0d4f",
    "fastattn-triton": "#ee8f3c",
    "fastattn-sdpa": "#f0a24b",
    "fastattn-without": "#d8a58f",
    "fastattn-1-thread": "#f0a24b",
    "sdpa": "#3f88c5",
    "nn-mha": "#3f88c5",
    "hf-sdpa": "#3f88c5",
    "hf-eager": "#9a7fd1",
    "sdpa-built": "#7fb2e5",
    "sdpa-flash": "#3fb5c0",
    "sdpa-efficient": "#58a66a",
    "sdpa-cudnn": "#a0785a",
    "sdpa-math": "#9a7fd1",
    "flex": "#b5a52d",
    "flash-attn": "#d66ba0",
    "flash-attn-3": "#b04f86",
    "flash-attn-4": "#8d3c70",
    "xformers": "#88a9d9",
    "liger": "#6f9a3d",
    "naive": "#8a8f98",
    "naive-compiled": "#b9bec6",
}
OTHER = "#8a8f98"
DIRECTIONS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
INK, GRID = "#010203", "#040506"  # replaced by the page's own
STYLE = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "fastattn",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
Value = Callable[[Row], float | None]
PANELS: tuple[tuple[str, str, Value], ...] = (
    ("ratio", "speed relative to {baseline}", lambda row: row.ratio),
    ("time", "time", lambda row: row.median_s),
    # a call may need less than a page above what was held before: drawn at the floor
    ("memory", "peak memory", lambda row: None if row.peak_gb is None else max(row.peak_gb * 1e9, 1e5)),
)


def colour(variant: str) -> str:
    return COLOURS.get(variant, OTHER)


def rank(variant: str) -> tuple[int, str]:
    """fastattn first, then its peers in the order of COLOURS, then those it does not know."""
    names = list(COLOURS)
    return (names.index(variant) if variant in COLOURS else len(names), variant)


def svg(figure: Figure) -> str:
    """The figure's <svg> element, in the page's colours, with nothing in it that two figures could both define."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' id="[A-Za-z][A-Za-z0-9.]*_[0-9]+"', "", text)  # figure_1, axes_2: names that nothing refers to
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text).groups()  # type: ignore[union-attr]
    return text.replace(f'width="{width}pt" height="{height}pt"', 'role="img"', 1).strip()


def length_label(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"


def sweep(rows: Sequence[Row]) -> str:
    """Ratio, time and memory against the length: a line of panels for each direction."""
    with matplotlib.rc_context(STYLE):
        directions = [d for d in ("forward", "both") if any(row.direction == d for row in rows)]
        panels = [panel for panel in PANELS if any(panel[2](row) is not None for row in rows)]
        figure = Figure(figsize=(10.4, 2.6 * len(directions) + 0.4), layout="constrained")
        grid = figure.subplots(len(directions), len(panels), squeeze=False)
        for line, direction in zip(grid, directions, strict=True):
            members = [row for row in rows if row.direction == direction]
            baseline = next((row.baseline for row in members if row.baseline), "")
            for axes, (kind, title, value) in zip(line, panels, strict=True):
                axes.set_title(f"{DIRECTIONS[direction]}: {title.format(baseline=baseline)}")
                _curves(axes, members, value)
                _scale(axes, kind, [v for row in members if (v := value(row)) is not None])
        _legend(figure, {row.variant for row in rows})
        return svg(figure)


def _curves(axes: Axes, rows: Sequence[Row], value: Value) -> None:
    lengths = sorted({row.key_length for row in rows})
    for variant in sorted({row.variant for row in rows}, key=rank, reverse=True):
        points = sorted((row.key_length, v) for row in rows if row.variant == variant and (v := value(row)) is not None)
        if not points:
            continue
        ours = variant in ("fastattn", "fastattn-mha", "fastattn-hf")
        axes.plot(
            *zip(*points, strict=True),
            color=colour(variant),
            marker="o",
            markersize=4.5 if ours else 3,
            linewidth=2 if ours else 1.2,
            # dashed over the choice that SDPA makes by itself: the two often coincide
            linestyle="--" if variant.startswith("sdpa-") else "-",
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    shown = lengths if len(lengths) <= 7 else lengths[::2]
    axes.set_xticks(shown, [length_label(n) for n in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def _scale(axes: Axes, kind: str, values: Sequence[float]) -> None:
    """Linear from 0 for ratios of one size, else logarithmic with round numbers."""
    if kind == "ratio":
        axes.axhline(1.0, color=INK, linewidth=0.7, alpha=0.6)
        if not values or max(values) <= 4:
            axes.set_ylim(0, 1.12 * max(values, default=1.0))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
            return
    axes.set_yscale("log")
    low, high = min(values, default=1.0), max(values, default=1.0)
    axes.set_ylim(low / 1.4, high * 1.4)
    decades = high / low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 300 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(_format(kind))


def _format(kind: str) -> FuncFormatter | EngFormatter:
    if kind == "ratio":
        return FuncFormatter(lambda y, _: f"{y:g}×")
    return EngFormatter(unit="s" if kind == "time" else "B", sep=" ")


def _legend(figure: Figure, variants: set[str]) -> None:
    from matplotlib.lines import Line2D

    names = sorted(variants, key=rank)
    handles = [Line2D([], [], color=colour(name), marker="o", markersize=4, linewidth=1.5) for name in names]
    figure.legend(handles, names, loc="outside lower left", ncols=min(len(names), 8), fontsize=8.5)


def dots(rows: Sequence[Row]) -> str:
    """One line per case with a dot for every variant's time; the ratio of ours stands beside its dot."""
    with matplotlib.rc_context(STYLE):
        dtypes = len({row.dtype for row in rows}) > 1
        cases = list(dict.fromkeys(_line(row, dtypes) for row in rows))
        directions = [d for d in ("forward", "both") if any(row.direction == d for row in rows)]
        figure = Figure(figsize=(10.4, 0.8 + 0.27 * len(cases)), layout="constrained")
        line = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
        for axes, direction in zip(line, directions, strict=True):
            members = [row for row in rows if row.direction == direction]
            baseline = next((row.baseline for row in members if row.baseline), "")
            title = f"{DIRECTIONS[direction]}: time" + (f", and {baseline}'s over ours" if baseline else "")
            axes.set_title(title)
            for row in sorted(members, key=lambda row: rank(row.variant), reverse=True):
                place = cases.index(_line(row, dtypes))
                ours = row.variant in ("fastattn", "fastattn-mha", "fastattn-hf")
                axes.plot(
                    row.median_s, place, "D" if ours else "o", color=colour(row.variant), markersize=6 if ours else 5,
                    alpha=1.0 if ours else 0.85, zorder=3 if ours else 2,
                )  # fmt: skip
                if ours and row.ratio is not None:
                    axes.annotate(
                        f"{row.ratio:.2f}×" if row.ratio < 10 else f"{row.ratio:.0f}×", (row.median_s, place),
                        xytext=(-7, 0), textcoords="offset points", ha="right", va="center", fontsize=7.5,
                    )  # fmt: skip
            times = [row.median_s for row in members if row.median_s]
            axes.set_xscale("log")
            axes.set_xlim(min(times, default=1e-6) / 2.5, max(times, default=1.0) * 1.5)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(times) / min(times) < 30 else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(_format("time"))
            axes.set_yticks(range(len(cases)), cases)
            axes.set_ylim(len(cases) - 0.4, -0.6)
            axes.set_axisbelow(True)
        _legend(figure, {row.variant for row in rows})
        return svg(figure)


def _line(row: Row, dtype: bool) -> str:
    text = f"{row.case}, {length_label(row.key_length)}"
    return f"{text}, {row.dtype}" if dtype else text


def roofline(rows: Sequence[Row], ceilings: Sequence[Row]) -> str | None:
    """Achieved FLOP/s against FLOPs per byte, under the ceilings of the same run; None where there is no such row."""
    points = [row for row in rows if row.tflops and row.gb_per_s and row.suite != "ceilings"]
    memory = next((row for name in ("read", "copy") for row in ceilings if row.case == name and row.gb_per_s), None)
    peaks = {row.dtype: row.tflops * 1e12 for row in ceilings if row.tflops and row.case in ("fma", "matmul")}
    peaks |= {row.dtype: row.tflops * 1e12 for row in ceilings if row.tflops and row.case == "fma"}
    if not points or memory is None or not peaks:
        return None
    bandwidth = (memory.gb_per_s or 0.0) * 1e9
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        axes = figure.subplots()
        intensity = [_intensity(row) for row in points]
        low, high = min(intensity) / 2, max(intensity) * 2
        for peak in sorted(set(peaks.values())):
            names = ", ".join(dtype for dtype, value in peaks.items() if value == peak)
            ridge = peak / bandwidth
            axes.plot([low, ridge, high], [low * bandwidth, peak, peak], color=INK, linewidth=1, alpha=0.6, zorder=1)
            axes.annotate(f"{names}: {_flops(peak)}", (high, peak), xytext=(-2, 3), textcoords="offset points",
                          ha="right", fontsize=8)  # fmt: skip
        axes.annotate(f"{memory.case} {bandwidth / 1e9:.1f} GB/s", (low * 1.2, low * 1.2 * bandwidth), xytext=(6, -2),
                      textcoords="offset points", fontsize=8, va="top")  # fmt: skip
        markers = {"float32": "o", "bfloat16": "s", "float16": "^"}
        for row in sorted(points, key=lambda row: rank(row.variant), reverse=True):
            axes.plot(_intensity(row), (row.tflops or 0.0) * 1e12, markers.get(row.dtype, "o"), markersize=4.5,
                      color=colour(row.variant), alpha=0.75, markeredgewidth=0)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_xlabel("FLOP per byte that has to cross the memory")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _flops(y)))
        axes.set_title("forward: circles float32, squares bfloat16, triangles float16")
        _legend(figure, {row.variant for row in points})
        return svg(figure)


def _intensity(row: Row) -> float:
    return (row.tflops or 0.0) * 1e12 / ((row.gb_per_s or 1.0) * 1e9)


def _flops(value: float) -> str:
    return f"{value / 1e12:g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"

"""Figures of a set of rows: time, memory and ratio against length, and bars where there is one length only."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fastattn.bench.report import groups, size
from fastattn.bench.results import Row

# One colour per peer in every figure; fastattn's is the loud one.
COLOURS = {
    "fastattn": "#d62728",
    "fastattn-mha": "#d62728",
    "fastattn-sdpa": "#ff7f0e",
    "fastattn-cuda": "#a50f15",
    "fastattn-hopper": "#67000d",
    "fastattn-triton": "#e6550d",
    "sdpa": "#1f77b4",
    "nn-mha": "#1f77b4",
    "sdpa-flash": "#17becf",
    "sdpa-efficient": "#2ca02c",
    "sdpa-cudnn": "#8c564b",
    "sdpa-math": "#9467bd",
    "flex": "#bcbd22",
    "naive": "#7f7f7f",
    "naive-compiled": "#c7c7c7",
    "flash-attn": "#e377c2",
    "xformers": "#aec7e8",
}
DIRECTIONS = {"forward": "forward (inference)", "backward": "backward", "both": "forward + backward"}


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write every figure that the rows give; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = [row for row in rows if row.status == "ok" and row.median_s is not None and row.variant in COLOURS]
    written: list[Path] = []
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    by_device: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        by_device.setdefault((row.device, row.isa), []).append(row)
    for (device, isa), mine in by_device.items():
        where = f"{device} ({isa or 'no native kernels'}, {mine[0].threads} threads), torch {mine[0].torch}"
        prefix = slug(f"{device}-{isa}")
        sweeps: dict[tuple[str, str, str, int], list[Row]] = {}
        for row in mine:
            sweeps.setdefault((row.suite, row.case, row.dtype, row.head_dim), []).append(row)
        for (suite, case, dtype, dim), members in sweeps.items():
            if len({row.key_length for row in members}) > 1:
                path = folder / f"{prefix}-{slug(suite)}-{slug(case)}-{dtype}-d{dim}.png"
                written.append(_sweep(members, f"{suite}: {case}, {dtype}, D = {dim}", where, path))
        for (suite, direction, dtype), members in groups(mine).items():
            lengths: dict[str, set[int]] = {}
            for row in members:
                lengths.setdefault(row.case, set()).add(row.key_length)
            if all(len(found) == 1 for found in lengths.values()) and direction != "backward":
                path = folder / f"{prefix}-{slug(suite)}-{direction}-{dtype}.png"
                written.append(_bars(members, f"{suite}: {DIRECTIONS[direction]}, {dtype}", where, path))
    return written


def slug(text: str) -> str:
    """A file name of lower-case words."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", "").replace("nvidia", "")).strip("-")


def _sweep(rows: list[Row], title: str, where: str, path: Path) -> Path:
    """A row of panels per direction: time, peak memory, ratio, against the length."""
    directions = [d for d in ("forward", "both") if any(row.direction == d for row in rows)]
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("time, ms", lambda row: None if row.median_s is None else row.median_s * 1e3),
        # a call may need less than a page above what was held before: draw it at the floor
        ("peak memory, MB", lambda row: None if row.peak_gb is None else max(row.peak_gb * 1e3, 0.1)),
        ("speed relative to the baseline", lambda row: row.ratio),
    ]
    figure, grid = plt.subplots(
        len(directions), len(panels), figsize=(12, 3.4 * len(directions)), squeeze=False, layout="constrained"
    )
    for line, direction in zip(grid, directions, strict=True):
        members = [row for row in rows if row.direction == direction]
        for axes, (label, value) in zip(line, panels, strict=True):
            _curves(axes, members, value, logarithmic=label[0] != "s")
            axes.set_title(f"{DIRECTIONS[direction]}: {label}", loc="left", fontsize=9)
            axes.set_xlabel("length")
    baseline = next((row.baseline for row in rows if row.baseline), "")
    for line in grid:
        line[2].axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        line[2].set_title(line[2].get_title(loc="left").replace("the baseline", baseline), loc="left", fontsize=9)
    handles, labels = _legend(grid)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", fontsize=10)
    figure.savefig(path)
    plt.close(figure)
    return path


def _curves(axes: Axes, rows: list[Row], value: Callable[[Row], float | None], *, logarithmic: bool) -> None:
    lengths = sorted({row.key_length for row in rows})
    for variant in sorted({row.variant for row in rows}, key=list(COLOURS).index):
        points = sorted(
            (row.key_length, value(row)) for row in rows if row.variant == variant and value(row) is not None
        )
        if points:
            ours = variant.startswith("fastattn")
            axes.plot(
                *zip(*points, strict=True),
                label=variant,
                color=COLOURS[variant],
                marker="o",
                markersize=4 if ours else 3,
                linewidth=2.2 if ours else 1.3,
                # dashed over the choice that SDPA makes by itself: the two often coincide
                linestyle="--" if variant.startswith("sdpa-") else "-",
                zorder=3 if ours else 2,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _legend(grid: object) -> tuple[list[object], list[str]]:
    """Every variant once, in the order of COLOURS."""
    found: dict[str, object] = {}
    for axes in grid.flat:  # type: ignore[attr-defined]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    labels = sorted(found, key=list(COLOURS).index)
    return [found[label] for label in labels], labels


def _bars(rows: list[Row], title: str, where: str, path: Path) -> Path:
    """Time and memory per case, one bar per variant."""
    cases = list(dict.fromkeys(row.case for row in rows))
    variants = sorted({row.variant for row in rows}, key=list(COLOURS).index)
    overhead = all(row.peak_gb is None for row in rows)
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("time, us" if overhead else "time, ms", lambda row: (row.median_s or 0) * (1e6 if overhead else 1e3))
    ]
    if not overhead:
        panels.append(("peak memory, MB", lambda row: None if row.peak_gb is None else row.peak_gb * 1e3))
    height = 1.2 + len(cases) * (0.14 * len(variants) + 0.16)
    figure, line = plt.subplots(1, len(panels), figsize=(6 * len(panels), height), squeeze=False, layout="constrained")
    for axes, (label, value) in zip(line[0], panels, strict=True):
        thickness = 0.84 / len(variants)
        top = max((value(row) or 0.0 for row in rows), default=1.0)
        for number, variant in enumerate(variants):
            for place, case in enumerate(cases):
                row = next((r for r in rows if r.variant == variant and r.case == case), None)
                at = place + (number - (len(variants) - 1) / 2) * thickness
                amount = value(row) if row is not None else None
                if amount is None:
                    axes.text(0.005 * top, at, "cannot", va="center", fontsize=6, color="#999999")
                    continue
                axes.barh(at, amount, thickness * 0.92, color=COLOURS[variant], label=variant if place == 0 else None)
                text = f"{amount:.0f}" if amount >= 100 else f"{amount:.3g}"
                if row.ratio is not None and variant != row.baseline and axes is line[0][0]:
                    text += f"  ({row.ratio:.2f}x)"
                axes.text(amount + 0.008 * top, at, text, va="center", fontsize=6.5)
        axes.set_yticks(range(len(cases)), cases)
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_axisbelow(True)
        axes.set_xlim(0, top * 1.18)
        axes.set_title(label, loc="left", fontsize=9)
        axes.grid(axis="x", alpha=0.25)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[variant]) for variant in variants]
    figure.legend(handles, variants, loc="outside lower center", ncols=min(len(variants), 7), frameon=False)
    baseline = next((row.baseline for row in rows if row.baseline), "")
    suffix = f"; in brackets: speed relative to {baseline}" if baseline else ""
    figure.suptitle(f"{title}, {size(rows[0])}{suffix}\n{where}", x=0.01, ha="left", fontsize=9)
    figure.savefig(path)
    plt.close(figure)
    return path

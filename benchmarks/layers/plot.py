"""The plot: speed-up over dense against keep ratio, a panel per dtype, mask, side and direction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.stats import geomean
from layers.rows import Row

DPI = 150
WIDTH, HEIGHT = 8.0, 4.1  # inches: 1200 pixels wide, and what a row of panels adds to the height
COLUMNS = 2
GAP = 0.045  # least distance of two labels, in heights of a panel
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
SIDES = {"both": "filters, in and out", "out": "filters, out", "in": "filters, in", "-": "kernels"}  # others: blocks
# Label, column, colour (distinct for colour-blind readers, too), line style, width.
LINES = (
    ("upper\nbound L", "limit_ms", "0.15", (0, (4, 2)), 1.4),
    ("ours", "ms", "#0072B2", "-", 2.6),
    ("Python\ncompaction", "compaction_ms", "#D55E00", "-", 1.4),
    ("SparseProp", "sparseprop_ms", "#009E73", "-", 1.4),
)


def write_plot(path: Path, rows: Sequence[Row]) -> None:
    """Lines are geometric means, weighted as in the summary; dots are ours, one for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(_panel_of(r) for r in rows))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (WIDTH, HEIGHT * lines + 0.6)
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _panel(axis, [r for r in rows if _panel_of(r) == panel])
        for row in axes:
            row[0].set_ylabel("speed-up over dense")
        figure.suptitle("Lines: geometric means over problems. Dots: ours, one per problem.", fontsize=10, color="0.3")
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def _panel_of(row: Row) -> tuple[str, ...]:
    return row.dtype, row.mask, row.side, row.direction


def _title(row: Row) -> str:
    dtype = "" if row.dtype == "float32" else f", {row.dtype}"
    return f"{SIDES.get(row.side, f'blocks of {row.side}')}: {row.direction}{dtype}"


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    ratios = sorted({r.kept for r in rows}, reverse=True)
    ends = [("dense", 1.0, "0.5")]
    axis.axhline(1, color="0.5", linewidth=1.2, zorder=1)
    axis.scatter([r.kept for r in rows], [r.vs_dense for r in rows], s=14, color="#0072B2", alpha=0.25, linewidths=0)
    for label, column, color, style, width in LINES:
        means = {k: _over_dense([r for r in rows if r.kept == k], column) for k in ratios}
        points = {k: v for k, v in means.items() if v is not None}
        if points:
            marker = dict(marker="o", markersize=4.5, markeredgecolor="white", markeredgewidth=0.6)
            axis.plot(list(points), list(points.values()), color=color, linestyle=style, linewidth=width, **marker)
            ends.append((label, points[min(points)], color))
    room = 0.06 * (ratios[0] - ratios[-1]) or 0.05
    axis.set(xlabel="keep ratio", xlim=(ratios[0] + room, ratios[-1] - room), yscale="log")
    axis.set_title(_title(rows[0]), loc="left", fontsize=11, fontweight="bold")
    axis.xaxis.set_major_locator(FixedLocator(_spread(ratios)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_major_locator(FixedLocator(TICKS))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    _label(axis, ends)


def _spread(ratios: Sequence[float]) -> list[float]:
    """The keep ratios that have room for a number below them."""
    shown: list[float] = []
    for ratio in ratios:
        if not shown or shown[-1] - ratio >= 0.07 * (ratios[0] - ratios[-1]):
            shown.append(ratio)
    return shown


def _label(axis: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names the lines at the right edge, at the height where each ends; names that would overlap are pushed apart."""
    axis.set_ylim(axis.get_ylim())
    height = (axis.transData + axis.transAxes.inverted()).transform
    placed = sorted([height((0, value))[1], label, color] for label, value, color in ends)
    breaks = [label.count("\n") / 2 for _, label, _ in placed]
    needed = [GAP * (1 + low + high) for low, high in zip(breaks, breaks[1:], strict=False)]
    for _ in range(50):
        for low, high, gap in zip(placed, placed[1:], needed, strict=False):
            if (short := gap - (high[0] - low[0])) > 0:
                low[0], high[0] = low[0] - short / 2, high[0] + short / 2
    for y, label, color in placed:
        axis.text(1.02, y, label, color=color, transform=axis.transAxes, va="center", fontsize=9.5, linespacing=0.95)


def _over_dense(rows: Sequence[Row], column: str) -> float | None:
    return geomean(rows, lambda r: None if getattr(r, column) is None else r.best_dense_ms / getattr(r, column))

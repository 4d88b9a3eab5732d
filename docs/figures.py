"""The style of the plots in docs/assets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

GREY = "#808080"  # readable on white and on black


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """Returns a figure and its axis, in the style of all plots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "svg.fonttype": "none", "svg.hashsalt": "prunekernels", "font.family": "sans-serif", "font.size": 10,
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": GREY,
        "xtick.color": GREY, "ytick.color": GREY,
    }  # fmt: skip
    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
    return figure, axis


def ticks(axis: Any, x: Sequence[float], y: Sequence[float]) -> None:
    """Marks these values, on the vertical axis as factors."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.xaxis.set_major_locator(FixedLocator(x))
    axis.yaxis.set_major_locator(FixedLocator(y))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def save(figure: Any, path: Path) -> None:
    """Writes the figure, without the date, and closes it."""
    import matplotlib.pyplot as plt

    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)

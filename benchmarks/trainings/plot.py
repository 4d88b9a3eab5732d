"""The plot: accuracy against wall-clock, a point a run; and which share of the soft-dead filters comes back."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainings.rows import TrainingRow
from trainings.spec import METHODS
from trainings.summary import came_back_by_epoch

DPI, WIDTH, HEIGHT = 150, 11.0, 4.3  # inches of a row of panels
# Distinct for colour-blind readers as far as eleven colours can be; what counts is named in the picture as well.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#332288", "#882255", "#999933", "#117733",
          "#AA4499")  # fmt: skip
COLOR_OF = dict(zip(METHODS, COLORS * 2, strict=False))
PLAIN = "0.25"  # of networks without a method
MARKERS = {"dense": "*", "method": "o", "scratch": "^", "scratch-time": "v", "literal": "s"}
TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)
Group = tuple[str, str, str, int]  # kind, method, key, epochs
Point = tuple[float, float]


def write_plot(path: Path, rows: Sequence[TrainingRow], rate: float, duty: float) -> None:
    """A row of two panels for each network. rate, duty: of the methods that are shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in rows if is_shown(r, rate, duty)]
    archs = list(dict.fromkeys(r.arch for r in shown))
    if not archs:
        return
    style: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        size = (WIDTH, HEIGHT * len(archs) + 1.1)
        figure, axes = plt.subplots(len(archs), 2, figsize=size, squeeze=False, layout="constrained")
        for arch, (left, right) in zip(archs, axes, strict=True):
            here = [r for r in shown if r.arch == arch]
            _accuracy(left, here, f"{arch}, rate {rate:g}: accuracy against wall-clock")
            _came_back(right, here, f"{arch}: soft-dead filters that came back")
        _legends(figure, shown)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)


def is_shown(row: TrainingRow, rate: float, duty: float) -> bool:
    if row.kind == "method":
        return row.rate == rate and row.duty == duty
    return row.kind in ("dense", "scratch") or (row.kind == "literal" and row.rate == rate)


def kind_of(row: TrainingRow, epochs: int) -> str:
    """The kind, with those from scratch that had more epochs than others as one of its own."""
    return "scratch-time" if row.kind == "scratch" and row.epochs > epochs else row.kind


def points(rows: Sequence[TrainingRow]) -> dict[Group, list[Point]]:
    """By group of runs that differ in their seeds alone: wall-clock, of dense training's, and accuracy in %."""
    epochs = min(row.epochs for row in rows)
    found: dict[Group, list[Point]] = {}
    for row in rows:
        group = (kind_of(row, epochs), row.method, row.key if row.kind == "scratch" else "", row.epochs)
        dense = row.dense_seconds * epochs / row.epochs
        found.setdefault(group, []).append((row.best_seconds / dense, 100 * row.accuracy))
    return found


def mean(of: Iterable[Point]) -> Point:
    x, y = zip(*of, strict=True)
    return statistics.mean(x), statistics.mean(y)


def pareto(of: dict[Group, Point]) -> list[Group]:
    """The groups that no other one beats in both, from the fastest on."""
    front: list[Group] = []
    for group in sorted(of, key=lambda group: (of[group][0], -of[group][1])):
        if not front or of[group][1] > of[front[-1]][1]:
            front.append(group)
    return front


def _accuracy(axis: Any, rows: Sequence[TrainingRow], title: str) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    groups = points(rows)
    means = {group: mean(of) for group, of in groups.items()}
    front = pareto(means)
    axis.plot(*zip(*(means[group] for group in front), strict=True), color="0.6", linewidth=1.2, zorder=1)
    low, high = _range([y for group, of in groups.items() if group[0] != "literal" for _, y in of])
    axis.set_ylim(low, high)
    for group, of in groups.items():
        if means[group][1] < low:  # far below: at the edge, with its number
            means[group] = (means[group][0], low)
            number = f"{mean(of)[1]:.0f}"
            axis.annotate(number, means[group], xytext=(0, 6), textcoords="offset points", fontsize=7, ha="center")
        color, marker = COLOR_OF.get(group[1], PLAIN), MARKERS[group[0]]
        face = "none" if group[0] == "literal" else color
        axis.scatter(
            *zip(*of, strict=True), s=16, marker=marker, color=color, alpha=0.3, linewidths=0.6, facecolor=face
        )
        axis.scatter(
            *means[group], s=64, marker=marker, edgecolor=color, facecolor=face, linewidths=1.3, zorder=3,
            clip_on=False,
        )  # fmt: skip
    for group in front:  # the others lie too close together for names
        name = group[0] if group[1] == "none" else group[1]
        axis.annotate(name, means[group], xytext=(-6, 5), textcoords="offset points", fontsize=8.5, ha="right")
    times = [x for of in groups.values() for x, _ in of]
    axis.set(xlabel="wall-clock of the whole run, fastest dense training = 1", ylabel="accuracy, %", xscale="log")
    axis.set_xlim(min(times) / 1.25, max(times) * 1.12)
    axis.xaxis.set_major_locator(FixedLocator([t for t in TICKS if min(times) / 1.25 <= t <= max(times) * 1.12]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.axvline(1, color="0.8", linewidth=1, zorder=0)
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis that shows these values."""
    room = 0.08 * max(max(values) - min(values), 0.5)
    return min(values) - room, max(values) + 2 * room


def _came_back(axis: Any, rows: Sequence[TrainingRow], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    is_empty = True
    for kind, line in (("method", "-"), ("literal", (0, (4, 2)))):
        for method in METHODS:
            shares = came_back_by_epoch([r for r in rows if r.kind == kind and r.method == method])
            shown = [(epoch, 100 * share) for epoch, share in enumerate(shares, 1) if share is not None]
            if shown:
                marker = MARKERS[kind] if len(shown) < 20 else ""
                face = "none" if kind == "literal" else COLOR_OF[method]
                axis.plot(*zip(*shown, strict=True), color=COLOR_OF[method], linestyle=line, marker=marker,
                          markersize=4, markerfacecolor=face, linewidth=1.6)  # fmt: skip
                is_empty = False
    axis.set(xlabel="epoch", ylabel="% of the soft-dead filters of the epoch before", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="0.92", linewidth=0.8)
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    if is_empty:
        axis.text(0.5, 0.5, "no run had soft-dead filters", transform=axis.transAxes, ha="center", color="0.4")


def _legends(figure: Any, rows: Sequence[TrainingRow]) -> None:
    from matplotlib.lines import Line2D

    methods = [m for m in METHODS if any(r.method == m for r in rows)]
    colors = [Line2D([], [], color=COLOR_OF[m], marker="o", linewidth=2, label=m) for m in methods]
    epochs = min(r.epochs for r in rows)
    kinds = [k for k in MARKERS if any(kind_of(r, epochs) == k for r in rows)]
    shapes = [
        Line2D([], [], color=PLAIN, marker=MARKERS[k], linestyle="--" if k == "literal" else "none", label=k,
               markerfacecolor="none" if k == "literal" else PLAIN)
        for k in kinds
    ]  # fmt: skip
    shapes.append(Line2D([], [], color="0.6", linewidth=1.2, label="Pareto front of the means"))
    figure.legend(handles=[*colors, *shapes], loc="outside lower center", ncols=6, frameon=False, fontsize=9)

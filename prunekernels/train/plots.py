"""The pictures of a report: accuracy, the state of each filter and time, by epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import write_atomically
from .optional_deps import need

DPI, WIDTH = 110, 9.0
LIVE, SOFT, HARD = "#0072B2", "#E69F00", "#DDDDDD"  # distinguishable with any colour vision
LABELS = {LIVE: "live", SOFT: "soft-dead: may come back", HARD: "hard-dead: gone"}
DENSE, SMALL = "0.35", "#009E73"
OTHERS = ("#D55E00", SMALL, "#CC79A7", "#56B4E9")  # runs beside this one that are not dense
STYLE: dict[str, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
History = Sequence[Mapping[str, float]]


@contextmanager
def _figure(path: Path, rows: int, height: float) -> Iterator[list[Any]]:
    """Yields axes, one above the other; writes the file at the end of the `with` block."""
    need("matplotlib", "train: report").use("Agg")
    pyplot = need("matplotlib.pyplot", "train: report")
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(rows, 1, figsize=(WIDTH, height), squeeze=False, layout="constrained")
        yield list(axes.flat)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=DPI))
        pyplot.close(figure)


def plot_accuracy(
    path: Path, history: History, states: Tensor, beside: Mapping[str, History], images: str = "test"
) -> None:
    """Plots accuracy by epoch, and below it how many filters are in each state.

    states: uint8 [epochs, filters]; beside: histories of other runs by what they are; images: those that epochs were
    evaluated on.
    """
    epochs = range(1, len(history) + 1)
    with _figure(path, 2, 6.2) as (top, bottom):
        for i, (label, other) in enumerate(beside.items()):
            color = DENSE if label == "dense" else OTHERS[i % len(OTHERS)]
            top.plot(*_evaluated(other), ".--", color=color, label=f"{label}, {images}")
        top.plot(epochs, [row["train_accuracy"] for row in history], color=LIVE, alpha=0.4, label="training")
        top.plot(*_evaluated(history), ".-", color=LIVE, linewidth=2, label=f"{images}, pruned filters off")
        top.set(ylabel="accuracy", ylim=(min(0.5, *_evaluated(history)[1]), 1.005))
        top.legend(loc="lower right")
        below = torch.zeros(len(states), dtype=torch.long)
        for state, (color, label) in enumerate(LABELS.items()):
            count = (states == state).sum(1)
            bottom.bar(epochs, count.tolist(), width=1, bottom=below.tolist(), color=color, label=label)
            below += count
        bottom.set(xlabel="epoch", ylabel="filters", ylim=(0, states.shape[1]))
        bottom.legend(loc="lower left", frameon=True, framealpha=1, ncols=3)
        for axis in (top, bottom):
            _epoch_axis(axis, max(map(len, (history, *beside.values()))))


def _evaluated(history: History) -> tuple[list[int], list[float]]:
    """The epochs that were evaluated, from 1, and their accuracies."""
    rows = [(epoch, row["accuracy"]) for epoch, row in enumerate(history, 1) if not math.isnan(row["accuracy"])]
    return [epoch for epoch, _ in rows], [share for _, share in rows]


def plot_filters(path: Path, layers: Mapping[str, int], states: Tensor) -> None:
    """Draws a row a filter and a column an epoch; in each layer the filters that were live for longest come first."""
    colors = need("matplotlib.colors", "train: report").ListedColormap([LIVE, SOFT, HARD])
    blocks = states.split(list(layers.values()), dim=1)
    ordered = torch.cat([block[:, block.sum(0).argsort(stable=True)] for block in blocks], dim=1)
    edges = torch.tensor([0, *layers.values()]).cumsum(0)
    with _figure(path, 1, min(16.0, max(4.0, 0.24 * len(layers) + 1))) as (axis,):
        area = (0.5, len(states) + 0.5, int(edges[-1]), 0)
        axis.imshow(ordered.T.numpy(), cmap=colors, vmin=0, vmax=2, aspect="auto", interpolation="nearest", extent=area)
        for edge in edges[1:-1].tolist():
            axis.axhline(edge, color="white", linewidth=1.2)
        every = max(1, len(layers) // 60)
        middle = ((edges[1:] + edges[:-1]) / 2).tolist()[::every]
        axis.set_yticks(middle, list(layers)[::every], fontsize=7)
        axis.tick_params(axis="y", length=0)
        axis.set(xlabel="epoch", title="filters, layer by layer")
        _epoch_axis(axis, len(states))
        patch = need("matplotlib.patches", "train: report").Patch
        handles = [patch(color=color, label=label) for color, label in LABELS.items()]
        axis.figure.legend(handles=handles, ncols=3, loc="outside lower left")


def plot_time(path: Path, history: History, epoch_of: Mapping[str, float], label: str) -> None:
    """Plots the seconds of each epoch, and lines for an epoch of the dense, the masked and the small network."""
    epochs = range(1, len(history) + 1)
    seconds = [row["seconds"] for row in history]
    with _figure(path, 1, 3.4) as (axis,):
        axis.bar(
            epochs, seconds, color=LIVE, alpha=0.75, width=0.8, label=f"{label}: measured, pruning and plans included"
        )
        levels = (
            ("dense", DENSE, "--", "dense network"),
            ("this", LIVE, ":", "last masks"),
            ("small", SMALL, "-", "small network"),
        )
        for name, color, line, text in levels:
            axis.axhline(
                epoch_of[name], color=color, linestyle=line, linewidth=1.8, label=f"{text}: {epoch_of[name]:.2f} s"
            )
        high = max(*epoch_of.values(), sorted(seconds)[len(seconds) * 9 // 10])
        axis.set(xlabel="epoch", ylabel="seconds", ylim=(0, 1.45 * high))  # one slow epoch must not squash the rest
        axis.legend(loc="upper right", ncols=2, fontsize=9)
        _epoch_axis(axis, len(history))


def _epoch_axis(axis: Any, epochs: int) -> None:
    axis.set_xlim(0.5, epochs + 0.5)
    axis.xaxis.set_major_locator(need("matplotlib.ticker", "train: report").MaxNLocator(integer=True))

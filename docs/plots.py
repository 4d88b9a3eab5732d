"""The plots of the pages, from committed results: results.py draws them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from figures import GREY, new_figure, save, ticks
from result_rows import FILTERS, KERNELS, NAMES, load, method_rows, network_rows

COLORS = {"resnet56": "#0072B2", "vgg16": "#D55E00", "resnet18": "#009E73"}  # told apart by every colour vision


def speed_up_series() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By network and mode, (keep ratio, speed-up over dense) of a training step under joint masks."""
    rows = [row for row in network_rows("train") if row["masks"] == "joint"]
    return {
        network: {mode: [(r["kept"], r[mode]) for r in rows if r["network"] == network] for mode in ("live", "masked")}
        for network in NAMES
    }


def draw_speed_up(path: Path) -> None:
    """Speed-up of a training step over dense against the keep ratio, by network and mode."""
    figure, axis = new_figure(7.2, 3.9)
    for network, modes in speed_up_series().items():
        for mode, style in (("live", "-"), ("masked", (0, (4, 2)))):
            kept, values = zip(*modes[mode], strict=True)
            axis.plot(kept, values, color=COLORS[network], linestyle=style, marker="o", markersize=4, linewidth=2)
        best = modes["live"][-1]
        axis.annotate(
            f"{NAMES[network]} {best[1]:.1f}x", best, xytext=(8, -3), textcoords="offset points", color=COLORS[network]
        )
    axis.axhline(1, color=GREY, linewidth=1)
    axis.annotate("dense", (0.27, 1), xytext=(4, -3), textcoords="offset points", color=GREY)
    for style, label in (("-", "live mode"), ((0, (4, 2)), "masked mode")):
        axis.plot([], [], color=GREY, linestyle=style, linewidth=2, label=label)
    axis.legend(frameon=False, labelcolor=GREY, loc="upper left", ncols=2)
    axis.set(xlim=(0.97, 0.27), ylim=(0.85, 11), xlabel="keep ratio (share of the filters that is live)", yscale="log")
    axis.set_title("Speed-up of a training step over the dense network", loc="left", color=GREY, fontsize=11)
    ticks(axis, (0.95, 0.9, 0.7, 0.5, 0.3), (1, 2, 3, 4, 6, 8))
    save(figure, path)


def draw_layers(path: Path) -> None:
    """Speed-up of single layers over dense: a dot a layer, the geometric mean as a line."""
    figure, axis = new_figure(7.2, 3.6)
    for name, label, color in ((FILTERS, "filters and inputs", "#0072B2"), (KERNELS, "single kernels", "#D55E00")):
        rows, summary = load(name)["rows"], load(name)["summary"]
        axis.scatter(
            [r["kept"] for r in rows], [r["vs_dense"] for r in rows], s=16, color=color, alpha=0.35, linewidths=0
        )
        means = [(s["kept"], s["vs_dense"]) for s in summary]
        axis.plot(*zip(*means, strict=True), color=color, marker="o", markersize=5, linewidth=2, label=label)
        for kept, mean in means:
            axis.annotate(f"{mean:.2f}x", (kept, mean), xytext=(6, -13), textcoords="offset points", color=color)
    axis.axhline(1, color=GREY, linewidth=1)
    axis.legend(frameon=False, labelcolor=GREY, loc="upper left")
    axis.set(xlim=(0.99, 0.03), xlabel="keep ratio", yscale="log")
    axis.set_title("Forward and backward of one layer, speed-up over dense", loc="left", color=GREY, fontsize=11)
    ticks(axis, (0.95, 0.7, 0.5, 0.3, 0.15, 0.05), (1, 2, 4, 8, 16))
    save(figure, path)


def draw_methods(path: Path) -> None:
    """Whole trainings at rate 0.5: how fast, and how accurate."""
    figure, axis = new_figure(7.2, 3.6)
    for arch, label, marker in (("resnet20", "ResNet-20", "o"), ("vgg_small", "VGG-small", "s")):
        dense, *rows = method_rows(arch, 0.5)
        rows = [row for row in rows if row["duty"] == 0.1 and row["clip"] is None]
        color = "#0072B2" if arch == "resnet20" else "#D55E00"
        x, y = [r["vs_dense"] for r in rows], [r["accuracy"] - dense["accuracy"] for r in rows]
        axis.scatter(x, y, color=color, marker=marker, s=26, label=label)
        for row in rows:
            if row["method"] in ("ghfp", "coarse-pruning"):
                at = (row["vs_dense"], row["accuracy"] - dense["accuracy"])
                axis.annotate(row["method"], at, xytext=(-8, 6), textcoords="offset points", color=color, fontsize=8)
    axis.axhline(0, color=GREY, linewidth=1)
    axis.axvline(1, color=GREY, linewidth=1)
    axis.legend(frameon=False, labelcolor=GREY, loc="lower right")
    axis.set(xlabel="speed-up of the whole training over dense training", ylabel="accuracy less dense, points")
    axis.set_title("Half of the filters pruned while training, digits", loc="left", color=GREY, fontsize=11)
    save(figure, path)


PLOTS: dict[str, Callable[[Path], None]] = {
    "speed-up.svg": draw_speed_up, "layers.svg": draw_layers, "methods.svg": draw_methods,
}  # fmt: skip

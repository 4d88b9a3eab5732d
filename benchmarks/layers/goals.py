"""The goals, and what rows say about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from layers.problems import Problem
from layers.rows import Row, geomean

LOSS = 0.98  # below this share of a rival's speed a problem counts as lost
NAMED = 3


@dataclass(frozen=True)
class Goal:
    """What rows of a device are to reach, all of them in the mean or each of them by itself."""

    text: str
    target: float
    ratio: Callable[[Any], float | None]
    wanted: Callable[[Any], bool]
    each: bool = False
    at_most: bool = False
    device: str = "cpu"

    def margin(self, value: float) -> float:
        """1 is just reached, below 1 is missed."""
        return self.target / value if self.at_most else value / self.target


@dataclass(frozen=True)
class Found:
    """A goal and what the rows say about it."""

    goal: str
    target: str
    reached: float  # geometric mean, or the worst row
    margin: float  # above 1 there is room, below 1 that share of the goal is reached
    rows: int
    failing: int  # rows that by themselves stay short of the target
    verdict: str
    failing_most: str  # up to NAMED of them, the worst first


def _training(r: Row) -> bool:
    return r.direction == "fwd+bwd"


def _filters(r: Row) -> bool:
    return r.mask == "filter" and _training(r)


def _measured_for_limit(r: Row) -> bool:
    return _filters(r) and r.side == "both" and r.kept in (0.7, 0.5, 0.3)


def _kernels_3x3(r: Row, kept: float) -> bool:
    return (r.mask, r.direction, r.kept) == ("kernel", "fwd+bwd", kept) and Problem.parse(r.problem).taps == 3


def _bf16_channels_last(r: Row) -> bool:
    return (r.dtype, r.layout) == ("bfloat16", "channels_last")


def _gpu_layers(r: Row) -> bool:
    return _measured_for_limit(r) and _bf16_channels_last(r)


def _gpu_blocks(r: Row) -> bool:
    return r.mask == "block" and r.density < 1 and _training(r) and _bf16_channels_last(r)


GOALS = (
    Goal("filters in and out: share of limit, mean", 0.85, lambda r: r.of_limit, _measured_for_limit),
    Goal("filters in and out: share of limit, each", 0.6, lambda r: r.of_limit, _measured_for_limit, each=True),
    Goal("filters: over dense, each", LOSS, lambda r: r.vs_dense, _filters, each=True),
    Goal("kernels 3x3: over dense, mean", 1, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.5)),
    Goal("kernels 3x3: over dense, mean", 3, lambda r: r.vs_dense, lambda r: _kernels_3x3(r, 0.15)),
    Goal("kernels 3x3: over SparseProp, mean", 5, lambda r: r.vs_sparseprop, lambda r: _kernels_3x3(r, 0.15)),
    Goal(
        "overhead: time over dense's, each",
        1.02,
        lambda r: r.ms / r.dense_ms,
        lambda r: _training(r) and r.kept >= 0.9,
        each=True,
        at_most=True,
    ),
    Goal("peak memory over dense's, each", 1.1, lambda r: r.of_dense_peak, _training, each=True, at_most=True),
    Goal(
        "GPU bf16 filters in and out: over compaction, mean", 1.3, lambda r: r.vs_compaction, _gpu_layers, device="cuda"
    ),
    Goal("GPU bf16 filters in and out: share of limit, mean", 0.85, lambda r: r.of_limit, _gpu_layers, device="cuda"),
    Goal("GPU any mask: over dense, each", LOSS, lambda r: r.vs_dense, _training, each=True, device="cuda"),
    Goal(
        "GPU bf16 blocks: over dense x density, mean", 0.7, lambda r: r.vs_dense * r.density, _gpu_blocks, device="cuda"
    ),
)


def _find(goal: Goal, rows: Sequence[Any]) -> Found | None:
    wanted = [r for r in rows if r.device == goal.device and goal.wanted(r)]
    values = [(value, r) for r in wanted if (value := goal.ratio(r)) is not None]
    if not values:
        return None
    values.sort(key=lambda pair: goal.margin(pair[0]))
    reached = values[0][0] if goal.each else geomean([r for _, r in values], goal.ratio)
    assert reached is not None
    failing = [(value, r) for value, r in values if goal.margin(value) < 1]
    named = [f"{r.label}{r.which} kept {r.kept:g}: {value:.2f}" for value, r in failing[:NAMED]]
    kept = " ".join(f"{k:g}" for k in sorted({r.kept for _, r in values}, reverse=True))
    return Found(
        goal=f"{goal.text}; kept {kept}",
        target=f"{'<=' if goal.at_most else '>='} {goal.target:g}",
        reached=reached,
        margin=goal.margin(reached),
        rows=len(values),
        failing=len(failing),
        verdict="holds" if goal.margin(reached) >= 1 else "missed",
        failing_most=", ".join(named) or "-",
    )


def goals(rows: Sequence[Any], asked: Sequence[Goal] = GOALS) -> list[Found]:
    """Every goal that some of the rows can speak to."""
    return [found for goal in asked if (found := _find(goal, rows)) is not None]

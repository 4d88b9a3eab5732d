"""Goals: what rows of results should reach, and what a set of rows says about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.stats import geomean

LOSS = 0.98  # a row is lost to a baseline below this share of the baseline's speed
NAMED = 3


@dataclass(frozen=True)
class Goal:
    """A ratio that the `wanted` rows of a device should reach: in the geometric mean, or with `each` row by row."""

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


def goals(rows: Sequence[Any], asked: Sequence[Goal]) -> list[Found]:
    """What the rows say about each of the goals in `asked`; a goal without a row that it is about is left out."""
    return [found for goal in asked if (found := _find(goal, rows)) is not None]


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

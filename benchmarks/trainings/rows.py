"""Rows of methods.py, one for each trained network; their means over seeds, and the goals of pruning methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from harness.report import Report, text_table

POINTS_BELOW, FASTER = 1.0, 1.5  # the goals, at RATE
RATE = 0.5
FAST = ("ghfp", "pgp")


@dataclass(frozen=True)
class Spec:
    """How a network is trained. clip: None = the method's default."""

    method: str
    rate: float = 0.0
    duty: float = 1.0
    clip: bool | None = None

    def __str__(self) -> str:
        clip = {None: "", True: " clipped", False: " unclipped"}[self.clip]
        return f"{self.method} {self.rate:g} duty {self.duty:g}{clip}"


@dataclass
class MethodRow:
    """live, multiply_adds and parameters are shares of the dense network's; came_back is the share of all filters that
    were dead after one epoch and live after a later one."""

    arch: str
    method: str
    rate: float
    duty: float
    clip: bool | None
    seed: int
    accuracy: float
    dense_accuracy: float
    seconds: float  # all epochs, without the evaluations on the test set
    dense_seconds: float
    live: float
    came_back: float
    multiply_adds: float  # of the small network
    parameters: float
    ms_1: float  # a forward pass of the small network with 1 image; ms_64: with 64
    dense_ms_1: float
    ms_64: float
    dense_ms_64: float

    @property
    def setting(self) -> tuple[str, str, float, float, bool | None]:
        return self.arch, self.method, self.rate, self.duty, self.clip

    @property
    def job(self) -> str:
        return job_name(self.arch, self.seed, Spec(self.method, self.rate, self.duty, self.clip))

    def flat(self) -> dict[str, object]:
        return asdict(self)


def job_name(arch: str, seed: int, spec: Spec) -> str:
    return f"{arch} seed {seed} {spec}"


@dataclass(frozen=True)
class Summary:
    """All seeds of one setting. accuracy and spread in points: the mean, and the best seed's less the worst's."""

    arch: str
    method: str
    rate: float
    duty: float
    clip: bool | None
    seeds: int
    accuracy: float
    spread: float
    below_dense: float  # points, of the means
    vs_dense: float  # dense's seconds / ours: above 1 training is faster
    live: float
    came_back: float
    multiply_adds: float
    parameters: float
    latency_1: float  # dense's time / the small network's
    latency_64: float

    @property
    def label(self) -> str:
        return f"{self.arch} {self.method}"


def summarise(rows: Sequence[MethodRow]) -> list[Summary]:
    summaries = []
    for setting in dict.fromkeys(r.setting for r in rows):
        here = [r for r in rows if r.setting == setting]
        points = [100 * r.accuracy for r in here]
        summaries.append(
            Summary(
                *setting,
                seeds=len(here),
                accuracy=statistics.mean(points),
                spread=max(points) - min(points),
                below_dense=statistics.mean(100 * r.dense_accuracy for r in here) - statistics.mean(points),
                vs_dense=_geomean([r.dense_seconds / r.seconds for r in here]),
                live=statistics.mean(r.live for r in here),
                came_back=statistics.mean(r.came_back for r in here),
                multiply_adds=statistics.mean(r.multiply_adds for r in here),
                parameters=statistics.mean(r.parameters for r in here),
                latency_1=_geomean([r.dense_ms_1 / r.ms_1 for r in here]),
                latency_64=_geomean([r.dense_ms_64 / r.ms_64 for r in here]),
            )
        )
    return summaries


def _geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def goal_lines(summaries: Sequence[Summary], duty: float) -> list[str]:
    """A sentence for each goal; duty: of the rows that the goals are about."""
    wanted = [s for s in summaries if s.rate == RATE and s.duty == duty and s.clip is None and s.method != "none"]
    lines = []
    if wanted:
        missed = [f"{s.label} by {s.below_dense:.2f} points" for s in wanted if s.below_dense > POINTS_BELOW]
        said = f"missed by {len(missed)} of {len(wanted)}: {', '.join(missed)}" if missed else "holds for each"
        lines.append(f"accuracy at rate {RATE:g}, at most {POINTS_BELOW:g} point below dense: {said}")
    fast = [s for s in wanted if s.method in FAST]
    if fast:
        reached = ", ".join(f"{s.label} {s.vs_dense:.2f}" for s in fast)
        verdict = "holds" if all(s.vs_dense >= FASTER for s in fast) else "missed"
        lines.append(f"training at rate {RATE:g}, at least {FASTER:g} times as fast as dense: {verdict}: {reached}")
    return lines


def table(summaries: Sequence[Summary], markdown: bool = False) -> str:
    """The summaries; without the column clip where all rows have the same."""
    records = [asdict(s) for s in summaries]
    records = [r | {"clip": {None: "-", True: "yes", False: "no"}[r["clip"]]} for r in records]
    shown = [c for c in records[0] if c != "clip" or len({r["clip"] for r in records}) > 1]
    return text_table([{c: _cell(c, r[c]) for c in shown} for r in records], markdown)


def _cell(column: str, value: object) -> object:
    if isinstance(value, float) and column in ("accuracy", "spread", "below_dense"):
        return f"{value:.2f}"
    return value


def trainings_report(duty: float) -> Report:
    """How methods.py shows and stores its rows; duty: of the rows that the goals are about."""

    def summary(rows: Sequence[MethodRow], markdown: bool) -> str:
        return table(summarise(rows), markdown)

    def goals(rows: Sequence[MethodRow], markdown: bool) -> str:
        return "\n".join(f"- {line}" if markdown else line for line in goal_lines(summarise(rows), duty))

    def findings(rows: Sequence[MethodRow]) -> dict[str, Any]:
        summaries = summarise(rows)
        return {"goals": goal_lines(summaries, duty), "summary": [asdict(s) for s in summaries]}

    return Report("Methods benchmark", MethodRow, no_table, summary, goals, findings, details=())


def no_table(rows: Sequence[MethodRow], markdown: bool) -> str:
    """The rows of single seeds are in the JSON file alone."""
    return ""

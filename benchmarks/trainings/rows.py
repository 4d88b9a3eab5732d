"""Rows of methods.py: one trained network each; their means over seeds, and what the goals say of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from layers.report import Missing, document, text_table, write_whole

POINTS_BELOW, FASTER = 1.0, 1.5  # the goals, at RATE
RATE = 0.5
FAST = ("ghfp", "pgp")


@dataclass(frozen=True)
class Spec:
    """What a network is trained with. clip: None = the method's default."""

    method: str
    rate: float = 0.0
    duty: float = 1.0
    clip: bool | None = None

    def __str__(self) -> str:
        clip = {None: "", True: " clipped", False: " unclipped"}[self.clip]
        return f"{self.method} {self.rate:g} duty {self.duty:g}{clip}"


@dataclass
class MethodRow:
    """Shares are of the dense network's. came_back: of all filters, those that were dead and are live later."""

    arch: str
    method: str
    rate: float
    duty: float
    clip: bool | None
    seed: int
    accuracy: float
    dense_accuracy: float
    seconds: float  # all epochs, without the looks at the test set
    dense_seconds: float
    live: float
    came_back: float
    multiply_adds: float  # of the small network
    parameters: float
    ms_1: float  # a forward pass of the small network, so many images
    dense_ms_1: float
    ms_64: float
    dense_ms_64: float

    @property
    def setting(self) -> tuple[str, str, float, float, bool | None]:
        return self.arch, self.method, self.rate, self.duty, self.clip


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
    """duty: that of the rows which the goals are about."""
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
    """Without the columns that are the same throughout and say nothing."""
    records = [asdict(s) for s in summaries]
    records = [r | {"clip": {None: "-", True: "yes", False: "no"}[r["clip"]]} for r in records]
    shown = [c for c in records[0] if c != "clip" or len({r["clip"] for r in records}) > 1]
    return text_table([{c: _cell(c, r[c]) for c in shown} for r in records], markdown)


def _cell(column: str, value: object) -> object:
    if isinstance(value, float) and column in ("accuracy", "spread", "below_dense"):
        return f"{value:.2f}"
    return value


def write(
    rows: Sequence[MethodRow], header: Mapping[str, object], failed: Mapping[str, str], duty: float,
    to_json: Path | None, to_markdown: Path | None,
) -> None:  # fmt: skip
    summaries = summarise(rows)
    lines = goal_lines(summaries, duty)
    if to_json:
        body = {
            "header": dict(header), "goals": lines, "failed": dict(failed),
            "summary": [asdict(s) for s in summaries], "rows": [asdict(r) for r in rows],
        }  # fmt: skip
        write_whole(to_json, json.dumps(body, indent=1) + "\n")
    if to_markdown:
        found = "\n".join(f"- {line}" for line in lines)
        shown = table(summaries, markdown=True) if summaries else ""
        write_whole(to_markdown, document("Methods benchmark", header, shown, found, Missing(failed), ""))

"""The goals of pruning methods, and what summaries say about them: for each network, and in the mean over networks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.paired import Paired
from harness.report import text_table
from trainings.spec import METHODS, RATE
from trainings.summary import Summary

SCRATCH, SCRATCH_AT_LEAST, MANY = 0.0, 1.0, 4  # points over scratch: of each method, and of so many
LITERAL, LITERAL_TIME = -0.2, 0.6
SCRATCH_TIME = 0.5
CAME_BACK = 0.5  # of literal SFP's share
SOFT = ("sfp", "asfp", "srfp", "asrfp", "ghfp")
SLOW = ("coarse-pruning", "csgd", "fpagl")  # once slower than dense training
OVER_DENSE = 1.0
BUDGET = 0.5


@dataclass(frozen=True)
class Verdict:
    """A goal, where it was looked at, what was reached, and whether it holds."""

    goal: str
    network: str
    reached: str
    verdict: str
    seeds: int  # the fewest that a number in it has


@dataclass(frozen=True)
class _Found:
    value: float
    seeds: int


def verdicts(summaries: Sequence[Summary], duty: float) -> list[Verdict]:
    """What the summaries say about each goal, network by network, then in the mean over the networks; goals without
    rows are left out. duty: of the rows that the goals are about."""
    archs = list(dict.fromkeys(s.arch for s in summaries))
    wanted = [s for s in summaries if s.rate == RATE and s.duty == duty and s.kind in ("method", "budget")]
    literal = [s for s in summaries if s.rate == RATE and s.kind == "literal"]
    found = []
    for where in [*archs, *(["mean"] if len(archs) > 1 else [])]:
        of = archs if where == "mean" else [where]
        found += [v for goal in _GOALS if (v := goal(where, of, wanted, literal)) is not None]
    return found


def _reached(
    of: Sequence[str], summaries: Iterable[Summary], ask: Callable[[Summary], float | Paired | None],
    mean: Callable[[Iterable[float]], float] = statistics.mean,
) -> dict[str, _Found]:  # fmt: skip
    """By method, the mean over the networks `of`; methods that one of them lacks are left out."""
    by_method: dict[str, list[_Found]] = {}
    for s in summaries:
        value = ask(s)
        if s.arch in of and value is not None:
            found = _Found(value.mean, value.pairs) if isinstance(value, Paired) else _Found(value, s.seeds)
            by_method.setdefault(s.method, []).append(found)
    return {
        method: _Found(round(mean([f.value for f in by_method[method]]), 9), min(f.seeds for f in by_method[method]))
        for method in METHODS
        if len(by_method.get(method, ())) == len(of)
    }


def _geomean(values: Iterable[float]) -> float:
    return math.exp(statistics.mean(map(math.log, values)))


def _verdict(goal: str, where: str, found: Iterable[_Found], holds: bool, reached: str) -> Verdict:
    return Verdict(goal, where, reached, "holds" if holds else "missed", min(f.seeds for f in found))


def _named(found: dict[str, _Found], text: str = "{:+.2f}") -> str:
    return ", ".join(f"{method} {text.format(f.value)}" for method, f in found.items())


def _methods(summaries: Iterable[Summary]) -> list[Summary]:
    return [s for s in summaries if s.kind == "method"]


def _none_below_scratch(
    where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]
) -> Verdict | None:
    found = _reached(of, _methods(wanted), lambda s: s.over_scratch)
    if not found:
        return None
    below = {method: f for method, f in found.items() if f.value < SCRATCH}
    reached = f"{len(below)} of {len(found)} below: {_named(below)}" if below else f"none of {len(found)} below"
    return _verdict("each method over scratch, points: none below 0", where, found.values(), not below, reached)


def _many_over_scratch(
    where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]
) -> Verdict | None:
    found = _reached(of, _methods(wanted), lambda s: s.over_scratch)
    if not found:
        return None
    over = {method: f for method, f in found.items() if f.value >= SCRATCH_AT_LEAST}
    reached = f"{len(over)}: {_named(over)}" if over else "0"
    goal = f"methods at least {SCRATCH_AT_LEAST:+g} over scratch: at least {MANY}"
    return _verdict(goal, where, found.values(), len(over) >= MANY, reached)


def _over_literal(where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]) -> Verdict | None:
    found = _reached(of, _methods(wanted), lambda s: s.over_literal)
    if not found:
        return None
    below = {method: f for method, f in found.items() if f.value < LITERAL}
    reached = f"{len(below)} of {len(found)} below: {_named(below)}" if below else f"none of {len(found)} below"
    return _verdict(
        f"each method over literal, points: at least {LITERAL:g}", where, found.values(), not below, reached
    )


def _time_of_literal(where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]) -> Verdict | None:
    found = _reached(of, _methods(wanted), lambda s: s.time_of_literal, _geomean)
    if not found:
        return None
    slow = {method: f for method, f in found.items() if f.value > LITERAL_TIME}
    reached = f"{len(slow)} of {len(found)} above: {_named(slow, '{:.2f}')}" if slow else f"none of {len(found)} above"
    goal = f"each method's time, of literal's: at most {LITERAL_TIME:g}"
    return _verdict(goal, where, found.values(), not slow, reached)


def _over_scratch_time(
    where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]
) -> Verdict | None:
    found = _reached(of, _methods(wanted), lambda s: s.over_scratch_time)
    if not found:
        return None
    best = max(found, key=lambda method: found[method].value)
    reached = f"best: {_named({best: found[best]})}"
    goal = f"at least one method over scratch-time, points: {SCRATCH_TIME:+g}"
    return _verdict(goal, where, found.values(), found[best].value >= SCRATCH_TIME, reached)


def _came_back(where: str, of: Sequence[str], wanted: Sequence[Summary], literal: Sequence[Summary]) -> Verdict | None:
    papers = _reached(of, literal, lambda s: s.came_back).get("sfp")
    found = {m: f for m, f in _reached(of, _methods(wanted), lambda s: s.came_back).items() if m in SOFT}
    if papers is None or not found:
        return None
    reached = f"{_named(found, '{:.3f}')}; literal sfp {papers.value:.3f}"
    holds = all(f.value >= CAME_BACK * papers.value for f in found.values())
    goal = f"came back, soft methods, first half: at least {CAME_BACK:g} of literal sfp's share"
    return _verdict(goal, where, [papers, *found.values()], holds, reached)


def _over_dense(where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]) -> Verdict | None:
    found = {m: f for m, f in _reached(of, _methods(wanted), lambda s: s.vs_dense, _geomean).items() if m in SLOW}
    if not found:
        return None
    holds = all(f.value >= OVER_DENSE for f in found.values())
    goal = f"whole run over the fastest dense, {', '.join(SLOW)}: at least {OVER_DENSE:g}"
    return _verdict(goal, where, found.values(), holds, _named(found, "{:.2f}"))


def _budget(where: str, of: Sequence[str], wanted: Sequence[Summary], _: Sequence[Summary]) -> Verdict | None:
    found = _reached(of, [s for s in wanted if s.kind == "budget"], lambda s: s.over_uniform)
    if not found:
        return None
    holds = all(f.value >= BUDGET for f in found.values())
    goal = f'budget="flops" at {RATE:g} over uniform rates of the same multiply-adds, points: {BUDGET:+g}'
    return _verdict(goal, where, found.values(), holds, _named(found))


_GOALS = (
    _none_below_scratch, _many_over_scratch, _over_literal, _time_of_literal, _over_scratch_time, _came_back,
    _over_dense, _budget,
)  # fmt: skip


def goals_text(summaries: Sequence[Summary], duty: float, markdown: bool) -> str:
    found = verdicts(summaries, duty)
    return text_table([vars(v) for v in found], markdown) if found else ""

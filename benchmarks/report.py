"""Rows of results: text table, Markdown, JSON, CSV, the summary that says where we lose, and the goals."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from problems import Problem

LOSS = 0.98  # below this share of a rival's speed a problem counts as lost

RATIOS = ("vs_dense", "vs_compaction", "vs_sparseprop", "of_limit", "of_dense_peak")


@dataclass(frozen=True)
class Row:
    """One problem, mask, kept share and direction. Times are medians in ms, None where a rival did not run."""

    problem: str
    name: str
    times: int
    mask: str
    side: str
    kept: float
    live_k: int
    live_c: int
    live_kernels: int
    direction: str
    layout: str  # where ours was fastest
    plan: str
    ms: float
    dense_ms: float
    masked_dense_ms: float | None
    compaction_ms: float | None
    sparseprop_ms: float | None
    limit_ms: float | None
    ours_peak_mb: float | None = None
    dense_peak_mb: float | None = None
    quartiles: dict[str, list[float]] = field(default_factory=dict)  # "ours/nchw": [first, median, third]

    @property
    def vs_dense(self) -> float:
        return self.dense_ms / self.ms

    @property
    def label(self) -> str:
        return self.name or self.problem

    @property
    def vs_compaction(self) -> float | None:
        return None if self.compaction_ms is None else self.compaction_ms / self.ms

    @property
    def vs_sparseprop(self) -> float | None:
        return None if self.sparseprop_ms is None else self.sparseprop_ms / self.ms

    @property
    def of_limit(self) -> float | None:
        return None if self.limit_ms is None else self.limit_ms / self.ms

    @property
    def of_dense_peak(self) -> float | None:
        return None if self.ours_peak_mb is None or not self.dense_peak_mb else self.ours_peak_mb / self.dense_peak_mb

    def flat(self) -> dict[str, object]:
        ratios = {name: getattr(self, name) for name in RATIOS}
        return {k: v for k, v in asdict(self).items() if k != "quartiles"} | ratios


def geomean(rows: Iterable[Row], ratio: Callable[[Row], float | None]) -> float | None:
    """Geometric mean weighted by multiplicity, over the rows that have the ratio."""
    pairs = [(row.times, value) for row in rows if (value := ratio(row)) is not None]
    total = sum(times for times, _ in pairs)
    return math.exp(sum(times * math.log(value) for times, value in pairs) / total) if total else None


def break_even(speedups: dict[float, float]) -> float | None:
    """The largest kept share at which ours is as fast as dense, from mean speed-ups by kept share.

    Interpolated in the logarithm between neighbours; None if dense is faster throughout.
    """
    kept = sorted(speedups, reverse=True)
    for above, here in zip([None, *kept], kept, strict=False):
        if speedups[here] < 1:
            continue
        if above is None:
            return here
        low, high = math.log(speedups[above]), math.log(speedups[here])
        return above + (here - above) * -low / (high - low)
    return None


@dataclass(frozen=True)
class Summary:
    """All rows of one mask, side, direction and kept share."""

    mask: str
    side: str
    direction: str
    kept: float
    problems: int
    vs_dense: float | None
    vs_compaction: float | None
    vs_sparseprop: float | None
    of_limit: float | None
    worst: str
    worst_ratio: float  # of the limit, or over dense where there is no limit
    lost_to_dense: int
    lost_to_compaction: int


def summarise(rows: Sequence[Row]) -> list[Summary]:
    keys = dict.fromkeys((r.mask, r.side, r.direction, r.kept) for r in rows)
    summaries = []
    for key in keys:
        here = [r for r in rows if (r.mask, r.side, r.direction, r.kept) == key]
        worst = min(here, key=lambda r: r.of_limit or r.vs_dense)
        summaries.append(
            Summary(
                *key,
                problems=len(here),
                vs_dense=geomean(here, lambda r: r.vs_dense),
                vs_compaction=geomean(here, lambda r: r.vs_compaction),
                vs_sparseprop=geomean(here, lambda r: r.vs_sparseprop),
                of_limit=geomean(here, lambda r: r.of_limit),
                worst=worst.label,
                worst_ratio=worst.of_limit or worst.vs_dense,
                lost_to_dense=sum(r.vs_dense < LOSS for r in here),
                lost_to_compaction=sum(r.vs_compaction is not None and r.vs_compaction < LOSS for r in here),
            )
        )
    return summaries


def break_evens(summaries: Sequence[Summary]) -> dict[str, float | None]:
    """By "mask side direction", where more than one kept share was run."""
    curves: dict[str, dict[float, float]] = {}
    for s in summaries:
        if s.vs_dense is not None:
            curves.setdefault(f"{s.mask} {s.side} {s.direction}", {})[s.kept] = s.vs_dense
    return {name: break_even(curve) for name, curve in curves.items() if len(curve) > 1}


@dataclass(frozen=True)
class Goal:
    """What rows are to reach, all of them in the mean or each of them by itself."""

    text: str
    target: float
    ratio: Callable[[Row], float | None]
    wanted: Callable[[Row], bool]
    each: bool = False
    at_most: bool = False

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


NAMED = 3
SIDES = {"out": " out", "in": " in"}


def _filters(r: Row) -> bool:
    return r.mask == "filter" and r.direction == "fwd+bwd"


def _measured_for_limit(r: Row) -> bool:
    return _filters(r) and r.side == "both" and r.kept in (0.7, 0.5, 0.3)


def _kernels_3x3(r: Row, kept: float) -> bool:
    return (r.mask, r.direction, r.kept) == ("kernel", "fwd+bwd", kept) and Problem.parse(r.problem).taps == 3


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
        lambda r: r.direction == "fwd+bwd" and r.kept >= 0.9,
        each=True,
        at_most=True,
    ),
    Goal(
        "peak memory over dense's, each",
        1.1,
        lambda r: r.of_dense_peak,
        lambda r: r.direction == "fwd+bwd",
        each=True,
        at_most=True,
    ),
)


def _find(goal: Goal, rows: Sequence[Row]) -> Found | None:
    values = [(value, r) for r in rows if goal.wanted(r) and (value := goal.ratio(r)) is not None]
    if not values:
        return None
    values.sort(key=lambda pair: goal.margin(pair[0]))
    reached = values[0][0] if goal.each else geomean([r for _, r in values], goal.ratio)
    assert reached is not None
    failing = [(value, r) for value, r in values if goal.margin(value) < 1]
    named = [f"{r.label}{SIDES.get(r.side, '')} kept {r.kept:g}: {value:.2f}" for value, r in failing[:NAMED]]
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


def goals(rows: Sequence[Row]) -> list[Found]:
    """Every goal that some of the rows can speak to."""
    return [found for goal in GOALS if (found := _find(goal, rows)) is not None]


def goals_table(rows: Sequence[Row], markdown: bool = False) -> str:
    found = goals(rows)
    return _table([asdict(f) for f in found], markdown) if found else ""


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(records: Sequence[dict[str, object]], markdown: bool) -> str:
    cells = [list(records[0]), *([_cell(v) for v in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    if markdown:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        lines.insert(1, "|" + "---|" * len(widths))
    return "\n".join(lines)


ROW_COLUMNS = (
    *("name", "times", "mask", "side", "kept", "live_k", "live_c", "direction", "layout", "plan", "ms", "dense_ms"),
    *("masked_dense_ms", "compaction_ms", "sparseprop_ms", "limit_ms", "ours_peak_mb", "dense_peak_mb"),
    *RATIOS,
)


def tables(rows: Sequence[Row], markdown: bool = False) -> tuple[str, str]:
    """The rows, and the summary with its break-even densities."""
    flat = [row.flat() for row in rows]
    columns = [c for c in ROW_COLUMNS if any(f[c] is not None for f in flat)]  # no column of dashes
    shown = [{c: (f["name"] or f["problem"]) if c == "name" else f[c] for c in columns} for f in flat]
    summaries = summarise(rows)
    summary = _table([asdict(s) for s in summaries], markdown)
    bullet = "\n- " if markdown else ""
    for name, kept in break_evens(summaries).items():
        found = "none: dense is faster throughout" if kept is None else f"kept {kept:.2f}"
        summary += f"\n{bullet}break-even with dense, {name}: {found}"
    return _table(shown, markdown), summary


def markdown(rows: Sequence[Row], header: dict[str, object]) -> str:
    table, summary = tables(rows, markdown=True)
    head = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in header.items())
    sections = {"Summary": summary, "Goals": goals_table(rows, markdown=True), "Rows": table}
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"# Convolution benchmark\n\n{head}\n\n{body}\n"


def write_json(path: Path, rows: Sequence[Row], header: dict[str, object]) -> None:
    summaries = summarise(rows)
    body = {
        "header": header,
        "summary": [asdict(s) for s in summaries],
        "break_even": break_evens(summaries),
        "goals": [asdict(found) for found in goals(rows)],
        "rows": [row.flat() | {"quartiles": row.quartiles} for row in rows],
    }
    path.write_text(json.dumps(body, indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a results file; ValueError if it is none."""
    names = {f.name for f in fields(Row)}
    try:
        body = json.loads(path.read_text())
        return [Row(**{name: value for name, value in row.items() if name in names}) for row in body["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no results file: {error}") from None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    flat = [row.flat() for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, flat[0])
        writer.writeheader()
        writer.writerows(flat)

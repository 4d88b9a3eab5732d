"""The tables of conv.py's rows, and the summary that says where ours loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.goals import LOSS, goals
from harness.report import Report, goals_table, text_table
from harness.stats import geomean
from layers.goals import GOALS
from layers.rows import RATES, RATIOS, Row

ROW_COLUMNS = (
    *("name", "times", "mask", "side", "kept", "live_k", "live_c", "direction", "layout", "plan", "ms", "dense_ms"),
    *(
        "dense_compile_ms",
        "fastest_dense",
        "masked_dense_ms",
        "compaction_ms",
        "sparseprop_ms",
        "limit_ms",
        "ours_peak_mb",
        "dense_peak_mb",
    ),
    *RATIOS,
)
GPU_COLUMNS = (*RATES, "clock")


def break_even(speedups: dict[float, float]) -> float | None:
    """The largest keep ratio at which ours is as fast as dense, from the mean speed-up at each keep ratio.

    Interpolated in the logarithm between neighbours; None if dense is faster throughout.
    """
    ratios = sorted(speedups, reverse=True)
    for above, here in zip([None, *ratios], ratios, strict=False):
        if speedups[here] < 1:
            continue
        if above is None:
            return here
        low, high = math.log(speedups[above]), math.log(speedups[here])
        return above + (here - above) * -low / (high - low)
    return None


@dataclass(frozen=True)
class Summary:
    """All rows of one dtype, mask, side, direction and keep ratio (kept)."""

    dtype: str
    mask: str
    side: str
    direction: str
    kept: float
    problems: int
    vs_dense: float | None
    noise: float | None  # the largest
    vs_compaction: float | None
    vs_sparseprop: float | None
    of_limit: float | None
    worst: str
    worst_ratio: float  # of_limit, or vs_dense where there is no upper bound
    lost_to_dense: int
    lost_to_compaction: int


def summarise(rows: Sequence[Row]) -> list[Summary]:
    keys = dict.fromkeys((r.dtype, r.mask, r.side, r.direction, r.kept) for r in rows)
    summaries = []
    for key in keys:
        here = [r for r in rows if (r.dtype, r.mask, r.side, r.direction, r.kept) == key]
        worst = min(here, key=lambda r: r.of_limit or r.vs_dense)
        summaries.append(
            Summary(
                *key,
                problems=len(here),
                vs_dense=geomean(here, lambda r: r.vs_dense),
                noise=max((r.noise for r in here if r.noise), default=None),
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
    """Break-even by "mask side direction", where several keep ratios were run; dtypes but float32 are named, too."""
    curves: dict[str, dict[float, float]] = {}
    for s in summaries:
        if s.vs_dense is not None:
            dtype = "" if s.dtype == "float32" else f" {s.dtype}"
            curves.setdefault(f"{s.mask} {s.side} {s.direction}{dtype}", {})[s.kept] = s.vs_dense
    return {name: break_even(curve) for name, curve in curves.items() if len(curve) > 1}


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    flat = [row.flat() for row in rows]
    wanted = (*ROW_COLUMNS, *GPU_COLUMNS) if any(row.device == "cuda" for row in rows) else ROW_COLUMNS
    columns = [c for c in wanted if any(f[c] is not None for f in flat)]  # no column of dashes
    shown = [{c: (f["name"] or f["problem"]) if c == "name" else f[c] for c in columns} for f in flat]
    return text_table(shown, markdown)


def summary(rows: Sequence[Row], markdown: bool = False) -> str:
    """A line for each mask, side, direction and keep ratio, then where ours breaks even with dense."""
    summaries = summarise(rows)
    several = len({s.dtype for s in summaries}) > 1
    text = text_table([{k: v for k, v in asdict(s).items() if k != "dtype" or several} for s in summaries], markdown)
    bullet = "\n- " if markdown else ""
    for name, kept in break_evens(summaries).items():
        found = "none: dense is faster throughout" if kept is None else f"kept {kept:.2f}"
        text += f"\n{bullet}break-even with dense, {name}: {found}"
    return text


def layer_goals(rows: Sequence[Row], markdown: bool = False) -> str:
    return goals_table(rows, GOALS, markdown)


def findings(rows: Sequence[Row]) -> dict[str, Any]:
    summaries = summarise(rows)
    return {
        "summary": [asdict(s) for s in summaries],
        "break_even": break_evens(summaries),
        "goals": [asdict(found) for found in goals(rows, GOALS)],
    }


LAYERS = Report("Convolution benchmark", Row, table, summary, layer_goals, findings)


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; ValueError if it is none."""
    return LAYERS.read(path)[0]

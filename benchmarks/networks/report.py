"""The tables of network.py's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from harness.goals import goals
from harness.report import Report, goals_table, text_table
from networks.rows import GOALS, RATIOS, NetworkRow, renewed, summarise

COLUMNS = (
    *("network", "masks", "kept", "direction", "dense_ms", "masked_ms", "live_ms", "compacted_ms", "small_ms"),
    *("dense_compile_ms", "dense_fp32_ms", "compacted_compile_ms", "small_compile_ms"),
    *("fastest_dense", "best", *RATIOS, "layouts"),
    *("dense_peak_mb", "masked_peak_mb", "live_peak_mb", "compacted_peak_mb", "small_peak_mb", "rounds"),
)
TITLES = {"direction": "pass"}
HIDDEN = ("optimizer", "dtype", "device", "clock")  # columns shown only where rows differ; the header has them


def _shown(flat: Sequence[Mapping[str, object]], columns: Sequence[str]) -> list[dict[str, object]]:
    """The columns that have values, and of the hidden ones those in which rows differ."""
    columns = [*columns, *(c for c in HIDDEN if len({f.get(c) for f in flat}) > 1)]
    filled = [c for c in columns if any(f.get(c) is not None for f in flat)]
    return [{TITLES.get(c, c): f.get(c) for c in filled} for f in flat]


def table(rows: Sequence[NetworkRow], markdown: bool = False) -> str:
    return text_table(_shown([row.flat() for row in rows], COLUMNS), markdown)


def summary(rows: Sequence[NetworkRow], markdown: bool = False) -> str:
    summaries = [asdict(s) for s in summarise(rows)]
    return text_table(_shown(summaries, [c for c in summaries[0] if c not in HIDDEN]), markdown)


def network_goals(rows: Sequence[NetworkRow], markdown: bool = False) -> str:
    return goals_table(rows, GOALS, markdown)


def findings(rows: Sequence[NetworkRow]) -> dict[str, Any]:
    return {"summary": [asdict(s) for s in summarise(rows)], "goals": [asdict(found) for found in goals(rows, GOALS)]}


NETWORKS = Report(
    "Network benchmark", NetworkRow, table, summary, network_goals, findings, ("quartiles", "trials"), renewed
)

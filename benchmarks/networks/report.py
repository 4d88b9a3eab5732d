"""network.py's results as text table, Markdown, JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from layers.goals import goals
from layers.jobs import Record
from layers.report import NOTHING, Missing, document, goals_table, read_results, text_table, write_csv, write_whole
from networks.rows import GOALS, RATIOS, NetworkRow, summarise

COLUMNS = (
    *("network", "masks", "kept", "direction", "dense_ms", "layer_ms", "network_ms", "small_ms", *RATIOS, "layouts"),
    *("dense_peak_mb", "layer_peak_mb", "network_peak_mb", "small_peak_mb", "rounds"),
)
TITLES = {"direction": "pass"}
HIDDEN = ("optimizer", "dtype", "device", "clock")  # unless they differ: the header says them


def _shown(flat: Sequence[Mapping[str, object]], columns: Sequence[str]) -> list[dict[str, object]]:
    """Without columns of dashes, and with those that tell rows apart."""
    columns = [*columns, *(c for c in HIDDEN if len({f.get(c) for f in flat}) > 1)]
    kept = [c for c in columns if any(f.get(c) is not None for f in flat)]
    return [{TITLES.get(c, c): f.get(c) for c in kept} for f in flat]


def tables(rows: Sequence[NetworkRow], markdown: bool = False) -> tuple[str, str]:
    """The rows, and the summary."""
    summaries = [asdict(s) for s in summarise(rows)]
    columns = [c for c in summaries[0] if c not in HIDDEN]
    return (
        text_table(_shown([row.flat() for row in rows], COLUMNS), markdown),
        text_table(_shown(summaries, columns), markdown),
    )


def network_goals(rows: Sequence[NetworkRow], markdown: bool = False) -> str:
    return goals_table(rows, markdown, GOALS)


def markdown(rows: Sequence[NetworkRow], header: Mapping[str, object], missing: Missing = NOTHING) -> str:
    table, summary = tables(rows, markdown=True) if rows else ("", "")
    return document("Network benchmark", header, summary, network_goals(rows, markdown=True), missing, table)


def write_json(path: Path, rows: Sequence[NetworkRow], header: Mapping[str, object], missing: Missing) -> None:
    body = {
        "header": header,
        "summary": [asdict(s) for s in summarise(rows)],
        "goals": [asdict(found) for found in goals(rows, GOALS)],
        "failed": dict(missing.failed),
        "not_run": list(missing.not_run),
        "rows": [row.flat() | {"quartiles": row.quartiles, "trials": row.trials} for row in rows],
    }
    write_whole(path, json.dumps(body, indent=1) + "\n")


class NetworkRecord(Record):
    """Rows of network.py as they come."""

    def read(self) -> tuple[list[NetworkRow], Missing]:
        return read_results(self.args.json, NetworkRow)

    def write_files(self, rows: list[NetworkRow], missing: Missing) -> None:
        if self.args.json:
            write_json(self.args.json, rows, self.header, missing)
        if self.args.csv:
            write_csv(self.args.csv, rows, NetworkRow)
        if self.args.md:
            write_whole(self.args.md, markdown(rows, self.header, missing))

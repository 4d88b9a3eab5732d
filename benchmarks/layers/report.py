"""Results as text table, Markdown, JSON and CSV, and the summary that says where we lose."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from layers.goals import GOALS, LOSS, Goal, goals
from layers.rows import RATES, RATIOS, Row, geomean


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
    """All rows of one dtype, mask, side, direction and kept share."""

    dtype: str
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
    """By "mask side direction", where more than one kept share was run; other dtypes than float32 are named too."""
    curves: dict[str, dict[float, float]] = {}
    for s in summaries:
        if s.vs_dense is not None:
            dtype = "" if s.dtype == "float32" else f" {s.dtype}"
            curves.setdefault(f"{s.mask} {s.side} {s.direction}{dtype}", {})[s.kept] = s.vs_dense
    return {name: break_even(curve) for name, curve in curves.items() if len(curve) > 1}


def goals_table(rows: Sequence[Any], markdown: bool = False, asked: Sequence[Goal] = GOALS) -> str:
    found = goals(rows, asked)
    return text_table([asdict(f) for f in found], markdown) if found else ""


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def text_table(records: Sequence[Mapping[str, object]], markdown: bool) -> str:
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
GPU_COLUMNS = (*RATES, "clock")


def tables(rows: Sequence[Row], markdown: bool = False) -> tuple[str, str]:
    """The rows, and the summary with its break-even densities."""
    flat = [row.flat() for row in rows]
    wanted = (*ROW_COLUMNS, *GPU_COLUMNS) if any(row.device == "cuda" for row in rows) else ROW_COLUMNS
    columns = [c for c in wanted if any(f[c] is not None for f in flat)]  # no column of dashes
    shown = [{c: (f["name"] or f["problem"]) if c == "name" else f[c] for c in columns} for f in flat]
    summaries = summarise(rows)
    told_apart = len({s.dtype for s in summaries}) > 1
    shortened = [{k: v for k, v in asdict(s).items() if k != "dtype" or told_apart} for s in summaries]
    summary = text_table(shortened, markdown)
    bullet = "\n- " if markdown else ""
    for name, kept in break_evens(summaries).items():
        found = "none: dense is faster throughout" if kept is None else f"kept {kept:.2f}"
        summary += f"\n{bullet}break-even with dense, {name}: {found}"
    return text_table(shown, markdown), summary


@dataclass(frozen=True)
class Missing:
    """What was asked for and is not among the rows."""

    failed: Mapping[str, str] = field(default_factory=dict)  # error by job
    not_run: Sequence[str] = ()  # jobs that time did not suffice for


NOTHING = Missing()


def not_run_text(jobs: Sequence[str]) -> str:
    """A line for each mask and kept share: the problems that time did not suffice for."""
    lines: dict[str, list[str]] = {}
    for job in jobs:
        name, _, which = job.partition(" ")
        lines.setdefault(which, []).append(name)
    return "\n".join(f"- {which}: {len(names)}: {', '.join(names)}" for which, names in lines.items())


def markdown(rows: Sequence[Row], header: Mapping[str, object], missing: Missing = NOTHING) -> str:
    table, summary = tables(rows, markdown=True) if rows else ("", "")
    return document("Convolution benchmark", header, summary, goals_table(rows, markdown=True), missing, table)


def document(
    title: str, header: Mapping[str, object], summary: str, goals_found: str, missing: Missing, table: str
) -> str:
    head = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in header.items())
    sections = {
        "Summary": summary,
        "Goals": goals_found,
        "Failed": "\n".join(f"- {job}: {error}" for job, error in missing.failed.items()),
        "Not run, for want of time": not_run_text(missing.not_run),
        "Rows": table,
    }
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"# {title}\n\n{head}\n\n{body}\n"


def write_whole(path: Path, text: str) -> None:
    """All of the new or all of the old: whoever is killed while writing leaves no torn file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, newline="")
    os.replace(part, path)


def write_json(path: Path, rows: Sequence[Row], header: Mapping[str, object], missing: Missing = NOTHING) -> None:
    summaries = summarise(rows)
    body = {
        "header": header,
        "summary": [asdict(s) for s in summaries],
        "break_even": break_evens(summaries),
        "goals": [asdict(found) for found in goals(rows)],
        "failed": dict(missing.failed),
        "not_run": list(missing.not_run),
        "rows": [row.flat() | {"quartiles": row.quartiles} for row in rows],
    }
    write_whole(path, json.dumps(body, indent=1) + "\n")


def read_json(path: Path) -> list[Row]:
    """The rows of a results file; ValueError if it is none."""
    return read_results(path)[0]


def read_results(path: Path, kind: type[Any] = Row) -> tuple[list[Any], Missing]:
    """The rows of a results file and what is missing; ValueError if it is none."""
    names = {f.name for f in fields(kind)}
    try:
        body = json.loads(path.read_text())
        rows = [kind(**{name: value for name, value in row.items() if name in names}) for row in body["rows"]]
        return rows, Missing(dict(body.get("failed", {})), list(body.get("not_run", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no results file: {error}") from None


def write_csv(path: Path, rows: Sequence[Any], kind: type[Any] = Row) -> None:
    text = io.StringIO(newline="")
    flat = [row.flat() for row in rows]
    writer = csv.DictWriter(text, flat[0] if flat else [f.name for f in fields(kind)])
    writer.writeheader()
    writer.writerows(flat)
    write_whole(path, text.getvalue())


def write_markdown(path: Path, rows: Sequence[Row], header: Mapping[str, object], missing: Missing = NOTHING) -> None:
    write_whole(path, markdown(rows, header, missing))

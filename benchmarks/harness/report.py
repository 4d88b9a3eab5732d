"""Results as text tables, Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from harness.goals import Goal, goals


@dataclass(frozen=True)
class Missing:
    """What a command was asked for and what is not among the rows."""

    failed: Mapping[str, str] = field(default_factory=dict)  # error by job
    not_run: Sequence[str] = ()  # jobs that found no time


NOTHING = Missing()


@dataclass(frozen=True)
class Report:
    """How one command shows and stores its rows.

    row: the dataclass of a row; its flat() gives the columns, `details` are the fields that only the JSON file has.
    table, summary, goals: rows and whether Markdown is wanted -> text.
    findings: rows -> what the JSON file says beside the rows.
    renewed: an entry of an older file -> the same under today's names.
    """

    title: str
    row: type[Any]
    table: Callable[[Sequence[Any], bool], str]
    summary: Callable[[Sequence[Any], bool], str]
    goals: Callable[[Sequence[Any], bool], str] = lambda rows, markdown: ""
    findings: Callable[[Sequence[Any]], dict[str, Any]] = lambda rows: {}
    details: tuple[str, ...] = ("quartiles",)
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda entry: entry

    def sections(self, rows: Sequence[Any], missing: Missing, markdown: bool) -> dict[str, str]:
        """Text by heading, without empty sections."""
        found = {
            "Summary": self.summary(rows, markdown) if rows else "",
            "Goals": self.goals(rows, markdown) if rows else "",
            "Failed": "\n".join(f"- {job}: {error}" for job, error in missing.failed.items()),
            NOT_RUN: not_run_text(missing.not_run),
            "Rows": self.table(rows, markdown) if rows else "",
        }
        return {title: text for title, text in found.items() if text}

    def on_terminal(self, rows: Sequence[Any], header: Mapping[str, object], missing: Missing = NOTHING) -> str:
        head = "\n".join(f"{key}: {value}" for key, value in header.items())
        found = self.sections(rows, missing, markdown=False)
        return "\n\n".join((head, *(start + found[title] for title, start in ON_TERMINAL.items() if title in found)))

    def markdown(self, rows: Sequence[Any], header: Mapping[str, object], missing: Missing = NOTHING) -> str:
        head = "\n".join(f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in header.items())
        found = self.sections(rows, missing, markdown=True)
        return f"# {self.title}\n\n{head}\n\n" + "\n".join(f"## {name}\n\n{text}\n" for name, text in found.items())

    def json(self, rows: Sequence[Any], header: Mapping[str, object], missing: Missing = NOTHING) -> str:
        body = {
            "header": dict(header),
            **self.findings(rows),
            "failed": dict(missing.failed),
            "not_run": list(missing.not_run),
            "rows": [row.flat() | {name: getattr(row, name) for name in self.details} for row in rows],
        }
        return json_text(body)

    def csv(self, rows: Sequence[Any]) -> str:
        text = io.StringIO(newline="")
        flat = [row.flat() for row in rows]
        writer = csv.DictWriter(text, flat[0] if flat else [f.name for f in fields(self.row)])
        writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()

    def read(self, path: Path) -> tuple[list[Any], Missing]:
        """The rows of a JSON file and what is missing there; ValueError if it is no results file."""
        names = {f.name for f in fields(self.row)}
        try:
            body = json.loads(path.read_text())
            entries = map(self.renewed, body["rows"])
            rows = [self.row(**{name: value for name, value in entry.items() if name in names}) for entry in entries]
            return rows, Missing(dict(body.get("failed", {})), list(body.get("not_run", ())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no results file: {error}") from None


NOT_RUN = "Not run, for want of time"
# The sections in the order in which the terminal shows them, and how they start there.
ON_TERMINAL = {"Rows": "", "Summary": "", "Goals": "", "Failed": "failed:\n", NOT_RUN: "not run:\n"}


def json_text(body: Mapping[str, Any]) -> str:
    """JSON in which each entry of each section has one line: a row of results is a line."""
    sections = []
    for key, value in body.items():
        if isinstance(value, dict):
            start, end, lines = "{", "}", [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
        elif isinstance(value, list):
            start, end, lines = "[", "]", [json.dumps(v) for v in value]
        else:
            sections.append(f" {json.dumps(key)}: {json.dumps(value)}")
            continue
        inner = ",\n".join(f"  {line}" for line in lines)
        sections.append(f" {json.dumps(key)}: {start}" + (f"\n{inner}\n {end}" if lines else end))
    return "{\n" + ",\n".join(sections) + "\n}\n"


def text_table(records: Sequence[Mapping[str, object]], markdown: bool) -> str:
    """The first record's keys as titles, a line for each record; all records have the same keys."""
    cells = [list(records[0]), *([_cell(v) for v in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    if markdown:
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]
        lines.insert(1, "|" + "---|" * len(widths))
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def goals_table(rows: Sequence[Any], asked: Sequence[Goal], markdown: bool = False) -> str:
    found = goals(rows, asked)
    return text_table([asdict(f) for f in found], markdown) if found else ""


def not_run_text(jobs: Sequence[str]) -> str:
    """A line for each mask and keep ratio, which names the problems that found no time."""
    lines: dict[str, list[str]] = {}
    for job in jobs:
        name, _, which = job.partition(" ")
        lines.setdefault(which, []).append(name)
    return "\n".join(f"- {which}: {len(names)}: {', '.join(names)}" for which, names in lines.items())


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside `path` and moves it there, so that a process killed while writing leaves the old file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, newline="")
    os.replace(part, path)

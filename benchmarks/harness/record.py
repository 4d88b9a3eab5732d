"""The rows of a run as they come, what failed, and what is left to do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.report import Missing, Report, write_whole

WRITE_EVERY = 2.0  # seconds


@dataclass
class Record:
    """Rows and errors by job. Files are written every few seconds, so that a killed run loses next to nothing.

    jobs: in the order of the tables; str(job) is the `job` of its rows.
    """

    args: argparse.Namespace
    report: Report
    jobs: Sequence[Any]
    header: dict[str, object]
    rows: list[Any] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    written: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Takes over what the JSON file of an earlier run holds, if there is one."""
        if self.args.json.exists():
            rows, missing = self.report.read(self.args.json)
            # A job that was cut short has rows of some directions only: it is run again.
            self.rows = [row for row in rows if row.job not in missing.not_run]
            self.failed = dict(missing.failed)
            self.finished = {row.job for row in self.rows} | set(self.failed)

    def todo(self) -> list[Any]:
        return [job for job in self.jobs if str(job) not in self.finished]

    def finish(self, job: object, error: str = "") -> None:
        self.finished.add(str(job))
        if error:
            self.failed[str(job)] = error
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()

    def in_order(self) -> list[Any]:
        place = {str(job): i for i, job in enumerate(self.jobs)}
        return sorted(self.rows, key=lambda row: place.get(row.job, len(place)))

    def missing(self) -> Missing:
        return Missing(self.failed, [str(job) for job in self.todo()])

    def write(self) -> None:
        """Writes the files that the command line asks for."""
        args, report, rows = self.args, self.report, self.in_order()
        if args.json:
            write_whole(args.json, report.json(rows, self.header, self.missing()))
        if args.csv:
            write_whole(args.csv, report.csv(rows))
        if args.md:
            write_whole(args.md, report.markdown(rows, self.header, self.missing()))
        self.written = time.monotonic()

    def text(self) -> str:
        """What the terminal shows at the end: the tables, and the files that hold them."""
        files = [f"{name}: {path}" for name in ("json", "csv", "md", "plot") if (path := getattr(self.args, name))]
        tables = self.report.on_terminal(self.in_order(), self.header, self.missing())
        return "\n\n".join(filter(None, (tables, "\n".join(files))))

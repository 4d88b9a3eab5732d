"""What a run has to do, in which order, and what became of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from layers.problems import Problem
from layers.report import Missing, read_results, write_csv, write_json, write_markdown

WRITE_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class Job:
    """A problem with one mask; a row for each direction comes of it."""

    problem: Problem
    mask: str
    side: str
    kept: float

    def __str__(self) -> str:
        return f"{self.problem.name or self.problem.shape} {self.mask} {self.side} kept {self.kept:g}"


def suite(problem: Problem) -> str:
    return problem.name.partition(":")[0]


def rebatched(problem: Problem, batches: dict[str, int]) -> Problem:
    """With the batch asked for its suite, or for all ("")."""
    return replace(problem, batch=batches.get(suite(problem), batches.get("", problem.batch)))


def jobs(problems: Sequence[Problem], variants: Sequence[tuple[str, str]], kept: Sequence[float]) -> list[Job]:
    """`variants`: masks and sides."""
    return [Job(p, mask, side, k) for p, (mask, side), k in product(problems, variants, kept)]


def most_telling_first(todo: Sequence[Job], kept: Sequence[float]) -> list[Job]:
    """For runs that may not get to the end: kept shares in this order, and problems by their share of their suite's
    multiply-adds, the largest first, so that means over what was run stay close to means over all."""
    problems = {job.problem for job in todo}
    total = {name: sum(p.macs * p.times for p in problems if suite(p) == name) for name in map(suite, problems)}

    def rank(job: Job) -> tuple[int, float]:
        p = job.problem
        return kept.index(job.kept), -p.macs * p.times / total[suite(p)]

    return sorted(todo, key=rank)


@dataclass
class Record:
    """Rows as they come. Files are written every few seconds, so that a run that is killed loses next to nothing."""

    args: argparse.Namespace
    natural: Sequence[Any]  # jobs in the order of the tables
    header: dict[str, object]
    rows: list[Any] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    written: float = field(default_factory=time.monotonic)

    def resume(self) -> None:
        """Starts from what the JSON file of an earlier run holds, if there is one."""
        if self.args.json.exists():
            rows, missing = self.read()
            self.rows = [row for row in rows if row.job not in missing.not_run]  # of some not all directions were run
            self.failed = dict(missing.failed)
            self.finished = {row.job for row in self.rows} | set(self.failed)

    def read(self) -> tuple[list[Any], Missing]:
        return read_results(self.args.json)

    def todo(self) -> list[Any]:
        return [job for job in self.natural if str(job) not in self.finished]

    def finish(self, job: object, error: str = "") -> None:
        self.finished.add(str(job))
        if error:
            self.failed[str(job)] = error
        if time.monotonic() - self.written > WRITE_EVERY:
            self.write()

    def in_order(self) -> list[Any]:
        place = {str(job): i for i, job in enumerate(self.natural)}
        return sorted(self.rows, key=lambda row: place.get(row.job, len(place)))

    def missing(self) -> Missing:
        return Missing(self.failed, [str(job) for job in self.todo()])

    def write(self) -> None:
        self.write_files(self.in_order(), self.missing())
        self.written = time.monotonic()

    def write_files(self, rows: list[Any], missing: Missing) -> None:
        if self.args.json:
            write_json(self.args.json, rows, self.header, missing)
        if self.args.csv:
            write_csv(self.args.csv, rows)
        if self.args.md:
            write_markdown(self.args.md, rows, self.header, missing)

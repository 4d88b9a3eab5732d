"""What conv.py has to run, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from layers.problems import Problem


@dataclass(frozen=True)
class Job:
    """A problem with one mask; gives a row for each direction."""

    problem: Problem
    mask: str
    side: str
    keep_ratio: float

    def __str__(self) -> str:
        return f"{self.problem.name or self.problem.shape} {self.mask} {self.side} kept {self.keep_ratio:g}"


def suite(problem: Problem) -> str:
    return problem.name.partition(":")[0]


def rebatched(problem: Problem, batches: dict[str, int]) -> Problem:
    """The problem with the batch that `batches` has for its suite, or for all problems under ""."""
    return replace(problem, batch=batches.get(suite(problem), batches.get("", problem.batch)))


def jobs(problems: Sequence[Problem], variants: Sequence[tuple[str, str]], keep_ratios: Sequence[float]) -> list[Job]:
    """A job for each problem, variant (mask and side) and keep ratio."""
    return [Job(p, mask, side, ratio) for p, (mask, side), ratio in product(problems, variants, keep_ratios)]


def most_telling_first(todo: Sequence[Job], keep_ratios: Sequence[float]) -> list[Job]:
    """The order for a run that may not get to the end: keep ratios as given here, and for each the problems with the
    largest share of their suite's multiply-adds first. So the means over what was run stay close to those over all."""
    problems = {job.problem for job in todo}
    total = {name: sum(p.macs * p.times for p in problems if suite(p) == name) for name in map(suite, problems)}

    def rank(job: Job) -> tuple[int, float]:
        p = job.problem
        return keep_ratios.index(job.keep_ratio), -p.macs * p.times / total[suite(p)]

    return sorted(todo, key=rank)

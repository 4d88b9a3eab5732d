"""What network.py has to run, and how its time is divided among the rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from networks.models import Network
from networks.rows import goal_row, job_name

LEAST, MOST = 3, 25  # rounds
TRAINING = 0.8  # the training pass's share of a job's time


@dataclass(frozen=True)
class Job:
    """A network with masks; gives a row for each pass."""

    network: Network
    masks: str
    keep_ratio: float
    dtype: str = "float32"

    def __str__(self) -> str:
        return job_name(self.network.name, self.masks, self.keep_ratio, self.dtype)

    @property
    def rank(self) -> int:
        """How few goals are about it: jobs of low rank come first, and those below 2 get more rounds."""
        return 0 if goal_row("train", self.masks, self.keep_ratio) else 1 if self.keep_ratio >= 0.95 else 2

    @property
    def weight(self) -> float:
        return self.network.work * (2 if self.rank < 2 else 1)


def jobs(
    networks: Sequence[Network], masks: Sequence[str], keep_ratios: Sequence[float], dtypes: Sequence[str]
) -> list[Job]:
    """All combinations, but for independent masks where they are the joint ones: no filters of the network meet."""
    found = [Job(*each) for each in product(networks, masks, keep_ratios, dtypes)]
    joint = "joint" in masks
    return [job for job in found if not (joint and job.masks == "independent" and not job.network.has_joins())]


class Pace:
    """How many rounds a row gets: the time that is left is divided among the jobs to come, by their work."""

    def __init__(self, todo: Iterable[Job], args: argparse.Namespace) -> None:
        self.args = args
        self.end = args.began + 60 * args.minutes
        self.left = {str(job): job.weight for job in todo}
        self.job_end = self.began = 0.0

    def begin(self, job: Job) -> bool:
        """Starts the clock of a job; False where no time is left."""
        self.began = time.monotonic()
        share = self.left[str(job)] / sum(self.left.values())
        del self.left[str(job)]
        self.job_end = self.began + share * (self.end - self.began)
        return self.began < self.end

    def rounds(self, direction: str, round_ms: float) -> int:
        if self.args.rounds:
            return self.args.rounds
        seconds = self.args.seconds
        if seconds is None:
            whole = self.job_end - self.began
            part = TRAINING if direction == "train" and len(self.args.passes) > 1 else 1.0
            seconds = self.began + part * whole - time.monotonic()
        return max(LEAST, min(MOST, int(1e3 * seconds / round_ms)))

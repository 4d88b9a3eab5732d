#!/usr/bin/env python3
"""Counts the bytes that a training step under DistributedDataParallel sends, in four processes of this machine.

    python benchmarks/wire.py --json w.json --md w.md
    python benchmarks/wire.py --networks resnet56 --kept 0.5

The processes are joined by gloo. As root on Linux they have a network of their own, whose loopback counts every byte
that they send, headers included. Masks are joint, drawn as network.py draws them; the classifier is masked too. Where
that is not said, DDP does not broadcast buffers. Nothing is timed.

form              ddp: masked mode, plain DDP; hook: the same with pk.live_gradients_hook; compacted: DDP around the
                  small network
gradient_bytes    what a process gives to all_reduce in a step
ring_bytes        what it sends by a ring: 2 (n - 1) / n of that, for n processes
wire_bytes        what it was counted to send; without root nothing is
change_bytes      what it sends for other masks: the hook compares them, and in compacted mode DDP wraps the small
                  network anew
buffer_bytes      all buffers, masks among them; buffer_wire_bytes: what it sends more where DDP broadcasts them
check_bytes       what pk.check_same_masks sends; filters: how many there are, of which a method averages scores
checkpoint_bytes  a file of the masked network and its momentum; small_bytes: of the small network
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from harness import command
from harness.goals import Goal, goals
from harness.machine import header
from harness.options import Parser, add_output_files, keep_ratio, positive
from harness.ranks import run_ranks
from harness.record import Record
from harness.report import Report, goals_table, text_table
from networks.models import NETWORKS
from networks.wire import FORMS, measured

NAMES = ("resnet56", "vgg16", "resnet50")
KEPT = (1.0, 0.7, 0.5, 0.3)
RANKS = 4


@dataclass(frozen=True)
class Job:
    network: str
    kept: float

    def __str__(self) -> str:
        return f"{self.network} kept {self.kept:g}"


@dataclass
class WireRow:
    """Bytes of one rank; None: not counted."""

    network: str
    kept: float
    form: str
    ranks: int
    gradient_bytes: int
    ring_bytes: float
    wire_bytes: float | None
    change_bytes: float | None
    buffer_bytes: int
    buffer_wire_bytes: float | None
    checkpoint_bytes: int
    check_bytes: float | None
    filters: int
    small_bytes: int | None = None

    times = 1
    device = "cpu"

    @property
    def job(self) -> str:
        return str(Job(self.network, self.kept))

    @property
    def label(self) -> str:
        return self.network

    @property
    def which(self) -> str:
        return f" {self.form}"

    def flat(self) -> dict[str, object]:
        return asdict(self)


def ring_bytes(given: int, ranks: int) -> float:
    """What a rank sends in an all_reduce of so many bytes by a ring: a part from everyone, then a sum to everyone."""
    return 2 * (ranks - 1) / ranks * given


def rows_of(job: Job, ranks: int) -> Iterator[WireRow]:
    for found in run_ranks(measured, ranks, job.network, job.kept):
        ring = ring_bytes(found["gradient_bytes"], ranks)
        yield WireRow(job.network, job.kept, found.pop("form"), ranks, ring_bytes=ring, **found)


GOALS = (
    Goal(
        "bytes on the wire over what a ring sends, each",
        1.02,
        lambda r: None if r.wire_bytes is None else r.wire_bytes / r.ring_bytes,
        lambda r: True,
        each=True,
        at_most=True,
    ),
)


def summary(rows: Sequence[WireRow], markdown: bool = False) -> str:
    """Of each network, the share of plain DDP's bytes."""
    lines = []
    for name in dict.fromkeys(row.network for row in rows):
        given = {(row.kept, row.form): row.gradient_bytes for row in rows if row.network == name}
        for form in FORMS[1:]:
            shares = [f"{given[kept, form] / given[kept, 'ddp']:.3f} at {kept:g}" for kept, f in given if f == form]
            lines.append(f"- {name}, {form}: of DDP's bytes {', '.join(shares)}")
    return "\n".join(lines)


WIRE = Report(
    "Wire benchmark",
    WireRow,
    lambda rows, markdown: text_table([row.flat() for row in rows], markdown),
    summary,
    lambda rows, markdown: goals_table(rows, GOALS, markdown),
    lambda rows: {"goals": [asdict(found) for found in goals(rows, GOALS)]},
    details=(),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("wire.py", str(__doc__))
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NAMES), help=f"default: {' '.join(NAMES)}")
    add("--kept", nargs="+", type=keep_ratio, default=KEPT, help=f"keep ratios; default: {' '.join(map(str, KEPT))}")
    add("--ranks", type=positive, default=RANKS, help="processes; default: %(default)s")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float32"))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def make_header() -> dict[str, object]:
        return header("wire.py", argv, args, {"ranks": args.ranks})

    jobs = [Job(*each) for each in product(args.networks, args.kept)]
    record = Record(args, WIRE, jobs, make_header())
    run = command.run_jobs
    return command.run(
        record, lambda record: run(record, record.todo(), lambda job: rows_of(job, args.ranks)), make_header
    )


if __name__ == "__main__":
    command.main(main)

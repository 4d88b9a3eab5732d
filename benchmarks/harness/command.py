"""What every command does around its rows: set up torch, resume, run job by job, write, report, exit code."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import torch

import prunekernels as pk
from harness.contender import Wrong
from harness.gpu import alive
from harness.record import Record
from prunekernels.train.progress import Progress

LOST = 3  # exit code: the device was lost on the way; --resume in a new process does the rest

T = TypeVar("T")


def set_up_torch(threads: int | None) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False


def run(record: Record, work: Callable[[Record], int], header: Callable[[], dict[str, object]]) -> int:
    """Runs a command and returns its exit code.

    work: adds rows to the record and returns an exit code. header: makes the header anew once all is done, since it
    names the load of the machine at the end.
    """
    if record.args.resume:
        record.resume()
    code = 0
    try:
        with pk.plan.force(record.args.plan):
            code = work(record)
    except KeyboardInterrupt:
        print("stopped; what is done is reported", file=sys.stderr)
    except Wrong as error:
        raise SystemExit(str(error)) from None
    record.header = header()
    record.write()
    if not record.rows:
        print("no rows", file=sys.stderr)
        return code or 1
    print(record.text())
    return code or int(bool(record.failed))


def run_jobs(
    record: Record,
    todo: Sequence[Any],
    rows_of: Callable[[Any], Iterable[Any]],
    begin: Callable[[Any], bool] = lambda job: True,
) -> int:
    """Adds the rows of each job to the record, until begin(job) says that the time is over; 0, or LOST."""
    args: argparse.Namespace = record.args
    for job in progress(todo, "benchmark"):
        if not begin(job):
            print("out of time", file=sys.stderr)
            break
        error = ""
        try:
            for row in rows_of(job):
                record.rows.append(row)
        except Exception as failed:
            if not args.keep_going:
                raise
            error = f"{type(failed).__name__}: {failed}".splitlines()[0]
            print(f"warning: {job}: {error}", file=sys.stderr)
        record.finish(job, error)
        if error and not alive(args.device):
            return LOST
    return 0


def deadline(args: argparse.Namespace) -> Callable[[Any], bool]:
    """The `begin` of run_jobs for a run that started at args.began and has args.minutes, None: without end."""
    end = args.began + 60 * args.minutes if args.minutes else float("inf")
    return lambda job: time.monotonic() <= end


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Yields the items, with a bar on a terminal and a line for each item elsewhere."""
    if not sys.stderr.isatty():
        for i, item in enumerate(items, 1):
            print(f"{label} {i}/{len(items)}: {item}", file=sys.stderr, flush=True)
            yield item
        return
    with Progress(len(items), label) as bar:
        for i, item in enumerate(items):
            bar.update(i, str(item))
            yield item


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(command: Callable[[], int]) -> NoReturn:
    """Runs a command as the process. SIGTERM, which a time limit sends, ends it in order: what is done is reported."""
    signal.signal(signal.SIGTERM, stop)
    sys.exit(command())

#!/usr/bin/env python3
"""Times masked convolutions, layer by layer, against dense, Python compaction and the limit; see options.py."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

import prunekernels as pk
from harness.gpu import alive, recorded
from harness.machine import header
from harness.memory import peak_mb
from harness.timing import Timing, interleaved
from layers.baselines import FORMATS, RIVALS, Dense, Ours, Rival, Wrong
from layers.case import Case
from layers.jobs import Job, Record, jobs, most_telling_first
from layers.options import parse, parser
from layers.plot import write_plot
from layers.problems import make_masks
from layers.report import goals_table, not_run_text, read_json, tables
from layers.rows import Row

LOST = 3  # exit code: the device was lost on the way, --resume does the rest

T = TypeVar("T")


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """A bar on a terminal, a line per item elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm and sys.stderr.isatty():
        yield from tqdm(items, desc=label, unit="case")
        return
    for i, item in enumerate(items, 1):
        print(f"{label} {i}/{len(items)}: {item}", file=sys.stderr, flush=True)
        yield item


def fastest(timings: dict[str, Timing], family: str) -> str:
    """The key of a rival's faster layout."""
    return min((key for key in timings if key.split("/")[0] == family), key=lambda key: timings[key].median)


def contenders(
    case: Case, direction: str, layout: str, rivals: Sequence[str] | None = None
) -> Iterator[tuple[type[Rival], str]]:
    for rival in RIVALS:
        wanted = rivals is None or rival is Dense or rival.family in rivals
        if wanted and rival.entered(case, direction):
            yield from ((rival, name) for name in rival.layouts)
    yield from ((Ours, name) for name in ([layout] if layout != "both" else FORMATS))


def checked(case: Case, direction: str, args: argparse.Namespace) -> Iterator[Rival]:
    """Everybody whose results are right. A rival that is wrong or fails sits out the row; ours must not."""
    for contender, name in contenders(case, direction, args.layout, args.rivals):
        try:
            rival = contender(case, direction, name)
            rival.check()
        except Exception as error:
            if contender is Ours or not alive(args.device):
                raise
            what = f"{case.problem.format()}: {contender.family} ({name}), {direction} failed, {type(error).__name__}: "
            print(f"warning: {'' if isinstance(error, Wrong) else what}{error}; left out", file=sys.stderr)
        else:
            yield rival


def timed(rivals: dict[str, Rival], args: argparse.Namespace) -> tuple[dict[str, Timing], str]:
    """Everybody's time, and how it was taken."""
    runs: dict[str, Any] | None = None
    if args.device == "cuda" and args.clock == "graph":
        runs = recorded(rivals)
    clock = "wall" if args.device == "cpu" else "events" if runs is None else "graph"
    runs = runs or {key: r.run for key, r in rivals.items()}
    return interleaved(runs, args.device, args.seconds, args.rounds), clock


def measure(case: Case, direction: str, args: argparse.Namespace, job: Job) -> Row | None:
    """Check everybody, then time everybody; None where no dense convolution is left to compare with."""
    rivals = {f"{r.family}/{r.layout}": r for r in checked(case, direction, args)}
    families = {r.family for r in rivals.values()}
    if Dense.family not in families:
        return None
    timings, clock = timed(rivals, args)
    best = {family: fastest(timings, family) for family in families}
    times = {family: timings[key].median for family, key in best.items()}
    ours, dense = rivals[best[Ours.family]], rivals[best[Dense.family]]
    assert isinstance(ours, Ours)
    p, masks = case.problem, case.masks
    return Row(
        problem=p.shape,
        name=p.name,
        times=p.times,
        mask=job.mask,
        side=job.side,
        kept=job.kept,
        live_k=int(masks.live_filters.sum()),
        live_c=int(masks.live_inputs(p.groups).sum()),
        live_kernels=int(masks.pairs.sum()),
        direction=direction,
        layout=ours.layout,
        plan=ours.plan(),
        ms=times["ours"],
        dense_ms=times["dense"],
        masked_dense_ms=times.get("masked_dense"),
        compaction_ms=times.get("compaction"),
        sparseprop_ms=times.get("sparseprop"),
        limit_ms=times.get("limit"),
        ours_peak_mb=peak_mb(ours.run) if args.memory else None,
        dense_peak_mb=peak_mb(dense.run) if args.memory else None,
        quartiles={key: [t.low, t.median, t.high] for key, t in timings.items()},
        dtype=args.dtype,
        device=args.device,
        clock=clock,
    )


def rows_of(job: Job, args: argparse.Namespace) -> Iterator[Row]:
    masks = make_masks(job.problem, job.mask, job.side, job.kept, args.seed)
    case = Case.make(job.problem, masks, getattr(torch, args.dtype), args.device, args.seed)
    for direction in args.direction:
        if direction == "grad_input" and job.problem.image_input:
            continue
        row = measure(case, direction, args, job)
        if row is not None:
            yield row


def run(record: Record, args: argparse.Namespace) -> int:
    """Does what is to be done, or what of it time allows; 0, or an exit code."""
    todo = most_telling_first(record.todo(), args.kept_first) if args.minutes else record.todo()
    end = args.began + 60 * args.minutes if args.minutes else float("inf")
    for job in progress(todo, "benchmark"):
        if time.monotonic() > end:
            print("out of time", file=sys.stderr)
            break
        error = ""
        try:
            for row in rows_of(job, args):
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


def plot_again(args: argparse.Namespace) -> int:
    """What --plot-from asks for: the plot, and the goals over the rows of all files."""
    try:
        rows = [row for path in args.plot_from for row in read_json(path)]
    except ValueError as error:
        parser().error(str(error))
    if not rows:
        print("no rows", file=sys.stderr)
        return 1
    write_plot(args.plot, rows)
    sections = tables(rows)[1], goals_table(rows), f"plot: {args.plot}"
    print(*filter(None, sections), sep="\n\n")
    return 0


def report(record: Record) -> None:
    """Tables on the terminal, the plot, and where everything is."""
    args, rows = record.args, record.in_order()
    table, summary = tables(rows)
    head = "\n".join(f"{key}: {value}" for key, value in record.header.items())
    missing = {"failed": "\n".join(f"- {job}: {error}" for job, error in record.failed.items())}
    missing["not run"] = not_run_text(record.missing().not_run)
    texts = [f"{title}:\n{text}" for title, text in missing.items() if text]
    print(*filter(None, (head, table, summary, goals_table(rows), *texts)), sep="\n\n")
    if args.plot:
        write_plot(args.plot, rows)
    for name in ("json", "csv", "md", "plot"):
        if path := getattr(args, name):
            print(f"{name}: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    args, problems = parse(argv)
    args.began = began
    if args.plot_from:
        return plot_again(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    command = sys.argv[1:] if argv is None else argv
    record = Record(args, jobs(problems, args.variants, args.kept), header(args, command))
    if args.resume:
        record.resume()
    code = 0
    try:
        with pk.plan.force(args.plan):
            code = run(record, args)
    except KeyboardInterrupt:
        print("stopped; what is done is reported", file=sys.stderr)
    except Wrong as error:
        raise SystemExit(str(error)) from None
    record.header = header(args, command)  # with the load when done
    record.write()
    if not record.rows:
        print("no rows", file=sys.stderr)
        return code or 1
    report(record)
    return code or int(bool(record.failed))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # a time limit's; what is done is reported all the same
    sys.exit(main())

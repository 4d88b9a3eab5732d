#!/usr/bin/env python3
"""Times masked convolutions, layer by layer, beside dense, Python compaction and the upper bound L; --help says how."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from harness import command
from harness.contender import checked, fastest, quartiles, timed
from harness.machine import header
from harness.memory import peak_mb
from harness.options import FORMATS
from harness.record import Record
from layers.baselines import BASELINES, Dense, LayerContender, Ours
from layers.case import Case
from layers.compiled import CompiledDense, compiling
from layers.jobs import Job, jobs, most_telling_first
from layers.masks import make_masks
from layers.options import parse, parser
from layers.plot import write_plot
from layers.report import LAYERS, layer_goals, read_rows, summary
from layers.rows import Row


def entries(
    case: Case, direction: str, layout: str, baselines: Sequence[str] | None = None
) -> Iterator[tuple[type[LayerContender], str]]:
    """Class and layout of everything that a row times: dense, the baselines (None: all), and ours in `layout`."""
    for baseline in (Dense, CompiledDense, *BASELINES[1:]):
        is_dense = baseline in (Dense, CompiledDense)
        wanted = is_dense or baselines is None or baseline.family in baselines
        if wanted and baseline.supports(case, direction):
            yield from ((baseline, name) for name in baseline.layouts)
    yield from ((Ours, name) for name in ([layout] if layout != "both" else FORMATS))


def measure(case: Case, direction: str, args: argparse.Namespace, job: Job) -> Row | None:
    """Checks all contenders, then times all; None where no dense convolution is left to compare with."""

    def make(kind: type[LayerContender], layout: str) -> LayerContender:
        contender = kind(case, direction, layout)
        contender.check()
        return contender

    found = entries(case, direction, args.layout, args.contenders)
    contenders = checked(found, make, case.problem.format(), args, direction)
    families = {c.family for c in contenders.values()}
    if Dense.family not in families:
        return None
    timings, clock = timed(contenders, args, args.seconds, args.rounds)
    best = {family: fastest(timings, family) for family in families}
    times = {family: timings[key].median for family, key in best.items()}
    baselines: dict[str, Any] = {f"{b.family}_ms": times.get(b.family) for b in BASELINES}
    baselines["dense_compile_ms"] = times.get(CompiledDense.family)
    ours, dense = contenders[best[Ours.family]], contenders[best[Dense.family]]
    assert isinstance(ours, Ours)
    p, masks = case.problem, case.masks
    return Row(
        problem=p.shape,
        name=p.name,
        times=p.times,
        mask=job.mask,
        side=job.side,
        kept=job.keep_ratio,
        live_k=int(masks.live_filters.sum()),
        live_c=int(masks.live_inputs(p.groups).sum()),
        live_kernels=int(masks.pairs.sum()),
        direction=direction,
        layout=ours.layout,
        plan=ours.plan(),
        ms=times["ours"],
        **baselines,
        ours_peak_mb=peak_mb(ours.run) if args.memory else None,
        dense_peak_mb=peak_mb(dense.run) if args.memory else None,
        quartiles=quartiles(timings),
        dtype=args.dtype,
        device=args.device,
        clock=clock,
    )


def rows_of(job: Job, args: argparse.Namespace) -> Iterator[Row]:
    masks = make_masks(job.problem, job.mask, job.side, job.keep_ratio, args.seed)
    case = Case.make(job.problem, masks, getattr(torch, args.dtype), args.device, args.seed)
    for direction in args.direction:
        if direction == "grad_input" and job.problem.image_input:
            continue
        row = measure(case, direction, args, job)
        if row is not None:
            yield row


def plot_again(args: argparse.Namespace) -> int:
    """--plot-from: writes the plot of the rows of all files, and prints their summary and goals."""
    try:
        rows = [row for path in args.plot_from for row in read_rows(path)]
    except ValueError as error:
        parser().error(str(error))
    if not rows:
        print("no rows", file=sys.stderr)
        return 1
    write_plot(args.plot, rows)
    print(*filter(None, (summary(rows), layer_goals(rows), f"plot: {args.plot}")), sep="\n\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args, problems = parse(argv)
    args.began = began
    if args.plot_from:
        return plot_again(args)
    command.set_up_torch(args.threads)

    compiling.begin(args.compile_seconds)

    def make_header() -> dict[str, object]:
        about = {"plan": args.plan, "layout of ours": args.layout, "dense": compiling.about()}
        return header("conv.py", argv, args, about)

    def work(record: Record) -> int:
        todo = record.todo()
        if args.minutes:
            todo = most_telling_first(todo, args.kept_as_given)
        return command.run_jobs(record, todo, lambda job: rows_of(job, args), command.deadline(args))

    record = Record(args, LAYERS, jobs(problems, args.variants, args.kept), make_header())
    code = command.run(record, work, make_header)
    if args.plot and record.rows:
        write_plot(args.plot, record.in_order())
    return code


if __name__ == "__main__":
    command.main(main)

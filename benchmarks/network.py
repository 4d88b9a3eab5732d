#!/usr/bin/env python3
"""Times training and inference steps of whole networks beside dense and the small network; --help says how."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

import prunekernels as pk
from harness import command
from harness.contender import checked, fastest, quartiles, timed
from harness.machine import header
from harness.memory import peak_mb
from harness.options import FORMATS
from harness.record import Record
from harness.timing import Clock
from networks.baselines import CONTENDERS, FAMILIES, Dense, NetworkContender
from networks.jobs import Job, Pace, jobs
from networks.models import draw
from networks.options import parse
from networks.report import NETWORKS
from networks.rows import NetworkRow
from networks.setting import MaskedSetting, Setting

SHORT = {"nchw": "nchw", "channels_last": "nhwc"}
WARMUPS = 3  # at most, after the run that is checked: until no more plans are measured
SLOWER = 1.15  # a layout whose single runs are this much slower than the other's is not run in the rounds


def first_runs(contender: NetworkContender, clock: Clock) -> None:
    """Checks a run from the first weights, then runs on until no plan is measured any more."""
    results: list[Tensor] = []
    known = len(pk.plan.table())
    contender.rewind()
    ms = clock(lambda: results.append(contender.run()))
    contender.check(results[0])
    for _ in range(WARMUPS):
        if len(pk.plan.table()) == known:
            break
        known = len(pk.plan.table())
        ms = clock(contender.run)
    contender.ms = min(contender.ms, ms)


def trial(contender: NetworkContender, clock: Clock, device: str) -> float:
    """Peak memory in MB of one more run, without gradients of an earlier one; also a second sample of its time."""
    contender.optimizer.zero_grad()
    times: list[float] = []
    peak = peak_mb(lambda: times.append(clock(contender.run)), device)
    contender.ms = min(contender.ms, *times)
    return peak


def finalists(trials: Mapping[str, float]) -> list[str]:
    """The layouts that are worth timing, from single runs by "family/layout"."""
    best: dict[str, float] = {}
    for key, ms in trials.items():
        family = key.split("/")[0]
        best[family] = min(ms, best.get(family, ms))
    return [key for key, ms in trials.items() if ms <= SLOWER * best[key.split("/")[0]]]


def entries(masked: MaskedSetting, direction: str, args: argparse.Namespace) -> Iterator[tuple[type, str]]:
    """Class and layout of everything that a row times; dense in the layout that was faster under the first masks."""
    wanted = [c for c in CONTENDERS if c is Dense or c.family in args.contenders]
    for contender, layout in product(wanted, FORMATS if args.layout == "both" else (args.layout,)):
        if contender is not Dense or layout == masked.setting.dense_layout.get(direction, layout):
            yield contender, layout


def measure(masked: MaskedSetting, direction: str, pace: Pace, args: argparse.Namespace) -> NetworkRow | None:
    """Checks all contenders, then times their faster layouts; None where no dense network is left to compare with."""
    setting = masked.setting
    clock = Clock(args.device)

    def make(kind: type[NetworkContender], layout: str) -> NetworkContender:
        contender = Dense.of(masked, direction, layout) if kind is Dense else kind(masked, direction, layout)
        first_runs(contender, clock)
        return contender

    contenders = checked(entries(masked, direction, args), make, setting.format(), args, direction)
    if not any(isinstance(c, Dense) for c in contenders.values()):
        return None
    peaks = {key: trial(contender, clock, args.device) for key, contender in contenders.items()}
    trials = {key: contender.ms for key, contender in contenders.items()}
    contenders = {key: contenders[key] for key in finalists(trials)}
    rounds = pace.rounds(direction, sum(c.ms for c in contenders.values()))
    timings, how = timed(contenders, args, 0, rounds, warmups=0)
    best = {f: fastest(timings, f) for f in FAMILIES if any(key.startswith(f"{f}/") for key in timings)}
    times = {family: timings[key].median for family, key in best.items()}
    columns: dict[str, Any] = {f"{family}_ms": times.get(family) for family in FAMILIES}
    columns |= {f"{family}_peak_mb": peaks[key] for family, key in best.items()}
    setting.dense_layout[direction] = contenders[best[Dense.family]].layout  # under all masks
    return NetworkRow(
        network=setting.network.name,
        batch=setting.network.batch,
        masks=masked.masks,
        kept=masked.keep_ratio,
        direction=direction,
        layouts=" ".join(SHORT[best[f].split("/")[1]] if f in best else "-" for f in FAMILIES),
        rounds=rounds,
        optimizer=args.optimizer,
        **columns,
        quartiles=quartiles(timings),
        trials=trials,
        dtype=args.dtype,
        device=args.device,
        clock=how,
    )


class Bench:
    """Makes the rows of jobs; jobs of one network share its setting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings: dict[str, Setting] = {}

    def rows_of(self, job: Job, pace: Pace) -> Iterator[NetworkRow]:
        args, name = self.args, job.network.name
        if name not in self.settings:
            dtype = getattr(torch, args.dtype)
            self.settings[name] = Setting(job.network, args.device, dtype, args.optimizer, args.seed)
        setting = self.settings[name]
        live = draw(setting.wires, job.masks, job.keep_ratio, args.seed)
        masked = MaskedSetting(setting, job.masks, job.keep_ratio, live)
        for direction in args.passes:
            row = measure(masked, direction, pace, args)
            if row is not None:
                yield row


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args, networks = parse(argv)
    args.began = began
    command.set_up_torch(args.threads)

    def make_header() -> dict[str, object]:
        about = {"plan": args.plan, "layout": args.layout, "optimizer of masked and live mode": args.optimizer}
        return header("network.py", argv, args, about)

    def work(record: Record) -> int:
        todo = sorted(record.todo(), key=lambda job: (not job.has_goal, args.masks.index(job.masks)))
        pace, bench = Pace(todo, args), Bench(args)
        return command.run_jobs(record, todo, lambda job: bench.rows_of(job, pace), pace.begin)

    record = Record(args, NETWORKS, jobs(networks, args.masks, args.kept), make_header())
    return command.run(record, work, make_header)


if __name__ == "__main__":
    command.main(main)

#!/usr/bin/env python3
"""Times training and inference steps of whole networks beside dense and the small network; --help says how."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from networks.baselines import Dense, FloatDense, NetworkContender
from networks.contenders import COMPILED, EAGER, FAMILIES
from networks.jobs import Job, Pace, jobs
from networks.models import draw
from networks.options import parse
from networks.report import NETWORKS
from networks.rows import NetworkRow, goal_row
from networks.setting import MaskedSetting, Setting

SHORT = {"nchw": "nchw", "channels_last": "nhwc"}
WARMUPS = 30  # at most, after the run that is checked: until no more plans are tried
SLOWER = 1.15  # a layout whose single runs are this much slower than the other's is not run in the rounds


def first_runs(contender: NetworkContender, clock: Clock) -> None:
    """Checks a run from the first weights, then runs on until no plan is tried any more."""
    results: list[Tensor] = []
    contender.rewind()
    ms = clock(lambda: results.append(contender.run()))
    contender.check(results[0])
    if pk.plan.settle(contender.run, WARMUPS) > 1:
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


# Class and layout of what a row times.
Entries = Iterator[tuple[type[NetworkContender], str]]


def entries(
    kinds: Iterable[type[NetworkContender]], masked: MaskedSetting, direction: str, args: argparse.Namespace
) -> Entries:
    """All of these kinds that a row times; dense in the layout that was faster under the first masks."""
    others = masked.setting.dtype != torch.float32 and args.device == "cpu"
    wanted = [c for c in kinds if c is Dense or c.family in args.contenders and (others or c is not FloatDense)]
    for contender, layout in product(wanted, FORMATS if args.layout == "both" else (args.layout,)):
        known = masked.setting.dense_layout.get((contender.family, direction), layout)
        if not issubclass(contender, Dense) or layout == known:
            yield contender, layout


def compiled_entries(
    masked: MaskedSetting, direction: str, trials: Mapping[str, float], args: argparse.Namespace
) -> Entries:
    """The same for compiled forms. trials: single runs of the eager ones, by "family/layout"."""
    has_goals = goal_row(direction, masked.masks, masked.keep_ratio)
    for contender, layout in entries(COMPILED, masked, direction, args):
        if not (args.all_compiled or has_goals or issubclass(contender, Dense)):
            continue  # compiling it would take longer than all else
        eager = contender.eager.family if f"{contender.eager.family}/{layout}" in trials else Dense.family
        faster = min((key for key in trials if key.startswith(f"{eager}/")), key=lambda key: trials[key])
        is_chosen = (contender.family, direction) in masked.setting.dense_layout  # its one layout, under all masks
        if args.compiled_layout == "both" or is_chosen or layout == faster.split("/")[1]:
            yield contender, layout


def measure(masked: MaskedSetting, direction: str, pace: Pace, args: argparse.Namespace) -> NetworkRow | None:
    """Checks all contenders, then times their faster layouts; None where no dense network is left to compare with."""
    setting = masked.setting
    clock = Clock(args.device)
    peaks: dict[str, float] = {}

    def make(kind: type[NetworkContender], layout: str) -> NetworkContender:
        contender: NetworkContender = (
            kind.of(masked, direction, layout) if issubclass(kind, Dense) else kind(masked, direction, layout)
        )
        first_runs(contender, clock)
        peaks[f"{kind.family}/{layout}"] = trial(contender, clock, args.device)
        return contender

    def made(found: Entries) -> dict[str, NetworkContender]:
        return checked(found, make, setting.format(), args, direction)

    contenders = made(entries((*EAGER, FloatDense), masked, direction, args))
    if not any(isinstance(c, Dense) for c in contenders.values()):
        return None
    eager = {key: contender.ms for key, contender in contenders.items()}
    contenders |= made(compiled_entries(masked, direction, eager, args))
    trials = {key: contender.ms for key, contender in contenders.items()}
    contenders = {key: contenders[key] for key in finalists(trials)}
    rounds = pace.rounds(direction, sum(c.ms for c in contenders.values()))
    timings, how = timed(contenders, args, 0, rounds, warmups=0)
    best = {f: fastest(timings, f) for f in FAMILIES if any(key.startswith(f"{f}/") for key in timings)}
    times = {family: timings[key].median for family, key in best.items()}
    columns: dict[str, Any] = {f"{family.replace('+', '_')}_ms": times.get(family) for family in FAMILIES}
    columns |= {f"{kind.family}_peak_mb": peaks[best[kind.family]] for kind in EAGER if kind.family in best}
    for family, key in best.items():
        if isinstance(contenders[key], Dense):
            setting.dense_layout[family, direction] = contenders[key].layout  # under all masks
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
        dtype=str(setting.dtype).split(".")[1],
        device=args.device,
        clock=how,
    )


class Bench:
    """Makes the rows of jobs; jobs of one network share its setting."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings: dict[tuple[str, str], Setting] = {}

    def rows_of(self, job: Job, pace: Pace) -> Iterator[NetworkRow]:
        args, key = self.args, (job.network.name, job.dtype)
        if key not in self.settings:
            dtype = getattr(torch, job.dtype)
            self.settings[key] = Setting(job.network, args.device, dtype, args.optimizer, args.seed)
        setting = self.settings[key]
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
        about = {"plan": args.plan, "layout": args.layout, "dtype": " ".join(args.dtypes)}
        about["optimizer of our modes"] = args.optimizer
        return header("network.py", argv, args, about)

    def work(record: Record) -> int:
        todo = sorted(record.todo(), key=lambda job: (job.rank, args.masks.index(job.masks)))
        pace, bench = Pace(todo, args), Bench(args)
        return command.run_jobs(record, todo, lambda job: bench.rows_of(job, pace), pace.begin)

    record = Record(args, NETWORKS, jobs(networks, args.masks, args.kept, args.dtypes), make_header())
    return command.run(record, work, make_header)


if __name__ == "__main__":
    command.main(main)

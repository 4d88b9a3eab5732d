#!/usr/bin/env python3
"""Times training and inference steps of whole networks against dense and the small network; see network_options.py."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import prunekernels as pk
from conv import LOST, fastest, progress, stop
from harness.gpu import alive, recorded
from harness.machine import header
from harness.memory import peak_mb
from harness.timing import Clock, Timing, interleaved
from layers.baselines import FORMATS, Wrong
from layers.report import not_run_text
from networks.baselines import FAMILIES, RIVALS, Dense, Masked, Rival, Setting
from networks.models import Network, draw
from networks.options import parse
from networks.report import NetworkRecord, network_goals, tables
from networks.rows import NetworkRow

SHORT = {"nchw": "nchw", "channels_last": "nhwc"}
LEAST, MOST = 3, 25  # rounds
WARMUPS = 3  # at most, after the run that is checked: until no more plans are measured
SLOWER = 1.15  # a layout whose single runs are this much slower than the other's is not run in the rounds
TRAINING = 0.8  # of a job's time


@dataclass(frozen=True)
class Job:
    """A network with masks; a row for each pass comes of it."""

    network: Network
    masks: str
    kept: float

    def __str__(self) -> str:
        return f"{self.network.name} {self.masks} kept {self.kept:g}"

    @property
    def counts(self) -> bool:
        """Whether a goal speaks of it: these come first, and get more rounds."""
        return self.kept >= 0.95 or (self.kept == 0.5 and self.masks == "joint")

    @property
    def weight(self) -> float:
        return self.network.work * (2 if self.counts else 1)


def jobs(networks: Sequence[Network], masks: Sequence[str], kept: Sequence[float]) -> list[Job]:
    return [Job(n, m, k) for n in networks for m in masks for k in kept]


class Pace:
    """Rounds by the time that is left: shared among what is to come, in proportion to its work."""

    def __init__(self, todo: Iterable[Job], args: argparse.Namespace) -> None:
        self.args = args
        self.end = args.began + 60 * args.minutes
        self.left = {str(job): job.weight for job in todo}
        self.job_end = self.began = 0.0

    def begin(self, job: Job) -> bool:
        """False where there is no time left."""
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


def checked(masked: Masked, direction: str, clock: Clock, args: argparse.Namespace) -> Iterator[Rival]:
    """Everybody whose step is right, warmed up. A rival that is wrong or fails sits out the row; ours must not."""
    layouts = tuple(FORMATS) if args.layout == "both" else (args.layout,)
    wanted = [r for r in RIVALS if r is Dense or r.family in args.rivals]
    for contender, layout in product(wanted, layouts):
        if contender is Dense and layout != masked.setting.dense_layout.get(direction, layout):
            continue
        try:
            rival = Dense.of(masked, direction, layout) if contender is Dense else contender(masked, direction, layout)
            first_runs(rival, clock)
        except Exception as error:
            if contender.ours or not alive(args.device):
                raise
            what = f"{masked.setting.format()}: {contender.family} ({layout}), {direction} failed: "
            print(f"warning: {'' if isinstance(error, Wrong) else what}{error}; left out", file=sys.stderr)
        else:
            yield rival


def first_runs(rival: Rival, clock: Clock) -> None:
    """Checks a run from the first weights on, and goes on until no plan is measured."""
    results: list[Tensor] = []
    known = len(pk.plan.table())
    rival.rewind()
    ms = clock(lambda: results.append(rival.run()))
    rival.check(results[0])
    for _ in range(WARMUPS):
        if len(pk.plan.table()) == known:
            break
        known = len(pk.plan.table())
        ms = clock(rival.run)
    rival.ms = min(rival.ms, ms)


def trial(rival: Rival, clock: Clock, device: str) -> float:
    """Peak memory of one more run, which finds no gradients of an earlier one; a second sample of its time, too."""
    rival.optimizer.zero_grad()
    times: list[float] = []
    peak = peak_mb(lambda: times.append(clock(rival.run)), device)
    rival.ms = min(rival.ms, *times)
    return peak


def finalists(trials: Mapping[str, float]) -> list[str]:
    """Without layouts that stand no chance."""
    best: dict[str, float] = {}
    for key, ms in trials.items():
        family = key.split("/")[0]
        best[family] = min(ms, best.get(family, ms))
    return [key for key, ms in trials.items() if ms <= SLOWER * best[key.split("/")[0]]]


def timed(rivals: dict[str, Rival], rounds: int, args: argparse.Namespace) -> tuple[dict[str, Timing], str]:
    """Everybody's time, and how it was taken."""
    runs = recorded(rivals) if args.device == "cuda" and args.clock == "graph" else None
    clock = "wall" if args.device == "cpu" else "events" if runs is None else "graph"
    return interleaved(runs or {key: r.run for key, r in rivals.items()}, args.device, 0, rounds, warmups=0), clock


def measure(masked: Masked, direction: str, pace: Pace, args: argparse.Namespace) -> NetworkRow | None:
    """Check everybody, try everybody, time the faster layouts; None where no dense network is left to compare with."""
    setting = masked.setting
    clock = Clock(args.device)
    rivals = {f"{r.family}/{r.layout}": r for r in checked(masked, direction, clock, args)}
    if not any(isinstance(r, Dense) for r in rivals.values()):
        return None
    peaks = {key: trial(rival, clock, args.device) for key, rival in rivals.items()}
    trials = {key: rival.ms for key, rival in rivals.items()}
    rivals = {key: rivals[key] for key in finalists(trials)}
    rounds = pace.rounds(direction, sum(r.ms for r in rivals.values()))
    timings, how = timed(rivals, rounds, args)
    best = {f: fastest(timings, f) for f in FAMILIES if any(key.startswith(f"{f}/") for key in timings)}
    times = {family: timings[key].median for family, key in best.items()}
    setting.dense_layout[direction] = rivals[best[Dense.family]].layout  # under all masks
    return NetworkRow(
        network=setting.network.name,
        batch=setting.network.batch,
        masks=masked.masks,
        kept=masked.kept,
        direction=direction,
        **{f"{family}_ms": times.get(family) for family in FAMILIES},
        layouts=" ".join(SHORT[best[f].split("/")[1]] if f in best else "-" for f in FAMILIES),
        rounds=rounds,
        optimizer=args.optimizer,
        **{f"{family}_peak_mb": peaks[key] for family, key in best.items()},
        quartiles={key: [t.low, t.median, t.high] for key, t in timings.items()},
        trials=trials,
        dtype=args.dtype,
        device=args.device,
        clock=how,
    )


class Bench:
    """The settings of networks that were begun, and the rows of a job."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.settings: dict[str, Setting] = {}

    def rows_of(self, job: Job, pace: Pace) -> Iterator[NetworkRow]:
        args, name = self.args, job.network.name
        if name not in self.settings:
            dtype = getattr(torch, args.dtype)
            self.settings[name] = Setting(job.network, args.device, dtype, args.optimizer, args.seed)
        setting = self.settings[name]
        masked = Masked(setting, job.masks, job.kept, draw(setting.wires, job.masks, job.kept, args.seed))
        for direction in args.passes:
            row = measure(masked, direction, pace, args)
            if row is not None:
                yield row


def run(record: NetworkRecord, args: argparse.Namespace) -> int:
    """Does what is to be done, or what of it time allows; 0, or an exit code."""
    todo = sorted(record.todo(), key=lambda job: (not job.counts, args.masks.index(job.masks)))
    pace, bench = Pace(todo, args), Bench(args)
    for job in progress(todo, "benchmark"):
        if not pace.begin(job):
            print("out of time", file=sys.stderr)
            break
        error = ""
        try:
            for row in bench.rows_of(job, pace):
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


def report(record: NetworkRecord) -> None:
    """Tables on the terminal, where everything is, and last the goals."""
    args, rows = record.args, record.in_order()
    head = "\n".join(f"{key}: {value}" for key, value in record.header.items())
    missing = {"failed": "\n".join(f"- {job}: {error}" for job, error in record.failed.items())}
    missing["not run"] = not_run_text(record.missing().not_run)
    texts = [f"{title}:\n{text}" for title, text in missing.items() if text]
    files = "\n".join(f"{name}: {path}" for name in ("json", "csv", "md") if (path := getattr(args, name)))
    print(*filter(None, (head, *tables(rows), *texts, files, network_goals(rows))), sep="\n\n")


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    args, networks = parse(argv)
    args.began = began
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    command = sys.argv[1:] if argv is None else argv
    about = {"optimizer of the gears": args.optimizer}
    record = NetworkRecord(args, _different(networks, args), header(args, command, "network.py") | about)
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
    record.header = header(args, command, "network.py") | about  # with the load when done
    record.write()
    if not record.rows:
        print("no rows", file=sys.stderr)
        return code or 1
    report(record)
    return code or int(bool(record.failed))


def _different(networks: Sequence[Network], args: argparse.Namespace) -> list[Job]:
    """Without independent masks of a network in which no filters meet: they would be the joint ones again."""
    found = []
    for job in jobs(networks, args.masks, args.kept):
        repeated = job.masks == "independent" and "joint" in args.masks and not job.network.has_joins()
        found += [] if repeated else [job]
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # a time limit's; what is done is reported all the same
    sys.exit(main())

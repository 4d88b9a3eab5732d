#!/usr/bin/env python3
"""Trains small networks on digits with every pruning method, beside dense training: accuracy, time, the small network.

    python benchmarks/methods.py --rates 0.3 0.5 0.7 --seeds 0 1 2 --sweep 0 0.1 0.25 0.5 1 --json m.json --md m.md

All runs of a network and a seed take turns, an epoch each; one of them is dense training with plain torch.nn layers and
torch.optim.SGD. So a slow minute of the machine slows all of them alike, and ratios of times stay fair. Groups of runs
are spread over processes. Time is that of whole epochs with all that a method does, without the evaluations on the test
set. --sweep also trains the methods of --swept at rate 0.5 with each of these duties, and once without clipping.
Results are written after every group.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

from harness import command
from harness.machine import header
from harness.options import Parser, Renamed, add_output_files, mode_of_gear, positive, share
from harness.record import Record
from harness.timing import interleaved
from prunekernels.inspect.flops import count_flops
from prunekernels.train import setup
from prunekernels.train.config import DUTY, Config
from prunekernels.train.config import MODES as TRAIN_MODES
from prunekernels.train.data import load
from prunekernels.train.finalize import shrunk
from prunekernels.train.loop import Trainer, accuracy
from prunekernels.train.models import MODELS
from trainings.rows import RATE, MethodRow, Spec, job_name, trainings_report

METHODS = [name for name in setup.known_methods() if name != "none"]
DENSE = Spec("none")
LATENCY_BATCHES = (1, 64)
LATENCY_SECONDS = 0.4
MODES = tuple(mode for mode in TRAIN_MODES if mode != "dense")


@dataclass(frozen=True)
class Group:
    """The runs of a network and a seed."""

    arch: str
    seed: int
    specs: tuple[Spec, ...]
    epochs: int
    size: int | None
    mode: str
    threads: int

    def config(self, spec: Spec) -> Config:
        common: dict[str, Any] = {
            "out": "unused",
            "arch": self.arch,
            "epochs": self.epochs,
            "size": self.size,
            "seed": self.seed,
        }
        if spec == DENSE:
            return Config(**common, mode="dense", quiet=True)
        options = {} if spec.clip is None else {"clip": spec.clip}
        return Config(
            **common,
            mode=self.mode,
            quiet=True,
            method=spec.method,
            rate=spec.rate,
            duty=spec.duty,
            options=options,
        )


@dataclass
class Run:
    """A trainer, and the states of its filters before the first epoch and after each."""

    trainer: Trainer
    states: list[Tensor]

    @classmethod
    def of(cls, group: Group, spec: Spec) -> Run:
        trainer = Trainer(group.config(spec), data=load("digits", group.size))
        return cls(trainer, [trainer.filter_states()])

    def epoch(self) -> None:
        self.trainer.run_epoch()
        self.states.append(self.trainer.states[-1])

    @property
    def seconds(self) -> float:
        return sum(row["seconds"] for row in self.trainer.history)

    @property
    def came_back(self) -> float:
        dead = torch.stack(self.states) > 0
        return float((dead[:-1] & ~dead[1:]).any(0).double().mean())


def trained(group: Group) -> tuple[list[MethodRow], dict[str, str]]:
    """The group's rows, and the errors of runs that failed, by name of the job."""
    torch.set_num_threads(group.threads)
    failed: dict[str, str] = {}
    runs: dict[Spec, Run] = {}

    def attempt(spec: Spec, work: Callable[[], object]) -> None:
        try:
            work()
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if spec == DENSE:
                raise
            failed[job_name(group.arch, group.seed, spec)] = f"{type(error).__name__}: {error}"
            runs.pop(spec, None)

    for spec in (DENSE, *group.specs):
        attempt(spec, lambda spec=spec: runs.update({spec: Run.of(group, spec)}))  # type: ignore[misc]
    for _ in range(group.epochs):
        for spec in list(runs):
            attempt(spec, runs[spec].epoch)
    dense = runs[DENSE]
    rows: list[MethodRow] = []
    for spec in list(runs):
        attempt(spec, lambda spec=spec: rows.append(_row(group, spec, runs[spec], dense)))  # type: ignore[misc]
    return rows, failed


def _row(group: Group, spec: Spec, run: Run, dense: Run) -> MethodRow:
    trainer = run.trainer
    small = (shrunk(trainer)[0] if spec != DENSE else trainer.model).eval()
    found = trainer.history[-1]["accuracy"]
    if abs(accuracy(small, trainer.data, trainer.device) - found) > 2 / len(trainer.data.test):
        raise RuntimeError(f"small network: expected accuracy {found:.4f}, got another")
    whole = dense.trainer.model.eval()
    image = trainer.data.normalised(trainer.data.test.images[:1])
    times = {
        n: latencies({"small": small, "dense": whole}, image.expand(n, -1, -1, -1).contiguous())
        for n in LATENCY_BATCHES
    }
    return MethodRow(
        group.arch, spec.method, spec.rate, spec.duty, spec.clip, group.seed,
        accuracy=found, dense_accuracy=dense.trainer.history[-1]["accuracy"],
        seconds=run.seconds, dense_seconds=dense.seconds,
        live=trainer.history[-1]["live"], came_back=run.came_back,
        multiply_adds=count_flops(small, image).dense / count_flops(whole, image).dense,
        parameters=sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in whole.parameters()),
        ms_1=times[1]["small"], dense_ms_1=times[1]["dense"], ms_64=times[64]["small"], dense_ms_64=times[64]["dense"],
    )  # fmt: skip


@torch.no_grad()
def latencies(models: dict[str, nn.Module], x: Tensor) -> dict[str, float]:
    """Milliseconds of a forward pass, by name of the model."""
    passes = {name: (lambda model=model: model(x)) for name, model in models.items()}  # type: ignore[misc]
    return {name: timing.median for name, timing in interleaved(passes, "cpu", LATENCY_SECONDS).items()}


def specs(args: argparse.Namespace) -> tuple[Spec, ...]:
    """Every method at every rate, and the sweep."""
    found = [Spec(method, rate, args.duty) for method in args.methods for rate in args.rates]
    if args.sweep:
        for method in args.swept:
            found += [Spec(method, RATE, duty) for duty in args.sweep]
            found.append(Spec(method, RATE, args.duty, clip=False))
    return tuple(dict.fromkeys(found))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("methods.py", str(__doc__))
    add = parser.add_argument
    add("--arch", nargs="+", choices=list(MODELS), default=["vgg_small", "resnet20"])
    add("--methods", nargs="*", choices=METHODS, default=METHODS, help="default: all")
    add("--rates", nargs="+", type=_rate, default=[0.3, 0.5, 0.7], help="shares of filters that are pruned in the end")
    add("--duty", type=share, default=DUTY, help="of every method; default: %(default)s")
    add("--sweep", nargs="*", type=share, default=[], help=f"duties of --swept at rate {RATE:g}")
    add("--swept", nargs="+", choices=METHODS, default=["sfp", "ghfp"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--epochs", type=positive, default=20, help="default: %(default)s")
    add("--size", type=int, help="height and width of the images; default: 16")
    add("--mode", choices=MODES, default="live", help="how masked networks run; default: %(default)s")
    add("--gear", action=Renamed, new="--mode", dest="mode", type=mode_of_gear, choices=MODES)
    add("--threads", type=positive, default=1, help="of each process; default: %(default)s")
    add("--workers", type=positive, default=os.cpu_count(), help="processes; default: as many as there are cores")
    add_output_files(parser, ("json", "md"))
    args = parser.parse_args(argv, argparse.Namespace(dtype="float32"))
    if not specs(args):
        parser.error("argument --methods: expected some, or a --sweep")
    return args


def _rate(text: str) -> float:
    value = share(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1), got {text}")
    return value


def train(record: Record, groups: Sequence[Group], workers: int) -> int:
    """Trains the groups in processes and records the runs of each as it ends."""
    begun = time.perf_counter()
    with ProcessPoolExecutor(min(workers, len(groups)), get_context("spawn")) as pool:
        waiting = {pool.submit(trained, group): group for group in groups}
        for done in as_completed(waiting):
            group, (found, errors) = waiting[done], done.result()
            record.rows += found
            record.failed |= errors
            record.finished |= {row.job for row in found} | set(errors)
            record.write()
            minutes = (time.perf_counter() - begun) / 60
            print(f"{group.arch} seed {group.seed}: {len(found)} runs, {minutes:.1f} minutes so far", flush=True)
    return 0


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    asked = specs(args)
    groups = [
        Group(arch, seed, asked, args.epochs, args.size, args.mode, args.threads)
        for seed in args.seeds
        for arch in args.arch
    ]
    names = [job_name(arch, seed, spec) for arch in args.arch for spec in (DENSE, *asked) for seed in args.seeds]
    torch.set_num_threads(args.threads)

    def make_header() -> dict[str, object]:
        return header("methods.py", argv, args, {"processes": args.workers})

    record = Record(args, trainings_report(args.duty), names, make_header())
    return command.run(record, lambda record: train(record, groups, args.workers), make_header)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

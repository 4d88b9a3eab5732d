#!/usr/bin/env python3
"""Trains small networks on digits with every method: accuracy, time and the small network, beside dense training.

    python benchmarks/methods.py --rates 0.3 0.5 0.7 --seeds 0 1 2 --sweep 0 0.1 0.25 0.5 1 --json m.json --md m.md

All runs of a network and a seed go forward in turns, an epoch each, the dense one among them: plain torch.nn layers
under torch.optim.SGD. So a slow minute is slow for all, and the ratio of two times is of the same minutes. Groups of
runs are spread over processes. Time is that of whole epochs with everything a method does, without the looks at the
test set; --sweep trains the methods of --swept at rate 0.5 with these duties as well, and once without clipping.
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
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.machine import header
from harness.timing import interleaved
from prunekernels.inspect.flops import count_flops
from prunekernels.train import setup
from prunekernels.train.config import DUTY, Config
from prunekernels.train.data import load
from prunekernels.train.finalize import shrunk
from prunekernels.train.loop import Trainer, accuracy
from prunekernels.train.models import MODELS
from trainings.rows import RATE, MethodRow, Spec, goal_lines, summarise, table, write

METHODS = [name for name in setup.known_methods() if name != "none"]
DENSE = Spec("none")
LATENCY_BATCHES = (1, 64)
LATENCY_SECONDS = 0.4


@dataclass(frozen=True)
class Group:
    """Runs of a network and a seed."""

    arch: str
    seed: int
    specs: tuple[Spec, ...]
    epochs: int
    size: int | None
    gear: str
    threads: int

    def config(self, spec: Spec) -> Config:
        common = {"out": "unused", "arch": self.arch, "epochs": self.epochs, "size": self.size, "seed": self.seed}
        if spec == DENSE:
            return Config(**common, gear="dense", quiet=True)
        options = {} if spec.clip is None else {"clip": spec.clip}
        return Config(
            **common, gear=self.gear, quiet=True, method=spec.method, rate=spec.rate, duty=spec.duty, options=options
        )


@dataclass
class Run:
    """A trainer and the states its filters were in, by epoch, those before the first one too."""

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
    """The group's rows, and by run that failed the error."""
    torch.set_num_threads(group.threads)
    failed: dict[str, str] = {}
    runs: dict[Spec, Run] = {}

    def attempt(spec: Spec, work: Callable[[], object]) -> None:
        try:
            work()
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if spec == DENSE:
                raise
            failed[f"{group.arch} seed {group.seed} {spec}"] = f"{type(error).__name__}: {error}"
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
    """Milliseconds of a forward pass."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", nargs="+", choices=list(MODELS), default=["vgg_small", "resnet20"])
    add("--methods", nargs="*", choices=METHODS, default=METHODS, help="default: all")
    add("--rates", nargs="+", type=_share, default=[0.3, 0.5, 0.7], help="shares of filters that are pruned in the end")
    add("--duty", type=_duty, default=DUTY, help="of every method; default: %(default)s")
    add("--sweep", nargs="*", type=_duty, default=[], help=f"duties of --swept at rate {RATE:g}")
    add("--swept", nargs="+", choices=METHODS, default=["sfp", "ghfp"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--epochs", type=int, default=20, help="default: %(default)s")
    add("--size", type=int, help="height and width of the images; default: 16")
    add("--gear", choices=("network", "layer"), default="network")
    add("--threads", type=int, default=1, help="of each process; default: %(default)s")
    add("--workers", type=int, default=os.cpu_count(), help="processes; default: as many as there are cores")
    add("--json", type=Path, help="write the rows here")
    add("--md", type=Path, help="write the tables here")
    args = parser.parse_args(argv, argparse.Namespace(device="cpu", dtype="float32", plan=None, layout=None))
    for name in ("epochs", "threads", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"argument --{name}: expected at least 1, got {getattr(args, name)}")
    if not specs(args):
        parser.error("argument --methods: expected some, or a --sweep")
    return args


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1), got {text}")
    return value


def _duty(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text}")
    return value


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    asked = specs(args)
    groups = [
        Group(arch, seed, asked, args.epochs, args.size, args.gear, args.threads)
        for seed in args.seeds
        for arch in args.arch
    ]
    torch.set_num_threads(args.threads)
    head = {k: v for k, v in header(args, argv, "methods.py").items() if v is not None} | {"processes": args.workers}
    rows: list[MethodRow] = []
    failed: dict[str, str] = {}
    begun = time.perf_counter()
    with ProcessPoolExecutor(min(args.workers, len(groups)), get_context("spawn")) as pool:
        waiting = {pool.submit(trained, group): group for group in groups}
        for done in as_completed(waiting):
            group = waiting[done]
            found, errors = done.result()
            rows, failed = rows + found, failed | errors
            order = {setting: i for i, setting in enumerate((a, s) for a in args.arch for s in (DENSE, *asked))}
            rows.sort(key=lambda r: (order[r.arch, Spec(r.method, r.rate, r.duty, r.clip)], r.seed))
            write(rows, head, failed, args.duty, args.json, args.md)
            minutes = (time.perf_counter() - begun) / 60
            print(f"{group.arch} seed {group.seed}: {len(found)} runs, {minutes:.1f} minutes so far", flush=True)
    summaries = summarise(rows)
    print(table(summaries))
    for job, error in failed.items():
        print(f"failed: {job}: {error}")
    print("\n".join(goal_lines(summaries, args.duty)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

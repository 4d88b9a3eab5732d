#!/usr/bin/env python3
"""Times whole trainings with GHFP beside dense ones, and asks whether they take what their phases predict.

    python benchmarks/whole_run.py --json w.json --md w.md
    python benchmarks/whole_run.py --networks resnet20 --modes compacted --epochs 3      # half a minute

Images and labels are random and stay in memory. An epoch has a sparse phase, in which soft-dead filters are masked, and
a dense phase, in which they train along; masks change before each. Dense training, with plain layers and
torch.optim.SGD, and each mode take turns, an epoch each, so that a slow minute of the machine slows all of them alike.

run_s, dense_s       all epochs, with all that the method does: ranking, new masks, entering and leaving compacted mode
vs_dense             dense_s / run_s
predicted_vs_dense   the same, if each step took what the steps of its phase take in the mean, without its first
of_prediction        vs_dense / predicted_vs_dense: 1 where the method and the changes of masks cost nothing
changes_s, ends_s    what the first step of each phase takes more than later ones do; the ends of epochs
setup_s              making the method and the first small network, which run_s does not count

Goal: in compacted mode at rate 0.5 a run is as fast as its phases predict, within 5 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunekernels as pk
from harness import command
from harness.contender import Wrong
from harness.goals import Goal, goals
from harness.machine import header
from harness.options import FORMATS, Parser, add_output_files, positive, share
from harness.record import Record
from harness.report import Report, goals_table, text_table
from harness.timing import Clock
from prunekernels.train.config import DUTY
from prunekernels.train.models import build

MODES = ("compacted", "live", "masked")
SIZES = {"resnet20": (32, 64), "resnet56": (32, 128), "vgg_small": (32, 64)}  # image, batch
SGD: dict[str, Any] = dict(lr=0.01, momentum=0.9, weight_decay=5e-4)
# GHFP with a sparse and a dense phase in each epoch, instead of its defaults below duty 1
TWO_PHASES: dict[str, Any] = dict(wake="together", warm_up=0, fine_tune=0, criterion="l2", clip=True, alpha=0.0)
RATE = 0.5
BATCHES = 8  # different ones; an epoch goes through them again and again
WARMUPS = 2  # steps of dense before the first epoch


@dataclass(frozen=True)
class Phase:
    """Steps between two changes of masks, in ms."""

    steps: int
    first: float
    later: float  # mean of the others
    total: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Phase:
        return cls(len(times), times[0], statistics.mean(times[1:] or times), sum(times))

    @property
    def predicted(self) -> float:
        return self.steps * self.later


class DenseRun:
    """A plain network and torch.optim.SGD."""

    def __init__(self, network: str, layout: str) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = build(network, 10).to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
        self.phases: list[Phase] = []
        self.ends: list[float] = []
        self.setup = Clock("cpu")(self.set_up) / 1e3

    def set_up(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), foreach=True, **SGD)

    @property
    def phase(self) -> object:
        """Differs between neighbouring phases of an epoch."""
        return None

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        return train(self.model, self.optimizer, x, y)

    def end(self) -> None:
        pass

    def epoch(self, batches: Sequence[tuple[Tensor, Tensor]], steps: int, clock: Clock) -> None:
        times: dict[object, list[float]] = {}
        losses: list[Tensor] = []
        for i in range(steps):
            x, y = batches[i % len(batches)]
            of_phase = times.setdefault(self.phase, [])
            of_phase.append(clock(lambda x=x, y=y: losses.append(self.step(x, y))))  # type: ignore[misc]
        if not torch.stack(losses).isfinite().all():
            raise Wrong(f"{type(self).__name__}: expected finite losses, got others")
        self.phases += map(Phase.of, times.values())
        self.ends.append(clock(self.end))

    @property
    def seconds(self) -> float:
        return (sum(phase.total for phase in self.phases) + sum(self.ends)) / 1e3

    @property
    def predicted(self) -> float:
        return sum(phase.predicted for phase in self.phases) / 1e3


class PrunedRun(DenseRun):
    """A masked network, MaskedSGD and GHFP, in one of MODES."""

    def __init__(self, network: str, layout: str, mode: str, x: Tensor, args: argparse.Namespace) -> None:
        self.mode, self.x, self.args = mode, x, args
        super().__init__(network, layout)

    def set_up(self) -> None:
        args = self.args
        pk.convert(self.model)
        if self.mode == "live":
            pk.flow(self.model)
        self.optimizer = pk.optim.MaskedSGD(self.model.parameters(), **SGD)
        self.method = pk.methods.GHFP(
            self.model,
            self.optimizer,
            rate=args.rate,
            epochs=args.epochs,
            duty=args.duty,
            coupling=args.coupling,
            steps_per_epoch=args.steps,
            example_input=self.x,
            **TWO_PHASES,
            mode="compacted" if self.mode == "compacted" else "masked",
        )
        self.method.net  # noqa: B018  traces the network

    @property
    def phase(self) -> object:
        return self.method.phase

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = train(self.method.net, self.method.opt, x, y)
        self.method.step()
        return loss

    def end(self) -> None:
        self.method.end_epoch()

    @property
    def live(self) -> float:
        states = torch.cat(list(self.method.states.values()))
        return float((states == 0).double().mean())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@dataclass
class RunRow:
    """Seconds of a whole training, and of dense training that took turns with it."""

    network: str
    batch: int
    mode: str
    rate: float
    duty: float
    coupling: str
    epochs: int
    steps: int
    layout: str
    live: float  # share of the filters in the end
    dense_s: float
    run_s: float
    changes_s: float
    ends_s: float
    setup_s: float
    vs_dense: float
    predicted_vs_dense: float
    of_prediction: float
    phases: list[list[float]] = field(default_factory=list)  # steps, first, later ms; two an epoch
    device: str = "cpu"

    times = 1

    @property
    def job(self) -> str:
        return self.network

    @property
    def label(self) -> str:
        return self.network

    @property
    def which(self) -> str:
        return f" {self.mode} {self.coupling}"

    @property
    def kept(self) -> float:
        return 1 - self.rate

    def flat(self) -> dict[str, object]:
        return {k: v for k, v in asdict(self).items() if k not in ("phases", "device")}


def trained(network: str, args: argparse.Namespace) -> Iterator[RunRow]:
    """Trains dense and in each mode, by turns."""
    image, batch = (8, 4) if args.tiny else SIZES[network]
    torch.manual_seed(1)
    batches = [
        (torch.randn(batch, 3, image, image).to(memory_format=FORMATS[args.layout]), torch.randint(10, (batch,)))
        for _ in range(BATCHES)
    ]
    clock = Clock(args.device)
    dense = DenseRun(network, args.layout)
    for batch_of_images in batches[:WARMUPS]:
        dense.step(*batch_of_images)
    runs = {mode: PrunedRun(network, args.layout, mode, batches[0][0][:2], args) for mode in args.modes}
    began = time.monotonic()
    for epoch in range(args.epochs):
        for run in (dense, *runs.values()):
            run.epoch(batches, args.steps, clock)
        spent = (time.monotonic() - began) / 60
        print(f"{network}: epoch {epoch + 1}/{args.epochs}, {spent:.1f} minutes so far", file=sys.stderr, flush=True)
    for mode, run in runs.items():
        ratio, predicted = dense.seconds / run.seconds, dense.predicted / run.predicted
        yield RunRow(
            network,
            batch,
            mode,
            args.rate,
            args.duty,
            args.coupling,
            args.epochs,
            args.steps,
            args.layout,
            live=run.live,
            dense_s=dense.seconds,
            run_s=run.seconds,
            changes_s=sum(phase.first - phase.later for phase in run.phases) / 1e3,
            ends_s=sum(run.ends) / 1e3,
            setup_s=run.setup,
            vs_dense=ratio,
            predicted_vs_dense=predicted,
            of_prediction=ratio / predicted,
            phases=[[phase.steps, phase.first, phase.later] for phase in run.phases],
            device=args.device,
        )


GOALS = (
    Goal(
        "whole GHFP run at rate 0.5, compacted mode: over dense, as its phases predict, each",
        0.95,
        lambda r: r.of_prediction,
        lambda r: r.mode == "compacted" and r.rate == RATE,
        each=True,
    ),
)


def table(rows: Sequence[RunRow], markdown: bool = False) -> str:
    return text_table([row.flat() for row in rows], markdown)


def summary(rows: Sequence[RunRow], markdown: bool = False) -> str:
    lines = [
        f"{r.network}, {r.mode} mode: {r.vs_dense:.2f} over dense, predicted {r.predicted_vs_dense:.2f}" for r in rows
    ]
    return "\n".join(f"- {line}" for line in lines)


RUNS = Report(
    "Whole-run benchmark",
    RunRow,
    table,
    summary,
    lambda rows, markdown: goals_table(rows, GOALS, markdown),
    lambda rows: {"goals": [asdict(found) for found in goals(rows, GOALS)]},
    details=("phases",),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("whole_run.py", str(__doc__))
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(SIZES), default=["resnet20", "resnet56"], help="default: %(default)s")
    add("--modes", nargs="+", choices=MODES, default=["compacted", "masked"], help="default: %(default)s")
    add("--rate", type=share, default=RATE, help="share of filters that is pruned in the end; default: %(default)s")
    add("--duty", type=share, default=DUTY, help="share of an epoch's steps in its dense phase; default: %(default)s")
    note = "whether filters that meet in an add are pruned together; default: %(default)s"
    add("--coupling", choices=("joint", "independent"), default="joint", help=note)
    add("--epochs", type=positive, default=8, help="default: %(default)s")
    add("--steps", type=positive, default=60, help="of an epoch; default: %(default)s")
    add("--layout", choices=list(FORMATS), default="channels_last", help="of all; default: %(default)s")
    add("--tiny", action="store_true", help="images of 8x8 and a batch of 4: does everything work?")
    add("--threads", type=positive, help="default: what torch has chosen")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float32"))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command.set_up_torch(args.threads)

    def make_header() -> dict[str, object]:
        return header("whole_run.py", argv, args)

    record = Record(args, RUNS, args.networks, make_header())
    return command.run(
        record,
        lambda record: command.run_jobs(record, record.todo(), lambda network: trained(network, args)),
        make_header,
    )


if __name__ == "__main__":
    command.main(main)

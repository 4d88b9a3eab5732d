#!/usr/bin/env python3
"""Images per second of one network that several Python threads call in inference: dense, in masked and live mode, and
the small network that pk.shrink makes.

    python benchmarks/serve.py --networks resnet56 --kept 0.5 --clients 1 4 16 --json s.json --md s.md

Each thread calls the network as often, on images of its own, with one thread of torch. Before anything is timed, what
each thread gets is compared with what one thread alone gets. The modes take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

import prunekernels as pk
from harness import command
from harness.contender import Wrong
from harness.machine import header
from harness.options import Parser, add_output_files, duration, keep_ratio, positive
from harness.record import Record
from harness.report import Report, text_table
from harness.timing import interleaved
from networks.models import NETWORKS, apply, draw, wires

MODES = ("dense", "masked", "live", "small")


@dataclass(frozen=True)
class Job:
    network: str
    keep_ratio: float
    clients: int

    def __str__(self) -> str:
        return f"{self.network} kept {self.keep_ratio:g}, {self.clients} threads"


@dataclass
class ServeRow:
    """Images per second by mode, and the milliseconds and quartiles that they come from."""

    network: str
    kept: float  # keep ratio of the filters
    threads: int
    images: int  # of all threads in one round
    ms: dict[str, float]
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def job(self) -> str:
        return str(Job(self.network, self.kept, self.threads))

    def flat(self) -> dict[str, object]:
        own = {"network": self.network, "kept": self.kept, "threads": self.threads, "images": self.images}
        return own | {f"{mode}_images_per_s": 1e3 * self.images / ms for mode, ms in self.ms.items()}


def networks(name: str, keep_ratio: float) -> dict[str, nn.Module]:
    """The network by mode, in eval mode, with the same weights."""
    torch.manual_seed(0)
    dense = NETWORKS[name].build().eval()
    masked = copy.deepcopy(dense)
    found = wires(masked)
    pk.convert(masked)
    apply(masked, found, draw(found, "joint", keep_ratio, seed=0), "cpu")
    size = NETWORKS[name].image
    small = pk.shrink(copy.deepcopy(masked), torch.randn(1, 3, size, size))
    return {"dense": dense, "masked": masked, "live": pk.flow(copy.deepcopy(masked)), "small": small}


def answer(net: nn.Module, x: Tensor, calls: int = 1) -> Tensor:
    with torch.inference_mode():
        for _ in range(calls):
            y: Tensor = net(x)
    return y


def row(job: Job, args: argparse.Namespace) -> ServeRow:
    nets = networks(job.network, job.keep_ratio)
    size = NETWORKS[job.network].image
    inputs = [torch.randn(args.batch, 3, size, size) for _ in range(job.clients)]
    with ThreadPoolExecutor(job.clients, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def run(mode: str, calls: int) -> Callable[[], list[Tensor]]:
            return lambda: list(pool.map(lambda x: answer(nets[mode], x, calls), inputs))

        for mode in MODES:
            pk.plan.settle(lambda mode=mode: answer(nets[mode], inputs[0]))  # type: ignore[misc]
            for got, x in zip(run(mode, 1)(), inputs, strict=True):
                if not torch.allclose(got, answer(nets[mode], x), rtol=1e-4, atol=1e-4):
                    raise Wrong(f"serve.py: {job}: {mode}: expected the answer of one thread, got another")
        found = interleaved({mode: run(mode, args.calls) for mode in MODES}, "cpu", args.seconds)
    times = {mode: timing.median for mode, timing in found.items()}
    quartiles = {mode: (t.low, t.high) for mode, t in found.items()}
    return ServeRow(job.network, job.keep_ratio, job.clients, job.clients * args.calls * args.batch, times, quartiles)


def summary(rows: Sequence[ServeRow], markdown: bool) -> str:
    lost = [row.job for row in rows if min(row.ms["masked"], row.ms["live"]) > row.ms["dense"]]
    return f"- {len(lost)} of {len(rows)} rows lost to dense: {', '.join(lost) or '-'}"


def table(rows: Sequence[ServeRow], markdown: bool) -> str:
    return text_table([row.flat() for row in rows], markdown)


SERVING = Report("Serving benchmark", ServeRow, table, summary)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("serve.py", str(__doc__))
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=["resnet56"], help="default: resnet56")
    add("--kept", nargs="+", type=keep_ratio, default=[0.5], help="keep ratios of the filters, default 0.5")
    add("--clients", nargs="+", type=positive, default=[1, 4, 16], help="numbers of threads, default 1 4 16")
    add("--batch", type=positive, default=1, help="images of a call, default 1")
    add("--calls", type=positive, default=8, help="calls of a thread in one round, default 8")
    add("--seconds", type=duration, default=5.0, help="to spend on a row, default %(default)s")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float32"))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(1)

    def make_header() -> dict[str, object]:
        return header("serve.py", argv, args)

    def rows_of(job: Job) -> Iterator[ServeRow]:
        yield row(job, args)

    jobs = [Job(*each) for each in product(args.networks, args.kept, args.clients)]
    record = Record(args, SERVING, jobs, make_header())
    return command.run(record, lambda record: command.run_jobs(record, record.todo(), rows_of), make_header)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

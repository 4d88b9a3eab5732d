#!/usr/bin/env python3
"""Trains networks with every pruning method and beside it what a method has to beat: accuracy, time, the small network.

    python benchmarks/methods.py --data fashion-mnist --rates 0.5 --seeds 0 1 2 3 4 --json m.json --md m.md --plot m.png
    python benchmarks/methods.py --data digits --rates 0.3 0.5 0.7 --seeds 0 1 2 --kinds dense method    # a demo

A run is one training; --workers processes make one each at a time, seed by seed, and files are written as each ends:
with --resume the same command goes on. Kinds of runs:

dense         the plain network
method        a method as the training command runs it by default
scratch       the small network that the method leaves, from new weights, for as many epochs
scratch-time  the same for at least as long as the method took
literal       the method to its paper's letter: duty 1, zeros multiplied
budget        with --budgets: half of the multiply-adds pruned instead of half of the filters of each layer
uniform       with --budgets: the rate of all layers that leaves as many multiply-adds
sweep         with --sweep: other duties, and without clipping

Accuracy is that of the whole test set, after the last epoch. Time is that of whole runs without evaluations. Beside
each run steps of plain dense networks are timed in each dtype and layout; it is compared with the fastest of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from importlib.util import find_spec
from multiprocessing import active_children, get_context
from typing import Any

import torch

from harness import command
from harness.machine import header
from harness.options import Parser, Renamed, add_output_files, complaint, mode_of_gear, positive, share
from harness.record import Record
from prunekernels.train.config import DUTY
from prunekernels.train.config import MODES as TRAIN_MODES
from prunekernels.train.models import MODELS
from trainings.plot import write_plot
from trainings.report import trainings_report
from trainings.rows import TrainingRow
from trainings.run import Job, loaded, trained
from trainings.schedule import Asked
from trainings.spec import KINDS, METHODS, RATE, Setting, Spec
from trainings.uniform import uniform_rate

MODES = tuple(mode for mode in TRAIN_MODES if mode != "dense")
ARCHS = ("resnet20", "vgg_small")
# What suits a data set: --epochs, --width, --train-images.
SUITS: dict[str, tuple[int, float, int | None]] = {"digits": (20, 1.0, None), "fashion-mnist": (8, 0.5, 20_000)}
OTHERS = (8, 0.5, None)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("methods.py", str(__doc__))
    add = parser.add_argument
    add("--data", default="digits", help="as --data of the training command; default: %(default)s")
    add("--arch", nargs="+", choices=list(MODELS), default=ARCHS, help="default: %(default)s")
    add("--methods", nargs="*", choices=METHODS, default=METHODS, help="default: all")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    add("--rates", nargs="+", type=_rate, default=[RATE], help="shares of filters that are pruned in the end")
    add("--duty", type=share, default=DUTY, help="of every method; default: %(default)s")
    add("--sweep", nargs="*", type=share, default=[], help=f"duties of --swept at rate {RATE:g}")
    add("--swept", nargs="+", choices=METHODS, default=["sfp", "ghfp"])
    add("--budgets", nargs="*", choices=METHODS, default=[], metavar="METHOD", help="of the kinds budget and uniform")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--epochs", type=positive, help="default: 20 of digits, 8 of others")
    add("--train-images", type=positive, help="default: 20,000 of fashion-mnist, all of others")
    note = "images held out of the training set, whose accuracy is told in place of the test set's; default: none"
    add("--validation", type=int, default=0, help=note)
    add("--width", type=float, help="default: 1 for digits, 0.5 for others")
    add("--size", type=int, help="height and width of the images; default: what suits the data")
    add("--mode", choices=MODES, default="auto", help="how masked networks run; default: %(default)s")
    add("--gear", action=Renamed, new="--mode", dest="mode", type=mode_of_gear, choices=MODES)
    add("--threads", type=positive, default=1, help="of each process; default: %(default)s")
    add("--workers", type=positive, default=os.cpu_count(), help="processes; default: as many as there are cores")
    add("--resume", action="store_true", help="leave out the runs that the --json file has already")
    add("--again", nargs="+", choices=METHODS, default=[], help="with --resume: methods whose runs are made anew")
    add_output_files(parser, ("json", "md", "plot"))
    args = parser.parse_args(argv, argparse.Namespace(dtype="float32"))
    epochs, width, images = SUITS.get(args.data, OTHERS)
    args.epochs, args.width = args.epochs or epochs, args.width or width
    args.train_images = args.train_images or images
    if (wrong := complaint(args)) is not None:
        parser.error(wrong)
    if args.json and args.json.exists() and not args.resume:
        parser.error(f"argument --json: {args.json} exists: --resume goes on with it")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("argument --plot: matplotlib is missing: pip install matplotlib")
    if not asked(args).specs([]):
        parser.error("argument --methods: expected some, or dense among --kinds, or a --sweep")
    return args


def _rate(text: str) -> float:
    value = share(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1), got {text}")
    return value


def asked(args: argparse.Namespace, uniform_rates: Mapping[str, float] | None = None) -> Asked:
    return Asked(
        args.arch, args.methods, args.rates, args.seeds, args.epochs, args.duty, args.kinds, args.sweep, args.swept,
        args.budgets, uniform_rates,
    )  # fmt: skip


def uniform_rates(args: argparse.Namespace) -> dict[str, float]:
    """By network; none where no run has them."""
    setting = setting_of(args)
    if not args.budgets or "uniform" not in args.kinds:
        return {}
    data = loaded(setting.data, setting.size, setting.train_images, setting.validation)
    return {arch: uniform_rate(arch, setting, data) for arch in args.arch}


def setting_of(args: argparse.Namespace) -> Setting:
    return Setting(args.data, args.train_images, args.validation, args.size, args.width, args.mode, args.threads)


def job_of(spec: Spec, setting: Setting, rows: Sequence[TrainingRow]) -> Job:
    """A run from scratch needs the masks of a run that left its architecture, the first of its seed."""
    if spec.kind != "scratch":
        return Job(spec, setting)
    of_this = [r for r in rows if r.masks and (r.arch, r.seed, r.key) == (spec.arch, spec.seed, spec.key)]
    return Job(spec, setting, min(of_this, key=lambda row: row.job).masks)


def train(record: Record, wanted: Asked, setting: Setting) -> int:
    """Makes all runs in processes and records each as it ends."""
    args, begun = record.args, time.perf_counter()
    record.rows = [row for row in record.rows if row.method not in args.again]
    record.failed = {}  # what failed is tried again
    record.finished = {row.job for row in record.rows}
    wrong = next((row for row in record.rows if row.setting != str(setting)), None)
    if wrong is not None:
        raise SystemExit(f"methods.py: {args.json}: expected rows of {setting}, got {wrong.setting}")
    running: dict[Future[TrainingRow], Spec] = {}
    with pool(args.workers) as workers:
        while True:
            record.jobs = wanted.specs(record.rows)
            todo = [spec for spec in record.todo() if spec not in running.values()]
            for spec in todo[: args.workers - len(running)]:
                running[workers.submit(trained, job_of(spec, setting, record.rows))] = spec
            if not running:
                return 0
            try:
                ended = wait(running, return_when=FIRST_COMPLETED).done
            except KeyboardInterrupt:
                for process in active_children():
                    process.terminate()
                raise
            for done in ended:
                spec, error = running.pop(done), done.exception()
                if error is None:
                    record.rows.append(done.result())
                record.finish(spec, "" if error is None else f"{type(error).__name__}: {error}")
                record.write()
                _tell(spec, record, error, (time.perf_counter() - begun) / 60)


def pool(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, get_context("spawn"))


def _tell(spec: Spec, record: Record, error: BaseException | None, minutes: float) -> None:
    said = f"{record.rows[-1].accuracy:.4f}" if error is None else f"{type(error).__name__}: {error}"
    left = len(record.todo())
    print(f"{spec}: {said}; {minutes:.1f} minutes so far, {left} runs known to be left", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    wanted = asked(args, uniform_rates(args))

    def make_header() -> dict[str, object]:
        about: dict[str, Any] = {"processes": args.workers, "setting": str(setting_of(args))}
        return header("methods.py", argv, args, about)

    record = Record(args, trainings_report(args.duty), wanted.specs([]), make_header())
    code = command.run(record, lambda record: train(record, wanted, setting_of(args)), make_header)
    if args.plot and record.rows:
        write_plot(args.plot, record.in_order(), RATE if RATE in args.rates else args.rates[0], args.duty)
    return code


if __name__ == "__main__":
    command.main(lambda: main(sys.argv[1:]))

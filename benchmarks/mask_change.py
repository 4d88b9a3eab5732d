#!/usr/bin/env python3
"""Times what a change of masks costs a training: the change itself and the first step behind it, beside a later step.

    python benchmarks/mask_change.py --json c.json --md c.md
    python benchmarks/mask_change.py --networks resnet20 --modes compacted --changes 20

Masks are joint, drawn as network.py draws them, and change between training steps with SGD and momentum, in masked,
live and compacted mode. Three kinds of change:

new          counts of live filters that the run has not seen
alike        other filters, the same counts
alternating  between two sets of masks, both of which have trained before

leave_ms, set_ms, enter_ms   compacted mode is left, masks are set, compacted mode is entered: medians over the changes
change_ms    all three
first_ms     the first step after a change
later_ms     a later step, in which no plan is tried any more
extra_steps  what a change costs in steps: change_ms, and by how much the steps behind it that try plans, and the first
             one in any case, take longer than later ones

Goals: leaving, setting and entering take at most 5 ms for ResNet-20 and 50 ms for ResNet-50, on two cores; a change
costs at most one step's time, in compacted mode; in any mode at most 2 % of an epoch of 100 steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product

import torch

import prunekernels as pk
from harness import command
from harness.goals import Goal, goals
from harness.machine import header
from harness.options import Parser, add_output_files, positive
from harness.record import Record
from harness.report import Report, goals_table, text_table
from harness.timing import Clock, summarise
from networks.baselines import CompactedMode, LiveMode, MaskedMode, NetworkContender
from networks.models import LiveChannels, Network, apply, draw
from networks.setting import MaskedSetting, Setting

MODES: dict[str, type[NetworkContender]] = {c.family: c for c in (MaskedMode, LiveMode, CompactedMode)}
CHANGES = ("new", "alike", "alternating")
SIZES = {"resnet20": (32, 64), "resnet56": (32, 128), "resnet50": (224, 8)}  # image, batch
KEEP_RATIO = 0.5
SEEN = 3  # steps before anything is timed
LATER = 3  # later steps behind each change
MOST_TRIALS = 64  # steps that try plans, at most


@dataclass(frozen=True)
class Job:
    network: str
    mode: str
    change: str

    def __str__(self) -> str:
        return f"{self.network} {self.mode} {self.change}"


@dataclass
class ChangeRow:
    """Medians in ms over the changes, and their quartiles."""

    network: str
    batch: int
    mode: str
    change: str
    changes: int
    leave_ms: float | None  # None: not in compacted mode
    set_ms: float
    enter_ms: float | None
    change_ms: float
    first_ms: float
    later_ms: float
    extra_steps: float
    quartiles: dict[str, list[float]] = field(default_factory=dict)
    device: str = "cpu"
    kept: float = KEEP_RATIO

    times = 1

    @property
    def job(self) -> str:
        return str(Job(self.network, self.mode, self.change))

    @property
    def label(self) -> str:
        return self.network

    @property
    def which(self) -> str:
        return f" {self.mode} {self.change}"

    def flat(self) -> dict[str, object]:
        return {k: v for k, v in asdict(self).items() if k not in ("quartiles", "device", "kept")}


def network(name: str, tiny: bool) -> Network:
    image, batch = (8, 4) if tiny else SIZES[name]
    return Network(name, name, image, batch, 1000 if name == "resnet50" else 10, 1.0)


def masks_of(setting: Setting, change: str, index: int) -> LiveChannels:
    """The masks behind the change of this index; 0: those at the start."""
    if change == "new":
        # 0.5, 0.53, 0.47, 0.56, ...: every layer of 34 filters and more has other counts each time
        ratio = KEEP_RATIO + (-1) ** (index + 1) * 0.03 * ((index + 1) // 2 % 15)
        return draw(setting.wires, "joint", ratio, index)
    return draw(setting.wires, "joint", KEEP_RATIO, index % 2 if change == "alternating" else index)


def until_settled(made: NetworkContender, clock: Callable[..., float]) -> list[float]:
    """The times of the first step and of those after it that try plans."""
    times: list[float] = []
    for _ in range(MOST_TRIALS):
        tried = pk.plan.trials()
        times.append(clock(made.run))
        if pk.plan.trials() == tried:
            break
    return times


def measured(setting: Setting, mode: str, change: str, changes: int, clock: Callable[..., float]) -> ChangeRow:
    """Trains in a mode and changes masks between steps. clock: runs a function and returns the milliseconds."""
    pk.plan.clear()  # of what other rows have measured
    made = MODES[mode](MaskedSetting(setting, "joint", KEEP_RATIO, masks_of(setting, change, 0)), "train", "nchw")
    compaction = made.compaction if isinstance(made, CompactedMode) else None
    model = made.full if isinstance(made, CompactedMode) else made.model
    samples: dict[str, list[float]] = {name: [] for name in ("leave", "set", "enter", "change", "first", "later")}
    extra: list[float] = []
    for _ in range(SEEN):
        made.run()
    known = 1 if change == "alternating" else 0  # changes that are not timed: both sets are to have trained
    for index in range(1, changes + known + 1):
        live = masks_of(setting, change, index)
        leave = clock(compaction.leave) if compaction else 0.0
        put = clock(lambda live=live: apply(model, setting.wires, live, setting.device))
        enter = clock(compaction.enter) if compaction else 0.0
        change_ms, behind = leave + put + enter, until_settled(made, clock)
        times = {"leave": leave, "set": put, "enter": enter, "change": change_ms, "first": behind[0]}
        later = [clock(made.run) for _ in range(LATER)]
        if index > known:
            for name, ms in times.items():
                samples[name].append(ms)
            samples["later"] += later
            extra.append((change_ms + sum(behind)) / statistics.median(later) - len(behind))
    found = {name: summarise(values) for name, values in samples.items()}
    median = {name: timing.median for name, timing in found.items()}
    return ChangeRow(
        setting.network.name,
        setting.network.batch,
        mode,
        change,
        changes,
        leave_ms=median["leave"] if compaction else None,
        set_ms=median["set"],
        enter_ms=median["enter"] if compaction else None,
        change_ms=median["change"],
        first_ms=median["first"],
        later_ms=median["later"],
        extra_steps=statistics.median(extra),
        quartiles={name: [t.low, t.median, t.high] for name, t in found.items()},
        device=setting.device,
    )


def _goal(text: str, target: float, ratio: Callable[[ChangeRow], float], *networks: str) -> Goal:
    """A limit for each row in compacted mode."""
    wanted = networks or tuple(SIZES)
    return Goal(text, target, ratio, lambda r: r.mode == "compacted" and r.network in wanted, each=True, at_most=True)


GOALS = (
    _goal("leave, set masks and enter, ResNet-20: ms, each", 5.0, lambda r: r.change_ms, "resnet20"),
    _goal("leave, set masks and enter, ResNet-50: ms, each", 50.0, lambda r: r.change_ms, "resnet50"),
    _goal(
        "a change and the first step: time over a later step's, with all that trials cost, each",
        2.0,
        lambda r: 1 + r.extra_steps,
    ),
    Goal(
        "an epoch of 100 steps with a change over one without, any mode, each",
        1.02,
        lambda r: 1 + r.extra_steps / 100,
        lambda r: True,
        each=True,
        at_most=True,
    ),
)


def table(rows: Sequence[ChangeRow], markdown: bool = False) -> str:
    return text_table([row.flat() for row in rows], markdown)


def summary(rows: Sequence[ChangeRow], markdown: bool = False) -> str:
    """By mode and kind of change, the median over the networks."""
    lines = []
    for mode, change in product(MODES, CHANGES):
        if here := [r.extra_steps for r in rows if (r.mode, r.change) == (mode, change)]:
            lines.append(f"{mode} mode, counts {change}: a change costs {statistics.median(here):.2f} steps")
    return "\n".join(f"- {line}" for line in lines)


CHANGED = Report(
    "Mask change benchmark",
    ChangeRow,
    table,
    summary,
    lambda rows, markdown: goals_table(rows, GOALS, markdown),
    lambda rows: {"goals": [asdict(found) for found in goals(rows, GOALS)]},
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("mask_change.py", str(__doc__))
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(SIZES), default=list(SIZES), help=f"default: {' '.join(SIZES)}")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES), help=f"default: {' '.join(MODES)}")
    add("--kinds", nargs="+", choices=CHANGES, default=CHANGES, help=f"of change; default: {' '.join(CHANGES)}")
    add("--changes", type=positive, default=5, help="of masks in each row; default: %(default)s")
    add("--tiny", action="store_true", help="images of 8x8 and a batch of 4: does everything work?")
    add("--threads", type=positive, help="default: what torch has chosen")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float32"))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command.set_up_torch(args.threads)
    clock, settings = Clock(args.device), {}

    def make_header() -> dict[str, object]:
        return header("mask_change.py", argv, args)

    def rows_of(job: Job) -> Iterator[ChangeRow]:
        if job.network not in settings:
            sized = network(job.network, args.tiny)
            settings[job.network] = Setting(sized, args.device, torch.float32, "masked", seed=0)
        yield measured(settings[job.network], job.mode, job.change, args.changes, clock)

    jobs = [Job(*each) for each in product(args.networks, args.modes, args.kinds)]
    record = Record(args, CHANGED, jobs, make_header())
    return command.run(record, lambda record: command.run_jobs(record, record.todo(), rows_of), make_header)


if __name__ == "__main__":
    command.main(main)

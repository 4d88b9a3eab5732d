#!/usr/bin/env python3
"""Tries what the package does on networks of public libraries, and Torch-Pruning on the same ones.

    python benchmarks/models.py --json m.json --md m.md
    python benchmarks/models.py --only resnet18 yolov8n
    python benchmarks/models.py --json m.json --md m.md --resume     # what is not in m.json yet

Every network is built without weights, in a process of its own. Half of the filters of each joint group that is no
output of the network are dead, those of least norm. Results are compared in float64; what differs by more than 1e-8
of the largest value counts as wrong. The columns say "yes", or "no" with the reason below the table:

converted        convolutions and linear layers that pk.convert turns into masked ones, of all
groups           joint groups that are masked, of all
live             a training step in live mode: outputs, gradients and statistics as in masked mode
fallbacks        operations of such a step that take live tensors at full width
compacted        a training step in compacted mode: outputs, gradients and statistics as in masked mode
shrink           the small network computes what the masked one does; its form
left             multiply-adds of the small network's convolutions and linear layers, over the dense network's
onnx             the small network, exported, gives the same in ONNX Runtime
Torch-Pruning    its pruner, at the same ratio and with the same layers left alone: the pruned network runs, and gives
                 outputs of the same shapes; multiply-adds left, by the same counter
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from harness import command
from harness.machine import commit, header
from harness.options import Parser, add_output_files, positive
from harness.record import Record
from harness.report import Report, text_table
from library_models import baseline, checks
from library_models.catalog import ENTRIES, Entry
from library_models.checks import OK

ASKED = ("groups", "live", "compacted", "shrink", "onnx", "torch_pruning")
LIBRARIES = ("timm", "torchvision", "ultralytics", "segmentation_models_pytorch", "transformers", "torch-pruning",
             "onnx", "onnxruntime")  # fmt: skip
LAYERS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.Linear)
BASELINE_SECONDS = 30  # of processor time for Torch-Pruning, which is slow where views mix channels
MARK = "models.py found: "  # before the line of a process that says what it found


@dataclass
class ModelRow:
    """What became of one network."""

    model: str
    library: str
    converted: int | None  # convolutions and linear layers
    layers: int
    groups: int | None
    pruned_groups: int | None
    answers: dict[str, str]  # OK, or why not
    form: str | None
    left: float | None
    torch_pruning_left: float | None
    fallbacks: dict[str, int]  # by operator
    left_alone: dict[str, int]  # by reason
    differences: dict[str, float] = field(default_factory=dict)
    said: str = ""  # by shrink
    seconds: float = 0.0
    commit: str | None = None  # at which it was tried: a run may go on with --resume
    device: str = "cpu"
    kept: float = 0.5

    times = 1

    @property
    def job(self) -> str:
        return self.model

    @property
    def label(self) -> str:
        return self.model

    def flat(self) -> dict[str, object]:
        return {k: v for k, v in asdict(self).items() if k not in ("device", "kept")}

    def cells(self) -> dict[str, object]:
        def said(what: str) -> str:
            return OK if self.answers.get(what) == OK else "no"

        return {
            "model": self.model,
            "library": self.library,
            "converted": "no" if self.converted is None else f"{self.converted}/{self.layers}",
            "groups": "no" if self.groups is None else f"{self.pruned_groups}/{self.groups}",
            "live": said("live"),
            "fallbacks": " ".join(f"{name} {count}" for name, count in self.fallbacks.items()),
            "compacted": said("compacted"),
            "shrink": self.form if said("shrink") == OK and self.form else said("shrink"),
            "left": _share(self.left),
            "onnx": said("onnx"),
            "Torch-Pruning": said("torch_pruning"),
            "its left": _share(self.torch_pruning_left),
        }


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# ---- one network, in a process of its own


def look_at(entry: Entry, baseline_seconds: int) -> dict[str, Any]:
    built = entry.build()
    layers = sum(isinstance(module, LAYERS) for module in built.model.modules())
    theirs = baseline.check(built, baseline.outputs_of(built), baseline_seconds)
    ours = checks.check(entry.build())
    return {"layers": layers, "ours": asdict(ours), "theirs": asdict(theirs)}


def in_process(entry: Entry, args: argparse.Namespace) -> dict[str, Any]:
    """What another process finds; RuntimeError if that ends early."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "YOLO_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--in-process", entry.name, "--threads", str(torch.get_num_threads())]
    limit = (args.seconds, args.seconds + 5)
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, limit),
    )
    lines = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    if done.returncode == -signal.SIGXCPU:
        raise RuntimeError(f"not done in {args.seconds} s of processor time")
    raise RuntimeError(f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")


def row_of(entry: Entry, args: argparse.Namespace) -> ModelRow:
    began = time.monotonic()
    found = in_process(entry, args)
    numbers, other = found["ours"]["numbers"], found["theirs"]
    return ModelRow(
        entry.name,
        entry.library,
        numbers.get("converted"),
        found["layers"],
        numbers.get("groups"),
        numbers.get("pruned_groups"),
        found["ours"]["answers"] | other["answers"],
        numbers.get("form"),
        _of(numbers),
        _of(other["numbers"]),
        numbers.get("fallbacks", {}),
        numbers.get("left_alone", {}),
        differences={name: value for name, value in numbers.items() if name.endswith("_difference")},
        said=numbers.get("said", ""),
        seconds=round(time.monotonic() - began, 1),
        commit=commit(),
    )


def _of(numbers: dict[str, Any]) -> float | None:
    return numbers["small"] / numbers["dense"] if "small" in numbers else None


# ---- the report


def table(rows: Sequence[ModelRow], markdown: bool = False) -> str:
    return text_table([row.cells() for row in rows], markdown)


def summary(rows: Sequence[ModelRow], markdown: bool = False) -> str:
    """How many of the networks, and why not the others; what falls back in live mode."""
    lines = []
    for what in ASKED:
        good = sum(row.answers.get(what) == OK for row in rows)
        lines.append(f"{what.replace('_', '-')}: {good} of {len(rows)}")
        lines += [f"{what.replace('_', '-')}: {row.model}: {row.answers.get(what, 'not asked')}"
                  for row in rows if row.answers.get(what) != OK]  # fmt: skip
    both = [r for r in rows if r.left is not None and r.torch_pruning_left is not None]
    fewer = sum(r.left <= r.torch_pruning_left + 0.005 for r in both)  # type: ignore[operator]
    lines.append(f"as few multiply-adds left as by Torch-Pruning, or fewer: {fewer} of {len(both)}")
    lines += [f"left alone: {row.model}: {count} x {why}" for row in rows for why, count in row.left_alone.items()]
    return "\n".join(f"- {line}" for line in lines)


MODELS = Report("Networks of public libraries", ModelRow, table, summary, details=())


def versions() -> dict[str, object]:
    found: dict[str, object] = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("models.py", str(__doc__))
    add = parser.add_argument
    add("--only", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), metavar="NAME", help="default: all")
    add("--list", action="store_true", help="names the networks, and does nothing")
    add("--seconds", type=positive, default=240, help="of processor time for one network; default: %(default)s")
    add("--resume", action="store_true", help="leave out the networks that the --json file has already")
    add("--threads", type=positive, help="default: what torch has chosen")
    add("--in-process", choices=list(ENTRIES), metavar="NAME", help="one network, in this process; prints JSON")
    add_output_files(parser, ("json", "md"))
    return parser.parse_args(argv, argparse.Namespace(dtype="float64", keep_going=True))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command.set_up_torch(args.threads)
    if args.list:
        print("\n".join(f"{entry.library}: {entry}" for entry in ENTRIES.values()))
        return 0
    if args.in_process:
        print(f"\n{MARK}{json.dumps(look_at(ENTRIES[args.in_process], BASELINE_SECONDS))}")
        return 0

    def make_header() -> dict[str, object]:
        return header("models.py", argv, args, versions())

    def rows_of(entry: Entry) -> Iterator[ModelRow]:
        yield row_of(entry, args)

    record = Record(args, MODELS, [ENTRIES[name] for name in args.only], make_header())
    return command.run(record, lambda record: command.run_jobs(record, record.todo(), rows_of), make_header)


if __name__ == "__main__":
    command.main(main)

"""Command-line options that the commands share: types of arguments, and where results go."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import prunekernels as pk

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}  # memory format by name of a layout
MODE_OF_GEAR = {"layer": "masked", "network": "live"}  # modes were called gears up to version 0.1
# What harness/command.py reads, for commands without the option.
NEUTRAL: dict[str, Any] = dict(json=None, csv=None, md=None, plot=None, resume=False, plan="auto", keep_going=False)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=raw, **options)
        self.set_defaults(device="cpu", **NEUTRAL)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class Renamed(argparse.Action):
    """The old name of an option, hidden from --help: warns and sets what the new name sets."""

    def __init__(self, option_strings: Sequence[str], dest: str, new: str, **options: Any) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)
        self.new = new

    def __call__(self, parser: Any, args: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        print(f"warning: {option_string} is now {self.new}", file=sys.stderr)
        setattr(args, self.dest, values)


def dtype_name(name: str) -> str:
    """torch's name of a dtype from its short one; other names stay as they are."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)


def mode_of_gear(name: str) -> str:
    """The name of a mode, or its "mode/layout", from what may be the name of a gear; other names stay as they are."""
    first, slash, layout = name.partition("/")
    return MODE_OF_GEAR.get(first, first) + slash + layout


def keep_ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return ratio


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text}")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def batch_of(kind: str, known: Container[str]) -> Callable[[str], tuple[str, int]]:
    """The type of --batch: the batch of one suite or network, "resnet50=128", or of all of them, "128"."""

    def batch(text: str) -> tuple[str, int]:
        name, _, number = text.rpartition("=")
        if name and name not in known:
            raise argparse.ArgumentTypeError(f"unknown {kind} {name!r}")
        return name, positive(number)

    return batch


def duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return seconds


def minutes(text: str) -> float:
    found = duration(text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text!r}")
    return found


def output_file(text: str) -> Path:
    """A path that can be written. Checked when the command starts, not after an hour of timing."""
    path = Path(text)
    # Writing replaces the file, so the folder must accept new files.
    if (path.exists() and not path.is_file()) or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def add_output_files(parser: Parser, names: Sequence[str]) -> argparse._ArgumentGroup:
    """The options --json, --csv, ...: files to write, besides the tables on the terminal."""
    group = parser.add_argument_group("where results go, besides the tables on the terminal")
    for name in names:
        group.add_argument(f"--{name}", type=output_file, metavar="FILE")
    return group


def add_contenders(group: argparse._ArgumentGroup, option: str, names: Sequence[str], **options: Any) -> None:
    """An option that chooses what is timed besides dense. --rivals is its old name."""
    chosen: dict[str, Any] = dict(nargs="+", choices=names, metavar="NAME", dest="contenders") | options
    group.add_argument(option, default=names, help=f"besides dense, of {', '.join(names)}; default all", **chosen)
    group.add_argument("--rivals", action=Renamed, new=option, **chosen)


def add_run_control(group: argparse._ArgumentGroup) -> None:
    """Options of the commands that check a row, time it and go on to the next."""
    add = group.add_argument
    note = "CUDA: time replays of a CUDA graph, or calls from Python; default graph"
    add("--clock", choices=("graph", "events"), default="graph", help=note)
    add("--plan", choices=pk.plan.PLANS, default="auto", help="plan of the masked convolutions, default auto")
    add("--keep-going", action="store_true", help="where a result of ours is wrong or fails, name it and go on")
    add("--resume", action="store_true", help="leave out the rows that the --json file has already")
    add("--threads", type=positive, help="default: what torch has chosen")


def complaint(args: argparse.Namespace) -> str | None:
    """Why options that every command has do not go together; None where they do."""
    if args.resume and not args.json:
        return "--resume goes on with a --json file"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this torch finds no CUDA device"
    return None

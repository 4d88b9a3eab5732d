"""The command line of conv.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

import prunekernels as pk
from layers.baselines import DIRECTIONS, FORMATS, RIVALS, Dense
from layers.jobs import rebatched
from layers.problems import Problem, load_suite, parse_block, suites

SIDES = ("both", "out", "in")
MASKS = ("filter", "kernel", "block")
DTYPES = ("float32", "bfloat16", "float16")
ALL_DIRECTIONS = (*DIRECTIONS, "all")
OTHERS = tuple(r.family for r in RIVALS if r is not Dense)
EXAMPLES = """\
  python benchmarks/conv.py --suite tiny --kept 0.5
  python benchmarks/conv.py --suite resnet50 --kept 0.9 0.7 0.5 0.3 --json r.json --md r.md --plot r.png
  python benchmarks/conv.py --problem 'n16c64h56k64r3s1p1g1' --mask kernel --kept 0.15 --direction all
  python benchmarks/conv.py --suite resnet50 --batch 128 --device cuda --dtype bfloat16 --minutes 3
  python benchmarks/conv.py --plot-from filters.json kernels.json --plot both.png"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def kept_share(text: str) -> float:
    try:
        kept = float(text)
    except ValueError:
        kept = 0.0
    if not 0 < kept <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and at most 1, got {text!r}")
    return kept


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def block(text: str) -> str:
    try:
        parse_block(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def batch(text: str) -> tuple[str, int]:
    """The batch of a suite, "resnet50=128", or of all, "128"."""
    name, _, number = text.rpartition("=")
    if name and name not in suites():
        raise argparse.ArgumentTypeError(f"unknown suite {name!r}")
    return name, positive(number)


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
    """Found unwritable now, not after an hour of timing."""
    path = Path(text)
    # What is written replaces the file, so it must be one, in a folder that takes new ones.
    if (path.exists() and not path.is_file()) or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def parser() -> Parser:
    p = Parser(
        prog="conv.py",
        description="Time masked convolutions, layer by layer, against dense, Python compaction and the limit.\n\n"
        "Every result, ours and the rivals', is checked against a masked reference before anything is timed.",
        epilog=f"examples:\n{EXAMPLES}\n\nsuites: {', '.join(suites())}; words and columns: benchmarks/README.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(p.add_argument_group("what is run"))
    _how(p.add_argument_group("how"))
    where = p.add_argument_group("where results go, besides the tables on the terminal")
    for name in ("json", "csv", "md", "plot"):
        where.add_argument(f"--{name}", type=output_file, metavar="FILE")
    drawn = "time nothing; plot the rows of results files written by --json"
    where.add_argument("--plot-from", nargs="+", type=Path, default=[], metavar="FILE", help=drawn)
    return p


def _what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--suite", nargs="+", default=[], metavar="NAME", help="problem lists of benchmarks/shapes")
    add("--problem", action="append", default=[], metavar="LINE", help="a problem line; may be repeated")
    add("--limit-problems", type=positive, metavar="N", help="only the first N problems of each suite")
    note = "another batch than the lines have, of all problems or, SUITE=N, of a suite"
    add("--batch", nargs="+", type=batch, default=[], metavar="N", help=note)
    add("--kept", nargs="+", type=kept_share, default=[0.5], metavar="X", help="live shares, default 0.5")
    note = f"what is masked, of {', '.join(MASKS)}; default filter"
    add("--mask", nargs="+", choices=MASKS, default=["filter"], metavar="M", help=note)
    note = f"of filter masks, of {', '.join(SIDES)}; default both"
    add("--side", nargs="+", choices=SIDES, default=["both"], metavar="S", help=note)
    note = "filters x channels of a block, default 64x16"
    add("--block", type=block, default="64x16", metavar="SIZE", help=note)
    note = f"of {', '.join(ALL_DIRECTIONS)}; default fwd+bwd"
    add("--direction", nargs="+", choices=ALL_DIRECTIONS, default=["fwd+bwd"], metavar="D", help=note)


def _how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    note = "of ours; both, as for rivals: the faster"
    add("--layout", choices=(*FORMATS, "both"), default="both", help=note)
    note = f"besides dense, of {', '.join(OTHERS)}; default all"
    add("--rivals", nargs="+", choices=OTHERS, default=OTHERS, metavar="R", help=note)
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    note = "CUDA: time replays of a graph, or calls from Python; default graph"
    add("--clock", choices=("graph", "events"), default="graph", help=note)
    add("--plan", choices=pk.plan.PLANS, default="auto", help="of ours, default auto")
    add("--seconds", type=duration, default=1.0, help="to spend on a row, default 1; 5 to 60 rounds are run")
    add("--rounds", type=positive, metavar="N", help="run N rounds, whatever the seconds")
    note = "begin no problem after so long, name what was not run; kept shares as ordered here, heavy problems first"
    add("--minutes", type=minutes, metavar="M", help=note)
    add("--keep-going", action="store_true", help="where ours is wrong or fails, name it and go on")
    add("--resume", action="store_true", help="leave out what the --json file has already")
    add("--memory", action="store_true", help="also the peak of memory, ours and dense's (CPU)")
    add("--threads", type=positive, help="default: what torch has chosen")
    add("--seed", type=int, default=0, help="of masks and numbers")


def _complaint(args: argparse.Namespace, problems: Sequence[Problem]) -> str | None:
    """What does not go together."""
    if args.plot_from and (problems or not args.plot or args.json or args.csv or args.md):
        return "--plot-from draws what is measured already: it goes with --plot alone"
    if not args.plot_from and not problems:
        return "nothing to run, give --suite or --problem"
    if args.resume and not args.json:
        return "--resume goes on with a --json file"
    if args.memory and args.device != "cpu":
        return "--memory counts the allocations of the CPU only"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this torch finds no CUDA device"
    if args.plot and find_spec("matplotlib") is None:
        return "--plot needs matplotlib"
    return None


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Problem]]:
    p = parser()
    args = p.parse_args(argv)
    try:
        problems = [q for name in args.suite for q in load_suite(name)[: args.limit_problems]]
        problems += [Problem.parse(line) for line in args.problem]
    except ValueError as error:
        p.error(str(error))
    if complaint := _complaint(args, problems):
        p.error(complaint)
    if "all" in args.direction:
        args.direction = list(DIRECTIONS)
    sides = {"filter": dict.fromkeys(args.side), "kernel": ["-"], "block": [args.block]}
    args.variants = [(mask, side) for mask in dict.fromkeys(args.mask) for side in sides[mask]]
    args.kept_first = list(dict.fromkeys(args.kept))
    args.kept = sorted(args.kept_first, reverse=True)
    batches = dict(args.batch)
    return args, [rebatched(q, batches) for q in problems]

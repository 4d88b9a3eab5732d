"""The command line of conv.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from harness.options import (
    FORMATS,
    Parser,
    add_contenders,
    add_output_files,
    add_run_control,
    batch_of,
    complaint,
    dtype_name,
    duration,
    keep_ratio,
    minutes,
    positive,
)
from layers.baselines import BASELINES, DIRECTIONS, Dense
from layers.jobs import rebatched
from layers.masks import parse_block
from layers.problems import Problem, load_suite, suites

SIDES = ("both", "out", "in")
MASKS = ("filter", "kernel", "block")
DTYPES = ("float32", "bfloat16", "float16")
ALL_DIRECTIONS = (*DIRECTIONS, "all")
OTHERS = tuple(b.family for b in BASELINES if b is not Dense)
COMPILE_SECONDS = 120.0
EXAMPLES = """\
  python benchmarks/conv.py --suite tiny --kept 0.5
  python benchmarks/conv.py --suite resnet50 --kept 0.9 0.7 0.5 0.3 --json r.json --md r.md --plot r.png
  python benchmarks/conv.py --problem 'n16c64h56k64r3s1p1g1' --mask kernel --kept 0.15 --direction all
  python benchmarks/conv.py --suite resnet50 --batch 128 --device cuda --dtype bfloat16 --minutes 3
  python benchmarks/conv.py --plot-from filters.json kernels.json --plot both.png"""


def block(text: str) -> str:
    try:
        parse_block(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parser() -> Parser:
    p = Parser(
        "conv.py",
        "Time masked convolutions, layer by layer, beside dense, Python compaction and the upper bound L.\n\n"
        "Every result, ours and the baselines', is checked against a masked reference before anything is timed.",
        epilog=f"examples:\n{EXAMPLES}\n\nsuites: {', '.join(suites())}; words and columns: benchmarks/README.md",
    )
    _what(p.add_argument_group("what is run"))
    _how(p.add_argument_group("how"))
    where = add_output_files(p, ("json", "csv", "md", "plot"))
    drawn = "time nothing; plot the rows of results files that --json wrote"
    where.add_argument("--plot-from", nargs="+", type=Path, default=[], metavar="FILE", help=drawn)
    return p


def _what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--suite", nargs="+", default=[], metavar="NAME", help="problem lists of benchmarks/shapes")
    add("--problem", action="append", default=[], metavar="LINE", help="a problem line; may be repeated")
    add("--limit-problems", type=positive, metavar="N", help="only the first N problems of each suite")
    note = "another batch than the lines have, of all problems or, SUITE=N, of a suite"
    add("--batch", nargs="+", type=batch_of("suite", suites()), default=[], metavar="N", help=note)
    add("--kept", nargs="+", type=keep_ratio, default=[0.5], metavar="X", help="keep ratios (live shares), default 0.5")
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
    note = "memory layout of ours; both, as for the baselines: the faster one counts"
    add("--layout", choices=(*FORMATS, "both"), default="both", help=note)
    add_contenders(group, "--baselines", OTHERS)
    add("--dtype", type=dtype_name, choices=DTYPES, default="float32", help="or fp32, bf16, fp16; default %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add_run_control(group)
    add("--seconds", type=duration, default=1.0, help="to spend on a row, default 1; 5 to 60 rounds are run")
    add("--rounds", type=positive, metavar="N", help="run N rounds, whatever the seconds")
    note = "begin no problem after M minutes, and name what was not run; keep ratios in the order given, heavy problems"
    add("--minutes", type=minutes, metavar="M", help=f"{note} first")
    note = "to spend in all on compiling dense, default %(default)g (CPU); 0: dense is eager alone"
    add("--compile-seconds", type=duration, default=COMPILE_SECONDS, metavar="S", help=note)
    add("--memory", action="store_true", help="measure the peak of memory of ours and dense, too (CPU)")
    add("--seed", type=int, default=0, help="of masks and numbers")


def _complaint(args: argparse.Namespace, problems: Sequence[Problem]) -> str | None:
    """Why the options do not go together; None where they do."""
    if args.plot_from and (problems or not args.plot or args.json or args.csv or args.md):
        return "--plot-from draws what is measured already: it goes with --plot alone"
    if not args.plot_from and not problems:
        return "nothing to run, give --suite or --problem"
    if args.memory and args.device != "cpu":
        return "--memory counts the allocations of the CPU only"
    if args.plot and find_spec("matplotlib") is None:
        return "--plot needs matplotlib"
    return complaint(args)


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
    args.kept_as_given = list(dict.fromkeys(args.kept))
    args.kept = sorted(args.kept_as_given, reverse=True)
    batches = dict(args.batch)
    return args, [rebatched(q, batches) for q in problems]

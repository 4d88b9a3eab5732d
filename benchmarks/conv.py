#!/usr/bin/env python3
"""Time masked convolutions, layer by layer, against dense, Python compaction and the limit.

Every result, ours and the rivals', is checked against a masked reference before anything is timed.

    python benchmarks/conv.py --suite tiny --kept 0.5
    python benchmarks/conv.py --suite resnet50 --kept 0.9 0.7 0.5 0.3 --json r.json --md r.md --plot r.png
    python benchmarks/conv.py --problem 'n16c64h56k64r3s1p1g1' --mask kernel --kept 0.15 --direction all
    python benchmarks/conv.py --plot-from filters.json kernels.json --plot both.png
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

import prunekernels as pk
from case import Case
from machine import header
from memory import peak_mb
from plot import write_plot
from problems import Masks, Problem, load_suite, make_masks, suites
from report import Row, goals_table, markdown, read_json, tables, write_csv, write_json
from rivals import DIRECTIONS, FORMATS, RIVALS, Dense, Ours, Rival, Wrong
from timing import Timing, interleaved

T = TypeVar("T")


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


def duration(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return seconds


def output_file(text: str) -> Path:
    """Found unwritable now, not after an hour of timing."""
    path = Path(text)
    found = os.access(path, os.W_OK) if path.exists() else path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if path.is_dir() or not found:
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def parser() -> Parser:
    summary, _, examples = (__doc__ or "").partition("\n    ")
    p = Parser(
        prog="conv.py",
        description=summary,
        epilog=f"examples:\n    {examples}\nsuites: {', '.join(suites())}; words and columns: benchmarks/README.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what is run")
    what.add_argument("--suite", nargs="+", default=[], metavar="NAME", help="problem lists of benchmarks/shapes")
    what.add_argument("--problem", action="append", default=[], metavar="LINE", help="a problem line; may be repeated")
    what.add_argument("--limit-problems", type=positive, metavar="N", help="only the first N problems of each suite")
    what.add_argument("--kept", nargs="+", type=kept_share, default=[0.5], metavar="X", help="live shares, default 0.5")
    what.add_argument("--mask", choices=("filter", "kernel"), default="filter", help="what is masked, default filter")
    sides = ("both", "out", "in")
    listed = f"of filter masks, of {', '.join(sides)}; default both"
    what.add_argument("--side", nargs="+", choices=sides, default=["both"], metavar="S", help=listed)
    directions = [*DIRECTIONS, "all"]
    listed = f"of {', '.join(directions)}; default fwd+bwd"
    what.add_argument("--direction", nargs="+", choices=directions, default=["fwd+bwd"], metavar="D", help=listed)
    how = p.add_argument_group("how")
    how.add_argument(
        "--layout", choices=(*FORMATS, "both"), default="both", help="of ours; both, as for rivals: the faster"
    )
    how.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--plan", choices=pk.plan.PLANS, default="auto", help="of ours, default auto")
    how.add_argument(
        "--seconds", type=duration, default=1.0, help="to spend on a row, default 1; 5 to 60 rounds are run"
    )
    how.add_argument("--rounds", type=positive, metavar="N", help="run N rounds, whatever the seconds")
    how.add_argument("--memory", action="store_true", help="also the peak of memory, ours and dense's (CPU)")
    how.add_argument("--threads", type=positive, help="default: what torch has chosen")
    how.add_argument("--seed", type=int, default=0, help="of masks and numbers")
    where = p.add_argument_group("where results go, besides the tables on the terminal")
    for name in ("json", "csv", "md", "plot"):
        where.add_argument(f"--{name}", type=output_file, metavar="FILE")
    drawn = "time nothing; plot the rows of results files written by --json"
    where.add_argument("--plot-from", nargs="+", type=Path, default=[], metavar="FILE", help=drawn)
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Problem]]:
    p = parser()
    args = p.parse_args(argv)
    try:
        problems = [q for name in args.suite for q in load_suite(name)[: args.limit_problems]]
        problems += [Problem.parse(line) for line in args.problem]
    except ValueError as error:
        p.error(str(error))
    if args.plot_from:
        if problems or not args.plot or args.json or args.csv or args.md:
            p.error("--plot-from draws what is measured already: it goes with --plot alone")
    elif not problems:
        p.error("nothing to run, give --suite or --problem")
    if args.memory and args.device != "cpu":
        p.error("--memory counts the allocations of the CPU only")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this torch finds no CUDA device")
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            p.error("--plot needs matplotlib")
    if "all" in args.direction:
        args.direction = list(DIRECTIONS)
    args.kept = sorted(set(args.kept), reverse=True)
    args.side = list(dict.fromkeys(args.side)) if args.mask == "filter" else ["-"]
    return args, problems


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """A bar on a terminal, a line per item elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm and sys.stderr.isatty():
        yield from tqdm(items, desc=label, unit="case")
        return
    for i, item in enumerate(items, 1):
        print(f"{label} {i}/{len(items)}", file=sys.stderr, flush=True)
        yield item


def fastest(timings: dict[str, Timing], family: str) -> str:
    """The key of a rival's faster layout."""
    return min((key for key in timings if key.split("/")[0] == family), key=lambda key: timings[key].median)


def contenders(case: Case, direction: str, layout: str) -> Iterator[tuple[type[Rival], str]]:
    for rival in RIVALS:
        if rival.entered(case, direction):
            yield from ((rival, name) for name in rival.layouts)
    yield from ((Ours, name) for name in ([layout] if layout != "both" else FORMATS))


def checked(case: Case, direction: str, layout: str) -> Iterator[Rival]:
    """Everybody whose results are right. A wrong result of ours ends the run; a rival that fails sits out the row."""
    for contender, name in contenders(case, direction, layout):
        try:
            rival = contender(case, direction, name)
            rival.check()
        except Wrong as error:
            if contender is Ours:
                raise SystemExit(str(error)) from None
            print(f"warning: {error}; left out", file=sys.stderr)
        except Exception as error:
            if contender is Ours:
                raise
            what = f"{case.problem.format()}: {contender.family} ({name}), {direction}"
            print(f"warning: {what} failed, {type(error).__name__}: {error}; left out", file=sys.stderr)
        else:
            yield rival


def measure(case: Case, direction: str, args: argparse.Namespace, side: str, kept: float) -> Row | None:
    """Check everybody, then time everybody; None where no dense convolution is left to compare with."""
    rivals = {f"{r.family}/{r.layout}": r for r in checked(case, direction, args.layout)}
    families = {r.family for r in rivals.values()}
    if Dense.family not in families:
        return None
    timings = interleaved({key: r.run for key, r in rivals.items()}, args.device, args.seconds, args.rounds)
    best = {family: fastest(timings, family) for family in families}
    times = {family: timings[key].median for family, key in best.items()}
    ours, dense = rivals[best[Ours.family]], rivals[best[Dense.family]]
    assert isinstance(ours, Ours)
    p, masks = case.problem, case.masks
    return Row(
        problem=p.shape,
        name=p.name,
        times=p.times,
        mask=args.mask,
        side=side,
        kept=kept,
        live_k=int(masks.live_filters.sum()),
        live_c=int(masks.live_inputs(p.groups).sum()),
        live_kernels=int(masks.pairs.sum()),
        direction=direction,
        layout=ours.layout,
        plan=ours.plan(),
        ms=times["ours"],
        dense_ms=times["dense"],
        masked_dense_ms=times.get("masked_dense"),
        compaction_ms=times.get("compaction"),
        sparseprop_ms=times.get("sparseprop"),
        limit_ms=times.get("limit"),
        ours_peak_mb=peak_mb(ours.run) if args.memory else None,
        dense_peak_mb=peak_mb(dense.run) if args.memory else None,
        quartiles={key: [t.low, t.median, t.high] for key, t in timings.items()},
    )


def run(problems: Iterable[Problem], args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    cases = list(product(problems, args.side, args.kept))
    try:
        for problem, side, kept in progress(cases, "benchmark"):
            masks: Masks = make_masks(problem, args.mask, side, kept, args.seed)
            case = Case.make(problem, masks, getattr(torch, args.dtype), args.device, args.seed)
            wanted = [d for d in args.direction if d != "grad_input" or not problem.image_input]
            measured = (measure(case, direction, args, side, kept) for direction in wanted)
            rows += [row for row in measured if row is not None]
    except KeyboardInterrupt:
        print("stopped; what is done is reported", file=sys.stderr)
    return rows


def plot_again(args: argparse.Namespace) -> int:
    """What --plot-from asks for: the plot, and the goals over the rows of all files."""
    try:
        rows = [row for path in args.plot_from for row in read_json(path)]
    except ValueError as error:
        parser().error(str(error))
    if not rows:
        print("no rows", file=sys.stderr)
        return 1
    write_plot(args.plot, rows)
    sections = tables(rows)[1], goals_table(rows), f"plot: {args.plot}"
    print(*filter(None, sections), sep="\n\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args, problems = parse(argv)
    if args.plot_from:
        return plot_again(args)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    with pk.plan.force(args.plan):
        rows = run(problems, args)
    if not rows:
        print("no rows", file=sys.stderr)
        return 1
    head = header(args, sys.argv[1:] if argv is None else argv)
    table, summary = tables(rows)
    sections = "\n".join(f"{key}: {value}" for key, value in head.items()), table, summary, goals_table(rows)
    print(*filter(None, sections), sep="\n\n")
    if args.json:
        write_json(args.json, rows, head)
    if args.csv:
        write_csv(args.csv, rows)
    if args.md:
        args.md.write_text(markdown(rows, head))
    if args.plot:
        write_plot(args.plot, rows)
    for name in ("json", "csv", "md", "plot"):
        if path := getattr(args, name):
            print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

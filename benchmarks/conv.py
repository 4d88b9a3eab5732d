#!/usr/bin/env python3
"""Time masked convolutions, layer by layer, against dense, Python compaction and the limit.

Every result, ours and the rivals', is checked against a masked reference before anything is timed.

    python benchmarks/conv.py --suite tiny --kept 0.5
    python benchmarks/conv.py --suite resnet50 --kept 0.9 0.7 0.5 0.3 --json r.json --md r.md --plot r.png
    python benchmarks/conv.py --problem 'n16c64h56k64r3s1p1g1' --mask kernel --kept 0.15 --direction all
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
from problems import Masks, Problem, load_suite, make_masks, suites
from report import Row, markdown, tables, write_csv, write_json, write_plot
from rivals import DIRECTIONS, FORMATS, RIVALS, Ours, Rival
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
    what.add_argument("--side", choices=("both", "out", "in"), default="both", help="of filter masks, default both")
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
    how.add_argument("--threads", type=positive, help="default: what torch has chosen")
    how.add_argument("--seed", type=int, default=0, help="of masks and numbers")
    where = p.add_argument_group("where results go, besides the tables on the terminal")
    for name in ("json", "csv", "md", "plot"):
        where.add_argument(f"--{name}", type=output_file, metavar="FILE")
    return p


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Problem]]:
    p = parser()
    args = p.parse_args(argv)
    try:
        problems = [q for name in args.suite for q in load_suite(name)[: args.limit_problems]]
        problems += [Problem.parse(line) for line in args.problem]
    except ValueError as error:
        p.error(str(error))
    if not problems:
        p.error("nothing to run, give --suite or --problem")
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


def contenders(case: Case, direction: str, layout: str) -> Iterator[Rival]:
    for rival in RIVALS:
        if rival.entered(case, direction):
            yield from (rival(case, direction, name) for name in rival.layouts)
    yield from (Ours(case, direction, name) for name in ([layout] if layout != "both" else FORMATS))


def measure(case: Case, direction: str, args: argparse.Namespace, kept: float) -> Row:
    """Check everybody, then time everybody."""
    rivals = list(contenders(case, direction, args.layout))
    for rival in rivals:
        rival.check()
    timings = interleaved({f"{r.family}/{r.layout}": r.run for r in rivals}, args.device, args.seconds)
    times = {r.family: timings[fastest(timings, r.family)].median for r in rivals}
    p, masks, layout = case.problem, case.masks, fastest(timings, "ours").split("/")[1]
    return Row(
        problem=p.shape,
        name=p.name,
        times=p.times,
        mask=args.mask,
        side=args.side if args.mask == "filter" else "-",
        kept=kept,
        live_k=int(masks.live_filters.sum()),
        live_c=int(masks.live_inputs(p.groups).sum()),
        live_kernels=int(masks.pairs.sum()),
        direction=direction,
        layout=layout,
        plan=next(r.plan() for r in rivals if isinstance(r, Ours) and r.layout == layout),
        ms=times["ours"],
        dense_ms=times["dense"],
        masked_dense_ms=times["masked_dense"],
        compaction_ms=times["compaction"],
        sparseprop_ms=times.get("sparseprop"),
        limit_ms=times.get("limit"),
        quartiles={key: [t.low, t.median, t.high] for key, t in timings.items()},
    )


def run(problems: Iterable[Problem], args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    cases = list(product(problems, args.kept))
    try:
        for problem, kept in progress(cases, "benchmark"):
            masks: Masks = make_masks(problem, args.mask, args.side, kept, args.seed)
            case = Case.make(problem, masks, getattr(torch, args.dtype), args.device, args.seed)
            wanted = [d for d in args.direction if d != "grad_input" or not problem.image_input]
            rows += [measure(case, direction, args, kept) for direction in wanted]
    except KeyboardInterrupt:
        print("stopped; what is done is reported", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args, problems = parse(argv)
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
    print("\n".join(f"{key}: {value}" for key, value in head.items()), table, summary, sep="\n\n")
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

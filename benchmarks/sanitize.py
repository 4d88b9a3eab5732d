#!/usr/bin/env python3
"""Small problems through every plan, dtype and layout of ours, each result checked: what a sanitizer watches.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py --minutes 1
python benchmarks/sanitize.py --kernels      # nobody watches; which of our kernels ran?
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

import prunekernels as pk
from layers.baselines import FORMATS, Ours
from layers.case import Case
from layers.options import Parser, minutes
from layers.problems import Problem, make_masks

# Odd counts, a tile and one more, strides, dilation, groups, depthwise, an image, padding beyond the kernel.
LINES = (
    "n2c24h9w7k40r3s1p1g1",
    "n1c16h8k72r1s1p0g1",
    "n2c33h6k17r1s1p0g1",
    "n2c20h9k12r3s2p1g1",
    "n1c12h10k12r3s1p2g1d2",
    "n1c16h6k32r3s1p1g4",
    "n1c12h6k12r3s1p1g12",
    "n1c3h8k6r3s1p1g1",
    "n1c144h5k136r3s1p1g1",
    "n3c64h3k64r3s1p3g1",
)
DTYPES = ("float32", "bfloat16", "float16")
VARIANTS = (("filter", "both"), ("kernel", "-"), ("block", "16x8"))
PLANS = tuple(plan for plan in pk.plan.PLANS if plan not in ("auto", "model"))
KEPT = 0.6

Trial = tuple[str, str, tuple[str, str], str, str]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser(prog="sanitize.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--minutes", type=minutes, metavar="M", help="begin no trial after so long")
    p.add_argument("--kernels", action="store_true", help="name the kernels of ours that ran; none: exit code 1")
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("this torch finds no CUDA device; --device cpu tries the script itself")
    return args


def trials() -> list[Trial]:
    """Shuffled, so that those which fit into any time are of all kinds."""
    found = list(product(LINES, DTYPES, VARIANTS, FORMATS, PLANS))
    random.Random(0).shuffle(found)
    return found


def attempt(trial: Trial, device: str) -> None:
    line, dtype, (mask, side), layout, plan = trial
    problem = Problem.parse(line)
    case = Case.make(problem, make_masks(problem, mask, side, KEPT), getattr(torch, dtype), device)
    with pk.plan.force(plan), pk.plan.measure(False):
        Ours(case, "fwd+bwd", layout).check()


def attempt_all(args: argparse.Namespace) -> int:
    """The number of trials that failed; an error that sticks ends the run."""
    began, failed, todo = time.monotonic(), 0, trials()
    for done, trial in enumerate(todo):
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            print(f"out of time: {len(todo) - done} of {len(todo)} trials not run")
            break
        try:
            attempt(trial, args.device)
        except Exception as error:
            failed += 1
            line, dtype, (mask, _), layout, plan = trial
            what = f"{line} {dtype} {layout} {mask} masks, plan {plan}"
            print(f"failed: {what}: {type(error).__name__}: {error}", flush=True)
            if args.device == "cuda":
                torch.cuda.synchronize()
    else:
        print(f"{len(todo)} trials")
    return failed


def kernel_names(profiled: profile) -> set[str]:
    """Of our kernels, without their namespaces and template arguments."""
    names = (event.key for event in profiled.key_averages() if "prunekernels::" in event.key)
    return {
        name.split("prunekernels::")[1].replace("(anonymous namespace)::", "").split("<")[0].split("(")[0]
        for name in names
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.backends.cudnn.allow_tf32 = False
    if not args.kernels:
        return int(attempt_all(args) > 0)
    activities = [ProfilerActivity.CUDA] if args.device == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        failed = attempt_all(args)
    names = sorted(kernel_names(profiled))
    print(f"kernels of ours that ran: {', '.join(names) or 'none'}")
    return int(failed > 0 or not names)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Runs small problems through every plan, dtype and layout and checks each result; meant to run under a sanitizer.

compute-sanitizer --tool memcheck python benchmarks/sanitize.py --minutes 1
python benchmarks/sanitize.py --kernels      # without a sanitizer: which kernels of this package run at all?
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections.abc import Sequence
from itertools import product

import torch
from torch.profiler import ProfilerActivity, profile

import prunekernels as pk
from harness.options import FORMATS, Parser, minutes
from layers.baselines import Ours
from layers.case import Case
from layers.masks import make_masks
from layers.problems import Problem
from prunekernels.ops import extension

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
KEEP_RATIO = 0.6

Trial = tuple[str, str, tuple[str, str], str, str]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser("sanitize.py", str(__doc__))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--minutes", type=minutes, metavar="M", help="begin no trial after so long")
    p.add_argument(
        "--kernels", action="store_true", help="name the kernels of this package that ran; exit code 1 if none did"
    )
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("this torch finds no CUDA device; --device cpu tries the script itself")
    return args


def trials() -> list[Trial]:
    """All trials, shuffled: a run that is cut short has tried all kinds."""
    found = list(product(LINES, DTYPES, VARIANTS, FORMATS, PLANS))
    random.Random(0).shuffle(found)
    return found


def force_tiles(trial: Trial, device: str) -> None:
    """Has the kernels take tiles and slices that these sizes would not get on a large GPU, others in each trial."""
    if device != "cuda" or extension._C is None or not extension.build_info()["cuda"]:
        return
    draw = random.Random(repr(trial))
    warpgroups = trial[1] != "float32" and torch.cuda.get_device_capability() == (9, 0)
    # as csrc/cuda/kernels/igemm.h counts them
    tile = draw.choice((1, 2) if trial[-1] == "sparse" else (0, 1, 2, *((3,) if warpgroups else ())))
    grad_tile, slices = draw.choice((0, 1)), draw.choice((-1, 1, 3))
    ctypes.CDLL(extension._C.__file__).pk_force_tiles(tile, grad_tile, ctypes.c_int64(slices), -1)


def attempt(trial: Trial, device: str) -> None:
    force_tiles(trial, device)
    line, dtype, (mask, side), layout, plan = trial
    problem = Problem.parse(line)
    case = Case.make(problem, make_masks(problem, mask, side, KEEP_RATIO), getattr(torch, dtype), device)
    with pk.plan.force(plan), pk.plan.measure(False):
        Ours(case, "fwd+bwd", layout).check()


def attempt_all(args: argparse.Namespace) -> int:
    """Runs all trials and returns how many failed; a CUDA error that sticks is raised."""
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
    """Names of this package's kernels, without namespaces and template arguments."""
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

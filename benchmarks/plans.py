#!/usr/bin/env python3
"""Times every plan of a few layers, and on a GPU every tile of the direct plan: what the cost models are checked by.

    python benchmarks/plans.py --device cuda --dtype bfloat16 --json plans.json
    python benchmarks/plans.py --suite tiny --seconds 0.05

Each layer has half of its filters and input channels, in runs of eight (which vectors serve) and one by one. The file
also holds what the machine reaches (a copy, a product of matrices) and `pk.plan.table()` of the layers left to choose.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import prunekernels as pk
from harness import command
from harness.contender import timed
from harness.machine import header
from harness.options import FORMATS, Parser, add_output_files, dtype_name, duration, minutes
from harness.report import json_text, text_table, write_whole
from layers.baselines import Ours
from layers.case import Case
from layers.masks import Masks, live_count
from layers.problems import Problem, load_suite, suites
from prunekernels.ops import extension

KEPT = 0.5
DIRECTIONS = ("fwd", "grad_input", "grad_weight")
PLANS = ("dense", "compact", "direct")
TILES = ("m128n128", "m128n64", "m64n32", "w128n128")  # as enum IgemmTile counts them


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = Parser("plans.py", str(__doc__))
    add = p.add_argument
    add("--suite", nargs="+", choices=suites(), default=["gpu_quick"], metavar="NAME", help="default gpu_quick")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", type=dtype_name, choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--layout", choices=tuple(FORMATS), default="channels_last")
    add("--seconds", type=duration, default=0.1, help="to spend on a row, default 0.1")
    add("--clock", choices=("graph", "events"), default="graph", help="CUDA: replays of a graph, or calls from Python")
    add("--minutes", type=minutes, metavar="M", help="begin no layer after so long")
    add_output_files(p, ["json"])
    args = p.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("this torch finds no CUDA device")
    return args


def halves(problem: Problem, runs: bool, seed: int) -> Masks:
    """Half of the filters and of the channels, alone or in runs of eight."""
    generator, width = torch.Generator().manual_seed(seed), 8 if runs else 1

    def half(count: int) -> torch.Tensor:
        units = max(1, count // width)
        live = torch.zeros(units, dtype=torch.bool)
        live[torch.randperm(units, generator=generator)[: live_count(units, KEPT)]] = True
        return live.repeat_interleave(width) if count >= width else torch.ones(count, dtype=torch.bool)

    filters, inputs = half(problem.filters), half(problem.channels)
    return Masks(filters, None, inputs, filters[:, None] & inputs[None])


class Forced(Ours):
    """Ours under one plan, and on CUDA one tile of it (-1: as chosen)."""

    plan_name, tile = "direct", -1

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        force = getattr(ctypes.CDLL(extension._C.__file__), "pk_force_tiles", None) if self.tile >= 0 else None
        with pk.plan.force(self.plan_name):
            if force is not None:
                force(self.tile, -1, ctypes.c_int64(-1), -1)
            try:
                yield
            finally:
                if force is not None:
                    force(-1, -1, ctypes.c_int64(-1), -1)

    def begin(self) -> None:
        with self.forced():
            super().begin()

    def run(self) -> tuple[torch.Tensor, ...]:
        with self.forced():
            return super().run()


def kinds(args: argparse.Namespace, direction: str) -> list[type[Forced]]:
    """What is timed of a layer."""
    found = [type(plan, (Forced,), {"plan_name": plan, "family": plan}) for plan in PLANS]
    if args.device == "cuda" and direction != "grad_weight":
        tiles = [(i, name) for i, name in enumerate(TILES) if name != "w128n128" or _has_warpgroups(args)]
        found += [type(name, (Forced,), {"tile": i, "family": f"direct {name}"}) for i, name in tiles]
    return found


def _has_warpgroups(args: argparse.Namespace) -> bool:
    return args.dtype != "float32" and torch.cuda.get_device_capability() == (9, 0)


def row(problem: Problem, runs: bool, direction: str, args: argparse.Namespace) -> dict[str, Any]:
    masks = halves(problem, runs, seed=0)
    case = Case.make(problem, masks, getattr(torch, args.dtype), args.device)
    contenders: dict[str, Forced] = {}
    wrong: dict[str, str] = {}
    for kind in kinds(args, direction):
        try:
            contender = kind(case, direction, args.layout)
            contender.check()
            contenders[kind.family] = contender
        except Exception as error:
            wrong[kind.family] = f"{type(error).__name__}: {error}".splitlines()[0]
    timings, clock = timed(contenders, args, args.seconds, None)
    chosen = Ours(case, direction, args.layout)
    pk.plan.settle(chosen.run)
    return {
        "problem": problem.shape,
        "name": problem.name,
        "channels": "runs" if runs else "single",
        "direction": direction,
        "ms": {name: timing.median for name, timing in timings.items()},
        "chosen": chosen.plan(),
        "clock": clock,
        "wrong": wrong,
    }


def main(argv: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    command.set_up_torch(None)
    body: dict[str, Any] = {"header": header("plans.py", argv, args, {"kept": KEPT, "layout": args.layout})}
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for problem in (p for suite in args.suite for p in load_suite(suite)):
        if problem.groups != 1:
            continue
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            left_out.append(problem.name)
            continue
        for runs in (True, False):
            for direction in DIRECTIONS:
                if direction != "grad_input" or not problem.image_input:
                    rows.append(row(problem, runs, direction, args))
        if args.json:
            write_whole(args.json, json_text(body | {"rows": rows, "plans": pk.plan.table(), "not run": left_out}))
    if args.json:
        write_whole(args.json, json_text(body | {"rows": rows, "plans": pk.plan.table(), "not run": left_out}))
    names = sorted({name for r in rows for name in r["ms"]})
    cells = [
        {"layer": r["name"], "channels": r["channels"], "direction": r["direction"]}
        | {name: r["ms"].get(name) for name in names} | {"chosen": r["chosen"]}
        for r in rows
    ]  # fmt: skip
    print(text_table(cells, markdown=False) if cells else "no rows")
    for r in rows:
        for name, error in r["wrong"].items():
            print(f"{r['name']} {r['channels']} {r['direction']}: {name}: {error}", file=sys.stderr)
    return int(not rows or any(r["wrong"] for r in rows))


if __name__ == "__main__":
    command.main(main)

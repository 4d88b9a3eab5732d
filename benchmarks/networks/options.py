"""The command line of network.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
    mode_of_gear,
    positive,
)
from networks.baselines import PASSES, FloatDense
from networks.contenders import EAGER, FAMILIES
from networks.models import MASKS, NETWORKS, Network
from networks.setting import OPTIMIZERS

SUITES = {  # networks that compile fast come first
    "cpu": ("resnet18", "vgg16", "resnet56", "mobilenet_v2"),
    "cuda": ("resnet50", "resnet56", "vgg16", "resnet18", "mobilenet_v2"),
}
TINY = ("tiny_resnet", "tiny_vgg")
KEEP_RATIOS = (0.95, 0.9, 0.7, 0.5, 0.3)
DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
DTYPE = {"cpu": "both", "cuda": "bfloat16"}
LAYOUTS = {"cpu": "both", "cuda": "channels_last"}
OPTIMIZER = {"cpu": "masked", "cuda": "torch"}  # MaskedSGD reads masks on the host, which a CUDA graph cannot record
MINUTES = 12.0
QUICK: dict[str, Any] = {"kept": [0.95, 0.5], "masks": ["joint"], "passes": ["train"], "rounds": 3}
QUICK["contenders"] = [contender.family for contender in (*EAGER[1:], FloatDense)]
GOALS: dict[str, Any] = {"kept": [0.5], "masks": ["joint"], "passes": ["train"], "minutes": 25.0}
EXAMPLES = """\
  python benchmarks/network.py --device cpu --json n.json --md n.md
  python benchmarks/network.py --goals --json n.json                     # the rows of most goals, in all forms
  python benchmarks/network.py --quick                                   # eager forms alone, three rounds
  python benchmarks/network.py --suite resnet56 --kept 0.5 --masks joint --pass train --rounds 20
  python benchmarks/network.py --suite tiny --kept 0.5                   # does everything work? some minutes
  python benchmarks/network.py --contenders live small --dtype float32   # nothing is compiled
  python benchmarks/network.py --device cuda --json g.json --md g.md     # bf16, channels_last, CUDA graphs"""


def parser() -> Parser:
    p = Parser(
        "network.py",
        "Time training and inference steps of whole networks: dense, masked, live and compacted mode, and the small\n"
        "network that never had the dead filters; dense, compacted and small also compiled by torch.compile, and\n"
        "on a CPU dense in float32 beside rows of bfloat16.\n\n"
        "Every step is checked against a masked reference before anything is timed.\n\n"
        "To compile a network takes half a minute and more, so by default (without --contenders) compacted mode and\n"
        "the small network are compiled for training steps with joint masks and kept 0.5 alone: most goals are about\n"
        "these rows, and they come first. --goals runs nothing else, on two cores in at most 25 minutes for the four\n"
        "networks and both dtypes; what --minutes (12) leave no time for is named at the end.",
        epilog=f"examples:\n{EXAMPLES}\n\nnetworks: {', '.join(NETWORKS)}; words and columns: benchmarks/README.md",
    )
    _what(p.add_argument_group("what is run"))
    _how(p.add_argument_group("how"))
    add_output_files(p, ("json", "csv", "md"))
    return p


def _what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    note = f"default {' '.join(SUITES['cpu'])}, on CUDA resnet50 besides; tiny: both tiny ones"
    add("--suite", nargs="+", choices=(*NETWORKS, "tiny"), metavar="NAME", help=note)
    note = "of all networks or, NETWORK=N, of one"
    add("--batch", nargs="+", type=batch_of("network", NETWORKS), default=[], metavar="N", help=note)
    note = f"keep ratios (live shares of the filters), default {' '.join(map(str, KEEP_RATIOS))}"
    add("--kept", nargs="+", type=keep_ratio, metavar="X", help=note)
    note = "joint: filters that meet in an add are masked alike; independent: a list per convolution; default both"
    add("--masks", nargs="+", choices=MASKS, metavar="M", help=note)
    add("--pass", nargs="+", choices=PASSES, dest="passes", metavar="P", help="train, infer; default both")
    add_contenders(group, "--contenders", FAMILIES[1:], type=mode_of_gear)
    group.set_defaults(contenders=None)
    add("--quick", action="store_true", help="joint masks, kept 0.95 and 0.5, training, nothing compiled, three rounds")
    add("--goals", action="store_true", help="joint masks, kept 0.5, training steps, at most 25 minutes")


def _how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", choices=tuple(SUITES), default="cpu")
    note = "bfloat16 (bf16): by autocast; both: rows of each; default both, on CUDA bfloat16"
    add("--dtype", type=dtype_name, choices=DTYPES, help=note)
    note = "memory layout of all; both: the faster one of each; default both, on CUDA channels_last"
    add("--layout", choices=(*FORMATS, "both"), help=note)
    note = "of compiled forms: both, or the one in which the eager form was faster; default faster"
    add("--compiled-layout", choices=("faster", "both"), default="faster", help=note)
    note = "of our modes: pk.optim.MaskedSGD, or torch.optim.SGD as the others; default masked, on CUDA torch"
    add("--optimizer", choices=OPTIMIZERS, help=note)
    add_run_control(group)
    note = f"of the whole run, which decide the rounds; what finds no time is named; default {MINUTES:g}"
    add("--minutes", type=minutes, metavar="M", help=note)
    add("--rounds", type=positive, metavar="N", help="run N rounds of every row, whatever the minutes")
    add("--seconds", type=duration, metavar="S", help="run each row for about S seconds, at least three rounds")
    add("--seed", type=int, default=0, help="of masks, weights and images")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Network]]:
    p = parser()
    args = p.parse_args(argv)
    if found := complaint(args):
        p.error(found)
    for preset in (QUICK if args.quick else {}, GOALS if args.goals else {}):
        for name, value in preset.items():
            setattr(args, name, getattr(args, name) or value)
    args.minutes = args.minutes or MINUTES
    args.kept = sorted(set(args.kept or KEEP_RATIOS), reverse=True)
    args.masks = list(dict.fromkeys(args.masks or MASKS))
    args.passes = [name for name in PASSES if name in (args.passes or PASSES)]
    args.dtypes = DTYPES[args.dtype or DTYPE[args.device]]
    args.dtype = args.dtypes[-1]
    args.all_compiled = args.contenders is not None  # those that are named run in each row
    args.contenders = args.contenders or FAMILIES[1:]
    args.layout = args.layout or LAYOUTS[args.device]
    args.optimizer = args.optimizer or OPTIMIZER[args.device]
    names = [each for name in args.suite or SUITES[args.device] for each in (TINY if name == "tiny" else (name,))]
    batches: dict[str, int] = dict(args.batch)
    sizes: dict[str, int] = {name: batches.get(name, batches.get("", NETWORKS[name].batch)) for name in names}
    return args, [replace(NETWORKS[name], batch=size) for name, size in sizes.items()]

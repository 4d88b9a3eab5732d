"""The command line of network.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

import prunekernels as pk
from layers.baselines import FORMATS
from layers.options import Parser, kept_share, minutes, output_file, positive
from networks.baselines import FAMILIES, OPTIMIZERS, PASSES
from networks.models import MASKS, NETWORKS, Network

SUITES = {"cpu": ("resnet56", "vgg16", "resnet18"), "cuda": ("resnet50", "resnet56", "vgg16", "resnet18")}
TINY = ("tiny_resnet", "tiny_vgg")
KEPT = (0.95, 0.9, 0.7, 0.5, 0.3)
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
LAYOUTS = {"cpu": "both", "cuda": "channels_last"}
OPTIMIZER = {"cpu": "masked", "cuda": "torch"}  # MaskedSGD looks at masks on the host, which no CUDA graph can hold
MINUTES = 11.0
QUICK = {"kept": [0.95, 0.5], "masks": ["joint"], "passes": ["train"], "rounds": 3}
EXAMPLES = """\
  python benchmarks/network.py --device cpu --json n.json --md n.md
  python benchmarks/network.py --quick                                   # the goals alone, three rounds
  python benchmarks/network.py --suite resnet56 --kept 0.5 --masks joint --pass train --rounds 20
  python benchmarks/network.py --suite tiny --kept 0.5                   # does everything work? a few seconds
  python benchmarks/network.py --device cuda --json g.json --md g.md     # bf16, channels_last, CUDA graphs"""


def batch(text: str) -> tuple[str, int]:
    """The batch of a network, "resnet56=64", or of all, "64"."""
    name, _, number = text.rpartition("=")
    if name and name not in NETWORKS:
        raise argparse.ArgumentTypeError(f"unknown network {name!r}")
    return name, positive(number)


def parser() -> Parser:
    p = Parser(
        prog="network.py",
        description="Time training and inference steps of whole networks: dense, the layer gear, the network gear,\n"
        "and the small network that never had the dead filters.\n\n"
        "Every step is checked against a masked reference before anything is timed.",
        epilog=f"examples:\n{EXAMPLES}\n\nnetworks: {', '.join(NETWORKS)}; words and columns: benchmarks/README.md",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(p.add_argument_group("what is run"))
    _how(p.add_argument_group("how"))
    where = p.add_argument_group("where results go, besides the tables on the terminal")
    for name in ("json", "csv", "md"):
        where.add_argument(f"--{name}", type=output_file, metavar="FILE")
    return p


def _what(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    note = f"default {' '.join(SUITES['cpu'])}, on CUDA resnet50 besides; tiny: both tiny ones"
    add("--suite", nargs="+", choices=(*NETWORKS, "tiny"), metavar="NAME", help=note)
    add("--batch", nargs="+", type=batch, default=[], metavar="N", help="of all networks or, NETWORK=N, of one")
    note = f"live shares, default {' '.join(map(str, KEPT))}"
    add("--kept", nargs="+", type=kept_share, metavar="X", help=note)
    note = "joint: filters that meet in an add are masked alike; independent: a list per convolution; default both"
    add("--masks", nargs="+", choices=MASKS, metavar="M", help=note)
    add("--pass", nargs="+", choices=PASSES, dest="passes", metavar="P", help="train, infer; default both")
    note = f"besides dense, of {', '.join(FAMILIES[1:])}; default all"
    add("--rivals", nargs="+", choices=FAMILIES[1:], default=FAMILIES[1:], metavar="R", help=note)
    add("--quick", action="store_true", help="joint masks, kept 0.95 and 0.5, training steps, three rounds")


def _how(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", choices=tuple(SUITES), default="cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16: by autocast; default float32, on CUDA bfloat16")
    note = "of everybody; both: the faster of each; default both, on CUDA channels_last"
    add("--layout", choices=(*FORMATS, "both"), help=note)
    note = "of the gears: pk.optim.MaskedSGD, or torch.optim.SGD as the others; default masked, on CUDA torch"
    add("--optimizer", choices=OPTIMIZERS, help=note)
    note = "CUDA: time replays of a graph, or calls from Python; default graph"
    add("--clock", choices=("graph", "events"), default="graph", help=note)
    add("--plan", choices=pk.plan.PLANS, default="auto", help="of the gears, default auto")
    note = f"of the whole run, which decides the rounds; what finds no time is named; default {MINUTES:g}"
    add("--minutes", type=minutes, default=MINUTES, metavar="M", help=note)
    add("--rounds", type=positive, metavar="N", help="run N rounds of every row, whatever the minutes")
    add("--seconds", type=float, metavar="S", help="run about S seconds of every row, at least three rounds")
    add("--keep-going", action="store_true", help="where ours is wrong or fails, name it and go on")
    add("--resume", action="store_true", help="leave out what the --json file has already")
    add("--threads", type=positive, help="default: what torch has chosen")
    add("--seed", type=int, default=0, help="of masks, weights and images")


def _complaint(args: argparse.Namespace) -> str | None:
    """What does not go together."""
    if args.resume and not args.json:
        return "--resume goes on with a --json file"
    if args.seconds is not None and not 0 <= args.seconds < float("inf"):
        return f"--seconds: expected seconds, got {args.seconds}"
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: this torch finds no CUDA device"
    return None


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Network]]:
    p = parser()
    args = p.parse_args(argv)
    if complaint := _complaint(args):
        p.error(complaint)
    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, getattr(args, name) or value)
    args.kept = sorted(set(args.kept or KEPT), reverse=True)
    args.masks = list(dict.fromkeys(args.masks or MASKS))
    args.passes = [name for name in PASSES if name in (args.passes or PASSES)]
    args.dtype = args.dtype or DTYPES[args.device]
    args.layout = args.layout or LAYOUTS[args.device]
    args.optimizer = args.optimizer or OPTIMIZER[args.device]
    names = [each for name in args.suite or SUITES[args.device] for each in (TINY if name == "tiny" else (name,))]
    batches: dict[str, int] = dict(args.batch)
    sizes: dict[str, int] = {name: batches.get(name, batches.get("", NETWORKS[name].batch)) for name in names}
    return args, [replace(NETWORKS[name], batch=size) for name, size in sizes.items()]

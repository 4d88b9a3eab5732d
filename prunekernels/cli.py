"""python -m prunekernels demo | train | bench | shrink | info"""

from __future__ import annotations

import argparse
import ast
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, build_info, has_extension, kernels

# What a user can put right; anything else is a mistake of ours and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0, or 2 after an error that names what was wrong."""
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.command is not bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given = {name: value for name, value in vars(asked).items() if name not in ("command", "name")}
    try:
        return asked.command(**given, **({"rest": rest} if asked.command is bench else {})) or 0
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{asked.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prunekernels", description="Training with masked convolutions.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    def add(name: str, command: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        # Absent means not given: what a resumed run may differ in is only what was said.
        made = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        made.set_defaults(command=command)
        return made

    parts = add(
        "demo", demo, "ResNet-20 on digits, dense and with half of the filters pruned: two minutes on two cores"
    )
    parts.add_argument("--out", type=Path, help="folder for both runs (out/demo)")
    parts.add_argument("--epochs", type=int, help="20")
    _add_train(add("train", train, "train a network while pruning it, then shrink it and write a report"))
    parts = add("bench", bench, "the benchmarks of a checkout: conv, network, optim; further arguments are theirs")
    parts.add_argument("which", nargs="?", default="conv", help="conv")
    parts = add("shrink", shrink, "the small network of a run's checkpoint, as small.pt in its folder")
    parts.add_argument("run", type=Path, help="the run's folder")
    parts.add_argument("--onnx", action="store_true", default=False, help="small.onnx as well")
    add("info", info, "versions, build and kernels")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **({"type": kind} if kind else {"action": "store_true"}), **more)

    add("out", str, "folder of the run", required=True)
    add("method", str, "none, sfp, asfp, srfp, asrfp, ghfp, pgp, rpgp, ... (none)")
    add("arch", str, "resnet20, vgg_small, ... (resnet20)")
    add("width", float, "share of every layer's filters that the network is built with (1)")
    add("data", str, "digits, cifar10:DIR (binary version) or folder:DIR (class folders of images) (digits)")
    add("size", int, "images are resized to this height and width (digits: 16, folder: 32)")
    add("augment", str, "none, shift or shift+flip (digits: none, others: shift+flip)")
    add("rate", float, "share of the filters that is pruned in the end (0.5)")
    add("duty", float, "share of an epoch's steps in which soft-dead filters train along; 1: as published (0.1)")
    add("measure", None, "pgp: score by an extra pass over the training set after each epoch, as its released code")
    add(
        "set",
        _setting,
        "an option of the method, as coupling=joint; repeat it for more",
        action="append",
        metavar="NAME=VALUE",
    )
    add("gear", str, "network, layer, or dense: masks applied, nothing skipped (network)")
    add("epochs", int, "30")
    add("batch", int, "64")
    add("lr", float, "at first; a cosine takes it to 0 (0.1)")
    add("momentum", float, "0.9")
    add("weight-decay", float, "0.0005")
    add("seed", int, "0")
    add("amp", None, "bfloat16 where autocast has it")
    add(
        "deterministic",
        None,
        "plans not by the clock: the same bits in every process of as many threads, often slower",
    )
    add("device", str, "cpu, cuda, ... (cuda if there is one)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    again.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    add("stop-after", int, "end after this epoch, to be resumed")
    add("onnx", None, "write small.onnx as well")
    add("beside", str, "folder of a dense run, for the report")
    parser.add_argument("--no-report", dest="report", action="store_false", help="no report.html, no pictures")
    parser.add_argument("--report", action="store_true", help="the report after all, of a run that was to have none")
    add("quiet", None, "no progress")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def train(*, resume: bool = False, overwrite: bool = False, **given: Any) -> None:
    from .train import run

    if "set" in given:
        given["options"] = dict(given.pop("set"))
    summary = run.train(given, resume=resume, overwrite=overwrite)
    if summary is not None:
        print(_told(summary, given["out"]))


def _told(s: dict[str, Any], out: str) -> str:
    times = s["epoch_of"]
    lines = [
        f"accuracy      {s['accuracy']:.4f}; small network {s['small_accuracy']:.4f}",
        f"small network {s['small_parameters']:,} of {s['parameters']:,} parameters, "
        f"{s['small_multiply_adds']:,} of {s['multiply_adds']:,} multiply-adds",
        f"an epoch      {s['epoch_seconds']:.3f} s (median); in turns: dense {times['dense']:.3f} s, "
        f"this {times['this']:.3f} s, small {times['small']:.3f} s",
        f"files         {s.get('report', out)}",
    ]
    return "\n".join(lines)


def demo(out: Path = Path("out/demo"), epochs: int = 20) -> None:
    from .train.demo import demo

    print(demo(out, epochs))


def bench(which: str, rest: Sequence[str]) -> int:
    folder = Path(__file__).parent.parent / "benchmarks"
    script = folder / f"{which}.py"
    known = [
        p.stem for p in (folder / name for name in ("conv.py", "network.py", "optim.py", "methods.py")) if p.is_file()
    ]
    if not known:
        raise FileNotFoundError(f"expected a checkout of the repository, got an installed package: no folder {folder}")
    if which not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {which!r}")
    return subprocess.run(
        [sys.executable, str(script), *(rest or ["--suite", "tiny"] if which == "conv" else rest)]
    ).returncode


def shrink(run: Path, onnx: bool) -> None:
    from .train.run import shrink_run

    checked, paths = shrink_run(run, onnx)
    print(checked, *paths, sep="\n")


def info() -> None:
    rows = kernels()
    print(f"prunekernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    extension = "loaded" if has_extension() else "not in use, pure torch instead"
    print(f"extension: {extension}; {torch.get_num_threads()} threads")
    for name, value in build_info().items():
        print(f"  {name}: {value or 'none'}")
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        print(f"{device} kernels: {sum(bool(row['compiled']) for row in own)} of {len(own)} in this build")
        for operation in dict.fromkeys(row["operation"] for row in own):
            names = [row["name"] for row in own if row["operation"] == operation and row["compiled"]]
            if names:
                print(f"  {operation}: {', '.join(names)}")

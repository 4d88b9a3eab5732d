"""The command line: python -m prunekernels demo | train | bench | shrink | sensitivity | info | doctor."""

from __future__ import annotations

import argparse
import ast
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch

from . import __version__, build_info, doctor, has_extension, kernels
from .train import demo, run
from .train.config import MODE_OF_GEAR
from .train.distributed import LostRank

# Errors that a user can correct are printed in one line; any other is a fault of the program and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: As on the command line. None: sys.argv.

    Returns:
        The exit status: 0; 1 where the doctor finds something wrong; 2 after an error of the user's, which is printed;
        130 after Ctrl-C.
    """
    parser = _parser()
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.command is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    given = {name: value for name, value in vars(asked).items() if name not in ("command", "name")}
    try:
        return asked.command(**given, **({"rest": rest} if asked.command is _bench else {})) or 0
    except USER_ERRORS as error:
        rank = os.environ.get("RANK", "0")  # torchrun's; rank 0 speaks for the run
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)
        if isinstance(error, LostRank):
            sys.stdout.flush()
            os._exit(2)  # at once: the ordinary end of the process might wait for the rank that is lost
        return 2
    except KeyboardInterrupt:
        print(f"\n{asked.name}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("prunekernels", description="Training with masked convolutions.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    def add(name: str, command: Callable[..., Any], text: str) -> argparse.ArgumentParser:
        # SUPPRESS: an option that is not given stays out of the settings, so that a resumed run keeps its own.
        made = commands.add_parser(name, help=text, description=text, argument_default=argparse.SUPPRESS)
        made.set_defaults(command=command)
        return made

    demo_text = "train ResNet-20 on digits, dense and with half of the filters pruned; about two minutes on two cores"
    parts = add("demo", _demo, demo_text)
    parts.add_argument("--out", type=Path, help="folder for both runs (out/demo)")
    parts.add_argument("--epochs", type=int, help="epochs of each run (20)")
    _add_train(add("train", _train, "train a network while pruning it, then shrink it and write a report"))
    parts = add("bench", _bench, "run a benchmark of a checkout; further arguments are the benchmark's own")
    parts.add_argument("which", nargs="?", default="conv", help="conv, network, optim or methods (conv)")
    parts = add("shrink", _shrink, "shrink the network of a run's checkpoint and write small.pt to the run's folder")
    parts.add_argument("out", type=Path, metavar="run", help="folder of the run")
    parts.add_argument("--onnx", action="store_true", default=False, help="write small.onnx as well")
    parts = add("sensitivity", _sensitivity, "prune each layer of a run's network alone and tell what that costs")
    parts.add_argument("out", type=Path, metavar="run", help="folder of the run, for sensitivity.json, .md and .png")
    parts.add_argument("--images", type=int, default=1024, help="images to evaluate: validation, or training (1024)")
    add("info", _info, "print versions, build and kernels")
    text = "check the installation, and name the command that mends what is wrong; exit status 1 if anything is"
    add("doctor", _doctor, text).add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **({"type": kind} if kind else {"action": "store_true"}), **more)

    add("out", str, "folder of the run", required=True)
    add("method", str, "none, sfp, asfp, srfp, asrfp, ghfp, pgp, rpgp, ... (none)")
    add("arch", str, "resnet20, vgg_small, ... (resnet20)")
    add("width", float, "share of every layer's filters that the network is built with (1)")
    sets = "digits, fashion-mnist, idx:DIR (MNIST's format), cifar10:DIR (binary version) or folder:DIR (class folders"
    add("data", str, f"{sets} of images) (digits)")
    add("size", int, "height and width that images are resized to (digits: 16, folder: 32)")
    add("augment", str, "none, shift or shift+flip (digits: none, idx: shift, others: shift+flip)")
    add("train-images", int, "train on so many images of the training set, the same for every seed (all)")
    held = "hold out so many images of the training set: epochs are evaluated on them, the test set is used once, at"
    add("validation", int, f"{held} the end (0)")
    add("rate", float, "share of the filters that is pruned in the end (0.5)")
    add("duty", float, "share of an epoch's steps in which soft-dead filters train along; 1: as published (0.2)")
    add("preset", str, "paper: what is not given, epochs and lr too, is the paper's, with duty 1 (none)")
    add("measure", None, "pgp: score filters by an extra pass over the training set after each epoch")
    add("recalibrate", int, "batches from which norms' statistics are estimated anew after a pruning; 0: never (20)")
    option = "an option of the method, such as coupling=joint; may be repeated"
    add("set", _setting, option, action="append", metavar="NAME=VALUE")
    modes = (
        "masked, live, compacted, dense (masks are applied, and nothing is skipped), or auto: the fastest of the first"
    )
    add("mode", str, f"{modes} three, as the steps of the run tell (auto)")
    parser.add_argument("--gear", action=_Gear, choices=MODE_OF_GEAR, help=argparse.SUPPRESS)
    add("compile", None, "use torch.compile once masks stand still, if that makes steps faster")
    add("compile-after", int, "for how many steps masks stand still before that (300)")
    add("epochs", int, "epochs in all (30)")
    add("batch", int, "images a step, of all processes together (64)")
    add("lr", float, "learning rate at first; a cosine takes it to 0 (0.1)")
    add("momentum", float, "momentum of SGD (0.9)")
    add("weight-decay", float, "weight decay of SGD (0.0005)")
    add("seed", int, "seed of weights, order of images and augmentation (0)")
    add("amp", None, "autocast to bfloat16; with --mode auto only where that is the faster")
    add("evaluate", str, "evaluate the network after each epoch, or at the end: after the last alone (each)")
    add("layout", str, "memory layout of the network: contiguous, channels_last, or auto: the faster one (auto)")
    add("deterministic", None, "choose plans by cost, not by time: the same bits with as many threads, often slower")
    add("device", str, "cpu, cuda, ... (cuda where there is one)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    again.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    add("stop-after", int, "stop after this epoch, to resume later")
    add("onnx", None, "write small.onnx as well")
    add("beside", str, "folders of other runs to compare with in the report", nargs="+", metavar="RUN")
    small_of = "folder of a run: trains its small network from new weights; what is not given is as in that run"
    add("small-of", str, small_of, metavar="RUN")
    parser.add_argument("--no-report", dest="report", action="store_false", help="write no report.html, no pictures")
    parser.add_argument("--report", action="store_true", help="write the report of a run that was started without one")
    add("timeout", float, "seconds that a process of torchrun waits for the others (600)")
    add("quiet", None, "print no progress")


class _Gear(argparse.Action):
    """--gear, the former name of --mode."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.mode = MODE_OF_GEAR[values]
        print(f"warning: --gear is deprecated: use --mode {namespace.mode}", file=sys.stderr)


def _setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE as (name, value); a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _train(*, resume: bool = False, overwrite: bool = False, **given: Any) -> None:
    if "set" in given:
        given["options"] = dict(given.pop("set"))
    summary = run.train(given, resume=resume, overwrite=overwrite)
    if summary is not None:
        print(_summary_text(summary, given["out"]))


def _summary_text(s: dict[str, Any], out: str) -> str:
    times, held_out = s["epoch_of"], s["validation_accuracy"]
    validation = "" if held_out is None else f"; on validation images {held_out:.4f}"
    lines = [
        f"accuracy      {s['accuracy']:.4f}; small network {s['small_accuracy']:.4f}{validation}",
        f"small network {s['small_parameters']:,} of {s['parameters']:,} parameters, "
        f"{s['small_multiply_adds']:,} of {s['multiply_adds']:,} multiply-adds",
        f"an epoch      {s['epoch_seconds']:.3f} s (median); in turns: dense {times['dense']:.3f} s, "
        f"this ({s['mode']}) {times['this']:.3f} s, small {times['small']:.3f} s",
        f"files         {s.get('report', out)}",
    ]
    return "\n".join(lines)


def _demo(out: Path = Path("out/demo"), epochs: int = 20) -> None:
    print(demo.demo(out, epochs))


def _bench(which: str, rest: Sequence[str]) -> int:
    folder = Path(__file__).parent.parent / "benchmarks"
    script = folder / f"{which}.py"
    scripts = (folder / f"{name}.py" for name in ("conv", "network", "optim", "methods"))
    known = [path.stem for path in scripts if path.is_file()]
    if not known:
        raise FileNotFoundError(f"expected a checkout of the repository, got an installed package: no folder {folder}")
    if which not in known:
        raise ValueError(f"expected one of {', '.join(known)}, got {which!r}")
    arguments = rest or (["--suite", "tiny"] if which == "conv" else [])
    return subprocess.run([sys.executable, str(script), *arguments]).returncode


def _shrink(out: Path, onnx: bool) -> None:
    checked, paths = run.shrink_run(out, onnx)
    print(checked, *paths, sep="\n")


def _sensitivity(out: Path, images: int) -> None:
    found, paths = run.sensitivity_run(out, images)
    print(found, *paths, sep="\n")


def _doctor(json: bool = False) -> int:
    found = doctor.findings()
    wrong = any(finding.state == "wrong" for finding in found)
    if json:
        checks = [finding._asdict() for finding in found]
        print(dumps({"version": __version__, "ok": not wrong, "checks": checks}, indent=2))
    else:
        print(f"prunekernels {__version__} in {Path(__file__).parent}", doctor.report(found), sep="\n")
    return int(wrong)


def _info() -> None:
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

"""The command line: python -m prunekernels demo | train | bench | shrink | sensitivity | report | info | doctor.

A command ends with 0; with 1 after a fault of the program, whose traceback it shows, and where the doctor finds
something wrong; with 2 after a wrong argument, setting or file, which one line names; with 130 after Ctrl-C.
"""

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
from .deploy import save
from .train import demo, run
from .train.compare import compare_runs
from .train.config import MODE_OF_GEAR
from .train.config_file import options_of, read_settings
from .train.distributed import LostRank
from .train.dry_run import dry_run

EXAMPLES = """examples:
  python -m prunekernels demo
  python -m prunekernels train --out runs/a --method ghfp --rate 0.5
  python -m prunekernels train --config run.yaml --lr 0.05
  python -m prunekernels shrink runs/a --onnx
  python -m prunekernels report runs/dense runs/a

exit status: 0 done; 1 a fault of the program, with its traceback; 2 a wrong argument, setting or file, named in one
line; 130 Ctrl-C. bench: that of the benchmark."""
TRAIN_EXAMPLES = """examples:
  train --out runs/dense --data cifar10:data/cifar-10 --arch resnet20 --epochs 60
  train --out runs/ghfp --method ghfp --rate 0.5 --data cifar10:data/cifar-10 --beside runs/dense
  train --out runs/half --method pgp --set "budget={'flops': 0.5}" --dry-run
  train --config run.yaml --lr 0.05 --set coupling=independent
  train --out runs/ghfp --resume
  torchrun --nproc-per-node 2 -m prunekernels train --out runs/two --method ghfp

A file for --config has the options by name, and those of the method as a table:
  out: runs/a
  method: ghfp
  rate: 0.5
  weight-decay: 1e-4
  set: {coupling: joint, budget: {flops: 0.5}}"""

ONLY_GIVEN = ("config", "dry_run", "resume", "overwrite")  # options that no file sets

# Errors that a user can correct are printed in one line; any other is a fault of the program and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: As on the command line. None: sys.argv.

    Returns:
        The exit status: 0; 1 where the doctor finds something wrong; 2 after an error of the user's, which is printed;
        130 after Ctrl-C. A fault of the program is raised, so that Python ends with 1.
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
    parser = argparse.ArgumentParser(
        "prunekernels", description="Training with masked convolutions.", epilog=EXAMPLES, formatter_class=_AsWritten
    )
    parser.add_argument("--version", action="version", version=f"prunekernels {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")

    def add(name: str, command: Callable[..., Any], text: str, examples: str) -> argparse.ArgumentParser:
        # SUPPRESS: an option that is not given stays out of the settings, so that a resumed run keeps its own.
        described: dict[str, Any] = {
            "help": text,
            "description": text,
            "epilog": examples,
            "formatter_class": _AsWritten,
        }
        made = commands.add_parser(name, argument_default=argparse.SUPPRESS, **described)
        made.set_defaults(command=command)
        return made

    demo_text = "train ResNet-20 on digits, dense and with half of the filters pruned; about two minutes on two cores"
    parts = add("demo", _demo, demo_text, "example: demo --epochs 5 --out out/demo")
    parts.add_argument("--out", type=Path, help="folder for both runs (out/demo)")
    parts.add_argument("--epochs", type=int, help="epochs of each run (20)")
    text = "train a network while pruning it, then shrink it and write a report"
    parts = add("train", _train, text, TRAIN_EXAMPLES)
    parts.usage = "%(prog)s --out RUN [options]"
    _add_train(parts)
    parts.set_defaults(parser=parts)
    text = "run a benchmark of a checkout; further arguments are the benchmark's own"
    parts = add("bench", _bench, text, "example: bench conv --suite resnet50 --kept 0.5")
    parts.add_argument("which", nargs="?", default="conv", help="conv, network, optim or methods (conv)")
    text = "shrink the network of a run's checkpoint and write small.pt to the run's folder"
    parts = add("shrink", _shrink, text, "example: shrink runs/a --onnx")
    parts.add_argument("out", type=Path, metavar="run", help="folder of the run")
    parts.add_argument("--onnx", action="store_true", default=False, help="write small.onnx as well")
    kinds = "also write the folder small: safetensors (for pk.load_small), pt2 (torch.export), onnx, and a model card"
    parts.add_argument("--format", nargs="+", choices=save.FORMATS, dest="formats", default=(), help=kinds)
    text = "prune each layer of a run's network alone and tell what that costs"
    parts = add("sensitivity", _sensitivity, text, "example: sensitivity runs/dense --images 512")
    parts.add_argument("out", type=Path, metavar="run", help="folder of the run, for sensitivity.json, .md and .png")
    parts.add_argument("--images", type=int, default=1024, help="images to evaluate: validation, or training (1024)")
    parts = add("report", _report, "compare runs in one HTML page with plots", "example: report runs/dense runs/ghfp")
    parts.add_argument("runs", type=Path, nargs="+", metavar="run", help="folders of runs, finished or not")
    parts.add_argument("--out", type=Path, default=Path("report.html"), help="the file to write (report.html)")
    add("info", _info, "print versions, build and kernels", "example: info")
    text = "check the installation, and name the command that mends what is wrong; exit status 1 if anything is"
    parts = add("doctor", _doctor, text, "example: doctor --json")
    parts.add_argument("--json", action="store_true", help="print JSON")
    return parser


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of examples."""


def _add_train(parser: argparse.ArgumentParser) -> None:
    group: Any = parser

    def into(title: str) -> None:
        nonlocal group
        group = parser.add_argument_group(title)

    def add(name: str, kind: Any, text: str, **more: Any) -> None:
        group.add_argument(f"--{name}", help=text, **({"type": kind} if kind else {"action": "store_true"}), **more)

    into("the run")
    add("out", str, "folder of the run (required, here or in --config)")
    add("config", Path, "a .yaml, .json or .toml file of these options; those given here come first", metavar="FILE")
    add("dry-run", None, "tell what would be pruned, what it saves and how fast steps are; train and write nothing")
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    again.add_argument("--overwrite", action="store_true", help="start anew in a folder that has a run")
    add("stop-after", int, "stop after this epoch, to resume later")
    add("seed", int, "seed of weights, order of images and augmentation (0)")

    into("network")
    add("arch", str, "resnet20, vgg_small, ... (resnet20)")
    add("width", float, "share of every layer's filters that the network is built with (1)")
    small_of = "folder of a run: trains its small network from new weights; what is not given is as in that run"
    add("small-of", str, small_of, metavar="RUN")

    into("data")
    sets = "digits, fashion-mnist, idx:DIR (MNIST's format), cifar10:DIR (binary version) or folder:DIR (class folders"
    add("data", str, f"{sets} of images) (digits)")
    add("size", int, "height and width that images are resized to (digits: 16, folder: 32)")
    add("augment", str, "none, shift or shift+flip (digits: none, idx: shift, others: shift+flip)")
    add("train-images", int, "train on so many images of the training set, the same for every seed (all)")
    held = "hold out so many images of the training set: epochs are evaluated on them, the test set is used once, at"
    add("validation", int, f"{held} the end (0)")
    add("evaluate", str, "evaluate the network after each epoch, or at the end: after the last alone (each)")

    into("pruning")
    add("method", str, "none, sfp, asfp, srfp, asrfp, ghfp, pgp, rpgp, ... (none)")
    add("rate", float, "share of the filters that is pruned in the end (0.5)")
    add("duty", float, "share of an epoch's steps in which soft-dead filters train along; 1: as published (0.2)")
    add("preset", str, "paper: what is not given, epochs and lr too, is the paper's, with duty 1 (none)")
    add("measure", None, "pgp: score filters by an extra pass over the training set after each epoch")
    add("recalibrate", int, "batches from which norms' statistics are estimated anew after a pruning; 0: never (20)")
    option = "an option of the method, such as coupling=joint; may be repeated"
    add("set", _setting, option, action="append", metavar="NAME=VALUE")

    into("training")
    add("epochs", int, "epochs in all (30)")
    add("batch", int, "images a step, of all processes together (64)")
    add("lr", float, "learning rate at first; a cosine takes it to 0 (0.1)")
    add("momentum", float, "momentum of SGD (0.9)")
    add("weight-decay", float, "weight decay of SGD (0.0005)")

    into("speed")
    modes = (
        "masked, live, compacted, dense (masks are applied, and nothing is skipped), or auto: the fastest of the first"
    )
    add("mode", str, f"{modes} three, as the steps of the run tell (auto)")
    group.add_argument("--gear", action=_Gear, choices=MODE_OF_GEAR, help=argparse.SUPPRESS)
    add("compile", None, "use torch.compile once masks stand still, if that makes steps faster")
    add("compile-after", int, "for how many steps masks stand still before that (300)")
    add("amp", None, "autocast to bfloat16; with --mode auto only where that is the faster")
    add("layout", str, "memory layout of the network: contiguous, channels_last, or auto: the faster one (auto)")
    add("deterministic", None, "choose plans by cost, not by time: the same bits with as many threads, often slower")
    add("device", str, "cpu, cuda, ... (cuda where there is one)")
    add("live-gradients", None, "processes of torchrun send each other live gradients alone in masked and live mode")
    add("timeout", float, "seconds that a process of torchrun waits for the others (600)")

    into("what is written")
    add("onnx", None, "write small.onnx as well")
    add("beside", str, "folders of other runs to compare with in the report", nargs="+", metavar="RUN")
    group.add_argument("--no-report", dest="report", action="store_false", help="write no report.html, no pictures")
    group.add_argument("--report", action="store_true", help="write the report of a run that was started without one")
    where = "send each epoch's numbers to tensorboard (files in the run's folder), wandb or mlflow as well"
    add("log", str, where, nargs="+", metavar="LOGGER")
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


def _train(parser: argparse.ArgumentParser, **given: Any) -> None:
    given = _with_file(parser, given)
    if "out" not in given:
        parser.error("the following arguments are required: --out, here or in --config")
    flags = {name: bool(given.pop(name, False)) for name in ("resume", "overwrite", "dry_run")}
    if flags["resume"] and flags["overwrite"]:
        parser.error("expected --resume or --overwrite, got both")
    if flags.pop("dry_run"):
        print(dry_run(given, **flags))
        return
    summary = run.train(given, **flags)
    if summary is not None:
        print(_summary_text(summary, given["out"]))


def _with_file(parser: argparse.ArgumentParser, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of --config, and over them those given; the method's options are a dict."""
    given = dict(given)
    if "set" in given:
        given["options"] = dict(given.pop("set"))
    path = given.pop("config", None)
    if path is None:
        return given
    of_file = read_settings(path, *options_of(parser, {"set": dict, "options": dict}, ONLY_GIVEN))
    options = of_file.pop("options", {}) | of_file.pop("set", {}) | given.pop("options", {})
    return of_file | given | ({"options": options} if options else {})


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


def _shrink(out: Path, onnx: bool, formats: Sequence[str]) -> None:
    checked, paths = run.shrink_run(out, onnx, formats)
    print(checked, *paths, sep="\n")


def _sensitivity(out: Path, images: int) -> None:
    found, paths = run.sensitivity_run(out, images)
    print(found, *paths, sep="\n")


def _report(runs: Sequence[Path], out: Path) -> None:
    print(compare_runs(runs, out))


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

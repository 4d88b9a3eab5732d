"""train, shrink_run and sensitivity_run: what the commands `train`, `shrink` and `sensitivity` do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..methods import Sensitivity, sensitivity
from ..nn.convert import convert
from . import checkpoint, distributed
from .config import TIMEOUT, Config
from .finalize import finalize_run, shrunk, write_folder, write_small
from .loggers import check_loggers
from .loop import CHECKPOINT, EVALUATION_BATCH
from .optional_deps import need
from .progress import Progress
from .report import write_report
from .scratch import begun_run, resumed_run


def train(given: Mapping[str, Any], *, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Trains a network, shrinks it and writes a report.

    Args:
        given: Fields of Config, at least out.
        resume: Whether to go on from the folder's checkpoint.
        overwrite: Whether to start anew in a folder that has a checkpoint; without resume or overwrite that raises
            FileExistsError.

    Returns:
        The summary, or None where stop_after ended the run before its last epoch, and on all ranks but the first.
    """
    out = Path(given["out"])
    with distributed.joined(given.get("device"), given.get("timeout", TIMEOUT)):
        is_first = distributed.rank() == 0
        distributed.from_rank_0(lambda: check_out(out, resume or overwrite))
        run = resumed_run(out, given) if resume else begun_run(given)
        distributed.from_rank_0(lambda: check_packages(run.config))
        beside = distributed.from_rank_0(lambda: _histories(run.config))
        run.run()
        run.modes.end()
        run.modes.leave_ranks()
    if not is_first:
        return None
    if run.epoch < run.config.epochs:
        print(f"stopped after {run.epoch} of {run.config.epochs} epochs: --resume goes on")
        return None
    summary = finalize_run(run)
    if run.config.report:
        layers = {name: layer.out_channels for name, layer in run.layers.items()}
        states = torch.stack(run.states)
        summary["report"] = str(write_report(out, run.config, run.history, layers, states, summary, beside))
    return summary


def shrink_run(out: Path, onnx: bool = False, formats: Sequence[str] = ()) -> tuple[str, list[Path]]:
    """Shrinks the network of a run's checkpoint.

    Args:
        out: The run's folder.
        onnx: Whether to write small.onnx.
        formats: Of save_small, for the folder "small" in that of the run; none: no such folder.

    Returns:
        The line that says how the small network was checked, and the files written.
    """
    with Progress(3, "shrink") as bar:
        run = resumed_run(out, {"onnx": onnx, "quiet": True})
        bar.update(1, "the run is loaded")
        small, checked = shrunk(run)
        bar.update(2, "the network is small")
        paths = write_small(run, small)
        return checked, [*paths, *(write_folder(run, small, formats) if formats else ())]


def sensitivity_run(out: Path, images: int) -> tuple[Sensitivity, list[Path]]:
    """Prunes each layer of a run's network alone and writes what that costs to the run's folder.

    Args:
        out: The folder.
        images: How many validation images are evaluated, or training images where there are none; the test set is for
            the report alone.

    Returns:
        The Sensitivity and the files written.
    """
    if images < 1:
        raise ValueError(f"sensitivity: images: expected at least 1, got {images}")
    need("matplotlib", "sensitivity: its picture")
    run = resumed_run(out, {"quiet": True})
    data = run.data
    split = data.validation or data.train
    chosen = slice(None, None, -(-len(split) // images))  # spread over the set, which may be sorted by class

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        own = split.images[chosen], split.labels[chosen]
        for x, y in zip(*(tensor.split(EVALUATION_BATCH) for tensor in own), strict=True):
            yield run.on_device(x, y)

    coupling = run.config.options.get("coupling", "joint")
    with run.masked(), Progress(1, "sensitivity") as bar:
        convert(run.model)
        example = next(batches())[0][:2]
        count = len(split.labels[chosen])
        found = sensitivity(
            run.model, batches, coupling=coupling, example_input=example, statistics="batch",
            progress=lambda done, trials: bar.update(done, "images", total=trials * count),
        )  # fmt: skip
    paths = [out / f"sensitivity.{kind}" for kind in ("json", "md", "png")]
    text = json.dumps(found.to_dict(), indent=1)
    checkpoint.write_atomically(paths[0], lambda path: path.write_text(text))
    table = f"{str(found).splitlines()[0]}\n\n{found.table()}\n"
    checkpoint.write_atomically(paths[1], lambda path: path.write_text(table))
    checkpoint.write_atomically(paths[2], found.plot)
    return found, paths


def check_out(out: Path, may_exist: bool) -> None:
    path = out / CHECKPOINT
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"train: out: expected a folder, got the file {out}")
    if path.exists() and not may_exist:
        raise FileExistsError(f"train: out: expected a folder without a run, or --resume or --overwrite, got {path}")


def check_packages(config: Config) -> None:
    """Raises ImportError for a missing package before the first epoch, not after the last."""
    check_loggers(config.log or ())
    if config.report:
        need("matplotlib", "train: report")
    if config.onnx:
        need("onnx", "train: onnx")
        need("onnxscript", "train: onnx")


def _histories(config: Config) -> dict[str, list[dict[str, float]]]:
    """The histories of the runs in config.beside, which were evaluated on the same images as this one, by what they
    are."""
    found: dict[str, list[dict[str, float]]] = {}
    for place in config.beside or ():
        path = Path(place) / CHECKPOINT
        state = checkpoint.load(path)
        held_out = state["config"].get("validation", 0)
        if held_out != config.validation:
            expected = f"a run with as many images held out for validation, {config.validation}"
            raise ValueError(f"train: beside: expected {expected}, got {held_out} in {path}")
        label = _label(state["config"], config.epochs)
        found[f"{label} ({place})" if label in found else label] = state["history"]
    return found


def _label(settings: Mapping[str, Any], epochs: int) -> str:
    """What a run is: dense, scratch or its method; with its epochs, if they are others than so many."""
    label = "scratch" if settings.get("small_of") is not None else settings["method"]
    longer = "" if settings["epochs"] == epochs else f", {settings['epochs']} epochs"
    return ("dense" if label == "none" else label) + longer

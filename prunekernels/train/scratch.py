"""Training from scratch: the small network that a run has left, from new weights, as a run of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .config import Config
from .finalize import shrunk
from .loop import CHECKPOINT, Trainer
from .models import with_new_weights

# What a run from scratch has from the other run, unless it is given: what the network and its training are like.
INHERITED = (
    "arch", "width", "data", "size", "augment", "train_images", "validation", "epochs", "batch", "lr", "momentum",
    "weight_decay", "seed", "amp", "evaluate", "layout",
)  # fmt: skip
FIXED = ("arch", "width", "data", "size", "train_images", "validation")  # what must not differ


def settings_of(source: Trainer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run from scratch: those given, and for the rest those of the run whose small network trains."""
    of_source = {name: getattr(source.config, name) for name in INHERITED}
    for name in FIXED:
        if given.get(name, of_source[name]) != of_source[name]:
            expected = f"{of_source[name]!r}, as in {source.out}, whose small network trains"
            raise ValueError(f"train: {name}: expected {expected}, got {given[name]!r}")
    return {**of_source, **given}


def source_run(folder: str | Path) -> Trainer:
    """The run in a folder, whose last epoch is behind it."""
    source = resumed_run(folder, {"quiet": True})
    if source.epoch < source.config.epochs:
        expected = f"a run whose last epoch, {source.config.epochs}, is over"
        raise ValueError(f"train: small_of: expected {expected}, got epoch {source.epoch} in {folder}")
    return source


def scratch_network(source: Trainer, seed: int) -> nn.Module:
    """The small network of a run, with new weights; single dead kernels are zeros and stay zeros."""
    small, _ = shrunk(source)
    torch.manual_seed(seed)
    return with_new_weights(small)


def begun_run(given: Mapping[str, Any]) -> Trainer:
    """A run before its first epoch. given: fields of Config; with small_of the others are that run's by default."""
    if given.get("small_of") is None:
        return Trainer(Config(**given))
    source = source_run(given["small_of"])
    config = Config(**settings_of(source, given))
    return Trainer(config, data=source.data, model=scratch_network(source, config.seed))


def resumed_run(out: str | Path, given: Mapping[str, Any]) -> Trainer:
    """The run in a folder as it was at its last checkpoint, whatever network it trains. given: settings to change."""
    small_of = checkpoint.load(Path(out) / CHECKPOINT)["config"].get("small_of")
    if small_of is None:
        return Trainer.resumed(out, given)
    source = source_run(small_of)
    return Trainer.resumed(out, given, data=source.data, model=scratch_network(source, 0))

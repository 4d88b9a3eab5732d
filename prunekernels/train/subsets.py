"""Fixed parts of a training set: those images that a run trains on, and those that it holds out.

data = chosen(load("fashion-mnist"), train_images=20_000, validation=10_000)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .data import Data, Split


def chosen(data: Data, train_images: int | None, validation: int) -> Data:
    """Returns the data with a part of its training set, and with another part of that as its validation set.

    Both parts have each class in the proportion that the training set has it in. They do not depend on a seed, nor on
    each other, and a smaller part is in a larger one. Data that fit already are returned as they are.

    Args:
        data: The data set.
        train_images: How many images to train on. None: all that are not held out.
        validation: How many images to hold out of the training set.
    """
    own, count = data.validation, len(data.train)
    if own is not None:
        if validation not in (0, len(own)):
            raise ValueError(f"train: validation: expected {len(own)}, as {data.name} has them, got {validation}")
        validation = 0
    if validation == 0 and train_images in (None, count):
        return data
    of = f"of the {count} that {data.name} has for training"
    if validation >= count:
        raise ValueError(f"train: validation: expected at most {count - 1} {of}, got {validation}")
    used = count - validation if train_images is None else train_images
    if used > count - validation:
        held_out = f", as {validation} are held out" if validation else ""
        raise ValueError(f"train: train_images: expected at most {count - validation} {of}{held_out}, got {used}")
    order = _order(data.train.labels)
    held = _part(data, order[count - validation :], "validation") if validation else own
    return replace(data, train=_part(data, order[:used], "train_images"), validation=held)


def _part(data: Data, rows: Tensor, name: str) -> Split:
    """Some rows of the training set, in its order."""
    rows = rows.sort().values
    part = Split(data.train.images[rows], data.train.labels[rows])
    missing = sorted(set(data.train.labels.tolist()) - set(part.labels.tolist()))
    if missing:
        got = f"{len(rows)}, none of class {data.classes[missing[0]]!r}"
        raise ValueError(f"train: {name}: expected images of each class of {data.name}, got {got}")
    return part


def _order(labels: Tensor) -> Tensor:
    """The rows of a set in an order whose every part has about the classes' proportions, by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    places = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        places[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
    return places.argsort(stable=True)

"""A data set and runs of a second."""

import torch

from prunekernels.train.config import Config
from prunekernels.train.data import Data, Split
from prunekernels.train.loop import Trainer


def tiny_data(labels=None, classes=4, size=8):
    """48 images for training, 16 for the test: a class is bright in its own corner."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(64) % classes if labels is None else labels
    x = torch.randint(0, 100, (64, 1, size, size), generator=generator)
    for i, label in enumerate(y.tolist()):
        row, column = divmod(label % 4, 2)
        x[i, 0, row * size // 2 :, column * size // 2 :][: size // 2, : size // 2] += 120
    x = x.byte()
    return Data("tiny", Split(x[:48], y[:48]), Split(x[48:], y[48:]), [str(c) for c in range(classes)])


def tiny_config(out, **given):
    common = {"arch": "vgg_small", "width": 0.25, "epochs": 3, "batch": 16, "lr": 0.05, "quiet": True, "report": False,
              "layout": "contiguous"}  # fmt: skip
    return Config(**{**common, "out": str(out), **given})


def tiny_run(out, data=None, **given):
    return Trainer(tiny_config(out, **given), data=data or tiny_data())


def flat(value):
    """All leaves of nested dicts and lists, tensors as lists."""
    if isinstance(value, dict):
        return [leaf for key in value for leaf in [key, *flat(value[key])]]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in flat(item)]
    return [value.tolist()] if isinstance(value, torch.Tensor) else [value]


def comparable(state):
    """Without what is time, and where."""
    timed = ("seconds", "images_per_s")
    history = [{key: value for key, value in row.items() if key not in timed} for row in state["history"]]
    config = {**state["config"], "out": "", "stop_after": None}
    return flat({**state, "history": history, "config": config})

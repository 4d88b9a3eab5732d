"""Makes what a run trains: the network in its mode, its optimizer and the pruning method."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods, plan
from ..methods import Method
from ..methods.arguments import keyword_options
from ..nn.convert import convert
from ..nn.flow import flow
from ..nn.masked_filters import MaskedFilters
from ..optim import MaskedSGD, bind
from . import distributed
from .config import Config
from .data import Data, steps_per_epoch
from .models import build

EVALUATED = 1024  # at most so many images evaluate a method's masks


def network(config: Config, data: Data, width: float | None = None) -> nn.Module:
    """Builds the plain network of a run, on its device. width None: that of config."""
    return placed(config, build(config.arch, len(data.classes), width=width or config.width, in_channels=data.channels))


def placed(config: Config, model: nn.Module) -> nn.Module:
    """Moves a plain network to the run's device."""
    device = device_of(config)
    return model.to(device)


def device_of(config: Config) -> torch.device:
    """The device of a run; ValueError where torch does not have it. Each rank on a machine has a GPU of its own."""
    index = distributed.local_rank()
    if index is not None and torch.cuda.is_available() and (config.device or "cuda").startswith("cuda"):
        if config.device not in (None, "cuda") or index >= torch.cuda.device_count():
            expected = f"cuda, a GPU for each rank of this machine ({torch.cuda.device_count()} are here)"
            raise ValueError(f"train: device: expected {expected}, got {config.device!r} for rank {index} of them")
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if config.device is not None:
        try:
            return torch.empty(0, device=config.device).device
        except (RuntimeError, AssertionError) as error:  # AssertionError: from a torch built without that device
            reason = str(error).splitlines()[0]
            raise ValueError(f"train: device: expected one that is here, got {config.device!r} ({reason})") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_mode(config: Config, model: nn.Module) -> nn.Module:
    """Converts the network to its mode, in place. Where no method will prune it, only masked and live mode do that."""
    if config.mode not in ("masked", "live") and config.method == "none":
        return model
    convert(model)
    return flow(model) if config.mode == "live" else model


@contextmanager
def numerics(config: Config) -> Iterator[None]:
    """Sets the plans of a mode: "dense" applies masks and skips nothing; deterministic plans are not chosen by time."""
    before = torch.are_deterministic_algorithms_enabled()
    plans = plan.force("dense") if config.mode == "dense" else plan.measure(not config.deterministic)
    torch.use_deterministic_algorithms(before or config.deterministic)
    try:
        with plans:
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """MaskedSGD, bound to the model, for a masked network; torch.optim.SGD for a plain one."""
    numbers: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    if not any(isinstance(module, MaskedFilters) for module in model.modules()):
        return torch.optim.SGD(model.parameters(), config.lr, **numbers, foreach=True)
    optimizer = MaskedSGD(model.parameters(), config.lr, **numbers)
    bind(optimizer, model)
    return optimizer


def known_methods() -> dict[str, type[Method] | None]:
    """The classes of prunekernels.methods by their names on the command line, as in prune-while-training."""
    classes = [getattr(methods, name) for name in methods.__all__]
    found = [c for c in classes if isinstance(c, type) and issubclass(c, Method) and c is not Method]
    return {"none": None, **{re.sub("(?<=[a-z])(?=[A-Z])", "-", c.__name__).lower(): c for c in found}}


def class_of(config: Config) -> type[Method] | None:
    """The class of a run's method, None for "none"; ValueError for settings that no such method has."""
    known = known_methods()
    if config.method not in known:
        raise ValueError(f"train: method: expected one of {', '.join(known)}, got {config.method!r}")
    if config.method == "none" and (config.duty is not None or config.options or config.preset is not None):
        raise ValueError("train: method: expected one that prunes, as duty or its options are given, got 'none'")
    if config.measure and config.method != "pgp":
        raise ValueError(f"train: measure: expected the method pgp, got {config.method!r}")
    return known[config.method]


def method_of(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> Method | None:
    """Makes the run's method, with those keywords that the run itself knows; None without one."""
    cls = class_of(config)
    if cls is None:
        return None
    keywords = keyword_options(cls)
    offered: dict[str, Any] = {
        "steps_per_epoch": steps_per_epoch(data, config.batch), "seed": config.seed,
        "example_input": data.normalised(data.test.images[:2]).to(device_of(config)),
        "data": lambda: evaluation_batches(data),
    }  # fmt: skip
    if config.preset is None and config.duty != 1:
        offered["coupling"] = "joint"  # where channels meet in adds, only those that are dead everywhere save work
    given = {name: value for name, value in offered.items() if name in keywords}
    keywords = [name for name in keywords if name not in ("mode", "preset")]  # config has those
    asked = config.options | ({} if config.duty is None else {"duty": config.duty})
    for name in asked:
        if name not in keywords:
            raise ValueError(f"train: {config.method}: expected options among {', '.join(keywords)}, got {name!r}")
    mode = "compacted" if config.mode == "compacted" else "masked"
    asked["preset"] = config.preset
    return cls(model, optimizer, rate=config.rate, epochs=config.epochs, mode=mode, **(given | asked))


def evaluation_batches(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (x, y) for a method to evaluate masks on: from the validation set if there is one, else from the training
    set; the test set is for the report alone.

    Each rank has its share of them.
    """
    split = data.validation or data.train
    chosen = slice(None, None, -(-len(split) // EVALUATED))  # spread over the set, as a folder's images are sorted
    images, labels = split.images[chosen], split.labels[chosen]
    own = distributed.share(len(labels))
    images, labels = images[own], labels[own]
    for x, y in zip(images.split(256), labels.split(256), strict=True):
        yield data.normalised(x), y

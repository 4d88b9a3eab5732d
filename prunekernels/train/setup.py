"""What a run trains: the network in its gear, its optimizer, and the pruning method over both."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import methods, plan
from ..methods import Method
from ..nn.conv import MaskedConv2d
from ..nn.convert import convert
from ..nn.flow import flow
from ..optim import MaskedSGD, bind
from .config import Config
from .data import Data, steps_per_epoch
from .models import build

JUDGED = 1024  # images that masks are judged by, at most


def network(config: Config, data: Data, width: float | None = None) -> nn.Module:
    """The plain network of a run."""
    model = build(config.arch, len(data.classes), width=width or config.width, in_channels=data.channels)
    device = device_of(config)
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model  # type: ignore[call-overload]


def device_of(config: Config) -> torch.device:
    if config.device is not None:
        try:
            return torch.empty(0, device=config.device).device
        except (RuntimeError, AssertionError) as error:  # the latter from a torch built without that device
            reason = str(error).splitlines()[0]
            raise ValueError(f"train: device: expected one that is here, got {config.device!r} ({reason})") from error
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def masked(config: Config, model: nn.Module) -> nn.Module:
    """The network in its gear, in place. Dense without a method leaves it plain."""
    if config.gear == "dense" and config.method == "none":
        return model
    convert(model)
    return flow(model) if config.gear == "network" else model


@contextmanager
def numerics(config: Config) -> Iterator[None]:
    """How a gear computes: the dense one applies masks and skips nothing; deterministic: no plan by the clock."""
    before = torch.are_deterministic_algorithms_enabled()
    plans = plan.force("dense") if config.gear == "dense" else plan.measure(not config.deterministic)
    torch.use_deterministic_algorithms(before or config.deterministic)
    try:
        with plans:
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    numbers: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    if not any(isinstance(module, MaskedConv2d) for module in model.modules()):
        return torch.optim.SGD(model.parameters(), config.lr, **numbers, foreach=True)
    optimizer = MaskedSGD(model.parameters(), config.lr, **numbers)
    bind(optimizer, model)
    return optimizer


def known_methods() -> dict[str, type[Method] | None]:
    """The classes of prunekernels.methods by the names that the command line has: PruneWhileTraining is
    prune-while-training."""
    classes = [getattr(methods, name) for name in methods.__all__]
    found = [c for c in classes if isinstance(c, type) and issubclass(c, Method) and c is not Method]
    return {"none": None, **{re.sub("(?<=[a-z])(?=[A-Z])", "-", c.__name__).lower(): c for c in found}}


def class_of(config: Config) -> type[Method] | None:
    known = known_methods()
    if config.method not in known:
        raise ValueError(f"train: method: expected one of {', '.join(known)}, got {config.method!r}")
    if config.method == "none" and (config.duty is not None or config.options):
        raise ValueError("train: method: expected one that prunes, as duty or its options are given, got 'none'")
    if config.measure and config.method != "pgp":
        raise ValueError(f"train: measure: expected the method pgp, got {config.method!r}")
    return known[config.method]


def method_of(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> Method | None:
    """The method, told of the run what it takes; None without one."""
    cls = class_of(config)
    if cls is None:
        return None
    knobs = knobs_of(cls)
    offered: dict[str, Any] = {
        "steps_per_epoch": steps_per_epoch(data, config.batch), "seed": config.seed,
        "example_input": data.normalised(data.test.images[:2]).to(device_of(config)),
        "data": lambda: judging(data),
    }  # fmt: skip
    given = {name: value for name, value in offered.items() if name in knobs}
    asked = config.options | ({} if config.duty is None else {"duty": config.duty})
    for name in asked:
        if name not in knobs:
            raise ValueError(f"train: {config.method}: expected options among {', '.join(knobs)}, got {name!r}")
    return cls(model, optimizer, rate=config.rate, epochs=config.epochs, **(given | asked))


def judging(data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that a method may judge masks by: of the training set, as the test set is for the report alone."""
    chosen = slice(None, None, -(-len(data.train) // JUDGED))  # across all of it: a folder's classes come in order
    images, labels = data.train.images[chosen], data.train.labels[chosen]
    for x, y in zip(images.split(256), labels.split(256), strict=True):
        yield data.normalised(x), y


def knobs_of(cls: type) -> list[str]:
    """Keywords of a class's constructor and, as it hands on the others, of its ancestors'."""
    constructors = [vars(c)["__init__"] for c in cls.__mro__[:-1] if "__init__" in vars(c)]
    names = dict.fromkeys(name for call in constructors for name in inspect.signature(call).parameters)
    return [n for n in names if n not in ("self", "model", "optimizer", "rate", "epochs", "options", "args", "kwargs")]

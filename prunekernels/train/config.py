"""Config: everything that decides a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .data import AUGMENTS
from .models import MODELS

GEARS = ("network", "layer", "dense")
DUTY = 0.1  # a method's, where nothing else is asked: soft-dead filters skip nine tenths of the steps
# What may change when a run goes on: none of it moves a weight.
FREE = ("out", "stop_after", "quiet", "onnx", "report", "beside")


@dataclass
class Config:
    """A training run. size, augment, device: None = what suits the data and the machine; duty: None = DUTY for a
    method; options: the method's own; measure: PGP's extra pass over the training set after each epoch, to score
    filters by."""

    out: str
    method: str = "none"
    arch: str = "resnet20"
    width: float = 1.0
    data: str = "digits"
    size: int | None = None
    augment: str | None = None
    rate: float = 0.5
    duty: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    measure: bool = False
    gear: str = "network"
    epochs: int = 30
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    amp: bool = False
    deterministic: bool = False
    device: str | None = None
    stop_after: int | None = None
    onnx: bool = False
    report: bool = True
    quiet: bool = False
    beside: str | None = None

    def __post_init__(self) -> None:
        self._among("arch", tuple(MODELS))
        self._among("gear", GEARS)
        self._number("rate", "a number in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("width", "lr"):
            self._number(name, "a number above 0", lambda v: v > 0)
        for name in ("momentum", "weight_decay"):
            self._number(name, "a number, at least 0", lambda v: v >= 0)
        self._number("batch", "at least 2", lambda v: v >= 2)
        self._number("epochs", "at least 1", lambda v: v >= 1)
        self._number("seed", "a number in [0, 2^32)", lambda v: 0 <= v < 2**32)  # times 1e6 it must be an int64
        if self.augment is not None:
            self._among("augment", AUGMENTS)
        if self.duty is None and self.method != "none":
            self.duty = DUTY  # a checkpoint must tell what was meant, even when another version reads it
        if self.duty is not None:
            self._number("duty", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        if self.stop_after is not None:
            self._number("stop_after", "at least 1", lambda v: v >= 1)

    def _among(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"train: {name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _number(self, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or not holds(value):
            raise ValueError(f"train: {name}: expected {expected}, got {value}")

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], given: Mapping[str, Any], where: object) -> Config:
        """The saved run's, with those of the given values that may change; an error for another."""
        known = {f.name for f in fields(cls)}
        for name, value in given.items():
            if name not in FREE and name in saved and saved[name] != value:
                raise ValueError(f"train: {name}: expected {saved[name]!r}, as in {where}, got {value!r}")
        kept = {name: value for name, value in saved.items() if name in known and name != "stop_after"}
        return cls(**{**kept, **given})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

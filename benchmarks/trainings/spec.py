"""What is trained: the setting that all runs of a command share, and one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunekernels.methods.arguments import keyword_options
from prunekernels.train import setup
from prunekernels.train.config import Config

# dense: the plain network. method: at its defaults. scratch: the small network that a method leaves, from new weights.
# literal: the method to its paper's letter. budget: a share of the multiply-adds is pruned; uniform: the rate of all
# layers that leaves as many. sweep: another duty, or without clipping.
KINDS = ("dense", "method", "scratch", "scratch-time", "literal", "budget", "uniform", "sweep")
METHODS = [name for name in setup.known_methods() if name != "none"]
# Of all runs, also where a paper has another: methods are compared, not learning rates.
TRAINING: dict[str, Any] = {"batch": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
RATE = 0.5  # of the goals, the sweep and the budgets


@dataclass(frozen=True)
class Setting:
    """What all runs of a command share, so that their rows compare."""

    data: str
    train_images: int | None
    validation: int
    size: int | None
    width: float
    mode: str
    threads: int

    def __str__(self) -> str:
        images = "all" if self.train_images is None else f"{self.train_images:,}"
        size = "" if self.size is None else f", size {self.size}"
        held_out = f", accuracy of {self.validation:,} validation images" if self.validation else ""
        return f"{self.data}, {images} training images{size}, width {self.width:g}, {self.mode} mode{held_out}"


@dataclass(frozen=True)
class Spec:
    """One run. key: the architecture of a scratch run; options: other keywords of the method, as (name, value)."""

    arch: str
    kind: str
    seed: int
    epochs: int
    method: str = "none"
    rate: float = 0.0
    duty: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()
    key: str = ""

    def __str__(self) -> str:
        words = [self.arch, f"seed {self.seed}", self.kind, self.key, f"{self.epochs} epochs"]
        if self.method != "none":
            words += [self.method, f"{self.rate:g}", f"duty {self.duty:g}"]
        return " ".join(filter(None, (*words, *(f"{name}={value}" for name, value in self.options))))

    def config(self, setting: Setting) -> Config:
        """The settings of the training command for this run."""
        common: dict[str, Any] = {
            "out": "unused", "arch": self.arch, "width": setting.width, "data": setting.data, "size": setting.size,
            "train_images": setting.train_images, "validation": setting.validation, "evaluate": "end",
            "epochs": self.epochs, "seed": self.seed, "quiet": True, "report": False, **TRAINING,
            "amp": self.kind != "literal" and setting.mode == "auto",  # bfloat16 where that is faster; papers had none
        }  # fmt: skip
        if self.method == "none":
            return Config(**common)
        pruning = {"method": self.method, "rate": self.rate, "duty": self.duty, "options": self._options()}
        if self.kind == "literal":
            return Config(**common, **pruning, mode="dense", preset="paper")
        return Config(**common, **pruning, mode=setting.mode)

    def _options(self) -> dict[str, Any]:
        cls = setup.known_methods()[self.method]
        assert cls is not None
        is_joint = self.kind != "literal" and "coupling" in keyword_options(cls)
        return ({"coupling": "joint"} if is_joint else {}) | dict(self.options)

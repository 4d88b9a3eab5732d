"""Config: the settings of a training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields
from typing import Any

from ..methods.defaults import training_of
from ..methods.presets import PRESETS
from .data import AUGMENTS
from .models import MODELS

MODES = ("auto", "masked", "live", "compacted", "dense")
MODE_OF_GEAR = {"network": "live", "layer": "masked", "dense": "dense"}  # the setting was called gear before
LAYOUTS = ("auto", "contiguous", "channels_last")
EVALUATE = ("each", "end")
DUTY = 0.2  # of a method, unless set: soft-dead filters skip four fifths of the steps
OPEN: Any = None  # the default of a setting that a preset may decide, otherwise DEFAULTS
DEFAULTS: dict[str, Any] = {
    "epochs": 30, "batch": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "measure": False, "recalibrate": 20
}  # fmt: skip
TIMEOUT = 600.0
COMPILE_AFTER = 300
FREE = (
    "out",
    "stop_after",
    "quiet",
    "onnx",
    "report",
    "beside",
    "timeout",
    "log",
)  # may change when a run resumes: they move no weight


@dataclass
class Config:
    """The settings of a training run.

    Args:
        out: Folder of the run.
        method: "none" or a method's name, as setup.known_methods has it.
        arch: Name of a network in models.MODELS.
        width: The share of every layer's filters that the network is built with.
        data: "digits", "fashion-mnist", "idx:DIR", "cifar10:DIR" or "folder:DIR".
        size: Height and width that images are resized to. None: what suits the data.
        augment: One of data.AUGMENTS. None: what suits the data.
        train_images: How many images of the training set to train on, the same for every seed. None: all.
        validation: How many images of the training set are held out: each epoch is evaluated on them, and the test set
            is used once, at the end.
        rate: The share of the filters that is pruned in the end.
        duty: See Method. None: DUTY where there is a method, 1 with a preset.
        preset: "paper": what is not given is the paper's, for the method and for the training (see
            methods.presets.PAPER).
        options: Other keywords of the method.
        measure: Whether PGP scores filters by an extra pass over the training set after each epoch.
        recalibrate: From how many training batches the statistics of norms are estimated anew before an evaluation that
            masks filters which were not masked in the steps before (see methods.recalibrate_norms). 0: never.
        mode: How the network of a method runs: "masked", "live", "compacted", or "dense" (masks are applied, and
            nothing is skipped). "auto": whichever of the first three takes the least time for the masks that there are,
            or of the first two where nothing is dead, by a measurement; if deterministic, compacted mode without one.
            Without a method "auto", "compacted" and "dense" leave the network plain.
        compile: Whether to give the network to torch.compile once its masks stand still, if that makes steps faster.
        compile_after: For how many steps they stand still before that.
        epochs: How many epochs to train.
        batch: Images a step, of all ranks together.
        lr: The learning rate at first; a cosine takes it to 0.
        momentum: Of SGD.
        weight_decay: Of SGD.
        seed: Of weights, order of images and augmentation.
        amp: Whether to autocast to bfloat16; with mode "auto", and if not deterministic, only where it makes a step
            faster than float32.
        evaluate: After which epochs the network is evaluated: "each", or "end", the last alone.
        layout: The memory layout of the network: "contiguous", "channels_last", or "auto": on cuda channels_last; on
            the CPU the one in which a dense step takes less time, or, if deterministic or in masked or live mode, the
            one that images have. On the CPU these are contiguous, but for masked and live mode in bfloat16:
            channels_last, where the CPU has instructions for it. With mode "auto" the other one is tried for them too.
        deterministic: Whether every process with as many threads computes the same bits.
        device: A torch device. None: cuda where there is one.
        stop_after: The epoch to stop after, to resume later.
        onnx: Whether to write small.onnx.
        report: Whether to write report.html.
        quiet: Whether to print no progress.
        beside: Folders of other runs, to compare with in the report: a dense one, one from scratch.
        small_of: Folder of a run: its small network trains, from new weights, in the place of arch. `train` makes it,
            and takes from that run what is not given. None: the network is arch.
        log: Where each epoch's numbers go beside the history: some of "tensorboard", "wandb" and "mlflow".
        timeout: Seconds that a rank waits for the others before its run ends with an error.
        live_gradients: Whether ranks send each other live gradients alone in masked and live mode; see
            prunekernels.live_gradients_hook.
        gear: Deprecated: the former name of mode, with the values in MODE_OF_GEAR.
    """

    out: str
    method: str = "none"
    arch: str = "resnet20"
    width: float = 1.0
    data: str = "digits"
    size: int | None = None
    augment: str | None = None
    train_images: int | None = None
    validation: int = 0
    rate: float = 0.5
    duty: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    measure: bool = OPEN
    recalibrate: int = OPEN
    mode: str = "auto"
    compile: bool = False
    compile_after: int = COMPILE_AFTER
    epochs: int = OPEN
    batch: int = OPEN
    lr: float = OPEN
    momentum: float = OPEN
    weight_decay: float = OPEN
    seed: int = 0
    amp: bool = False
    evaluate: str = "each"
    layout: str = "auto"
    deterministic: bool = False
    device: str | None = None
    stop_after: int | None = None
    onnx: bool = False
    report: bool = True
    quiet: bool = False
    beside: list[str] | None = None
    small_of: str | None = None
    log: list[str] | None = None
    timeout: float = TIMEOUT
    live_gradients: bool = False
    gear: InitVar[str | None] = None

    def __post_init__(self, gear: str | None) -> None:
        if gear is not None:
            warnings.warn("Config: gear is deprecated: use mode", DeprecationWarning, stacklevel=3)
            self.mode = MODE_OF_GEAR.get(gear, gear)
        self._take_preset()
        if isinstance(self.beside, str):
            self.beside = [self.beside]
        if isinstance(self.log, str):
            self.log = [self.log]
        if self.small_of is not None and self.method != "none":
            raise ValueError(f"train: method: expected none, as the run trains a small network, got {self.method!r}")
        self._among("arch", tuple(MODELS))
        self._among("mode", MODES)
        self._number("rate", "a number in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("width", "lr", "timeout"):
            self._number(name, "a number above 0", lambda v: v > 0)
        for name in ("momentum", "weight_decay"):
            self._number(name, "a number, at least 0", lambda v: v >= 0)
        self._number("batch", "at least 2", lambda v: v >= 2)
        self._number("epochs", "at least 1", lambda v: v >= 1)
        self._number("recalibrate", "at least 0", lambda v: v >= 0)
        self._number("compile_after", "at least 0", lambda v: v >= 0)
        self._number("seed", "a number in [0, 2^32)", lambda v: 0 <= v < 2**32)  # times 1e6 it must be an int64
        self._number("validation", "at least 0", lambda v: v >= 0)
        if self.train_images is not None:
            self._number("train_images", "at least 1", lambda v: v >= 1)
        self._among("evaluate", EVALUATE)
        self._among("layout", LAYOUTS)
        if self.augment is not None:
            self._among("augment", AUGMENTS)
        if self.duty is None and self.method != "none":
            self.duty = (
                DUTY if self.preset is None else 1.0
            )  # written out, so that a checkpoint means the same where DUTY is another
        if self.duty is not None:
            self._number("duty", "a number in [0, 1]", lambda v: 0 <= v <= 1)
        if self.stop_after is not None:
            self._number("stop_after", "at least 1", lambda v: v >= 1)

    def _take_preset(self) -> None:
        """Gives each open setting its value: the preset's, or that of DEFAULTS."""
        if self.preset is not None:
            self._among("preset", PRESETS)
        of_preset = {"recalibrate": 0, **training_of(self.method)} if self.preset is not None else {}
        for name, value in {**DEFAULTS, **of_preset}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _among(self, name: str, known: tuple[str, ...]) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"train: {name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _number(self, name: str, expected: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        if not math.isfinite(value) or not holds(value):
            raise ValueError(f"train: {name}: expected {expected}, got {value}")

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], given: Mapping[str, Any], where: object) -> Config:
        """Returns the settings of a saved run with some of them changed.

        Args:
            saved: What as_dict returned when the run was saved.
            given: The settings to change. One that is not in FREE and differs raises ValueError.
            where: The checkpoint, for the error.
        """
        saved, given = {"preset": None, "recalibrate": 0, **_without_gear(saved)}, _without_gear(given)
        known = {f.name for f in fields(cls)}
        for name, value in given.items():
            if name not in FREE and name in saved and saved[name] != value:
                raise ValueError(f"train: {name}: expected {saved[name]!r}, as in {where}, got {value!r}")
        as_saved = {name: value for name, value in saved.items() if name in known and name != "stop_after"}
        return cls(**{**as_saved, **given})

    def as_dict(self) -> dict[str, Any]:
        """Returns all settings as plain values."""
        return asdict(self)


def _without_gear(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `mode` in the place of `gear`."""
    renamed = {name: value for name, value in settings.items() if name != "gear"}
    if "gear" in settings:
        renamed["mode"] = MODE_OF_GEAR.get(settings["gear"], settings["gear"])
    return renamed

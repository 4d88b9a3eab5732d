"""Rows of methods.py, one for each trained network."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from trainings.spec import Spec
from trainings.yardstick import fastest

TOGETHER = 2  # epochs of trainings from scratch for a method's time are a multiple of this


@dataclass
class TrainingRow:
    """A training from beginning to end.

    Seconds are those of making the method and of all epochs with all that it does, without evaluations. Lists have an
    entry an epoch. The small network is the one that a method leaves; of other runs it is the network itself.
    """

    arch: str
    kind: str
    seed: int
    epochs: int
    method: str
    rate: float
    duty: float
    options: dict[str, Any]
    key: str  # of the small network, see architecture.key_of
    setting: str
    accuracy: float  # share of the test set, under the masks, after the last epoch
    train_accuracy: float  # in the last epoch
    seconds: float
    setup_seconds: float
    epoch_seconds: list[float]
    steps: int  # of an epoch
    dense_step_ms: dict[str, float]  # by form of the plain dense network, measured beside this run
    small_step_ms: dict[str, float]  # of the plain small network
    computed: list[float]  # share of the filters that the steps of an epoch computed
    live: list[float]  # share of the filters that are live after an epoch
    soft: list[int]  # soft-dead filters after an epoch
    came_back: list[float | None]  # share of the soft-dead filters of the epoch before that are live after this one
    multiply_adds: int  # of the small network, for an image
    dense_multiply_adds: int
    parameters: int
    dense_parameters: int
    ms_1: float  # a forward pass of the small network with 1 image; ms_64: with 64
    dense_ms_1: float
    ms_64: float
    dense_ms_64: float
    counts: list[int] = field(default_factory=list)  # live filters of each convolution
    masks: dict[str, str] = field(default_factory=dict)  # see architecture.masks_of
    told: str = ""  # the mode that it trained in at the end
    commit: str = ""
    cpu: str = ""
    torch: str = ""
    date: str = ""

    @property
    def spec(self) -> Spec:
        options = tuple(self.options.items())
        key = self.key if self.kind == "scratch" else ""
        return Spec(self.arch, self.kind, self.seed, self.epochs, self.method, self.rate, self.duty, options, key)

    @property
    def job(self) -> str:
        return str(self.spec)

    @property
    def dense_seconds(self) -> float:
        """What as many epochs of dense training in its fastest form would have taken beside this run."""
        return self.epochs * self.steps * fastest(self.dense_step_ms) / 1e3

    @property
    def fp32_seconds(self) -> float:
        """The same in float32."""
        return self.epochs * self.steps * fastest(self.dense_step_ms, "fp32") / 1e3

    @property
    def best_seconds(self) -> float:
        """Seconds of this run; those of a plain network are what its fastest form would have taken beside it."""
        return self.seconds if self.method != "none" else self.epochs * self.small_epoch_seconds

    @property
    def small_epoch_seconds(self) -> float:
        """An epoch of the plain small network in its fastest form."""
        return self.steps * fastest(self.small_step_ms) / 1e3

    @property
    def scratch_epochs(self) -> int:
        """Epochs of the small network that take at least as long as this run, and at least as many as it had; rounded
        up, so that methods share such trainings."""
        return max(self.epochs, TOGETHER * math.ceil(self.seconds / self.small_epoch_seconds / TOGETHER))

    @property
    def came_back_early(self) -> float | None:
        """The mean of came_back over the first half of the epochs; None where nothing was soft-dead."""
        shares = [share for share in self.came_back[: self.epochs // 2] if share is not None]
        return statistics.mean(shares) if shares else None

    def flat(self) -> dict[str, object]:
        return {name: _rounded(value) for name, value in asdict(self).items()}


def _rounded(value: Any) -> Any:
    """Numbers to six digits, which is finer than any clock here."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value

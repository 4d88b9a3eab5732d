"""How fast the machine is while a run trains: steps of plain networks in each form, between the run's epochs.

Machines are noisy and a table is made over hours, so that a dense training of another hour says little about this one.
Each run therefore carries its own measure: medians of steps that were made beside it, outside of its clock.
torch.compile is left out, since compiling takes longer than such a run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.options import FORMATS
from prunekernels.train import setup
from prunekernels.train.config import Config
from prunekernels.train.data import Data, train_batches

FORMS = {f"{dtype} {layout}": (dtype, layout) for dtype in ("fp32", "bf16") for layout in FORMATS}
TIMED = 2  # steps of each form after each epoch, behind one that warms caches up
ROUNDS = 8  # of the comparison at the end


class Steps:
    """A network that trains on batches of the data set, as the training command would: augmented, loss checked."""

    def __init__(self, config: Config, data: Data, model: nn.Module, form: str) -> None:
        dtype, layout = FORMS[form]
        self.is_bf16, self.format = dtype == "bf16", FORMATS[layout]
        self.data, self.batches = data, _endless(config, data)
        self.model = model.to(memory_format=self.format).train()  # type: ignore[call-overload]
        self.optimizer = setup.optimizer_of(config, self.model)

    def __call__(self) -> None:
        images, labels = next(self.batches)
        x = self.data.normalised(images).contiguous(memory_format=self.format)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if self.is_bf16 else nullcontext():
            loss = F.cross_entropy(self.model(x).float(), labels)
        loss.backward()
        self.optimizer.step()
        if not loss.isfinite():
            raise FloatingPointError(f"yardstick: expected a finite loss, got {loss.item()}")


def _endless(config: Config, data: Data) -> Iterator[tuple[Tensor, Tensor]]:
    for epoch in count():
        yield from train_batches(data, config.batch, config.seed, epoch, config.augment or data.augment)


class Yardstick:
    """Steps of the dense network in each form.

    Args:
        config: Settings of a run without a method.
        data: The data set.

    Attributes:
        times: By form, milliseconds of each timed step.
    """

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.dense = {form: Steps(config, data, setup.network(config, data), form) for form in FORMS}
        self.times: dict[str, list[float]] = {form: [] for form in FORMS}

    def measure(self) -> None:
        """Makes a few steps in each form."""
        for form, step in self.dense.items():
            self.times[form] += _milliseconds(step, TIMED)

    @property
    def dense_ms(self) -> dict[str, float]:
        """Milliseconds of a step by form, medians over the run."""
        return {form: statistics.median(times) for form, times in self.times.items()}

    def of_small(self, make: Callable[[], nn.Module]) -> dict[str, float]:
        """Milliseconds of a step of another network by form, as it would have been during the run: its steps and the
        dense network's take turns now, and the ratio counts.

        make: Returns the network, a new one each time.
        """
        reference = min(self.dense_ms, key=lambda form: self.dense_ms[form])
        steps = {form: Steps(self.config, self.data, make(), form) for form in FORMS}
        found: dict[str, list[float]] = {form: [] for form in (*FORMS, "dense")}
        for _ in range(ROUNDS):
            found["dense"] += _milliseconds(self.dense[reference], TIMED)
            for form, step in steps.items():
                found[form] += _milliseconds(step, TIMED)
        pace = self.dense_ms[reference] / statistics.median(found["dense"])
        return {form: pace * statistics.median(found[form]) for form in FORMS}


def _milliseconds(step: Callable[[], None], times: int) -> list[float]:
    step()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - begun))
    return found


def fastest(ms: Mapping[str, float], dtype: str = "") -> float:
    """The milliseconds of the fastest form, of those in one dtype if that is given."""
    return min(value for form, value in ms.items() if form.startswith(dtype))
